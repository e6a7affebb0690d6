"""The cache of prepared texts: its folder, its file names, and files that one process makes while others wait."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sa_lens.data.whole_files import replacement, staged_folder
from sa_lens.places import local_path


def cache_folder(cache_dir: str | None) -> Path:
    """Returns the folder for tokens on disk: `cache_dir`, else `$SA_LENS_CACHE`, else `~/.cache/sa_lens`."""
    chosen = cache_dir if cache_dir is not None else os.environ.get("SA_LENS_CACHE") or "~/.cache/sa_lens"
    return local_path(chosen, "data.cache_dir").resolve()


def fingerprint(path: str | Path) -> str:
    """Returns the SHA-256 (hex) of a file's bytes, or of names and bytes of all files of a folder except hidden ones.

    Raises:
        FileNotFoundError: no such file or folder.
    """
    path = Path(path)
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    if not path.is_dir():
        raise FileNotFoundError(f"no file or folder {path}")
    return key_of({file.relative_to(path).as_posix(): fingerprint(file) for file in visible_files(path)})


def visible_files(folder: Path) -> list[Path]:
    """Returns all files in a folder and its subfolders, sorted, without hidden files and folders."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    return [file for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts)]


def key_of(values: Any) -> str:
    """Returns the SHA-256 (hex) of plain nested values, the same in every process."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def make_once(path: Path, make: Callable[[], object]) -> None:
    """Makes a file or folder of the cache unless it exists; of several processes one makes it and the others wait.

    Its fingerprint is recorded beside it when it is complete; without a record it counts as missing.

    Args:
        make: writes `path`.

    Raises:
        ValueError: the content of the file or folder is not what was written.
    """
    record = path.with_name(f"{path.name}.sha256")

    def exists() -> bool:
        if not path.exists() or not record.is_file():
            return False
        if record.read_text(encoding="utf-8").strip() != fingerprint(path):
            raise ValueError(f"{path} in the cache is damaged; delete it and {record.name}, they will be made again")
        return True

    if not exists():
        with hold_lock(path):
            if not exists():
                make()
                with new_file(record) as temporary:
                    temporary.write_text(fingerprint(path), encoding="utf-8")


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path` that replaces `path` at the end.

    Raises:
        OSError: the folder cannot be written; the message says which setting names another.
    """
    with _explain_errors(path), replacement(path) as temporary:
        yield temporary


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yields an empty temporary folder that becomes `path` at the end; raises as `new_file` does."""
    with _explain_errors(path), staged_folder(path) as temporary:
        yield temporary


@contextlib.contextmanager
def hold_lock(path: Path) -> Iterator[None]:
    """Holds the inter-process lock that belongs to `path`, waiting for it as long as it takes."""
    from filelock import FileLock

    with _explain_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.parent / f".{path.name}.lock")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _explain_errors(path: Path) -> Iterator[None]:
    """Adds the cache file and the remedy to an error of the operating system that concerns it."""
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
