"""When a unit fires: one rule for every model and stream, calibrated on a text of its own.

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
"""The percentile of a unit's scores that stands for its largest ones."""
SHARE = 0.5
"""A unit fires above this share of its percentile."""
OTHER_SHARES = (0.3, 0.7)
"""Shares at which results are given too."""
DEAD_BELOW = 1e-4
"""A unit whose percentile is below this share of its layer's root mean square is dead."""


def check_share(share: float) -> None:
    """Raises ValueError if a firing level is no share of the percentile."""
    if not 0 < share <= 1:
        raise ValueError(f"share={share} of the percentile must be above 0 and at most 1; the rule's is {SHARE}")


def unit_scores(place: Sublayer | Unit, values: Float[Tensor, "... unit"]) -> Float[Tensor, "... unit"]:
    """What the rule looks at: a neuron's value, an attention unit's absolute value."""
    return values.abs() if place.site == "attn" else values


@dataclass(frozen=True)
class Thresholds:
    """The firing rule of one model in one stream, from `calibrate`."""

    stream: Stream
    """Stream that it holds for."""
    peaks: Mapping[Sublayer, Float[Tensor, " unit"]]
    """99.9th percentile of each unit's scores on the calibration text."""
    rms: Mapping[Sublayer, float]
    """Root mean square of all values of a sublayer."""
    n_tokens: int
    """Tokens of the calibration text."""
    model: str | None = None
    """Fingerprint of the model that was calibrated; None: made by hand, for any model of this shape."""

    def check_model(self, model: Host) -> None:
        """Raises ValueError if these are the thresholds of another model."""
        shapes = {sublayer: len(peaks) for sublayer, peaks in self.peaks.items()}
        if shapes != unit_counts(model):
            raise ValueError("the thresholds are those of a model of another shape: calibrate this one")
        if self.model not in (None, fingerprint_of(model, self.stream)):
            raise ValueError("the thresholds are those of a model with other weights or gates: calibrate this one")

    def live(self, sublayer: Sublayer) -> Bool[Tensor, " unit"]:
        """Units that are not dead."""
        peaks = self.peaks[sublayer]
        return (peaks >= DEAD_BELOW * self.rms[sublayer]) & (peaks > 0)

    def levels(self, sublayer: Sublayer, share: float = SHARE) -> Float[Tensor, " unit"]:
        """The score above which each unit fires; infinite for dead ones.

        Raises:
            ValueError: a share outside (0, 1].
        """
        check_share(share)
        return torch.where(self.live(sublayer), share * self.peaks[sublayer], math.inf)

    def fires(
        self, sublayer: Sublayer, values: Float[Tensor, "... unit"], share: float = SHARE
    ) -> Bool[Tensor, "... unit"]:
        """Where each unit of the sublayer fires."""
        return unit_scores(sublayer, values) > self.levels(sublayer, share).to(values.device)


def calibrate(
    model: Host,
    text: TokenFile | Tensor | TextBlocks,
    streams: Stream | Sequence[Stream] = "clean",
    *,
    n_tokens: int | None = 250_000,
    progress: bool = True,
) -> dict[Stream, Thresholds]:
    """The firing rule of each unit, by stream, from a text that is used for nothing else.

    The percentile is exact (linear between neighbours, as numpy's): a unit's largest thousandth of scores is kept.

    Args:
        text: calibration text; the same for every model that is compared.
        streams: one stream or several.
        n_tokens: tokens to read at most; None: all. Fewer than 1,000 make the percentile the interpolated maximum.

    Raises:
        ValueError: an unknown stream, or a text that does not fit (`stream_units`).
    """
    blocks = text_blocks(model, text, n_tokens)
    chosen = chosen_streams(model, streams)
    batches = stream_units(model, blocks, chosen, progress=progress, name="calibration")
    at = (blocks.n_tokens - 1) * QUANTILE
    kept = blocks.n_tokens - math.floor(at)
    largest: dict[tuple[Stream, Sublayer], Tensor] = {}
    squares: dict[tuple[Stream, Sublayer], float] = {}
    for batch in batches:
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
            peaks[sublayer] = torch.lerp(top[:, -1], above, at - math.floor(at)).to(largest[stream, sublayer].dtype)
            rms[sublayer] = math.sqrt(squares[stream, sublayer] / (blocks.n_tokens * count))
        rules[stream] = Thresholds(stream, peaks, rms, blocks.n_tokens, fingerprint_of(model, stream))
    return rules
