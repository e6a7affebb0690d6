"""Temporary files: those of killed processes are removed, and nothing else."""

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from sa_lens.data.writing import atomic_write, remove_leftovers, replacement, scratch_folder, staged_folder


def killed(write: Callable[[], object]) -> None:
    """Runs a function in another process, which is killed in the middle of it."""
    process = multiprocessing.get_context("fork").Process(target=write)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def kill(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_the_next_writer_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    killed(lambda: atomic_write(tmp_path / "file", kill))
    assert len(list(tmp_path.iterdir())) == 1
    atomic_write(tmp_path / "other", b"content")
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


@pytest.mark.parametrize("exists", [False, True])
def test_folders_too(exists: bool, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    if exists:
        folder.mkdir()

    def write() -> None:
        with staged_folder(folder) as temporary:
            (temporary / "large").write_bytes(b"0" * 1000)
            kill()

    killed(write)
    assert len(list(tmp_path.rglob("large"))) == 1
    with staged_folder(folder) as temporary:
        (temporary / "file").write_text("content")
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "file"]


def test_a_live_process_keeps_its_temporary_files(tmp_path: Path) -> None:
    with replacement(tmp_path / "file") as temporary, staged_folder(tmp_path / "folder") as folder:
        temporary.write_bytes(b"half")
        (folder / "half").write_bytes(b"half")
        remove_leftovers(tmp_path)
        atomic_write(tmp_path / "file", b"another writer")
        assert temporary.read_bytes() == (folder / "half").read_bytes() == b"half"
    assert (tmp_path / "file").read_bytes() == b"half"


@pytest.mark.parametrize("name", [".file.abcdefgh", "file.abcdefgh.sa_lens-part", ".sa_lens-part", ".notes", "state"])
def test_nothing_else_is_ever_removed(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_text("mine")
    (tmp_path / ".link.abcdefgh.sa_lens-part").symlink_to(tmp_path / "elsewhere")
    atomic_write(tmp_path / "other", b"content")
    assert (tmp_path / name).read_text() == (tmp_path / "elsewhere" / "file").read_text() == "mine"


def test_very_long_names(tmp_path: Path) -> None:
    name = "é" * 120
    atomic_write(tmp_path / name, b"content")
    assert (tmp_path / name).read_bytes() == b"content"


def test_a_folder_that_is_not_there_holds_no_leftovers(tmp_path: Path) -> None:
    remove_leftovers(tmp_path / "missing")


def test_scratch_folders_go_with_their_process_or_the_next_one(tmp_path: Path) -> None:
    def write() -> None:
        with scratch_folder(tmp_path / "place") as folder:
            (folder / "large").write_bytes(b"0" * 1000)
            kill()

    killed(write)
    with scratch_folder(tmp_path / "place") as folder:
        assert list(folder.parent.iterdir()) == [folder]
    assert list((tmp_path / "place").iterdir()) == []
