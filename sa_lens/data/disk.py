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


def local_path(name: str | Path, what: str) -> Path:
    """The path that a user wrote, with `~` for the home folder unless there is a file of that very name.

    Args:
        what: the setting that holds the path, for the message.

    Raises:
        ValueError: an empty name, which an unset variable leaves; it never stands for the current folder.
    """
    if not str(name).strip():
        raise ValueError(f"{what} is empty: give a name, or leave the setting out")
    path = Path(name)
    if path.exists():
        return path
    try:
        return path.expanduser()
    except RuntimeError:  # `~name` where there is no such user
        return path


def cache_folder(cache_dir: str | None) -> Path:
    """The folder for tokens on disk: `cache_dir`, else `$SA_LENS_CACHE`, else `~/.cache/sa_lens`."""
    chosen = cache_dir if cache_dir is not None else os.environ.get("SA_LENS_CACHE") or "~/.cache/sa_lens"
    return local_path(chosen, "data.cache_dir").resolve()


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
    return key_of({file.relative_to(path).as_posix(): fingerprint(file) for file in visible_files(path)})


def visible_files(folder: Path) -> list[Path]:
    """All files in a folder and its subfolders, sorted; those whose name or folder begins with a dot are left out."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    return [file for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts)]


def key_of(values: Any) -> str:
    """SHA-256 (hex) of plain nested values, the same in every process."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def seal(path: Path) -> None:
    """Records the fingerprint of a file or folder of the cache beside it; what has no record counts as not there."""
    write_atomically(_record(path), fingerprint(path))


def is_sealed(path: Path) -> bool:
    """Whether a file or folder of the cache is there, complete and unchanged since it was sealed.

    Raises:
        ValueError: its content is not what was written.
    """
    record = _record(path)
    if not path.exists() or not record.is_file():
        return False
    if record.read_text(encoding="utf-8").strip() != fingerprint(path):
        raise ValueError(f"{path} in the cache is damaged; delete it and {record.name}, they will be made again")
    return True


def _record(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


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
