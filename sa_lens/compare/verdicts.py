"""Intervals over seeds, paired differences, and the rule by which a claim holds, fails or stays undecided.

The rule is fixed before anything is run: a claim predicts a direction for one column; it *holds* if the paired
difference over seeds goes that way and its 95 % interval excludes 0 after Holm's correction over the claims of one
variant in one stream, it *fails* if the difference goes the other way on the same terms, otherwise it is *undecided*.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

from sa_lens.statistics import LEVEL, t_interval

LEAST_PAIRS = 3
"""Seeds without which there is no test: counts of edges can differ by the same number twice, and p would be 0."""

Verdict = Literal["holds", "fails", "undecided"]


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


def paired(values: Sequence[float], reference: Sequence[float], level: float = LEVEL) -> Difference:
    """Difference of values that belong together by seed; pairs with a NaN are left out.

    Differences that are all equal have no test, or p = 1 if they are all 0: counts of edges may differ by the same
    number in every seed, which is no certainty.

    Raises:
        ValueError: sequences of unequal length, or a level outside (0, 1).
    """
    from scipy import stats

    differences = [a - b for a, b in zip(values, reference, strict=True)]
    differences = [difference for difference in differences if math.isfinite(difference)]
    n, interval = len(differences), t_interval(differences, level)
    if n < LEAST_PAIRS:
        return Difference(n, *interval, math.nan)
    if interval.high == interval.mean:
        return Difference(n, *interval, 1.0 if interval.mean == 0 else math.nan)
    statistic = abs(interval.mean) / float(stats.sem(differences))
    return Difference(n, *interval, 2 * float(stats.t.sf(statistic, n - 1)))


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
