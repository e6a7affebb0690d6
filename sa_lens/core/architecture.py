"""The transformer under the gates: its configuration, supported shapes, initial weights and weight processing."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sa_lens.config import GateConfig, ModelConfig
from sa_lens.core.base import HookedTransformer, HookedTransformerConfig
from sa_lens.core.coverage import Coverage
from sa_lens.core.tied_embedding import TiedUnembed


def hooked_config(
    cfg: ModelConfig, *, tokenizer: Any = None, device: str | torch.device | None = None
) -> HookedTransformerConfig:
    """Returns TransformerLens's configuration of a `ModelConfig`.

    Raises:
        ValueError: neither the configuration nor the tokenizer gives a vocabulary size.
    """
    d_vocab = cfg.d_vocab if cfg.d_vocab is not None else (len(tokenizer) if tokenizer is not None else None)
    if d_vocab is None:
        raise ValueError("model.d_vocab=None: give the vocabulary size, or a tokenizer to take it from")
    d_head = cfg.d_head if cfg.d_head is not None else cfg.d_model // cfg.n_heads
    d_mlp = 4 * cfg.d_model if cfg.d_mlp is None else cfg.d_mlp
    return HookedTransformerConfig(
        n_layers=cfg.n_layers,
        d_model=cfg.d_model,
        n_heads=cfg.n_heads,
        d_head=d_head,
        d_mlp=d_mlp or None,
        attn_only=d_mlp == 0,
        n_ctx=cfg.n_ctx,
        d_vocab=d_vocab,
        act_fn=cfg.act_fn,
        eps=cfg.eps,
        use_attn_scale=cfg.attn_scale,
        normalization_type="LN",
        tie_word_embeddings=cfg.tied_embedding,
        init_weights=cfg.init == "gpt2",
        device=None if device is None else str(device),
    )


_GATES = Coverage(
    features={
        "windowed attention",
        "grouped keys and values",
        "a soft cap on logits",
        "an attention scale that falls with the layer",
        "a final RMSNorm after LayerNorms",
        "a LayerNorm on the embedding",
        "attention and MLP in parallel",
        "no MLPs",
        "a gated MLP",
        "a LayerNorm inside the MLP",
    },
    positions={"standard", "rotary", "shortformer", "alibi"},
    because={
        "bidirectional attention": "the ablated stream is defined for causal decoders",
        "a soft cap on attention scores": "scores are hooked after the cap, so clean keys cannot be put in",
        "clipped queries, keys and values": "they are hooked before the clip",
        "log-n attention": "queries are scaled after their hook",
        "a mixture of experts": "its neurons have no single hook",
        "4-bit weights": "gates cannot read them exactly",
    },
)
"""Architectures whose ablated stream is exact, as the tests show; the others are refused."""


def check_supported(cfg: HookedTransformerConfig, gates: GateConfig) -> None:
    """Refuses models for which the ablated stream would not be exact, and gates that do not fit the model.

    Raises:
        ValueError: the model or the gates are not supported; the message gives the reason.
    """
    if gates.gated:
        reason = _GATES.reason_against(cfg)
        if reason is not None:
            raise ValueError(f"no gates on this model, which has {reason}")
        assert cfg.attn_only or cfg.d_mlp is not None
        check_units(gates, cfg.d_model, cfg.n_heads, cfg.d_head, None if cfg.attn_only else cfg.d_mlp)


def check_units(gates: GateConfig, d_model: int, n_heads: int, d_head: int, d_mlp: int | None) -> None:
    """Refuses gates that keep more units than a layer has, or whose rank is that of a full matrix.

    Args:
        d_mlp: neurons of a layer; None: no MLPs.

    Raises:
        ValueError: with the number of units.
    """
    n_attn = n_heads * (d_head if gates.attn_unit == "channel" else 1)
    for name, k, n in (("k_attn", gates.k_attn, n_attn), ("k_mlp", gates.k_mlp, d_mlp)):
        if gates.gated and n is not None and k > n:
            raise ValueError(f"gates.{name}={k} is more than the {n} units of a layer: choose from 1 to {n}")
        if gates.gated and gates.rank is not None and n is not None and gates.rank >= (most := min(d_model, n)):
            raise ValueError(
                f"gates.rank={gates.rank} must be less than both sizes of a gate's matrix, d_model={d_model} and "
                f"{n} units of a layer ({name}): choose from 1 to {most - 1}, or leave it out for full matrices"
            )


def actual_config(model: HookedTransformer) -> HookedTransformerConfig:
    """Returns a copy of the model's configuration with the dtype, device, sizes and tying of its parameters.

    `model.cfg` may say otherwise: torch's `half()` and `double()`, for one, do not change that of a HookedTransformer.
    """
    cfg = copy.deepcopy(model.cfg)
    cfg.dtype, cfg.device = model.W_E.dtype, str(model.W_E.device)
    cfg.d_vocab, cfg.d_vocab_out = model.W_E.shape[0], model.W_U.shape[1]
    cfg.n_layers = min(cfg.n_layers, len(model.blocks))
    if hasattr(model, "pos_embed"):
        cfg.n_ctx = model.W_pos.shape[0]
    cfg.tie_word_embeddings = isinstance(model.unembed, TiedUnembed)
    return cfg


def check_weights(weights: Mapping[str, Tensor], dtype: torch.dtype, refusal: str) -> None:
    """Checks that weights are finite numbers of one floating-point type.

    Args:
        refusal: what the message begins with.

    Raises:
        ValueError: the first weight of another type or with a value that is not finite.
    """
    for name, tensor in weights.items():
        if tensor.dtype != dtype or not dtype.is_floating_point:
            raise ValueError(f"{refusal}: {name} is of type {tensor.dtype}, but the model is of type {dtype}")
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{refusal}: {name} holds values that are NaN or infinite")


def check_queries_and_keys(state: Mapping[str, Tensor]) -> None:
    """Checks that the weights of queries and keys are finite.

    The attention pattern of scores that are NaN is 0 in TransformerLens, so that the logits would not show it.

    Raises:
        ValueError: the first weight with a value that is not finite.
    """
    for name, tensor in state.items():
        if name.endswith(("W_Q", "W_K", "b_Q", "b_K")) and not bool(tensor.isfinite().all()):
            raise ValueError(
                f"{name} holds values that are NaN or infinite, which the logits would not show, since TransformerLens "
                "sets attention patterns that are NaN to 0: load weights that are finite"
            )


@torch.no_grad()
def initialise_as_reference(model: nn.Module, generator: torch.Generator) -> None:
    """Draws initial weights in the same way as the paper's code.

    Matrices and the biases that go with them uniform in +-1/sqrt(fan_in), the embedding with fan_in d_model,
    positions N(0, 1), LayerNorm 1 and 0; biases of query, key, value and logits zero.
    """
    cfg: Any = model.cfg
    units = cfg.n_heads * cfg.d_head
    inputs = {"W_O": units, "b_O": units, "W_out": cfg.d_mlp, "b_out": cfg.d_mlp}
    for name, parameter in model.named_parameters():
        leaf = name.rsplit(".", 1)[-1]
        draw = torch.rand(parameter.shape, generator=generator) * 2 - 1
        fan_in = inputs.get(leaf, cfg.d_model)
        if leaf == "W_pos":
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        elif leaf not in ("w", "b", "b_Q", "b_K", "b_V", "b_U"):
            parameter.copy_(draw / math.sqrt(fan_in))


def inexact_processing(
    cfg: HookedTransformerConfig,
    state: dict[str, Tensor],
    *,
    fold_ln: bool,
    center_writing_weights: bool,
    center_unembed: bool,
    fold_value_biases: bool,
    refactor_factored_attn_matrices: bool,
) -> dict[str, str]:
    """Returns the options of weight processing that would change a stream of a gated model, each with the reason."""

    def nonzero(*leaves: str) -> bool:
        return any(bool(value.any()) for name, value in state.items() if name.endswith(leaves))

    refusals = [
        (
            "center_writing_weights",
            center_writing_weights,
            "the ablated stream: the gates read the residual stream before LayerNorm, and its mean would be gone",
        ),
        (
            "refactor_factored_attn_matrices",
            refactor_factored_attn_matrices,
            "the ablated stream: it mixes the channels of each head, which are the units of the gates",
        ),
        (
            "fold_value_biases",
            # folding LayerNorm moves the bias of ln1 into b_V before value biases are folded
            fold_value_biases and (nonzero("attn.b_V", "attn._b_V") or (fold_ln and nonzero(".ln1.b"))),
            "the ablated stream: a masked unit must lose its value bias too, and b_V is not zero, or would not be "
            "after fold_ln",
        ),
        (
            "fold_ln",
            fold_ln and cfg.is_layer_norm_activation(),
            "the ablated stream: a masked neuron must lose the bias of the LayerNorm inside the MLP too",
        ),
        (
            "fold_ln",
            fold_ln and cfg.positional_embedding_type == "shortformer",
            "both streams: positions are added after the LayerNorm",
        ),
        (
            "center_unembed",
            center_unembed and cfg.output_logits_soft_cap > 0,
            "both streams: the soft cap acts on the logits with their mean",
        ),
    ]
    return {option: reason for option, refused, reason in refusals if refused}


def fold_final_norm_into_gates(state: dict[str, Tensor]) -> None:
    """Moves the final LayerNorm's weight and bias into the global gates, in place."""
    if "ln_final.w" not in state:
        return
    w = state["ln_final.w"]
    b = state.get("ln_final.b")
    for key in [k for k in state if k.endswith(("_gate.W_global", "_gate.A_global"))]:
        gate = key.rsplit(".", 1)[0]
        if b is not None:
            read = b @ state[key]
            read = read @ state[f"{gate}.B_global"] if key.endswith("A_global") else read
            state[f"{gate}.b_global"] = state[f"{gate}.b_global"] + read
        state[key] = w[:, None] * state[key]
