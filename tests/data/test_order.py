"""The stream of blocks is a function of seed and position alone."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sa_lens.data import BlockOrder

blocks = st.integers(1, 60)
seeds = st.integers(0, 2**32)


def slow_stream(n_blocks: int, seed: int, stop: int) -> list[int]:
    """The first positions of the stream, one epoch after another."""
    stream: list[int] = []
    epoch = 0
    while len(stream) < stop:
        stream += np.random.default_rng([seed, epoch]).permutation(n_blocks).tolist()
        epoch += 1
    return stream[:stop]


@given(blocks, seeds, st.integers(0, 200), st.integers(0, 200))
def test_any_window_is_a_window_of_the_slow_stream(n_blocks: int, seed: int, start: int, count: int) -> None:
    window = BlockOrder(n_blocks, seed).indices(start, count)
    assert window.tolist() == slow_stream(n_blocks, seed, start + count)[start:]


@given(blocks, seeds, st.integers(0, 5))
def test_every_epoch_holds_every_block_once(n_blocks: int, seed: int, epoch: int) -> None:
    window = BlockOrder(n_blocks, seed).indices(epoch * n_blocks, n_blocks)
    assert sorted(window.tolist()) == list(range(n_blocks))


def test_epochs_and_seeds_differ() -> None:
    order = BlockOrder(50, seed=3)
    first, second = order.indices(0, 50).tolist(), order.indices(50, 50).tolist()
    other = BlockOrder(50, seed=4).indices(0, 50).tolist()
    assert first != second
    assert first != other
    assert first != list(range(50))


def test_far_positions_cost_no_earlier_epochs() -> None:
    assert BlockOrder(7, seed=0).indices(7 * 10**12, 7).tolist() != []


@pytest.mark.parametrize(("n_blocks", "seed"), [(0, 0), (-1, 0), (3, -1)])
def test_impossible_orders_are_refused(n_blocks: int, seed: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        BlockOrder(n_blocks, seed)


def test_negative_positions_are_refused() -> None:
    with pytest.raises(ValueError, match="start=-1"):
        BlockOrder(3, 0).indices(-1, 2)
