"""The interface through which analyses use a model, and the choice of its stream.

Circuits, units and views use a model through `Host` and the functions here alone, so that a model of another class can
take the place of `HookedTransformer` without a change to them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sa_lens.config import Masks, Stream, suggestion

Hook = tuple[str, Callable[..., Tensor | None]]
"""(name of a hook point, function of the activation and `hook=`)."""


@runtime_checkable
class Host(Protocol):
    """A model with hook points, such as any `HookedTransformer`."""

    cfg: Any
    """Shape: `n_layers`, `d_model`, `n_heads`, `d_head`, `d_mlp`, `d_vocab`, `n_ctx`, `attn_only`, ..."""
    hook_dict: Any
    """Hook points by name."""
    tokenizer: Any
    """Hugging Face tokenizer, or None."""

    def __call__(self, input: Any, **kwargs: Any) -> Any:
        """Returns the logits `[batch pos d_vocab]` of tokens or text."""

    def run_with_cache(self, *args: Any, **kwargs: Any) -> Any:
        """Returns logits and recorded activations."""

    def run_with_hooks(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the logits under `fwd_hooks`."""


def has_ablated_stream(model: Host) -> bool:
    """Returns whether the model has gates, and therefore an ablated stream."""
    gates = getattr(model, "gates", None)
    return gates is not None and bool(gates.gated)


def streams_of(model: Host, stream: Stream | None = None) -> tuple[Stream, ...]:
    """Returns the streams that the model has, or only the given one."""
    if stream is not None:
        return (stream,)
    return ("clean", "ablated") if has_ablated_stream(model) else ("clean",)


def refuse_chosen_stream(model: Host, what: str) -> None:
    """Raises an error inside `with model.ablated():`, for functions that take the stream as an argument instead."""
    streams = getattr(model, "_streams", None)
    if streams is not None and streams.current is not None:
        raise ValueError(
            f"{what} takes the stream from stream=..., not from `with model.ablated():`. Call it outside of this "
            "context, with stream='ablated' or stream='clean'"
        )


def in_stream(
    model: Host,
    stream: Stream,
    position: int | Sequence[int] | Tensor | None = None,
    *,
    masks: Masks | Mapping[str, Tensor] | None = None,
    clean_hooks: Sequence[Any] = (),
) -> AbstractContextManager[Any]:
    """Runs the model in the given stream, within the context.

    Args:
        position: position at which the masks act in the ablated stream; None for all positions. See `model.ablated`.
        masks: `frozen`, `live` or given masks, as in `model.ablated`; None: `frozen`.
        clean_hooks: hooks of the clean pass, as in `model.ablated`.

    The last three mean nothing in the clean stream, so one call serves both.

    Raises:
        ValueError: the stream is unknown, or the ablated stream is asked of a model without gates.
    """
    if stream == "clean":
        return model.clean() if hasattr(model, "clean") else nullcontext(model)
    if stream != "ablated":
        raise ValueError(f"stream={stream!r} must be 'clean' or 'ablated'")
    if not has_ablated_stream(model):
        raise ValueError(
            f"stream='ablated' needs gates, but this {type(model).__name__} has none: use stream='clean', or put gates "
            "on it with SelfAblatingTransformer.from_hooked(model, GateConfig(...))"
        )
    ablated: Callable[..., AbstractContextManager[Any]] = model.ablated  # type: ignore[attr-defined]
    return ablated(position=position, masks="frozen" if masks is None else masks, clean_hooks=clean_hooks)


def gate_hook_names(model: Host, what: Literal["in", "scores", "mask"] = "mask") -> list[str]:
    """Returns the names of one hook point of every gate, layer by layer, attention first; empty without gates."""
    kinds = [f"{gate}.hook_{what}" for gate in ("attn_gate", "mlp_gate")]
    names = [f"blocks.{layer}.{kind}" for layer in range(model.cfg.n_layers) for kind in kinds]
    return [name for name in names if name in model.hook_dict]


