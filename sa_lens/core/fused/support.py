"""Which models the fused path can run."""

from __future__ import annotations

import torch

from sa_lens.core.gated import GatedTransformer

NORMALIZATIONS = (None, "LN", "LNPre", "RMS", "RMSPre")
ACTIVATIONS = ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu", "silu")


def why_not_fused(model: GatedTransformer) -> str | None:
    """The reason why this model must train on the hooked path; None if the fused one can run it."""
    cfg = model.cfg
    reasons = {
        f"positions of type {cfg.positional_embedding_type!r}": cfg.positional_embedding_type != "standard",
        f"normalisation {cfg.normalization_type!r}": cfg.normalization_type not in NORMALIZATIONS,
        "a final normalisation unlike the others": cfg.final_rms and not str(cfg.normalization_type).startswith("RMS"),
        "normalisation after the layers": cfg.use_normalization_before_and_after,
        "a LayerNorm on the embedding": cfg.post_embedding_ln,
        f"activation {cfg.act_fn!r}": not cfg.attn_only and cfg.act_fn not in ACTIVATIONS,
        "a gated MLP": not cfg.attn_only and cfg.gated_mlp,
        "a mixture of experts": bool(cfg.num_experts),
        "grouped queries": cfg.n_key_value_heads not in (None, cfg.n_heads),
        "windowed attention": cfg.use_local_attn,
        "bidirectional attention": cfg.attention_dir != "causal",
        "a soft cap": cfg.attn_scores_soft_cap > 0 or cfg.output_logits_soft_cap > 0,
        "attention sinks": cfg.use_attention_sinks,
        "normalised queries and keys": cfg.use_qk_norm,
        "clipped queries, keys and values": cfg.clip_qkv is not None,
        "log-n attention": cfg.use_logn_attn,
        "4-bit weights": bool(cfg.load_in_4bit),
        "several devices": cfg.n_devices > 1,
        f"the original architecture {cfg.original_architecture!r}": str(cfg.original_architecture).startswith("Olmo"),
        f"parameters of type {cfg.dtype}": cfg.dtype not in (torch.float32, torch.float64),
        "biases that its configuration does not have": any(
            bool(model.get_parameter(name).any()) for name in model.zero_biases
        ),
        "a tokenizer that pads on the left": model.tokenizer is not None and model.tokenizer.padding_side == "left",
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


def has_user_hooks(model: GatedTransformer) -> bool:
    """Whether a hook is attached to any hook point; the fused path would not fire it."""
    return any(
        point._forward_hooks or point._forward_pre_hooks or point._backward_hooks or point._backward_pre_hooks
        for point in model.hook_dict.values()
    )
