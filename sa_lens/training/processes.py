"""Devices, processes and trackers, through Hugging Face Accelerate."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch

from sa_lens.config import Device, RunConfig, to_dict

if TYPE_CHECKING:
    from accelerate import Accelerator


def check_device(device: str) -> None:
    """Checks that this machine has the device.

    Raises:
        ValueError: an unknown device, or one that is not there.
    """
    if device not in get_args(Device):
        raise ValueError(f"device={device!r} is not one of {', '.join(get_args(Device))}")
    missing = (device == "cuda" and not torch.cuda.is_available()) or (
        device == "mps" and not torch.backends.mps.is_available()
    )
    if missing:
        raise ValueError(f"device={device!r}: this machine, or this build of PyTorch, has none; use 'auto' or 'cpu'")


def check_tracker(tracker: str) -> None:
    """Checks that the tracker is `none` or installed.

    Raises:
        ValueError: the tracker is not installed; the message gives the command that installs it.
    """
    if tracker == "tensorboard":
        installed = any(importlib.util.find_spec(name) for name in ("tensorboard", "tensorboardX"))
    else:
        installed = tracker == "none" or importlib.util.find_spec(tracker) is not None
    if not installed:
        raise ValueError(f"train.tracker={tracker!r} is not installed: pip install 'sa-lens[{tracker}]'")


@contextmanager
def open_accelerator(run: RunConfig, out: Path, device: str) -> Iterator[Accelerator]:
    """Makes the Accelerator of a run.

    Accelerate keeps its state in the process. It is restored afterwards, so that the next run can use another device
    and the caller's own Accelerator stays usable.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from accelerate.utils import DistributedDataParallelKwargs

    # Accelerate would pick the best accelerator whatever the caller asked for
    mine = not AcceleratorState._shared_state and not PartialState._shared_state
    chosen = os.environ.get("ACCELERATE_TORCH_DEVICE")
    if device == "mps":
        os.environ["ACCELERATE_TORCH_DEVICE"] = device
    try:
        accelerator = Accelerator(
            cpu=device == "cpu",
            # the loss casts by itself, so that what must stay in float32 does
            mixed_precision="no",
            log_with=None if run.train.tracker == "none" else run.train.tracker,
            project_dir=str(out),
            step_scheduler_with_optimizer=False,
            # while the clean stream alone is trained, the gates have no gradient that processes could wait for
            kwargs_handlers=[
                DistributedDataParallelKwargs(find_unused_parameters=run.gates.gated and run.train.dense_steps > 0)
            ],
        )
        if device not in ("auto", accelerator.device.type):
            raise ValueError(
                f"device={device!r}, but Accelerate already runs on {accelerator.device.type!r} in this process"
            )
        if run.train.tracker != "none":
            # in the types that every tracker takes
            settings = {
                name: value if isinstance(value, bool | int | float | str) else str(value)
                for name, value in flat_settings(to_dict(run)).items()
            }
            accelerator.init_trackers(
                "sa_lens", config=settings, init_kwargs={"wandb": {"dir": str(out), "name": out.name}}
            )
        try:
            yield accelerator
        finally:
            if run.train.tracker != "none":
                accelerator.end_training()
    finally:
        if device == "mps":
            os.environ.pop("ACCELERATE_TORCH_DEVICE")
            if chosen is not None:
                os.environ["ACCELERATE_TORCH_DEVICE"] = chosen
        if mine and not torch.distributed.is_initialized():
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()


class LostProcess(RuntimeError):
    """Another process of the training has died."""

    def __init__(self, folder: Path, survivor: int) -> None:
        super().__init__(
            f"process {survivor} cannot continue, since another process of this training has died and may have left a "
            f"message. Continue from the last checkpoint with: sa-lens train --out {folder} --resume"
        )


def is_lost_connection(error: RuntimeError) -> bool:
    """Returns whether an error of torch means that another process can no longer be reached."""
    return isinstance(error, torch.distributed.DistError) or bool(re.search("gloo|nccl", str(error), re.IGNORECASE))


def micro_batches(run: RunConfig, processes: int) -> int:
    """Returns the number of micro-batches per step of each process.

    Raises:
        ValueError: a batch or a number of micro-batches that the processes cannot share evenly.
    """
    cfg = run.train
    if cfg.accumulate > processes and cfg.accumulate % processes != 0:
        raise ValueError(
            f"train.accumulate={cfg.accumulate} is not a multiple of the {processes} processes that share its "
            "micro-batches"
        )
    each = max(1, cfg.accumulate // processes)
    if cfg.batch_size % (each * processes) != 0:
        raise ValueError(
            f"train.batch_size={cfg.batch_size} is not a multiple of {each * processes} ({processes} processes, {each} "
            "micro-batches each)"
        )
    return each


def flat_settings(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested settings by name, as `section.name`."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= flat_settings(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


@dataclasses.dataclass(frozen=True)
class Environment:
    """The properties of the machine on which bit-for-bit repetition of a run depends."""

    device: str
    """Type of the device."""
    processes: int
    """Number of processes that train."""
    threads: int
    """Number of threads of each process."""
    versions: dict[str, str]
    """Versions of Python and of the libraries that compute."""

    @classmethod
    def of(cls, accelerator: Accelerator) -> Environment:
        """Returns the environment of this process."""
        import platform

        import numpy
        import transformer_lens

        return cls(
            accelerator.device.type,
            accelerator.num_processes,
            torch.get_num_threads(),
            {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "numpy": numpy.__version__,
                "transformer_lens": getattr(transformer_lens, "__version__", "unknown"),
            },
        )
