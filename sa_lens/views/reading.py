"""One text as a model reads it: a pass of each stream, of which several views are made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sa_lens.config import Stream
from sa_lens.core.host import Hook, Host, at_least_float32, gate_hook_names, in_stream, streams_of
from sa_lens.core.unit import Sublayer
from sa_lens.units.activations import UnitValues, masks_of_units
from sa_lens.views.wording import read_text


@dataclass(frozen=True)
class Reading:
    """What a pass of each stream gave on one text, in float32 or wider."""

    model: Host
    """The model."""
    tokens: Int[Tensor, "1 pos"]
    """The text."""
    labels: tuple[str, ...]
    """The text, token by token."""
    log_p: dict[Stream, Float[Tensor, "pos d_vocab"]] = field(default_factory=dict)
    """Log-probabilities of the next token, nats."""
    values: dict[Stream, UnitValues] = field(default_factory=dict)
    """Values of units by sublayer, those of the ablated stream after the mask."""
    masks: UnitValues = field(default_factory=dict)
    """Masks of units by sublayer."""
    patterns: dict[Stream, dict[int, Float[Tensor, "head query key"]]] = field(default_factory=dict)
    """Attention patterns by layer."""

    @property
    def streams(self) -> tuple[Stream, ...]:
        """The streams that were read."""
        return tuple(self.log_p)

    def loss(self, stream: Stream) -> Float[Tensor, " pos_less_1"]:
        """Loss of each token but the first, nats."""
        return -self.log_p[stream][:-1].gather(-1, self.tokens[0, 1:, None])[:, 0]


def read_streams(
    model: Host,
    text: str | Int[Tensor, " pos"],
    stream: Stream | None = None,
    *,
    sublayers: Sequence[Sublayer] = (),
    layers: Sequence[int] = (),
    position: int | None = None,
) -> Reading:
    """Returns what views show of a text, from one pass of each stream.

    Args:
        text: text, which gets one begin-of-text token, or tokens.
        stream: which to read; None: every stream of the model.
        sublayers: whose units to keep.
        layers: whose attention patterns to keep.
        position: where the ablated stream is ablated; None: at all positions.

    Raises:
        ValueError: a stream that the model does not have, or a text that it cannot read.
    """
    tokens, labels = read_text(model, text)
    reading = Reading(model, tokens, labels)
    gated = set(gate_hook_names(model))
    masks: UnitValues = {}

    def keep(key: object, into: dict) -> Callable[..., None]:
        return lambda x, hook: into.__setitem__(key, at_least_float32(x.detach()))

    for of_stream in streams_of(model, stream):
        values, patterns = reading.values.setdefault(of_stream, {}), reading.patterns.setdefault(of_stream, {})
        hooks: list[Hook] = [(sublayer.value_hook, keep(sublayer, values)) for sublayer in sublayers]
        hooks += [(f"blocks.{layer}.attn.hook_pattern", keep(layer, patterns)) for layer in layers]
        if of_stream == "ablated":
            hooks += [(s.mask_hook, keep(s, masks)) for s in sublayers if s.mask_hook in gated]
        with torch.no_grad(), in_stream(model, of_stream, position=position):
            logits = model.run_with_hooks(tokens, fwd_hooks=hooks)[0]
        reading.log_p[of_stream] = at_least_float32(logits).log_softmax(-1)
        values.update({sublayer: x.flatten(2) for sublayer, x in values.items()})
        patterns.update({layer: x[0] for layer, x in patterns.items()})
    reading.masks.update(masks_of_units(model, {sublayer: x.flatten(2) for sublayer, x in masks.items()}))
    return reading
