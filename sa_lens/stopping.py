"""Stopping when the user or the cluster asks for it: the exception that is raised, and how signals are handled."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any


class Interrupted(KeyboardInterrupt):
    """Work stopped because Ctrl-C or SIGTERM asked for it; the message says what is kept and how to resume."""

    def __init__(
        self, message: str = "", *, result: Any = None, folder: Path | None = None, step: int | None = None
    ) -> None:
        self.result = result
        """The unfinished result, which `resume=` of the same function takes; None if there is none."""
        self.folder = folder
        """Folder of what is kept; None: nothing is on disk."""
        self.step = step
        """Steps done, if the work counts steps."""
        super().__init__(message)


class StopRequest:
    """Whether a stop was asked for."""

    def __init__(self) -> None:
        self.made = False

    def raise_if_made(self) -> None:
        """Raises `Interrupted` if a stop was asked for."""
        if self.made:
            raise Interrupted


@contextmanager
def stop_requests(*, at_once: bool = False) -> Iterator[StopRequest]:
    """Within the context, the first Ctrl-C or SIGTERM makes a stop request instead of ending the process.

    A second Ctrl-C raises KeyboardInterrupt. Outside the main thread nothing changes.

    Args:
        at_once: raise KeyboardInterrupt on the first SIGTERM already, as Ctrl-C does by itself.
    """
    request = StopRequest()

    def handle(number: int, _frame: FrameType | None) -> None:
        if at_once or (request.made and number == signal.SIGINT):
            raise KeyboardInterrupt
        request.made = True

    numbers = [signal.SIGTERM] if at_once else [signal.SIGINT, signal.SIGTERM]
    in_main_thread = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, handle) for number in numbers if in_main_thread}
    try:
        yield request
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
