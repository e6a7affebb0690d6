"""Training in processes of their own, which may be killed or train together."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import forked

from sa_lens.config import RunConfig

Where = Literal["anywhere", "writing"]


def train_and_die(run: RunConfig, out: Path, where: Where, moment: int, report: Path) -> None:
    """Trains; at the `moment`-th function call of the main thread (in all, or of those made while files are written)
    the process kills itself with SIGKILL. A process that survives writes its number of calls to `report`."""
    import torch

    from sa_lens.core import save_and_load
    from sa_lens.training import checkpoints, loop, train

    torch.set_num_threads(1)
    # data workers notice the death of the process that forked them, not that of a server's client
    multiprocessing.set_start_method("fork", force=True)
    calls = 0
    writing = 0

    def count(_frame: Any, event: str, _argument: Any) -> None:
        nonlocal calls
        if event in ("call", "c_call") and (writing or where == "anywhere"):
            calls += 1
            if calls == moment:
                os.kill(os.getpid(), signal.SIGKILL)

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def write(*arguments: Any, **named: Any) -> Any:
            nonlocal writing
            writing += 1
            try:
                return function(*arguments, **named)
            finally:
                writing -= 1

        return write

    checkpoints.write = watched(checkpoints.write)
    save_and_load.save = watched(save_and_load.save)
    assert loop.checkpoints.write is checkpoints.write
    sys.setprofile(count)
    train(run, out, device="cpu", resume=True, progress=False)
    sys.setprofile(None)
    report.write_text(str(calls))


def train_together(run: RunConfig, out: Path, processes: int, *, shard: bool = False, **options: Any) -> None:
    """Trains in several processes over gloo and waits for them.

    Args:
        shard: shard the parameters over the processes instead of copying them.

    Raises:
        AssertionError: one of them failed.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = [forked.start(_one_of, run, out, rank, processes, port, shard, options) for rank in range(processes)]
    for process in started:
        process.join()
    assert [process.exitcode for process in started] == [0] * processes


def _one_of(
    run: RunConfig, out: Path, rank: int, processes: int, port: int, shard: bool, options: dict[str, Any]
) -> None:
    # what `accelerate launch --cpu` sets
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(processes),
        LOCAL_WORLD_SIZE=str(processes),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        ACCELERATE_USE_CPU="true",
        OMP_NUM_THREADS="1",
    )
    import torch

    from sa_lens.training import train

    torch.set_num_threads(1)
    if shard:
        shard_instead_of_copying()
    train(run, out, device="cpu", progress=False, **options)
    torch.distributed.destroy_process_group()


def shard_instead_of_copying() -> None:
    """Has Accelerate's `prepare` shard the loss as one unit. Accelerate itself shards on GPUs only, torch anywhere."""
    import torch
    from accelerate import Accelerator
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    prepare = Accelerator.prepare

    def sharded(self: Any, loss: torch.nn.Module, optimizer: torch.optim.AdamW) -> Any:
        names = {id(p): name for name, p in loss.named_parameters()}
        groups = [{**group, "params": [names[id(p)] for p in group["params"]]} for group in optimizer.param_groups]
        fully_shard(loss, mesh=init_device_mesh("cpu", (self.num_processes,)))
        parameters = dict(loss.named_parameters())
        optimizer = torch.optim.AdamW(
            [{**group, "params": [parameters[name] for name in group["params"]]} for group in groups]
        )
        return loss, prepare(self, optimizer)

    Accelerator.prepare = sharded  # type: ignore[method-assign]


def train_and_lose_one(run: RunConfig, out: Path, step: int, report: Path) -> list[int | None]:
    """Trains in two processes, the second of which kills itself with SIGKILL when a step begins.

    What the first one says is written to `report`. Returns the exit codes.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = [forked.start(_one_of_two, run, out, rank, port, step, report) for rank in range(2)]
    for process in started:
        process.join()
    return [process.exitcode for process in started]


def _one_of_two(run: RunConfig, out: Path, rank: int, port: int, step: int, report: Path) -> None:
    from sa_lens.training import loop

    rate = loop.learning_rate

    def dying(now: int, cfg: Any) -> float:
        if rank == 1 and now == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return rate(now, cfg)

    loop.learning_rate = dying
    try:
        _one_of(run, out, rank, 2, port, False, {})
    except RuntimeError as error:
        report.write_text(f"{type(error).__name__}: {error}")
        os._exit(2)
