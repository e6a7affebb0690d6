"""Stopping when the user or the cluster asks for it: what is raised then, and how signals are taken."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any


class Interrupted(KeyboardInterrupt):
    """Work was asked to stop and did so; the message says what is kept and how to go on."""

    def __init__(self, message: str, *, folder: Path | None = None, step: int | None = None) -> None:
        self.folder = folder
        """Where what is kept lies; None: nowhere."""
        self.step = step
        """Steps done, where the work has such."""
        super().__init__(message)


class StopRequest:
    """Whether a stop was asked for."""

    def __init__(self) -> None:
        self.made = False


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Within the context, the first SIGINT (Ctrl-C) or SIGTERM makes a stop request instead of ending the process.

    A second SIGINT raises KeyboardInterrupt at once. Outside the main thread nothing changes.
    """
    request = StopRequest()

    def ask(number: int, _frame: FrameType | None) -> None:
        if request.made and number == signal.SIGINT:
            raise KeyboardInterrupt
        request.made = True

    with _handled(ask, signal.SIGINT, signal.SIGTERM):
        yield request


@contextmanager
def terminable() -> Iterator[None]:
    """Within the context SIGTERM raises KeyboardInterrupt, as Ctrl-C does; outside the main thread nothing changes."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    with _handled(stop, signal.SIGTERM):
        yield


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], None], *numbers: int) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[int, Any] = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
