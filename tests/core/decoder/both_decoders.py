"""Small random models of many architectures, each as TransformerLens's HookedTransformer and as ours."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import torch
from small_models import BASE, SHAPES, random_tokens
from transformer_lens.HookedTransformer import HookedTransformer as TransformerLensModel
from transformer_lens.HookedTransformer import HookedTransformerConfig as TransformerLensConfig

from sa_lens.core.decoder import HookedTransformer, HookedTransformerConfig

ARCHITECTURES: dict[str, dict[str, Any]] = {
    **SHAPES,
    "gpt-j": {
        **SHAPES["pythia"],
        "rotary_adjacent_pairs": True,
        "act_fn": "gelu_new",
    },
    "llama-3": {
        **SHAPES["llama"],
        "use_NTK_by_parts_rope": True,
        "NTK_original_ctx_len": 40,
        "rotary_base": 500.0,
    },
    "qwen2": {**SHAPES["llama"], "n_key_value_heads": 1, "rotary_base": 1_000_000, "tie_word_embeddings": True},
    "mistral": {**SHAPES["llama"], "use_local_attn": True, "attn_types": ["local", "local"], "window_size": 4},
    "two rotary bases": {
        **SHAPES["llama"],
        "use_local_attn": True,
        "attn_types": ["local", "global"],
        "window_size": 3,
        "rotary_base_local": 100.0,
        "rotary_scaling_factor": 8.0,
    },
    "ungrouped": {**SHAPES["llama"], "ungroup_grouped_query_attention": True},
    "opt": {"act_fn": "relu", "n_ctx": 20},
    "bloom": {**SHAPES["alibi"], "act_fn": "gelu_fast", "eps": 1e-3},
    "no attention scale, wide heads": {
        "use_attn_scale": False,
        "d_head": 6,
        "n_heads": 3,
        "act_fn": "gelu_pytorch_tanh",
    },
    "folded LayerNorm": {"normalization_type": "LNPre", "act_fn": "relu2"},
    "folded RMSNorm": {**SHAPES["llama"], "normalization_type": "RMSPre", "act_fn": "gelu"},
    "folded final RMSNorm": {"normalization_type": "LNPre", "final_rms": True, "act_fn": "solu"},
    "final RMSNorm": {"final_rms": True, "parallel_attn_mlp": True},
    "folded LayerNorm in the MLP": {"normalization_type": "LNPre", "act_fn": "solu_ln"},
    "capped scores": {"attn_scores_soft_cap": 3.0, "output_logits_soft_cap": 2.0, "d_vocab_out": 7},
    "tokens hooked": {"use_hook_tokens": True, "positional_embedding_type": "shortformer"},
}

TOKENS = random_tokens(2, 7)


def twins(
    name: str = "gpt2", dtype: torch.dtype = torch.float64, **changes: Any
) -> tuple[TransformerLensModel, HookedTransformer]:
    """(TransformerLens's, ours) with the same weights, none of which is zero."""
    fields = {**BASE, **ARCHITECTURES[name], "dtype": dtype, **changes}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        theirs = TransformerLensModel(TransformerLensConfig(**fields))
    ours = HookedTransformer(HookedTransformerConfig(**fields))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype)
            parameter.copy_(1 + 0.2 * noise if name.endswith(".w") else 0.3 * noise)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def set_flags(model: Any) -> None:
    """Makes every hook point fire."""
    model.set_use_attn_result(True)
    model.set_use_split_qkv_input(True)
    if model.cfg.n_key_value_heads is None:
        model.set_use_attn_in(True)
    if not model.cfg.attn_only:
        model.set_use_hook_mlp_in(True)


def assert_near(ours: torch.Tensor, theirs: torch.Tensor, what: str = "") -> None:
    """Same shape and type, and values that differ by less than 1e-6 (float32) or 1e-10 (float64) of the largest."""
    assert ours.shape == theirs.shape, what
    assert ours.dtype == theirs.dtype, what
    finite = theirs.isfinite()
    assert torch.equal(ours.isfinite(), finite), what
    bound = 1e-10 if theirs.dtype == torch.float64 else 1e-6
    if finite.any():
        difference = (ours - theirs)[finite].abs().max()
        assert difference <= bound * theirs[finite].abs().max().clamp(min=1), f"{what}: {difference}"


def dictionary(cfg: Any) -> dict[str, Any]:
    return {field.name: getattr(cfg, field.name) for field in dataclasses.fields(cfg)}
