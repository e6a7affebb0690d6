"""Places where output goes: checked before the work whose result they are to hold, and without making anything."""

from __future__ import annotations

import os
from pathlib import Path

_FILES = (".html", ".htm", ".png", ".svg", ".pdf", ".csv", ".json", ".jsonl", ".txt", ".yaml", ".yml", ".pt")
"""Endings of files; `runs/lr-0.1` is a folder."""


def output_folder(folder: str | Path, *, free: bool = False) -> Path:
    """The folder, if it is one that can be written to, or can be made.

    Args:
        free: whether it must not exist yet, or be empty.

    Raises:
        ValueError: an empty name, which an unset variable leaves; it never stands for the current folder.
        NotADirectoryError: the folder, or one above it, is a file, or a new one has the ending of a file.
        FileExistsError: it must be free, and holds something.
        PermissionError: it may not be written to.
    """
    path = named_place(folder)
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{path} is a file: name a folder")
    _check_parents(path)
    if path.suffix.lower() in _FILES and not path.exists():
        raise NotADirectoryError(
            f"{path} has the ending of a file, but a folder is written: name a folder, such as {path.with_suffix('')}"
        )
    if free and path.is_dir() and any(path.iterdir()):
        raise FileExistsError(f"{path} exists and is not empty: name another folder")
    return path


def output_file(file: str | Path) -> Path:
    """The file, if it is one that can be written, over an older one or in a folder that can be made.

    Raises:
        ValueError, NotADirectoryError, PermissionError: as `output_folder`.
        IsADirectoryError: it is a folder.
    """
    path = named_place(file)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: name the file to write, such as {path / 'new'}{path.suffix}")
    _check_parents(path.parent)
    return path


def named_place(name: str | Path) -> Path:
    """The path of a place to write to.

    Raises:
        ValueError: an empty name, which an unset variable leaves; it never stands for the current folder.
    """
    if not str(name).strip():
        raise ValueError("the place to write to has an empty name: give a name, or leave it out where it has a default")
    return Path(name)


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


def _check_parents(folder: Path) -> None:
    """Checks the nearest folder that is there already, in which the others would be made."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"{there} is a file, so that nothing can be written below it: name another place")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"{there}: you may not write there; name another place")
