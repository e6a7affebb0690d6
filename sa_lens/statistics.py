"""Intervals, rank statistics and measures of concentration, as plain functions of arrays.

Intervals: a percentile bootstrap over samples for one quantity (`bootstrap_interval`) and for many columns at once
(`bootstrap_means`, `resampled_means`), and the t interval of a mean (`t_interval`). Ranks: `auroc`, `pearson`,
`spearman`. Concentration: `effective_number`, `gini`, `hoyer`; these are plug-in estimates, so an effective number from
few counts is too low.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

LEVEL = 0.95
"""Default coverage of intervals."""


class Interval(NamedTuple):
    """A mean and its confidence interval."""

    mean: float
    """The mean itself; NaN without any value."""
    low: float
    """Lower end."""
    high: float
    """Upper end."""

    def columns(self, name: str) -> dict[str, float]:
        """The columns of a table that hold it: `name`, `name_low` and `name_high`."""
        return {name: self.mean, f"{name}_low": self.low, f"{name}_high": self.high}


def bootstrap_interval(
    values: Float[Tensor, " sample"] | Float[np.ndarray, " sample"],
    weights: Float[Tensor, " sample"] | Float[np.ndarray, " sample"] | None = None,
    *,
    level: float = LEVEL,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Mean over samples with a percentile bootstrap interval; samples are drawn with replacement.

    Args:
        weights: if given, the quantity is sum(values) / sum(weights), for samples that are sums over several items.
            Draws of total weight zero are left out; if all weights are zero, the interval is NaN.
        level: coverage of the interval, between 0 and 1.
        resamples: number of bootstrap draws.

    Raises:
        ValueError: no values, a level outside (0, 1), or no resamples.
    """
    _check(level, resamples, len(values) if weights is None else 1)
    x, w = (_float64(values), np.ones(len(values)) if weights is None else _float64(weights))
    if not w.sum():
        return Interval(math.nan, math.nan, math.nan)
    rng = np.random.default_rng(seed)
    draws = []
    # the drawn indices of a chunk take a few megabytes
    chunk = max(1, 2**20 // len(x))
    for first in range(0, resamples, chunk):
        drawn = rng.integers(len(x), size=(min(chunk, resamples - first), len(x)))
        total = w[drawn].sum(1)
        draws.append(x[drawn].sum(1)[total > 0] / total[total > 0])
    low, high = np.quantile(np.concatenate(draws), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(x.sum() / w.sum()), float(low), float(high))


def bootstrap_means(
    values: Float[np.ndarray, "sample column"], *, level: float = LEVEL, resamples: int = 2000, seed: int = 0
) -> Float[np.ndarray, "3 column"]:
    """Mean and both ends of the percentile bootstrap interval of each column; NaN values are left out.

    Raises:
        ValueError: no samples, a level outside (0, 1), or no resamples.
    """
    _check(level, resamples, len(values))
    draws = resampled_means(values, resamples, np.random.default_rng(seed))
    return np.stack([column_means(values), *percentile_interval(draws, level)])


def resampled_means(
    values: Float[np.ndarray, "sample column"], resamples: int, rng: np.random.Generator
) -> Float[np.ndarray, "draw column"]:
    """Column means of bootstrap draws, all columns with the same draws; NaN values are left out."""
    n = len(values)
    known = np.isfinite(values)
    filled = np.where(known, values, 0.0)
    means = []
    for first in range(0, resamples, 500):
        counts = rng.multinomial(n, np.full(n, 1 / n), size=min(500, resamples - first)).astype(float)
        with np.errstate(invalid="ignore", divide="ignore"):
            means.append((counts @ filled) / (counts @ known))
    return np.concatenate(means)


def percentile_interval(
    draws: Float[np.ndarray, "draw column"], level: float = LEVEL
) -> tuple[Float[np.ndarray, " column"], Float[np.ndarray, " column"]]:
    """Lower and upper percentiles of bootstrap draws, by column; NaN draws are left out, NaN for a column of them."""
    known = np.isfinite(draws)
    draws = np.where(known, draws, np.nan)
    draws[0, ~known.any(0)] = 0.0  # a column without a value, which would warn
    low, high = np.nanquantile(draws, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return np.where(known.any(0), low, np.nan), np.where(known.any(0), high, np.nan)


def column_means(values: Float[np.ndarray, "sample column"]) -> Float[np.ndarray, " column"]:
    """Mean of each column, NaN values left out; NaN for a column of them."""
    known = np.isfinite(values)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(known, values, 0).sum(0) / known.sum(0)


def t_interval(values: Sequence[float], level: float = LEVEL) -> Interval:
    """Mean and t interval of the mean; NaN values are left out. With fewer than two values the ends are NaN.

    Raises:
        ValueError: a level outside (0, 1).
    """
    from scipy.special import stdtrit

    _check(level)
    x = np.asarray([value for value in values if math.isfinite(value)], dtype=float)
    if len(x) < 2:
        return Interval(float(x[0]) if len(x) else math.nan, math.nan, math.nan)
    mean = float(x.mean())
    half = float(stdtrit(len(x) - 1, (1 + level) / 2) * x.std(ddof=1) / math.sqrt(len(x)))
    return Interval(mean, mean - half, mean + half)


def auroc(
    scores: Float[Tensor, "sample score"], member: Bool[Tensor, "sample label"] | Float[Tensor, "sample label"]
) -> Float[Tensor, "label score"]:
    """Area under the ROC curve of every score for every label; ties count half.

    NaN for a label of all or no samples.
    """
    from scipy import stats

    n = len(scores)
    chosen = member.T.double().cpu().numpy()
    positives = chosen.sum(1, keepdims=True)
    # chunks of scores, since their ranks take 8 bytes per sample and score
    ranks = (stats.rankdata(part.T.cpu().numpy(), axis=1) for part in scores.detach().split(256, dim=1))
    sums = np.concatenate([chosen @ part.T for part in ranks], axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        area = (sums - positives * (positives + 1) / 2) / (positives * (n - positives))
    return torch.from_numpy(area).to(scores.device)


def pearson(x: Float[np.ndarray, " sample"], y: Float[np.ndarray, " sample"]) -> float:
    """Pearson's correlation; NaN for fewer than two samples, or if either side is constant."""
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    return float(np.corrcoef(x, y)[0, 1])


def spearman(x: Float[np.ndarray, " sample"], y: Float[np.ndarray, " sample"]) -> float:
    """Spearman's rank correlation; equal values share the mean of their ranks. NaN as for `pearson`."""
    from scipy import stats

    return pearson(stats.rankdata(x), stats.rankdata(y))


def effective_number(counts: Float[Tensor, " group *rest"]) -> Float[Tensor, " *rest"]:
    """Effective number of groups, exp(entropy of their shares): 1 if one group has all, n if n groups have as much.

    NaN where all counts are zero.
    """
    total = counts.sum(0)
    entropy = total.log() - torch.special.xlogy(counts, counts).sum(0) / total
    return torch.where(total > 0, entropy.clamp(min=0).exp(), torch.nan)


def gini(values: Float[Tensor, " entry *rest"]) -> Float[Tensor, " *rest"]:
    """Gini coefficient of absolute values: 0 if all are equal, close to 1 if one entry has all. NaN for all zeros.

    With x sorted upwards: sum_i (2i - n - 1) x_i / (n sum x).
    """
    # rows sort several times faster than columns
    x = values.abs().movedim(0, -1).contiguous().sort(-1).values
    n = x.shape[-1]
    weight = (2 * torch.arange(1, n + 1, device=x.device) - n - 1).double()
    return (x.double() @ weight) / (n * x.sum(-1, dtype=torch.float64))


def hoyer(values: Float[Tensor, " entry *rest"]) -> Float[Tensor, " *rest"]:
    """Hoyer's sparsity: 0 if all absolute values are equal, 1 if all but one entry are zero. NaN for all zeros."""
    x = values.double()
    return hoyer_from_sums(len(x), x.abs().sum(0), x.square().sum(0))


def hoyer_from_sums(
    n: int, absolute: Float[Tensor, " *rest"], squares: Float[Tensor, " *rest"]
) -> Float[Tensor, " *rest"]:
    """Hoyer's sparsity (sqrt n - |x|_1 / |x|_2) / (sqrt n - 1) from both sums over n entries; NaN for n = 1."""
    root = n**0.5
    if n < 2:
        return torch.full_like(absolute, torch.nan)
    return (root - absolute / squares.sqrt()) / (root - 1)


def _float64(values: Tensor | np.ndarray) -> np.ndarray:
    return values.detach().double().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values, float)


def _check(level: float, resamples: int = 1, samples: int = 1) -> None:
    if not 0 < level < 1 or not samples or resamples < 1:
        raise ValueError(
            f"an interval of level={level} from {resamples} resamples of {samples} samples: "
            "level must lie above 0 and below 1, with at least one resample and one sample"
        )
