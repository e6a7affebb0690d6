"""Conversion of a `TransformerBridge` into a `HookedTransformer` with the same logits.

The bridge of TransformerLens wraps a model of `transformers`. Its weights come from the bridge in TransformerLens's
names and shapes; facts that its configuration lacks, such as windows of attention, come from the Hugging Face one. What
neither says shows in the logits, which are compared before the model is handed out.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from sa_lens.core.base import HookedTransformer, HookedTransformerConfig, hooked_transformer

log = logging.getLogger(__name__)

TOLERANCE = 1e-4
"""Largest difference of logits that is accepted; of logits above 10, a tenth of it times the largest one."""
LONGEST = 2048
"""Context of a model without learned positions, whose masks would otherwise take n_ctx^2 bytes in every layer."""

_COPIED = (
    *("d_model", "d_head", "n_layers", "n_heads", "eps", "act_fn", "gated_mlp", "attn_only", "parallel_attn_mlp"),
    *("positional_embedding_type", "scale_attn_by_inverse_layer_idx", "final_rms", "tie_word_embeddings"),
    *("attn_scores_soft_cap", "output_logits_soft_cap", "use_qk_norm", "use_normalization_before_and_after"),
    *("num_experts", "experts_per_token", "default_prepend_bos", "device", "dtype", "tokenizer_name"),
)
"""Fields that both configurations have and that a bridge fills in."""


def is_bridge(model: object) -> bool:
    """Returns whether the object is a TransformerBridge."""
    return any(cls.__name__ == "TransformerBridge" for cls in type(model).__mro__)


@torch.no_grad()
def hooked_from_bridge(bridge: Any, *, longest: int = LONGEST) -> HookedTransformer:
    """Returns the bridge's transformer as a plain HookedTransformer with a copy of the weights.

    Args:
        longest: context, in tokens, to which a model without learned positions is cut.

    Raises:
        ValueError: an architecture that HookedTransformer does not express, with the reason; or logits that differ by
            more than `TOLERANCE` on random tokens.
    """
    name = getattr(bridge.cfg, "architecture", None) or type(bridge.original_model).__name__
    if bridge.cfg.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"the bridge's weights are {bridge.cfg.dtype}, in which logits cannot be compared: boot it in float32, and "
            f"call to({bridge.cfg.dtype}) on the model that from_hooked returns"
        )
    settings = bridge.original_model.config.to_dict() if hasattr(bridge.original_model, "config") else {}
    try:
        weights = _weights(bridge, settings)
        model = hooked_transformer(_config(bridge.cfg, settings, weights, longest))
        missing, unknown = model.load_state_dict(weights, strict=False)
        missing = [key for key in missing if key in dict(model.named_parameters())]
        if missing or unknown:
            raise ValueError(f"its weights do not fit: missing {missing}, unknown {unknown}")
    except (KeyError, AttributeError, RuntimeError, ValueError) as error:
        raise ValueError(f"no HookedTransformer can be made of this bridge ({name}): {error}") from error
    model.tokenizer = bridge.tokenizer
    model.eval()
    _check_logits(bridge, model, name)
    return model


def _weights(bridge: Any, settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """Returns the state dict of a HookedTransformer."""
    weights: dict[str, Tensor] = {key: value.detach() for key, value in bridge.tl_parameters().items()}
    groups = bridge.cfg.n_key_value_heads
    for layer in range(bridge.cfg.n_layers):
        block = f"blocks.{layer}"
        if groups is not None and groups != bridge.cfg.n_heads:
            # a bridge repeats grouped keys and values for every query
            for key in ("W_K", "W_V", "b_K", "b_V"):
                repeated = weights.pop(f"{block}.attn.{key}")
                weights[f"{block}.attn._{key}"] = repeated[:: bridge.cfg.n_heads // groups].contiguous()
        if bridge.cfg.parallel_attn_mlp and f"{block}.ln2.w" not in weights:
            # attention and MLP share one norm
            weights |= {f"{block}.ln2.{key}": weights[f"{block}.ln1.{key}"].clone() for key in ("w", "b")}
    if bridge.cfg.positional_embedding_type == "standard":
        # OPT's first two positions stand for padding
        weights["pos_embed.W_pos"] = weights["pos_embed.W_pos"][-bridge.cfg.n_ctx :].contiguous()
    elif bridge.cfg.positional_embedding_type == "rotary":
        weights.pop("pos_embed.W_pos", None)
    if hasattr(bridge, "embed_ln"):
        weights |= {"embed.ln.w": bridge.embed_ln.weight.detach(), "embed.ln.b": bridge.embed_ln.bias.detach()}
    if settings.get("model_type") == "gemma":
        # it multiplies by 1 + w, and the embedding by sqrt(d_model)
        weights |= {key: w + 1 for key, w in weights.items() if key.endswith((".ln1.w", ".ln2.w", "ln_final.w"))}
        weights["embed.W_E"] = weights["embed.W_E"] * bridge.cfg.d_model**0.5
    return weights


def _config(
    cfg: Any, settings: Mapping[str, Any], weights: Mapping[str, Tensor], longest: int
) -> HookedTransformerConfig:
    """Returns the configuration of a bridge from its Hugging Face settings and weights."""
    n_ctx = cfg.n_ctx
    if cfg.positional_embedding_type != "standard" and n_ctx > longest:
        log.warning("the model's context of %d tokens is cut to %d", n_ctx, longest)
        n_ctx = longest
    norm = "RMS" if cfg.normalization_type.startswith("RMS") else "LN"
    copied = {field: getattr(cfg, field) for field in _COPIED if hasattr(cfg, field)}
    if settings.get("model_type") == "bloom":  # its bridge does not name the activation
        copied["act_fn"] = "gelu_fast"
    return HookedTransformerConfig(
        **copied,
        n_ctx=n_ctx,
        d_mlp=weights["blocks.0.mlp.W_in"].shape[1],
        d_vocab=weights["embed.W_E"].shape[0],
        d_vocab_out=weights["unembed.W_U"].shape[1],
        normalization_type=norm if "ln_final.w" in weights else f"{norm}Pre",
        n_key_value_heads=None if cfg.n_key_value_heads == cfg.n_heads else cfg.n_key_value_heads,
        post_embedding_ln="embed.ln.w" in weights,
        # what the bridge of GPT-Neo leaves out: scores are not scaled
        use_attn_scale=cfg.use_attn_scale and settings.get("model_type") != "gpt_neo",
        original_architecture=getattr(cfg, "architecture", None),
        init_weights=False,
        **_rotary(cfg, settings),
        **_windows(settings),
    )


def _rotary(cfg: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the configuration's fields about rotary positions."""
    if cfg.positional_embedding_type != "rotary":
        return {}
    rope = {**settings, **(settings.get("rope_parameters") or settings.get("rope_scaling") or {})}
    share = rope.get("partial_rotary_factor", rope.get("rotary_pct", 1.0))
    fields = {
        "rotary_dim": cfg.rotary_dim or int(cfg.d_head * share),
        "rotary_base": rope.get("rope_theta", rope.get("rotary_emb_base", cfg.rotary_base)),
        "rotary_adjacent_pairs": settings.get("model_type") in ("gptj", "codegen"),
    }
    kind = rope.get("rope_type", "default")
    if kind == "llama3":
        fields |= {
            "use_NTK_by_parts_rope": True,
            "NTK_by_parts_factor": rope["factor"],
            "NTK_by_parts_low_freq_factor": rope["low_freq_factor"],
            "NTK_by_parts_high_freq_factor": rope["high_freq_factor"],
            "NTK_original_ctx_len": rope["original_max_position_embeddings"],
        }
    elif kind == "linear":
        fields["rotary_scaling_factor"] = rope["factor"]
    elif kind != "default":
        raise ValueError(f"rotary positions of type {kind!r} are not supported: only default, linear and llama3 are")
    return fields


