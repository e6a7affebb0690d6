"""Which architectures a path (a way to run or write a model) covers, and why it refuses the others.

`FEATURES` names once what sets an architecture apart from GPT-2's. Each path (gates, fused passes, single nodes, a
file format) declares a `Coverage` beside its code: the features and choices that it is exact for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from transformer_lens.utilities.architectures import POST_NORM_ARCHITECTURES

FEATURES: dict[str, Callable[[Any], bool]] = {
    "bidirectional attention": lambda cfg: cfg.attention_dir != "causal",
    "windowed attention": lambda cfg: cfg.use_local_attn,
    "grouped keys and values": lambda cfg: cfg.n_key_value_heads not in (None, cfg.n_heads),
    "a soft cap on attention scores": lambda cfg: cfg.attn_scores_soft_cap > 0,
    "a soft cap on logits": lambda cfg: cfg.output_logits_soft_cap > 0,
    "attention sinks": lambda cfg: cfg.use_attention_sinks,
    "normalised queries and keys": lambda cfg: cfg.use_qk_norm,
    "clipped queries, keys and values": lambda cfg: cfg.clip_qkv is not None,
    "log-n attention": lambda cfg: cfg.use_logn_attn,
    "dynamic NTK rotary embeddings": lambda cfg: cfg.use_dynamic_ntk_rope,
    "an attention scale that falls with the layer": lambda cfg: cfg.scale_attn_by_inverse_layer_idx,
    "a final RMSNorm after LayerNorms": lambda cfg: cfg.final_rms and cfg.normalization_type in ("LN", "LNPre"),
    "a LayerNorm on the embedding": lambda cfg: cfg.post_embedding_ln,
    "normalisation after the layers": lambda cfg: (
        cfg.use_normalization_before_and_after
        or cfg.original_architecture in (*POST_NORM_ARCHITECTURES, "OlmoeForCausalLM")
    ),
    "attention and MLP in parallel": lambda cfg: cfg.parallel_attn_mlp,
    "no MLPs": lambda cfg: cfg.attn_only,
    "a gated MLP": lambda cfg: not cfg.attn_only and cfg.gated_mlp,
    "a LayerNorm inside the MLP": lambda cfg: not cfg.attn_only and str(cfg.act_fn).endswith("_ln"),
    "a mixture of experts": lambda cfg: bool(cfg.num_experts),
    "4-bit weights": lambda cfg: bool(getattr(cfg, "load_in_4bit", False)),
    "several devices (n_devices > 1)": lambda cfg: cfg.n_devices > 1,
}
"""What a decoder may have that GPT-2 has not, by the name that reasons give it."""


@dataclass(frozen=True)
class Coverage:
    """The architectures for which a path is exact: that of GPT-2, with the features and choices named here."""

    features: Set[str] = frozenset()
    """Names from `FEATURES`."""
    positions: Set[str] = frozenset({"standard"})
    """Types of positional embedding."""
    normalizations: Set[str | None] = frozenset({None, "LN", "LNPre", "RMS", "RMSPre"})
    """Types of normalisation."""
    activations: Set[str] | None = None
    """Activation functions; None: all."""
    dtypes: Set[torch.dtype] | None = None
    """Types of the parameters; None: all."""
    because: Mapping[str, str] = field(default_factory=dict)
    """Why a feature is not covered, for the message."""

    def __post_init__(self) -> None:
        unknown = {*self.features, *self.because} - FEATURES.keys()
        if unknown:
            raise ValueError(f"unknown features of an architecture: {sorted(unknown)}")

    def reason_against(self, cfg: Any, dtype: torch.dtype | None = None) -> str | None:
        """Returns the first feature of an architecture that the path does not cover, or None if it is exact.

        Args:
            cfg: a TransformerLens configuration.
            dtype: type of the parameters; None takes that of `cfg`.
        """
        for name, applies in FEATURES.items():
            if name not in self.features and applies(cfg):
                return f"{name}: {self.because[name]}" if name in self.because else name
        dtype = cfg.dtype if dtype is None else dtype
        act_fn = None if cfg.attn_only else cfg.act_fn
        choices: list[tuple[str, Any, Set[Any] | None]] = [
            ("positions of type", cfg.positional_embedding_type, self.positions),
            ("normalisation", cfg.normalization_type, self.normalizations),
            ("activation", act_fn, None if act_fn is None else self.activations),
            ("parameters of type", dtype, self.dtypes),
        ]
        for name, value, covered in choices:
            if covered is not None and value not in covered:
                return f"{name} {value!r}"
        return None
