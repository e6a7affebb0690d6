"""What a training step reads does not depend on processes, workers or where the run was begun."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sa_lens.data import BlockOrder, ProcessPositions, TokenFile, load_tokenizer, training_loader
from sa_lens.data.batches import BlockDataset
from sa_lens.data.tokens import write_tokens


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory, stories: list[str], bpe_folder: Path) -> TokenFile:
    path = tmp_path_factory.mktemp("tokens") / "a.bin"
    return write_tokens(path, stories, load_tokenizer(bpe_folder), name="test", progress=False)


@given(
    start=st.integers(0, 5),
    steps=st.integers(0, 4),
    share=st.integers(1, 4),
    accumulate=st.integers(1, 3),
    world_size=st.integers(1, 4),
)
def test_processes_cut_each_micro_batch_without_gap_or_overlap(
    start: int, steps: int, share: int, accumulate: int, world_size: int
) -> None:
    batch_size = share * accumulate * world_size
    per_rank = [
        list(
            ProcessPositions(start, start + steps, batch_size, accumulate=accumulate, rank=rank, world_size=world_size)
        )
        for rank in range(world_size)
    ]
    joined = [position for micro in zip(*per_rank, strict=True) for part in micro for position in part]
    assert joined == list(range(start * batch_size, (start + steps) * batch_size))
    assert all(len(lists) == steps * accumulate for lists in per_rank)


def test_a_batch_that_cannot_be_shared_is_refused() -> None:
    with pytest.raises(ValueError, match=r"batch_size=6 is not a multiple of train.accumulate=2 times 2"):
        ProcessPositions(0, 1, 6, accumulate=2, world_size=2)
    with pytest.raises(ValueError, match="rank=2"):
        ProcessPositions(0, 1, 6, rank=2, world_size=2)


def test_targets_are_the_next_tokens(tokens: TokenFile) -> None:
    order = BlockOrder(tokens.n_blocks(8), seed=1)
    dataset = BlockDataset(tokens, 8, order)
    position = 2 * order.n_blocks + 3
    inputs, targets = dataset[position]
    block = tokens.block(int(order.indices(position, 1)[0]), 8).tolist()
    assert inputs.tolist() == block[:-1]
    assert targets.tolist() == block[1:]
    assert inputs.dtype == targets.dtype == torch.int64


def test_two_processes_read_what_one_reads(tokens: TokenFile) -> None:
    def steps(**options: int) -> list[torch.Tensor]:
        positions = ProcessPositions(0, 5, batch_size=8, **options)
        return [batch for batch, _ in training_loader(tokens, 8, positions, seed=0)]

    alone = steps(accumulate=2)
    shared = [steps(accumulate=2, rank=rank, world_size=2) for rank in range(2)]
    assert len(alone) == 10
    for micro, parts in zip(alone, zip(*shared, strict=True), strict=True):
        assert torch.equal(micro, torch.cat(parts))
    whole = torch.stack(steps())
    assert torch.equal(whole, torch.stack(alone).reshape(whole.shape))


def test_a_run_begun_later_goes_on_with_the_same_blocks(tokens: TokenFile) -> None:
    def steps(start: int) -> list[torch.Tensor]:
        loader = training_loader(tokens, 8, ProcessPositions(start, 6, batch_size=4), seed=5)
        return [torch.stack(pair) for pair in loader]

    assert len(steps(0)) == 6
    for before, after in zip(steps(0)[4:], steps(4), strict=True):
        assert torch.equal(before, after)


def test_workers_change_neither_the_batches_nor_the_random_state(tokens: TokenFile) -> None:
    state = torch.get_rng_state()
    plain, worked = (
        [
            torch.stack(pair)
            for pair in training_loader(tokens, 8, ProcessPositions(0, 7, batch_size=4), seed=5, workers=workers)
        ]
        for workers in (0, 2)
    )
    assert torch.equal(torch.stack(plain), torch.stack(worked))
    assert torch.equal(torch.get_rng_state(), state)


def test_an_order_for_a_longer_file_is_refused(tokens: TokenFile) -> None:
    with pytest.raises(ValueError, match="the order has"):
        BlockDataset(tokens, 8, BlockOrder(tokens.n_blocks(8) + 1, seed=0))


# ---------------------------------------------------------------------------------------------------------------- order

block_counts = st.integers(1, 60)
seeds = st.integers(0, 2**32)


def slow_stream(n_blocks: int, seed: int, stop: int) -> list[int]:
    """The first positions of the stream, one epoch after another."""
    stream: list[int] = []
    epoch = 0
    while len(stream) < stop:
        stream += np.random.default_rng([seed, epoch]).permutation(n_blocks).tolist()
        epoch += 1
    return stream[:stop]


@given(block_counts, seeds, st.integers(0, 200), st.integers(0, 200))
def test_any_window_is_a_window_of_the_slow_stream(n_blocks: int, seed: int, start: int, count: int) -> None:
    window = BlockOrder(n_blocks, seed).indices(start, count)
    assert window.tolist() == slow_stream(n_blocks, seed, start + count)[start:]


@given(block_counts, seeds, st.integers(0, 5))
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
