"""Batches for the training loop: the order of blocks, and which process reads which of them at which step."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from sa_lens.data.tokens import TokenFile


class BlockOrder:
    """The order of blocks in an endless stream of shuffled epochs.

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
        """Returns the blocks at positions `start` to `start + count - 1`."""
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


class BlockDataset(Dataset[tuple[Tensor, Tensor]]):
    """Blocks by position in the endless shuffled stream: `dataset[position]` is `(tokens[n_ctx], targets[n_ctx])`."""

    def __init__(self, file: TokenFile, n_ctx: int, order: BlockOrder) -> None:
        if order.n_blocks > file.n_blocks(n_ctx):
            raise ValueError(f"the order has {order.n_blocks} blocks, the file only {file.n_blocks(n_ctx)}")
        self.file = file
        self.n_ctx = n_ctx
        self.order = order

    def __getitem__(self, position: int) -> tuple[Int64[Tensor, " pos"], Int64[Tensor, " pos"]]:
        block = torch.from_numpy(self.file.block(int(self.order.indices(position, 1)[0]), self.n_ctx))
        return block[:-1], block[1:]


@dataclass(frozen=True)
class ProcessPositions(Sampler[list[int]]):
    """The positions that one process reads, as one list per micro-batch.

    Step s of the run reads positions `s * batch_size` to `(s + 1) * batch_size - 1`, cut into `accumulate`
    micro-batches; process `rank` takes the `rank`-th contiguous share of each. So a step reads the same blocks with any
    number of processes.
    """

    start_step: int
    """First step."""
    stop_step: int
    """Step to stop before."""
    batch_size: int
    """Sequences per optimizer step, over all processes."""
    accumulate: int = 1
    """Micro-batches per step."""
    rank: int = 0
    """Index of this process."""
    world_size: int = 1
    """Number of processes."""

    def __post_init__(self) -> None:
        if self.batch_size % (self.accumulate * self.world_size) != 0:
            raise ValueError(
                f"train.batch_size={self.batch_size} is not a multiple of train.accumulate={self.accumulate} times "
                f"{self.world_size} processes"
            )
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank={self.rank} must be from 0 to {self.world_size - 1}")

    def __len__(self) -> int:
        return max(0, self.stop_step - self.start_step) * self.accumulate

    def __iter__(self) -> Iterator[list[int]]:
        micro = self.batch_size // self.accumulate
        share = micro // self.world_size
        for step in range(self.start_step, self.stop_step):
            for part in range(self.accumulate):
                first = step * self.batch_size + part * micro + self.rank * share
                yield list(range(first, first + share))


def training_loader(
    file: TokenFile,
    n_ctx: int,
    positions: ProcessPositions,
    *,
    seed: int,
    workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader[tuple[Tensor, Tensor]]:
    """Micro-batches `(tokens, targets)` of one process, both `batch pos`, for the steps that `positions` names.

    The batches depend only on the arguments: started at a later step, the loader continues with the same blocks,
    whatever the number of workers. It draws nothing from torch's global random state. It is sharded already, so
    Accelerate must not shard it again.

    Args:
        file: training tokens.
        positions: steps, batch size, and which process reads.
        seed: seed of the order.
        workers: number of data-loading processes.
        pin_memory: whether to use page-locked memory, for copies to a GPU.
    """
    dataset = BlockDataset(file, n_ctx, BlockOrder(file.n_blocks(n_ctx), seed))
    return DataLoader(
        dataset,
        batch_sampler=positions,
        num_workers=workers,
        pin_memory=pin_memory,
        generator=torch.Generator().manual_seed(seed),
        persistent_workers=False,
    )