def require_hooks(model: Host, names: Iterable[str]) -> None:
    """Checks that the model has these hook points.

    Raises:
        ValueError: a hook point is missing; the message names the first, and the nearest that the model has.
    """
    for name in names:
        if name not in model.hook_dict:
            near = suggestion(name, model.hook_dict)
            raise ValueError(f"this {type(model).__name__} has no hook point {name!r}; see model.hook_dict{near}")


def weight(model: Host, name: str) -> Tensor:
    """Returns a weight by its TransformerLens name, such as `blocks.0.attn.W_O`; grouped keys and values are repeated.

    Raises:
        ValueError: the model has no such weight.
    """
    try:
        value = reduce(getattr, name.split("."), model)
    except AttributeError as error:
        raise ValueError(f"this {type(model).__name__} has no weight {name!r}") from error
    if not isinstance(value, Tensor):
        raise ValueError(f"{name!r} of this {type(model).__name__} is not a weight but a {type(value).__name__}")
    return value


def local_scores(model: Host, gate: str, resid: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos ..."]:
    """Returns the scores that a local gate, such as `blocks.0.mlp_gate`, gives to a residual stream that it reads."""
    scores: Tensor = reduce(getattr, gate.split("."), model).project(resid, None)  # type: ignore[attr-defined]
    return scores


_SETTINGS_OF_THE_COMPUTATION = (
    *("n_heads", "n_key_value_heads", "d_head", "act_fn", "normalization_type", "eps", "final_rms"),
    *("use_attn_scale", "attn_scale", "scale_attn_by_inverse_layer_idx", "attention_dir", "parallel_attn_mlp"),
    *("use_local_attn", "attn_types", "window_size", "attn_scores_soft_cap", "output_logits_soft_cap"),
    *("positional_embedding_type", "rotary_base", "rotary_dim", "rotary_adjacent_pairs"),
)
"""Settings that change what a model computes with the same weights."""


def fingerprint_of(model: Host, stream: Stream = "ablated") -> str:
    """Returns a hash of all that determines a stream's results: weights, their precision, settings and gates.

    Results that are kept to be resumed or reused carry this hash, and are refused for a model with another hash.
    """
    settings = {name: getattr(model.cfg, name, None) for name in _SETTINGS_OF_THE_COMPUTATION}
    # the number of units that the gates keep is in no weight; their rank is
    gates = repr(model.gates) if stream == "ablated" and has_ablated_stream(model) else ""  # type: ignore[attr-defined]
    gates = gates.replace(", rank=None", "")
    return hash_of(model.named_parameters(), f"{settings} {gates}")  # type: ignore[attr-defined]


def hash_of(tensors: Iterable[tuple[str, Tensor]], about: str = "") -> str:
    """Returns a short hash of a text, and of names, shapes, precisions and all numbers of tensors."""
    digest = hashlib.sha256(about.encode())
    for name, tensor in tensors:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        # as bytes, since numpy has no bfloat16
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def device_of(model: Host) -> torch.device:
    """Returns the device on which the model takes its tokens."""
    return weight(model, "embed.W_E").device


def at_least_float32(x: Tensor) -> Tensor:
    """Returns `x` in float32 if its type is narrower, else unchanged; losses, scores and figures use it."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def run_to_last(
    model: Host, tokens: Int[Tensor, "batch pos"], fwd_hooks: Sequence[Hook] = ()
) -> Float[Tensor, "batch d_vocab"]:
    """Returns the logits at the last position in float32 or wider; other positions are not unembedded.

    With a large vocabulary, unembedding takes most of the time and memory of a short prompt. Do not use it with
    `masks="live"` of gates that read the clean stream: their clean pass runs these hooks too and would lose the other
    positions.
    """
    last = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"

    def keep_last(resid: Float[Tensor, "batch pos d_model"], hook: Any) -> Float[Tensor, "batch 1 d_model"]:
        return resid[:, -1:]

    return at_least_float32(model.run_with_hooks(tokens, fwd_hooks=[*fwd_hooks, (last, keep_last)])[:, -1])
