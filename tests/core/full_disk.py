"""A disk that is full, for tests of what is left behind."""

from __future__ import annotations

import resource
import signal
from contextlib import contextmanager


@contextmanager
def full_disk(bytes_left: int):
    """No file may grow beyond so many bytes, as if the disk had no more."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_left, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
