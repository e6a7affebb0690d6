"""The order in which blocks are seen: an endless stream of shuffled epochs, addressed by position."""

from __future__ import annotations

import functools

import numpy as np
from jaxtyping import Int64


class BlockOrder:
    """Block indices by position in an endless stream of epochs.

    Epoch e holds every block once, permuted by (seed, e). The block at a position depends on nothing else, so one
    integer restores the place in the stream, and the number of processes does not change the order.

    Args:
        n_blocks: blocks of the token file, at least 1.
        seed: at least 0.
    """

    def __init__(self, n_blocks: int, seed: int) -> None:
        if n_blocks < 1:
            raise ValueError(f"n_blocks={n_blocks} must be at least 1")
        if seed < 0:
            raise ValueError(f"seed={seed} must be 0 or more")
        self.n_blocks = n_blocks
        self.seed = seed

    def indices(self, start: int, count: int) -> Int64[np.ndarray, " count"]:
        """The blocks at positions `start` to `start + count - 1`."""
        if start < 0 or count < 0:
            raise ValueError(f"start={start} and count={count} must be 0 or more")
        first, last = start // self.n_blocks, (start + max(count, 1) - 1) // self.n_blocks
        epochs = [_permutation(self.n_blocks, self.seed, epoch) for epoch in range(first, last + 1)]
        offset = start - first * self.n_blocks
        return np.concatenate(epochs)[offset : offset + count]


@functools.lru_cache(maxsize=4)
def _permutation(n_blocks: int, seed: int, epoch: int) -> Int64[np.ndarray, " block"]:
    order = np.random.default_rng([seed, epoch]).permutation(n_blocks)
    order.flags.writeable = False
    return order
