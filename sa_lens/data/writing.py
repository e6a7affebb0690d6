"""Writing files and folders so that a reader, or a power cut, finds the old or the new content and never a part."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacement(path: Path) -> Iterator[Path]:
    """Yields a temporary name beside `path`; what stands there at the end becomes `path`, if nothing was raised."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        _finish(temporary)
        temporary.replace(path)
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write(path: str | Path, write: bytes | Callable[[Path], object]) -> None:
    """Writes a file.

    Args:
        write: the content, or a function that writes it to the temporary path it is given.
    """
    with replacement(Path(path)) as temporary:
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
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file: give the name of a folder")
    exists = folder.is_dir()
    # within an existing folder, which may be a mount point that files cannot be moved into
    place = folder if exists else folder.parent
    place.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=place, prefix=f".{folder.name}."))
    try:
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
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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
