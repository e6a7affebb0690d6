"""What becomes of the memory of tensors that are freed, on CPUs under Linux.

By default glibc returns the memory of large tensors to the system and requests it again page by page, which takes 3 to
12 % of a training step. Elsewhere than with glibc, the functions here do nothing.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

# names and numbers of <malloc.h>
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4
_MIB = 1 << 20


@cache
def _glibc() -> Any:
    """The C library, where it is glibc."""
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


@contextmanager
def kept_freed_memory() -> Iterator[None]:
    """Keeps freed memory in the process for the tensors to come, within the context, and returns it at the end.

    Afterwards glibc has the settings that it gives itself in a process that has freed a large tensor.
    """
    libc = _glibc()
    if libc is None:
        yield
        return
    _set(libc, {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: 2**31 - 1})
    try:
        yield
    finally:
        _set(libc, {_M_MMAP_MAX: 65536, _M_MMAP_THRESHOLD: 32 * _MIB, _M_TRIM_THRESHOLD: 64 * _MIB})
        libc.malloc_trim(0)


def return_freed_memory() -> None:
    """Returns memory that no tensor occupies to the system."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def _set(libc: Any, options: dict[int, int]) -> None:
    for option, value in options.items():
        libc.mallopt(option, value)
