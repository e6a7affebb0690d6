"""Small random transformers of every shape that the gates support, for the tests of `sa_lens.core`."""

from __future__ import annotations

from typing import Any

import torch

from sa_lens.config import GateConfig
from sa_lens.core import HookedTransformer, HookedTransformerConfig, SelfAblatingTransformer

D_VOCAB = 23

BASE: dict[str, Any] = {
    "n_layers": 2,
    "d_model": 16,
    "n_heads": 4,
    "d_head": 4,
    "d_mlp": 24,
    "n_ctx": 16,
    "d_vocab": D_VOCAB,
    "act_fn": "gelu_new",
    "normalization_type": "LN",
    "device": "cpu",
}

SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "gpt-neo": {
        "use_attn_scale": False,
        "use_local_attn": True,
        "attn_types": ["global", "local"],
        "window_size": 3,
    },
    "pythia": {
        "positional_embedding_type": "rotary",
        "rotary_dim": 2,
        "parallel_attn_mlp": True,
        "act_fn": "gelu",
    },
    "llama": {
        "positional_embedding_type": "rotary",
        "rotary_dim": 4,
        "n_key_value_heads": 2,
        "normalization_type": "RMS",
        "gated_mlp": True,
        "final_rms": True,
        "act_fn": "silu",
    },
    "alibi": {"positional_embedding_type": "alibi", "post_embedding_ln": True},
    "shortformer": {"positional_embedding_type": "shortformer"},
    "attention-only": {"attn_only": True, "d_mlp": None, "act_fn": None},
    "no-norm": {"normalization_type": None},
    "solu-ln": {"act_fn": "solu_ln"},
    "inverse-layer-scale": {"scale_attn_by_inverse_layer_idx": True, "n_layers": 3},
    "capped-logits": {"output_logits_soft_cap": 2.0},
}


def plain_model(shape: str = "gpt2", *, seed: int = 0, **changes: Any) -> HookedTransformer:
    """A HookedTransformer in which no parameter is zero, so that a forgotten bias or weight shows."""
    cfg = HookedTransformerConfig(**{**BASE, **SHAPES[shape], **changes})
    model = HookedTransformer(cfg)
    generator = torch.Generator().manual_seed(seed)
    scale = 0.5 if cfg.normalization_type is not None else 0.1
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            if name.rsplit(".", 1)[-1] == "w":
                parameter.copy_(1 + 0.2 * noise)
            elif parameter.ndim == 1 or ".b_" in name or "._b_" in name:
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_(noise * (1.0 if "embed" in name else scale))
    return model


def gates_for(shape: str, scope: str = "local", **changes: Any) -> GateConfig:
    """Gates that keep about a quarter of the units."""
    k_attn = 2 if changes.get("attn_unit") == "head" else 4
    return GateConfig(**{"scope": scope, "k_attn": k_attn, "k_mlp": 5, **changes})


def gated_model(shape: str = "gpt2", scope: str = "local", *, seed: int = 0, **gates: Any) -> SelfAblatingTransformer:
    """`plain_model(shape)` with fresh gates on it."""
    return SelfAblatingTransformer.from_hooked(plain_model(shape, seed=seed), gates_for(shape, scope, **gates), seed=3)


def random_tokens(batch: int = 2, length: int = 7, *, seed: int = 0) -> torch.Tensor:
    """Tokens, the same for the same seed; never 0, 1, 2, which the tests' tokenizer keeps for special ones."""
    return torch.randint(3, D_VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))
