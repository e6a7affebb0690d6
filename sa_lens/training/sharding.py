"""Parameters that are sharded over processes (FSDP version 2): their whole tensors, for evaluation and files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, distribute_tensor


def check_sharding(module: nn.Module) -> None:
    """Checks that the loss is not sharded, or sharded as one unit, which the fused path needs.

    Raises:
        ValueError: another kind of sharding, with the setting of Accelerate that helps.
    """
    if isinstance(module, FullyShardedDataParallel):
        raise ValueError("this trainer shards with FSDP version 2: set fsdp_version to 2 (accelerate config)")
    if sum(isinstance(part, FSDPModule) for part in module.modules()) > 1:
        raise ValueError(
            "the loss must be sharded as one unit, because it reads the parameters of all layers: set "
            "fsdp_auto_wrap_policy to NO_WRAP (accelerate config)"
        )


@contextmanager
def whole_parameters(module: nn.Module) -> Iterator[None]:
    """Within the context every process holds whole parameters, which it may only read. All processes must enter it."""
    if not isinstance(module, FSDPModule):
        yield
        return
    module.unshard()
    try:
        yield
    finally:
        module.reshard()


def whole_tensor(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, or the tensor itself. All processes must call it in the same order."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """The tensor on the device of `like`, and sharded as it is. All processes hold the whole of it."""
    with torch.no_grad():
        if isinstance(like, DTensor) and tensor.ndim == like.ndim:
            return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
        return tensor.to(like.device)
