"""Whole files: written so that a reader finds the old or the new content and never a part, and JSON read with checks.

Everything is written under a temporary name first, `.NAME.xxxxxxxx.sa_lens-part`, synced, and renamed. A process that
is killed leaves its temporary file behind; whoever writes beside it next removes it. A temporary name is locked while
its process lives, so that those of other live processes are left alone, and nothing else is ever removed.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, get_args

from sa_lens.config import shown
from sa_lens.places import named_place

_PART = ".sa_lens-part"
_TEMPORARY = re.compile(rf"\..+\.[a-z0-9_]{{8}}{re.escape(_PART)}")


@contextmanager
def replacement(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path` that replaces `path` at the end, unless an error is raised."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _temporary(path.parent, path.name, folder=False) as temporary:
        yield temporary
        _sync_file(temporary)
        temporary.replace(path)
        _sync_folder(path.parent)


def atomic_write(path: str | Path, write: str | bytes | Callable[[Path], object]) -> None:
    """Writes a file as a whole: a reader sees either the old or the new content.

    Args:
        write: the content, or a function that writes it to the temporary path that it is given.
    """
    with replacement(named_place(path)) as temporary:
        if isinstance(write, str | bytes):
            temporary.write_bytes(write.encode() if isinstance(write, str) else write)
        else:
            write(temporary)


@contextmanager
def staged_folder(folder: str | Path, last: str = "") -> Iterator[Path]:
    """Yields an empty temporary folder whose files are moved to `folder` at the end, unless an error is raised.

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
            _sync_file(file)
        if exists:
            for file in files:
                file.replace(folder / file.name)
        else:
            temporary.chmod(0o777 & ~_umask())
            temporary.rename(folder)
        _sync_folder(place)


@contextmanager
def scratch_folder(place: Path) -> Iterator[Path]:
    """Yields an empty folder in `place` that is removed at the end; after a kill the next user removes it."""
    place.mkdir(parents=True, exist_ok=True)
    with _temporary(place, "scratch", folder=True) as temporary:
        yield temporary


def remove_folder(folder: Path) -> None:
    """Removes a folder; if the process is killed meanwhile, the rest has a temporary name and is removed later."""
    gone = folder.with_name(f".{folder.name}.removing{_PART}")
    folder.rename(gone)
    shutil.rmtree(gone)


def remove_leftovers(folder: str | Path) -> None:
    """Removes temporary files and folders of killed processes from a folder, but not those of live ones."""
    with contextlib.suppress(OSError):
        for entry in list(os.scandir(folder)):
            if _TEMPORARY.fullmatch(entry.name) and not entry.is_symlink():
                lock = _lock(Path(entry.path), wait=False)
                if lock is not None:
                    _remove(Path(entry.path))
                    os.close(lock)


@contextmanager
def _temporary(place: Path, name: str, *, folder: bool) -> Iterator[Path]:
    """Yields an empty temporary file or folder in `place`, which is removed or renamed at the end."""
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
    """Returns a descriptor that holds the lock of a temporary file or folder until it is closed or its process dies.

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


def _sync_file(file: Path) -> None:
    """Writes a file through to the disk, and gives it the permissions of an ordinary file."""
    with file.open("rb+") as opened:
        os.fsync(opened.fileno())
    file.chmod(0o666 & ~_umask())


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def _sync_folder(folder: Path) -> None:
    """Makes renames in a folder survive a power cut, if the system can."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# ----------------------------------------------------------------------------------------------------------- JSON files


class DamagedFile(ValueError):
    """A file has another content than it should; the message names the file, the fault and the remedy."""


def read_json(
    path: str | Path,
    *,
    remedy: str,
    complaint: str = "is damaged",
    keys: Mapping[str, Any] | None = None,
    other_keys: bool = False,
) -> Any:
    """Returns the content of a JSON file after checks.

    Duplicate keys, numbers that are not finite, text that is not UTF-8 and lone surrogates are refused everywhere.

    Args:
        remedy: what to do about a damaged file, in the imperative: "delete it, it will be made again".
        complaint: what the message says of the file before the fault.
        keys: the keys that the object at the top must have, with the type of their values; None: the content may be of
            any form. `float` admits whole numbers too; Boolean values are `bool` alone.
        other_keys: whether it may have further keys.

    Raises:
        FileNotFoundError: no such file.
        IsADirectoryError: a folder.
        DamagedFile: a file that is not JSON, or whose content is of another form.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, not a JSON file: give the name of the file")
    if not path.exists():
        raise FileNotFoundError(f"no file {path}")
    try:
        content = parse_json(path.read_bytes())
        if keys is not None:
            check_object(content, keys, other_keys=other_keys)
    except ValueError as error:
        raise DamagedFile(f"{path} {complaint}: {error}; {remedy}") from error
    return content


def parse_json(data: bytes | str) -> Any:
    """Returns the content of a JSON document; duplicate keys, infinite numbers and invalid text are refused.

    Raises:
        ValueError: the document is not valid; the message does not name the file.
    """
    try:
        text = data if isinstance(data, str) else data.decode("utf-8-sig")
        content = json.loads(
            text, parse_constant=_refuse_constant, parse_float=_read_finite, object_pairs_hook=_refuse_duplicates
        )
        if "\\u" in text:
            json.dumps(content, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8 text") from error
    except UnicodeEncodeError as error:
        raise ValueError("it holds half of a surrogate pair, which is no character") from error
    except json.JSONDecodeError as error:
        raise ValueError(str(error)) from error
    except RecursionError as error:
        raise ValueError("its lists or objects are nested too deeply") from error
    return content


def check_object(
    content: Any,
    keys: Mapping[str, Any],
    optional: Mapping[str, Any] | None = None,
    *,
    other_keys: bool = False,
    where: str = "",
) -> None:
    """Checks that a value read from JSON is an object with these keys and types; see `read_json`.

    Args:
        where: the path of the value in the file, with a dot at its end, such as "model."; empty for the whole file.

    Raises:
        ValueError: the value has another form; the message names the first fault, but not the file.
    """
    name = where.rstrip(".") or "it"
    if not isinstance(content, dict):
        raise ValueError(f"{name} must be an object, not {shown(content)}")
    missing = [key for key in keys if key not in content]
    if missing:
        raise ValueError(f"{name} lacks {missing[0]!r}")
    known = {**keys, **(optional or {})}
    unknown = [key for key in content if key not in known]
    if unknown and not other_keys:
        raise ValueError(f"{name} has the unknown key {unknown[0]!r}")
    for key, kind in known.items():
        if key in content and not has_type(content[key], kind):
            expected = kind.__name__ if isinstance(kind, type) else str(kind)
            raise ValueError(f"{where}{key} must be of type {expected}, not {shown(content[key])}")


def has_type(value: Any, kind: Any) -> bool:
    """Returns whether a JSON value is of a type; whole numbers count as `float`, Boolean values only as `bool`."""
    kinds = get_args(kind) or (kind,)
    if isinstance(value, bool):
        return bool in kinds or object in kinds
    return isinstance(value, kind) or (isinstance(value, int) and float in kinds)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a finite number")


def _read_finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{shown(text)} is not a finite number")
    return number


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r} occurs twice")
    return content
