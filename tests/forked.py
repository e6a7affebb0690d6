"""Child processes that start in milliseconds: training that may be killed or spread over several, kernels of notebooks.

They are forked from a server that has imported everything and computed nothing.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

IMPORTED = ("sa_lens.training", "sa_lens.core.fused", "sa_lens.circuits", "sa_lens.units", "sa_lens.sae", "accelerate")
"""What the server imports, with all that these import. Without plotly, which asks at its import whether a kernel
shows its figures."""

CONTEXT = multiprocessing.get_context("forkserver")


def start(function: Callable[..., object], *arguments: Any) -> Any:
    """Starts `function` in a child with one thread; returns the process."""
    CONTEXT.set_forkserver_preload([*IMPORTED, "tokenizers", "ipykernel.kernelapp"])
    # the server reads both when it imports torch and tqdm; a notebook's own TQDM_DISABLE would come too late
    with mock.patch.dict(os.environ, {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}):
        process = CONTEXT.Process(target=function, args=arguments)
        process.start()
    return process


def modules_after_import(*names: str) -> set[str]:
    """Names of all modules of a process that has imported these, and what the server has, and nothing else."""
    receiver, sender = CONTEXT.Pipe(duplex=False)
    process = start(_send_modules, sender, names)
    modules = receiver.recv()
    process.join()
    return set(modules)


def _send_modules(sender: Any, names: tuple[str, ...]) -> None:
    for name in names:
        importlib.import_module(name)
    sender.send(list(sys.modules))


def execute(notebook: Any, folder: Path, environment: Mapping[str, str], *, timeout: int = 300) -> None:
    """Runs a notebook from top to bottom in a kernel of its own and keeps the outputs in it.

    Args:
        folder: the kernel's working directory.
        environment: variables that the kernel sees beside those of the tests.
        timeout: seconds that a cell may take.
    """
    from jupyter_client.connect import write_connection_file
    from jupyter_client.manager import AsyncKernelManager
    from nbclient import NotebookClient

    class Kernel(AsyncKernelManager):
        """The forked process, as the manager of a kernel that is already there."""

        has_kernel = True

        async def _async_is_alive(self) -> bool:
            return process.is_alive()

        is_alive = _async_is_alive  # type: ignore[assignment]

    # a short path, as a socket's may have about a hundred characters
    with tempfile.TemporaryDirectory() as short:
        connection, _ = write_connection_file(f"{short}/kernel.json", ip=f"{short}/socket", transport="ipc")
        process = start(_run_kernel, connection, folder, dict(environment))
        try:
            manager = Kernel(owns_kernel=False)
            manager.load_connection_file(connection)
            NotebookClient(notebook, km=manager, timeout=timeout).execute(cleanup_kc=True)
        finally:
            process.kill()
            process.join()


def _run_kernel(connection: str, folder: Path, environment: dict[str, str]) -> None:
    from ipykernel.kernelapp import IPKernelApp

    os.environ.update(environment)
    os.chdir(folder)
    server = f"--IPKernelApp.parent_handle={os.getppid()}"  # the kernel dies with it
    IPKernelApp.launch_instance(["-f", connection, server, "--HistoryManager.hist_file=:memory:"])
