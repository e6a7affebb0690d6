"""Measures of concentration, and intervals over units: plain functions of arrays.

All are plug-in estimates; every one ignores what it cannot see (an effective number from few counts is low).
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

LEVEL = 0.95
"""Coverage of intervals."""


def effective_number(counts: Float[Tensor, " group *rest"]) -> Float[Tensor, " *rest"]:
    """exp(entropy) of the shares of each group: 1 if one group has all, the number of groups if all have as much.

    NaN where all counts are zero.
    """
    total = counts.sum(0)
    entropy = total.log() - torch.special.xlogy(counts, counts).sum(0) / total
    return torch.where(total > 0, entropy.clamp(min=0).exp(), torch.nan)


def gini(values: Float[Tensor, " entry *rest"]) -> Float[Tensor, " *rest"]:
    """Gini coefficient of absolute values: 0 if all are equal, towards 1 if one entry has all. NaN for all zeros.

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
    """(sqrt n - |x|_1 / |x|_2) / (sqrt n - 1), from the sums of absolute values and of squares; NaN for n = 1."""
    root = n**0.5
    if n < 2:
        return torch.full_like(absolute, torch.nan)
    return (root - absolute / squares.sqrt()) / (root - 1)


def bootstrap_means(
    values: Float[np.ndarray, "unit column"],
    *,
    level: float = LEVEL,
    resamples: int = 2000,
    seed: int = 0,
) -> Float[np.ndarray, "3 column"]:
    """Mean, lower and upper end of each column's percentile interval, units drawn with replacement; NaNs are left out.

    Raises:
        ValueError: no units, a level outside (0, 1), or no resamples.
    """
    if not 0 < level < 1 or not len(values) or resamples < 1:
        raise ValueError(
            f"an interval of level={level} from {resamples} resamples of {len(values)} units: "
            "level in (0, 1), at least one of each"
        )
    draws = resampled_means(values, resamples, np.random.default_rng(seed))
    known = np.isfinite(values)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(known, values, 0).sum(0) / known.sum(0)
    tail = (1 - level) / 2
    low, high = quantiles(draws, tail), quantiles(draws, 1 - tail)
    return np.stack([mean, low, high])


def resampled_means(
    values: Float[np.ndarray, "unit column"], resamples: int, rng: np.random.Generator, at_once: int = 500
) -> Float[np.ndarray, "resample column"]:
    """Column means of units drawn with replacement; NaNs are left out of each."""
    n = len(values)
    known = np.isfinite(values)
    filled = np.where(known, values, 0.0)
    means = []
    for start in range(0, resamples, at_once):
        weights = rng.multinomial(n, np.full(n, 1 / n), size=min(at_once, resamples - start)).astype(float)
        with np.errstate(invalid="ignore", divide="ignore"):
            means.append((weights @ filled) / (weights @ known))
    return np.concatenate(means)


def quantiles(draws: Float[np.ndarray, "resample column"], q: float) -> Float[np.ndarray, " column"]:
    """The quantile of each column, NaNs left out; NaN for a column of them."""
    found = np.full(draws.shape[1], np.nan)
    for i, column in enumerate(draws.T):
        known = column[np.isfinite(column)]
        if len(known):
            found[i] = np.quantile(known, q)
    return found
