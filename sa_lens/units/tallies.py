"""Running sums over the units of one sublayer or layer, in memory that does not grow with the text."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

EXACT_IN_FLOAT32 = 2**24
"""Counts up to here are exact in float32."""


class Moments:
    """Sums of powers of each unit's values, around its mean in the first batch so that large means cost no digits."""

    def __init__(self) -> None:
        self.n = 0
        self.shift: Tensor | None = None
        self.sums = torch.zeros(0)
        """`[5, unit]`: of the shifted values to the powers 1 to 4, and of the absolute values."""

    def add(self, x: Float[Tensor, "token unit"]) -> None:
        if self.shift is None:
            self.shift = x.mean(0)
            self.sums = torch.zeros(5, x.shape[1], dtype=torch.float64, device=x.device)
        ones = torch.ones(1, len(x), dtype=x.dtype, device=x.device)
        # a product with ones sums columns several times faster than a reduction, and fresh memory costs more than sums
        d = x - self.shift
        d2 = d * d
        sums = [ones @ d, ones @ d2, ones @ d.mul_(d2), ones @ d2.mul_(d2), ones @ torch.abs(x, out=d)]
        self.sums += torch.cat(sums).double()
        self.n += len(x)

    def mean(self) -> Float[Tensor, " unit"]:
        assert self.shift is not None
        return self.shift.double() + self.sums[0] / self.n

    def variance(self) -> Float[Tensor, " unit"]:
        """Population variance."""
        m = self.sums / self.n
        return (m[1] - m[0] ** 2).clamp(min=0)

    def squares(self) -> Float[Tensor, " unit"]:
        """Sum of squares of the values themselves."""
        return self.n * (self.variance() + self.mean() ** 2)

    def absolute(self) -> Float[Tensor, " unit"]:
        """Sum of absolute values."""
        return self.sums[4]

    def kurtosis(self) -> Float[Tensor, " unit"]:
        """Excess kurtosis (0 for a normal distribution); NaN for a unit that does not vary."""
        m1, m2, m3, m4 = (self.sums[:4] / self.n).unbind()
        fourth = m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4
        variance = self.variance()
        varies = variance > 1e-12 * self.squares() / self.n
        return torch.where(varies, fourth / variance**2 - 3, torch.nan)


class TokenTally:
    """How often each unit fires on each token: a counter for each of the most frequent tokens, one for the rest.

    Args:
        slot_of: slot of each token of the vocabulary; the last slot holds the rest.
        n_slots: slots.
        exact: whether float32 holds every count exactly.
    """

    def __init__(self, slot_of: Int[Tensor, " d_vocab"], n_slots: int, n_units: int, exact: bool) -> None:
        dtype = torch.float32 if exact else torch.float64
        self.slot_of = slot_of
        self.counts = torch.zeros(n_slots, n_units, dtype=dtype, device=slot_of.device)

    def add(self, tokens: Int[Tensor, " token"], fired: Float[Tensor, "token unit"]) -> None:
        self.counts.index_add_(0, self.slot_of[tokens], fired.to(self.counts.dtype))


class CoActivation:
    """How often two units of a layer fire at the same token.

    Args:
        units: which of the layer's units are counted.
    """

    def __init__(self, units: Int[Tensor, " unit"]) -> None:
        self.units = units
        self.counts = torch.zeros(len(units), len(units), dtype=torch.float64, device=units.device)
        self.n_tokens = 0

    def add(self, fired: Float[Tensor, "token unit_of_layer"]) -> None:
        some = fired if len(self.units) == fired.shape[1] else fired[:, self.units]
        self.counts += some.T @ some
        self.n_tokens += len(fired)

    def jaccard(self) -> Float[Tensor, "unit unit"]:
        """Tokens at which both fire over tokens at which either does; 0 where neither ever does."""
        alone = self.counts.diagonal()
        either = alone[:, None] + alone[None] - self.counts
        return torch.where(either > 0, self.counts / either.clamp(min=1), 0)

    def partners(self, n: int) -> tuple[Float[Tensor, "unit partner"], Int[Tensor, "unit partner"]]:
        """The `n` other units with the largest Jaccard index, and their places in `units`."""
        other = self.jaccard().clone()
        other.fill_diagonal_(-1)
        top = other.topk(min(n, len(other) - 1), dim=1)
        return top.values, top.indices
