"""When a unit fires: one rule for every model and stream, calibrated on a separate text.

A neuron fires where its hooked value (after the mask in the ablated stream) exceeds half its own 99.9th percentile on
the calibration text; an attention unit where its absolute value does. A unit whose percentile is below 1e-4 of the
root mean square of its sublayer is dead: it never fires.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sa_lens.config import Stream
from sa_lens.core.host import Host, fingerprint_of
from sa_lens.core.unit import Sublayer, Unit, unit_counts
from sa_lens.data import TokenFile
from sa_lens.data.blocks import TextBlocks
from sa_lens.units.activations import chosen_streams, stream_units, text_blocks

QUANTILE = 0.999
"""Quantile of a unit's scores that the rule takes as its peak."""
SHARE = 0.5
"""A unit usually fires above this share of its peak."""
OTHER_SHARES = (0.3, 0.7)
"""Further shares for which `specialization` gives firing rates."""
DEAD_BELOW = 1e-4
"""A unit whose percentile is below this share of its layer's root mean square is dead."""


def unit_scores(place: Sublayer | Unit, values: Float[Tensor, "... unit"]) -> Float[Tensor, "... unit"]:
    """Returns the scores that the rule compares: the values of neurons, the absolute values of attention units."""
    return values.abs() if place.site == "attn" else values


@dataclass(frozen=True)
class Thresholds:
    """The firing rule of one model in one stream, from `calibrate`."""

    stream: Stream
    """Stream in which the rule applies."""
    peaks: Mapping[Sublayer, Float[Tensor, " unit"]]
    """99.9th percentile of each unit's scores on the calibration text."""
    rms: Mapping[Sublayer, float]
    """Root mean square of all values of a sublayer."""
    n_tokens: int
    """Number of tokens of the calibration text."""
    model: str | None = None
    """Fingerprint of the calibrated model; None allows any model of this shape."""
    share: float = SHARE
    """A unit fires if its score exceeds this share of its percentile; above 0 and at most 1."""

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share={self.share} of the percentile must be above 0 and at most 1; {SHARE} is usual")

    def check_model(self, model: Host) -> None:
        """Raises ValueError if these are the thresholds of another model."""
        shapes = {sublayer: len(peaks) for sublayer, peaks in self.peaks.items()}
        if shapes != unit_counts(model):
            raise ValueError("the thresholds are those of a model of another shape: calibrate this one")
        if self.model not in (None, fingerprint_of(model, self.stream)):
            raise ValueError("the thresholds are those of a model with other weights or gates: calibrate this one")

    def live(self, sublayer: Sublayer) -> Bool[Tensor, " unit"]:
        """Returns which units are not dead."""
        peaks = self.peaks[sublayer]
        return (peaks >= DEAD_BELOW * self.rms[sublayer]) & (peaks > 0)

    def levels(self, sublayer: Sublayer) -> Float[Tensor, " unit"]:
        """Returns the score above which each unit fires; it is infinite for dead units."""
        return torch.where(self.live(sublayer), self.share * self.peaks[sublayer], math.inf)

    def fires(self, sublayer: Sublayer, values: Float[Tensor, "... unit"]) -> Bool[Tensor, "... unit"]:
        """Returns where each unit of the sublayer fires."""
        return unit_scores(sublayer, values) > self.levels(sublayer).to(values.device)


def calibrate(
    model: Host,
    text: TokenFile | Tensor | TextBlocks,
    streams: Stream | Sequence[Stream] = "clean",
    *,
    share: float = SHARE,
    n_tokens: int | None = 250_000,
    progress: bool = True,
) -> dict[Stream, Thresholds]:
    """Determines the firing thresholds of all units, by stream, on a text that is used for nothing else.

    The percentile is exact and interpolates linearly, as in numpy.

    Args:
        text: calibration text; use the same text for all models that you compare.
        streams: one stream or several.
        share: a unit fires if its score exceeds this share of its percentile; above 0 and at most 1. Half is a
            convention.
        n_tokens: largest number of tokens to read; None reads all. With fewer than 1,000 tokens, the percentile is
            interpolated between the two largest scores.
        progress: whether to show a progress bar.

    Raises:
        ValueError: an unknown stream, a share outside (0, 1], or a text that does not fit the model.
    """
    Thresholds("clean", {}, {}, 0, share=share)  # checks the share before the text is read
    blocks = text_blocks(model, text, n_tokens)
    chosen = chosen_streams(model, streams)
    rank = (blocks.n_tokens - 1) * QUANTILE
    kept = blocks.n_tokens - math.floor(rank)
    largest: dict[tuple[Stream, Sublayer], Tensor] = {}
    squares: dict[tuple[Stream, Sublayer], float] = {}
    for batch in stream_units(model, blocks, chosen, progress=progress, name="calibration"):
        for stream in chosen:
            for sublayer, values in batch.values[stream].items():
                key = (stream, sublayer)
                squares[key] = squares.get(key, 0.0) + float(values.double().square().sum())
                scores = unit_scores(sublayer, values).flatten(0, 1).T
                pool = scores if key not in largest else torch.cat([largest[key], scores], 1)
                largest[key] = pool.topk(min(kept, pool.shape[1]), dim=1).values
    counts, rules = unit_counts(model), {}
    for stream in chosen:
        peaks, rms = {}, {}
        for sublayer, count in counts.items():
            top = largest[stream, sublayer].double()
            above = top[:, -2] if kept > 1 else top[:, -1]
            peak = torch.lerp(top[:, -1], above, rank - math.floor(rank))
            peaks[sublayer] = peak.to(largest[stream, sublayer].dtype)
            rms[sublayer] = math.sqrt(squares[stream, sublayer] / (blocks.n_tokens * count))
        rules[stream] = Thresholds(stream, peaks, rms, blocks.n_tokens, fingerprint_of(model, stream), share)
    return rules
