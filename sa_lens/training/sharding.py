"""Parameters that are sharded over processes (FSDP version 2), as whole tensors for evaluation and files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, distribute_tensor


def check_sharding(module: nn.Module) -> None:
    """Checks that the loss is not sharded, or is sharded as one unit, which the fused path needs.

    Raises:
        ValueError: the loss is sharded in another way; the message names the setting of Accelerate to use.
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
    """Gives every process whole parameters to read, within the context, which all processes must enter."""
    if not isinstance(module, FSDPModule):
        yield
        return
    module.unshard()
    try:
        yield
    finally:
        module.reshard()


def whole_tensor(tensor: Tensor) -> Tensor:
    """Returns the whole of a sharded tensor, or the tensor itself. All processes must call it in the same order."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Returns the tensor on the device of `like`, and sharded like it. All processes hold the whole tensor."""
    with torch.no_grad():
        if isinstance(like, DTensor) and tensor.ndim == like.ndim:
            return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
        return tensor.to(like.device)
