"""Freed memory stays in the process where it is asked to."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from sa_lens.core import freed_memory

SCRIPT = """
import resource, torch
from contextlib import nullcontext
from sa_lens.core.freed_memory import kept_freed_memory

def faults():
    def pages():
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        before = pages()
        # 160 MB, above the size from which glibc always asks the system
        torch.ones(40_000_000)
    return pages() - before

print(faults())
with kept_freed_memory():
    print(faults())
print(faults())
with kept_freed_memory(kept=False):
    print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="without glibc nothing is set")
def test_memory_is_taken_again_without_asking_the_system() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    before, kept, after, not_kept = map(int, done.stdout.split())
    pages = 160_000_000 // 65_536
    assert kept < pages / 10
    assert min(before, after, not_kept) >= pages


def test_other_c_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("musl", "1.2"))
    monkeypatch.setattr(freed_memory, "_set", lambda *_: pytest.fail("settings were changed"))
    freed_memory._glibc.cache_clear()
    with freed_memory.kept_freed_memory():
        pass
    freed_memory._glibc.cache_clear()
