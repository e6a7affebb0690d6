"""Freed memory stays in the process where it is asked to."""

from __future__ import annotations

import platform
import subprocess
import sys
import threading

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
try:
    with kept_freed_memory():
        with kept_freed_memory(kept=False), kept_freed_memory():
            print(faults())
        print(faults())
        raise KeyboardInterrupt
except KeyboardInterrupt:
    print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="without glibc nothing is set")
def test_memory_is_taken_again_without_asking_the_system() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    before, kept, after, not_kept, nested, outer, interrupted = map(int, done.stdout.split())
    pages = 160_000_000 // 65_536
    assert max(kept, nested, outer) < pages / 10
    assert min(before, after, not_kept, interrupted) >= pages


def test_memory_is_kept_until_the_last_thread_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    class Library:
        def malloc_trim(self, _: int) -> None:
            pass

    kept: list[bool] = []
    monkeypatch.setattr(freed_memory, "_glibc", Library)
    monkeypatch.setattr(freed_memory, "_set", lambda _, options: kept.append(options[-4] == 0))
    inside, leave = threading.Event(), threading.Event()

    def stay() -> None:
        with freed_memory.kept_freed_memory():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=stay)
    with freed_memory.kept_freed_memory():
        thread.start()
        assert inside.wait(10)
    assert kept == [True]
    leave.set()
    thread.join()
    assert kept == [True, False]


def test_other_c_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("musl", "1.2"))
    monkeypatch.setattr(freed_memory, "_set", lambda *_: pytest.fail("settings were changed"))
    freed_memory._glibc.cache_clear()
    with freed_memory.kept_freed_memory():
        pass
    freed_memory._glibc.cache_clear()


def test_what_is_free_is_returned_within_a_context_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Library:
        trimmed = 0

        def malloc_trim(self, _: int) -> None:
            Library.trimmed += 1

    monkeypatch.setattr(freed_memory, "_glibc", Library)
    monkeypatch.setattr(freed_memory, "_set", lambda *_: None)
    freed_memory.return_freed_memory()
    assert Library.trimmed == 0
    with freed_memory.kept_freed_memory():
        before = Library.trimmed
        freed_memory.return_freed_memory()
        assert Library.trimmed == before + 1
    after = Library.trimmed
    freed_memory.return_freed_memory()
    assert Library.trimmed == after
