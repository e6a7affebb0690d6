"""Colours of scores: a few groups for lines, and the colour bar that explains them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from sa_lens.views.theme import colour_at, palette, strong_scale, wrapped

BINS = 5
"""Colours for each sign of a score."""


class ScoreScale:
    """From scores to colours: spread by asinh, so that a few large ones leave the others apart.

    Args:
        scores: all that will be shown.
        dark: the dark look.
    """

    def __init__(self, scores: Sequence[float], dark: bool = False) -> None:
        self.dark = dark
        known = sorted(abs(score) for score in scores if score)
        self.unit = known[len(known) // 2] if known else 1.0
        low, high = min(scores, default=0.0), max(scores, default=1.0)
        self.signed = low < 0
        if self.signed:
            most = max(-low, high)
            low, high = -most, most
        elif low == high:
            low, high = min(0.0, low), high or 1.0
        self.ends = (self.place(low), self.place(high))
        self.scale = strong_scale("diverging" if self.signed else "sequential", dark)
        self.limits = (low, high)

    def place(self, score: float) -> float:
        """Place of a score on the spread axis."""
        return math.asinh(score / self.unit)

    def share(self, score: float) -> float:
        """Place of a score from 0 to 1."""
        low, high = self.ends
        return (self.place(score) - low) / (high - low)

    def bin(self, score: float) -> int:
        """Group of a score."""
        n = 2 * BINS if self.signed else BINS
        return min(n - 1, int(self.share(score) * n))

    def colour(self, index: int) -> str:
        """Colour of a group."""
        at = (index + 0.5) / (2 * BINS if self.signed else BINS)
        return colour_at(self.scale, at)

    def weight(self, index: int) -> float:
        """How strong a group is, from 0 to 1."""
        return (abs(index - BINS + 0.5) - 0.5) / (BINS - 1) if self.signed else index / (BINS - 1)

    def ticks(self) -> tuple[list[float], list[str]]:
        """Round scores at some distance from one another, as places and texts."""
        low, high = self.limits
        most = max(abs(low), abs(high))
        size = math.floor(math.log10(most))
        rounds = [digit * 10.0**power for power in range(size, size - 4, -1) for digit in (5, 2, 1)]
        candidates = [0.0, *rounds, *(-x for x in rounds)]
        apart = (self.ends[1] - self.ends[0]) / 9
        chosen: list[float] = []
        for score in candidates:
            if low <= score <= high and all(abs(self.place(score) - self.place(c)) >= apart for c in chosen):
                chosen.append(score)
        chosen.sort()
        return [self.place(score) for score in chosen], [f"{score:g}" for score in chosen]

    def axis(self, title: str, x: float = 1.02) -> dict[str, Any]:
        """Plotly's colour axis."""
        places, texts = self.ticks()
        return {
            "cmin": self.ends[0],
            "cmax": self.ends[1],
            "colorscale": self.scale,
            "colorbar": {
                "title": {
                    "text": wrapped(title, 110),
                    "side": "top",
                    "font": {"size": 12, "color": palette(self.dark).faint},
                },
                "tickvals": places,
                "ticktext": texts,
                "tickfont": {"size": 11},
                "thickness": 12,
                "outlinewidth": 0,
                "len": 0.8,
                "x": x,
            },
        }
