"""A TransformerBridge as input and output: what becomes of it has its logits, or is refused with the reason."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from small_models import random_tokens
from test_export import letters, small_model  # noqa: F401
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import sa_lens as sa
from sa_lens.core import bridge as bridge_module
from sa_lens.core import export

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
GROUPED = {**SIZES, "num_key_value_heads": 2, "max_position_embeddings": 48}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 48}
NEO = {"hidden_size": 16, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 48, "window_size": 5}
LLAMA3 = {
    "rope_theta": 10000.0,
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT-2": ("GPT2", GPT2),
    "GPT-2 with a scale per layer": (
        "GPT2",
        {**GPT2, "scale_attn_by_inverse_layer_idx": True, "tie_word_embeddings": False},
    ),
    "GPT-Neo": ("GPTNeo", {**NEO, "attention_types": [[["global", "local"], 1]]}),
    "Pythia": ("GPTNeoX", {**SIZES, "max_position_embeddings": 48}),
    "Pythia in sequence": ("GPTNeoX", {**SIZES, "max_position_embeddings": 48, "use_parallel_residual": False}),
    "OPT": (
        "OPT",
        {
            **{key: SIZES[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads")},
            **{"ffn_dim": 24, "word_embed_proj_dim": 32, "max_position_embeddings": 48},
        },
    ),
    "GPT-J": ("GPTJ", {**GPT2, "rotary_dim": 2}),
    "Llama": ("Llama", GROUPED),
    "Llama 3": ("Llama", {**GROUPED, "rope_parameters": LLAMA3}),
    "Qwen2": ("Qwen2", GROUPED),
    "Mistral": ("Mistral", {**GROUPED, "sliding_window": 5}),
    "Gemma": ("Gemma", {**GROUPED, "head_dim": 12}),
    "Phi": ("Phi", {**SIZES, "max_position_embeddings": 48}),
    "StableLM": ("StableLm", {**GROUPED, "num_key_value_heads": 4}),
    "BLOOM": ("Bloom", {"hidden_size": 16, "n_layer": 2, "n_head": 4}),
}
"""Name in `transformers` and settings of a small model of each family."""


def make_hf(kind: str, settings: dict[str, Any]) -> PreTrainedModel:
    """A random model of `transformers` in which no weight is zero or one."""
    special = {f"{name}_token_id": 0 for name in ("bos", "eos", "pad")}
    cfg = getattr(transformers, f"{kind}Config")(vocab_size=23, **special, **settings)
    model = transformers.AutoModelForCausalLM.from_config(cfg).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def boot(folder: Path, **options: Any) -> Any:
    """The bridge of a model in a folder."""
    from transformer_lens.model_bridge import TransformerBridge

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return TransformerBridge.boot_transformers(str(folder), device="cpu", **options)


Boot = Callable[..., Any]


@pytest.fixture
def boot_family(tmp_path: Path, letters: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> Boot:  # noqa: F811
    """Boots a small model of a family with a tokenizer."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def boot_one(kind: str, settings: dict[str, Any], **options: Any) -> Any:
        make_hf(kind, settings).save_pretrained(tmp_path / "hf")
        letters.save_pretrained(tmp_path / "hf")
        return boot(tmp_path / "hf", **options)

    return boot_one


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_logits_are_those_of_the_bridge(boot_family: Boot, family: str) -> None:
    bridge = boot_family(*FAMILIES[family])
    model = sa.SelfAblatingTransformer.from_hooked(bridge, sa.GateConfig(k_attn=4, k_mlp=5))
    # longer than every window
    tokens = random_tokens(2, 20, seed=1)
    expected = bridge(tokens)
    assert (model(tokens) - expected).abs().max() < 1e-5
    with model.ablated():
        assert (model(tokens) - expected).abs().max() > 1e-2
    if family != "BLOOM":
        fused, hooked = (sa.TwoStreamLoss(model, path=path)(tokens) for path in ("fused", "hooked"))
        torch.testing.assert_close(torch.stack(fused[:3]), torch.stack(hooked[:3]), rtol=1e-5, atol=1e-5)
    # Gemma's embedding is the unembedding times sqrt(d_model)
    assert model.tied == (bool(bridge.cfg.tie_word_embeddings) and family != "Gemma")
    assert model.to_str_tokens("cab", prepend_bos=True) == ["<|endoftext|>", "c", "a", "b"]


def test_a_long_context_is_cut(boot_family: Boot) -> None:
    bridge = boot_family("Llama", {**GROUPED, "max_position_embeddings": 4096})
    model = sa.SelfAblatingTransformer.from_hooked(bridge, sa.GateConfig(k_attn=4, k_mlp=5))
    assert model.cfg.n_ctx == bridge_module.LONGEST


@torch.no_grad()
def test_a_processed_bridge_is_taken_as_it_is(boot_family: Boot) -> None:
    bridge = boot_family("GPT2", {**GPT2, "tie_word_embeddings": False})
    bridge.enable_compatibility_mode()
    tokens = random_tokens(2, 20, seed=1)
    model = sa.SelfAblatingTransformer.from_hooked(bridge, sa.GateConfig(k_attn=4, k_mlp=5))
    assert (model(tokens) - bridge(tokens)).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("kind", "settings", "reason"),
    [
        ("Qwen3", {**GROUPED, "head_dim": 8}, r"logits that differ from the bridge's by .* and at most 0\.0001"),
        ("Granite", {**GROUPED, "residual_multiplier": 0.5}, "has a part that HookedTransformer does not"),
        (
            "Llama",
            {**GROUPED, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}},
            "rotary positions of type 'dynamic' are not supported",
        ),
    ],
)
def test_what_cannot_be_expressed_is_refused(
    boot_family: Boot, kind: str, settings: dict[str, Any], reason: str
) -> None:
    bridge = boot_family(kind, settings)
    with pytest.raises(ValueError, match=reason):
        sa.SelfAblatingTransformer.from_hooked(bridge, sa.GateConfig(k_attn=4, k_mlp=5))


def test_weights_that_the_bridge_does_not_run_are_refused(boot_family: Boot, monkeypatch: pytest.MonkeyPatch) -> None:
    bridge = boot_family("GPT2", GPT2)
    stale = {key: value.clone() for key, value in bridge.tl_parameters().items()}
    stale["blocks.1.attn.W_Q"] *= 1.5
    monkeypatch.setattr(type(bridge), "tl_parameters", lambda self: stale)
    with pytest.raises(ValueError, match="or the bridge's weights were changed after it was booted"):
        sa.SelfAblatingTransformer.from_hooked(bridge)


def test_half_precision_cannot_be_compared(boot_family: Boot) -> None:
    bridge = boot_family("GPT2", GPT2, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"boot it in float32, and call to\(torch\.bfloat16\) on the model"):
        sa.SelfAblatingTransformer.from_hooked(bridge)


@pytest.mark.parametrize("attn_scale", [True, False])
@torch.no_grad()
def test_an_exported_folder_boots_as_a_bridge_with_the_same_logits(
    tmp_path: Path,
    letters: PreTrainedTokenizerFast,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    attn_scale: bool,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = small_model(attn_scale=attn_scale, unembed_bias=False)
    model.set_tokenizer(letters)
    folder = export.to_hf(model, tmp_path / "hf")
    bridge = boot(folder)
    tokens = random_tokens(2, 12)
    assert (bridge(tokens) - model(tokens)).abs().max() < 1e-5
    again = sa.SelfAblatingTransformer.from_hooked(bridge, model.gates)
    assert (again(tokens) - model(tokens)).abs().max() < 1e-5
