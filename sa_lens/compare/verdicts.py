"""Intervals over seeds, paired differences, and the rule by which a claim holds, fails or stays undecided.

The rule is fixed before anything is run: a claim predicts a direction for one column; it *holds* if the paired
difference over seeds goes that way and its 95 % interval excludes 0 after Holm's correction over the claims of one
variant in one stream, it *fails* if the difference goes the other way on the same terms, otherwise it is *undecided*.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

LEVEL = 0.95
"""Coverage of intervals; claims are decided at 1 - LEVEL."""

LEAST_PAIRS = 3
"""Seeds without which there is no test: counts of edges can differ by the same number twice, and p would be 0."""

Verdict = Literal["holds", "fails", "undecided"]


class Interval(NamedTuple):
    """A mean over seeds."""

    n: int
    """Seeds with a value."""
    mean: float
    """Their mean; NaN without any."""
    low: float
    """Lower end of the t interval; NaN with fewer than two seeds."""
    high: float
    """Upper end."""


class Difference(NamedTuple):
    """A paired difference over seeds."""

    n: int
    """Seeds that have both values."""
    mean: float
    """Mean of variant minus reference."""
    low: float
    """Lower end of the t interval of the differences."""
    high: float
    """Upper end."""
    p: float
    """Two-sided p-value of the paired t test; NaN with fewer than `LEAST_PAIRS` seeds, or differences all alike."""


def t_interval(values: Sequence[float], level: float = LEVEL) -> Interval:
    """Mean and t interval of the mean; NaN values are left out.

    Raises:
        ValueError: a level outside (0, 1).
    """
    from scipy.stats import t

    if not 0 < level < 1:
        raise ValueError(f"level={level} must lie above 0 and below 1")
    x = np.asarray([v for v in values if math.isfinite(v)], dtype=float)
    n = len(x)
    if n < 2:
        return Interval(n, float(x[0]) if n else math.nan, math.nan, math.nan)
    half = float(t.ppf((1 + level) / 2, n - 1)) * float(x.std(ddof=1)) / math.sqrt(n)
    mean = float(x.mean())
    return Interval(n, mean, mean - half, mean + half)


def paired(values: Sequence[float], reference: Sequence[float], level: float = LEVEL) -> Difference:
    """Difference of values that belong together by seed; pairs with a NaN are left out.

    Differences that are all equal have no test, or p = 1 if they are all 0: counts of edges may differ by the same
    number in every seed, which is no certainty.

    Raises:
        ValueError: sequences of unequal length, or a level outside (0, 1).
    """
    from scipy.stats import t

    found = t_interval([a - b for a, b in zip(values, reference, strict=True)], level)
    if found.n < LEAST_PAIRS:
        return Difference(*found, math.nan)
    half = found.high - found.mean
    if half == 0:
        return Difference(*found, 1.0 if found.mean == 0 else math.nan)
    statistic = abs(found.mean) / half * float(t.ppf((1 + level) / 2, found.n - 1))
    return Difference(*found, 2 * float(t.sf(statistic, found.n - 1)))


def holm(p: Sequence[float], family: int | None = None) -> list[float]:
    """Holm's adjusted p-values, in the order given; NaN (no test) stays NaN.

    Args:
        family: number of tests that were planned, those without a value included; None: as many as are given. Fixing
            it beforehand keeps a verdict from changing with what else is measured.

    Raises:
        ValueError: a family smaller than the tests given.
    """
    planned = len(p) if family is None else family
    if planned < len(p):
        raise ValueError(f"family={planned} is smaller than the {len(p)} tests given")
    order = sorted((i for i in range(len(p)) if not math.isnan(p[i])), key=lambda i: p[i])
    adjusted, highest = [math.nan] * len(p), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (planned - rank) * p[i]))
        adjusted[i] = highest
    return adjusted


def verdict(difference: float, adjusted_p: float, direction: int, level: float = LEVEL) -> Verdict:
    """What becomes of a claim.

    Args:
        difference: mean paired difference, variant minus reference.
        adjusted_p: its p-value after Holm's correction; NaN: no test was possible.
        direction: +1 if the claim predicts a higher value, -1 if a lower one.

    Raises:
        ValueError: another direction.
    """
    if direction not in (1, -1):
        raise ValueError(f"direction={direction} must be 1 or -1")
    if math.isnan(adjusted_p) or not adjusted_p + level < 1:
        return "undecided"
    return "holds" if difference * direction > 0 else "fails"
