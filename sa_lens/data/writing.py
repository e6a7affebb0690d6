"""Writing files and folders so that a reader, or a power cut, finds the old or the new content and never a part.

Everything is written under a temporary name first, `.NAME.xxxxxxxx.sa_lens-part`. A process that is killed leaves it
behind; whoever writes beside it next removes it. A temporary name is locked while its process lives, so that those of
other live processes are left alone, and nothing without this ending is ever removed.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sa_lens.places import named_place

_PART = ".sa_lens-part"
_TEMPORARY = re.compile(rf"\..+\.[a-z0-9_]{{8}}{re.escape(_PART)}")


@contextmanager
def replacement(path: Path) -> Iterator[Path]:
    """Yields a temporary name beside `path`; what stands there at the end becomes `path`, if nothing was raised."""
    with _temporary(path.parent, path.name, folder=False) as temporary:
        yield temporary
        _finish(temporary)
        temporary.replace(path)
        _sync_folder(path.parent)


def atomic_write(path: str | Path, write: bytes | Callable[[Path], object]) -> None:
    """Writes a file.

    Args:
        write: the content, or a function that writes it to the temporary path it is given.
    """
    with replacement(named_place(path)) as temporary:
        if isinstance(write, bytes):
            temporary.write_bytes(write)
        else:
            write(temporary)


@contextmanager
def staged_folder(folder: str | Path, last: str = "") -> Iterator[Path]:
    """Yields an empty temporary folder whose files become those of `folder` at the end, if nothing was raised.

    A new folder appears under its name only when complete. In an existing one the files replace those of the same name
    after all of them have been written; other files are left alone.

    Args:
        last: name of the file that is replaced last.

    Raises:
        NotADirectoryError: the folder's name is a file.
        OSError: a full disk or a folder that cannot be written; then everything is as it was.
    """
    folder = named_place(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file: give the name of a folder")
    exists = folder.is_dir()
    # within an existing folder, which may be a mount point that files cannot be moved into
    place = folder if exists else folder.parent
    place.mkdir(parents=True, exist_ok=True)
    with _temporary(place, folder.name, folder=True) as temporary:
        yield temporary
        files = sorted(temporary.iterdir(), key=lambda file: (file.name == last, file.name))
        for file in files:
            _finish(file)
        if exists:
            for file in files:
                file.replace(folder / file.name)
        else:
            temporary.chmod(0o777 & ~_umask())
            temporary.rename(folder)
        _sync_folder(place)


@contextmanager
def scratch_folder(place: Path) -> Iterator[Path]:
    """Yields an empty folder in `place` that is removed at the end, or after a kill by whoever needs one next."""
    place.mkdir(parents=True, exist_ok=True)
    with _temporary(place, "scratch", folder=True) as temporary:
        yield temporary


def remove_folder(folder: Path) -> None:
    """Removes a folder; what is left of it if the process is killed meanwhile has a temporary name and goes later."""
    gone = folder.with_name(f".{folder.name}.removing{_PART}")
    folder.rename(gone)
    shutil.rmtree(gone)


def remove_leftovers(folder: str | Path) -> None:
    """Removes the temporary files and folders that killed processes left in a folder; those of live ones stay."""
    with contextlib.suppress(OSError):
        for entry in list(os.scandir(folder)):
            if _TEMPORARY.fullmatch(entry.name) and not entry.is_symlink():
                lock = _lock(Path(entry.path), wait=False)
                if lock is not None:
                    _remove(Path(entry.path))
                    os.close(lock)


@contextmanager
def _temporary(place: Path, name: str, *, folder: bool) -> Iterator[Path]:
    """Yields an empty temporary file or folder in `place`, which is gone or renamed at the end."""
    remove_leftovers(place)
    while True:
        prefix = f".{name[:50]}."
        if folder:
            temporary = Path(tempfile.mkdtemp(dir=place, prefix=prefix, suffix=_PART))
        else:
            descriptor, made = tempfile.mkstemp(dir=place, prefix=prefix, suffix=_PART)
            os.close(descriptor)
            temporary = Path(made)
        lock = _lock(temporary, wait=True)
        # another process may have removed it in the moment before it was locked
        if temporary.exists():
            break
        if lock is not None:
            os.close(lock)
    try:
        yield temporary
    finally:
        _remove(temporary)
        if lock is not None:
            os.close(lock)


def _lock(path: Path, *, wait: bool) -> int | None:
    """A descriptor that holds the lock of a temporary file or folder until it is closed, or until its process dies.

    None if another process holds it, or where the system has no such locks.
    """
    if os.name != "posix":
        return None
    import fcntl

    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _remove(temporary: Path) -> None:
    if temporary.is_dir():
        shutil.rmtree(temporary, ignore_errors=True)
    else:
        temporary.unlink(missing_ok=True)


def _finish(file: Path) -> None:
    """Puts a written file on the disk, with the permissions of a file made in the ordinary way."""
    with file.open("rb+") as opened:
        os.fsync(opened.fileno())
    file.chmod(0o666 & ~_umask())


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def _sync_folder(folder: Path) -> None:
    """Makes renames in a folder last through a power cut, where the system can."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