def _windows(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the configuration's fields about local attention, empty if every layer sees all earlier positions."""
    window = settings.get("sliding_window")
    if settings.get("model_type") == "gpt_neo":
        window, kinds = settings["window_size"], settings["attention_layers"]
    elif window is None or not settings.get("use_sliding_window", True):
        return {}
    else:
        # models without a list of kinds, such as Mistral, have a window in every layer
        layers = settings.get("layer_types") or ["sliding_attention"] * settings["num_hidden_layers"]
        kinds = ["local" if kind == "sliding_attention" else "global" for kind in layers]
    return {"use_local_attn": True, "window_size": window, "attn_types": kinds} if "local" in kinds else {}


def _check_logits(bridge: Any, model: HookedTransformer, name: str) -> None:
    """Compares the logits of both models on random tokens, also beyond a short window of attention.

    Raises:
        ValueError: the largest difference is above the tolerance.
    """
    window = model.cfg.window_size or 0
    length = min(model.cfg.n_ctx, 32 + (window if window <= 512 else 0))
    generator = torch.Generator().manual_seed(0)
    tokens: Int[Tensor, "batch pos"] = torch.randint(model.cfg.d_vocab, (2, length), generator=generator)
    training = bridge.training
    try:
        theirs = bridge.eval()(tokens.to(model.W_E.device))
    finally:
        bridge.train(training)
    ours = model(tokens)
    difference = float((theirs - ours).abs().max())
    allowed = TOLERANCE * max(1.0, float(theirs.abs().max()) / 10)
    if not difference <= allowed:
        raise ValueError(
            f"the HookedTransformer made of this bridge ({name}) has logits that differ from the bridge's by "
            f"{difference:.2g}, and at most {allowed:.1g} is accepted: either the architecture has a part that "
            "HookedTransformer does not, or the bridge's weights were changed after it was booted"
        )
