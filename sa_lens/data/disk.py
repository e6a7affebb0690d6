"""Files in the cache: where it is, fingerprints by content, and writing so that a file is either whole or not there."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sa_lens.data.writing import replacement, staged_folder


def cache_folder(cache_dir: str | None) -> Path:
    """The folder for tokens on disk: `cache_dir`, else `$SA_LENS_CACHE`, else `~/.cache/sa_lens`."""
    chosen = cache_dir or os.environ.get("SA_LENS_CACHE") or "~/.cache/sa_lens"
    return Path(chosen).expanduser().resolve()


def fingerprint(path: str | Path) -> str:
    """SHA-256 (hex) of a file's bytes, or of the names and bytes of all files of a folder, hidden ones left out.

    Raises:
        FileNotFoundError: no such file or folder.
    """
    path = Path(path)
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    if not path.is_dir():
        raise FileNotFoundError(f"no file or folder {path}")
    files = (p for p in sorted(path.rglob("*")) if p.is_file())
    named = {p.relative_to(path).as_posix(): p for p in files}
    visible = {name: p for name, p in named.items() if not any(part.startswith(".") for part in name.split("/"))}
    return key_of({name: fingerprint(p) for name, p in visible.items()})


def key_of(values: Any) -> str:
    """SHA-256 (hex) of plain nested values, the same in every process."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file, whole or not at all.

    Raises:
        OSError: the folder cannot be written; the message says which setting names another.
    """
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yields a temporary name beside `path`; what stands there at the end becomes `path`.

    Raises:
        OSError: the folder cannot be written; the message says which setting names another.
    """
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacement(path) as temporary:
            yield temporary


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yields an empty temporary folder that becomes `path` at the end.

    Raises:
        OSError: the folder cannot be written; the message says which setting names another.
    """
    with explained(path), staged_folder(path) as temporary:
        yield temporary


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the inter-process lock that belongs to `path`, waiting for it as long as it takes."""
    from filelock import FileLock

    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.parent / f".{path.name}.lock")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Names the cache file and the way out in an operating-system error that concerns it; others pass as they are."""
    try:
        yield
    except OSError as error:
        blamed = Path(error.filename) if isinstance(error.filename, str) else None
        ours = blamed is not None and (blamed.is_relative_to(path.parent) or path.is_relative_to(blamed))
        if not ours and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        raise type(error)(
            error.errno,
            f"{error.strerror}: cannot write the cache file {path}; name a folder with room that you may write in "
            "data.cache_dir or $SA_LENS_CACHE",
        ) from error
