"""The number of processes that a launcher was asked for, and starting those that it has left out.

`accelerate launch` starts several processes on GPUs alone. On CPUs it starts one, sets `MASTER_ADDR` and leaves the
others to MPI; how many were asked for stands on its command line and in its configuration file, and nowhere else.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Where launchers say how many processes there are."""


@dataclass(frozen=True)
class Launch:
    """What `accelerate launch` was asked for."""

    processes: int
    """Processes on all machines."""
    machines: int
    """Machines."""
    machine: int
    """Which of them this one is."""
    cpu: bool
    """Whether the processes are to run on CPUs."""

    def command(self, program: Sequence[str]) -> list[str]:
        """The command that starts this machine's processes, each of which runs `python -m program`."""
        launcher = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            f"--nproc_per_node={self.processes // self.machines}",
        ]
        if self.machines == 1:
            launcher += ["--standalone"]
        else:
            launcher += [f"--nnodes={self.machines}", f"--node_rank={self.machine}"]
            launcher += [f"--master_addr={os.environ['MASTER_ADDR']}", f"--master_port={os.environ['MASTER_PORT']}"]
        return [*launcher, "-m", *program]


def unfinished_launch() -> Launch | None:
    """What `accelerate launch` was asked for, if it has started one process of several; otherwise None.

    Raises:
        RuntimeError: it cannot be found out how many processes were asked for.
    """
    by_accelerate = "ACCELERATE_DYNAMO_BACKEND" in os.environ and "MASTER_ADDR" in os.environ
    if not by_accelerate or any(name in os.environ for name in _SIZES):
        return None
    launch = _asked_of(_parent())
    return launch if launch.processes > 1 else None


def check_processes(running: int) -> None:
    """Raises RuntimeError unless as many processes train together as the launcher was asked for."""
    launch = unfinished_launch()
    size = next((os.environ[name] for name in _SIZES if name in os.environ), None)
    asked = launch.processes if launch is not None else int(size) if size is not None else running
    if asked != running:
        raise RuntimeError(
            f"{asked} processes were asked for, but {running} would train: start CPU processes with torchrun "
            "--nproc_per_node N and device='cpu' (--device cpu), GPU processes with accelerate launch --multi_gpu"
        )


def _parent() -> list[str]:
    """The command line of the process that started this one."""
    import psutil

    try:
        return psutil.Process(os.getppid()).cmdline()
    except psutil.Error:
        return []


def _asked_of(command: Sequence[str]) -> Launch:
    """What a command line of `accelerate launch` asks for, its configuration file included."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    names = [Path(word).name for word in command]
    starts = [
        i + 1
        for i, name in enumerate(names)
        if name in ("accelerate-launch", "accelerate.commands.launch")
        or (name == "launch" and i > 0 and names[i - 1] in ("accelerate", "accelerate.commands.accelerate_cli"))
    ]
    # the launcher has already said which defaults it takes
    logging.disable(logging.WARNING)
    try:
        if not starts:
            raise ValueError("no command line of accelerate launch")
        args, *_ = _validate_launch_command(launch_command_parser().parse_args([*command[starts[0] :]]))
        return Launch(int(args.num_processes), int(args.num_machines), int(args.machine_rank or 0), bool(args.use_cpu))
    except (ValueError, TypeError, AttributeError, SystemExit) as error:
        raise RuntimeError(
            "this is one process of several that a launcher was to start (MASTER_ADDR is set, WORLD_SIZE is not): "
            "start them with torchrun --nproc_per_node N -m sa_lens train ... --device cpu, or unset MASTER_ADDR"
        ) from error
    finally:
        logging.disable(logging.NOTSET)
