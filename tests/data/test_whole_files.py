"""Whole files: nothing is left half written, and JSON is checked as it is read."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from sa_lens.data.whole_files import (
    DamagedFile,
    atomic_write,
    check_object,
    parse_json,
    read_json,
    remove_leftovers,
    replacement,
    scratch_folder,
    staged_folder,
)

KEYS = {"name": str, "count": int, "rate": float, "flag": bool}
RIGHT = {"name": "é", "count": 2, "rate": 1, "flag": True}


@pytest.mark.parametrize("prefix", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte-order mark"])
def test_a_right_file_is_read(prefix, tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(prefix + json.dumps(RIGHT, ensure_ascii=False).encode())
    assert read_json(path, remedy="", keys=KEYS) == RIGHT
    assert read_json(path, remedy="") == RIGHT


def test_surrogate_pairs_are_characters():
    assert parse_json('["\\ud83d\\ude00"]') == ["😀"]


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "Expecting value: line 1"),
        (b"{", "Expecting property name"),
        (b'{"a": 1} x', "Extra data"),
        (b"\xff\xfe\0", "byte 0 is not UTF-8"),
        ('"é"'.encode("latin-1"), "byte 1 is not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"a": 1, "b": 2, "a": 1}', "the key 'a' occurs twice"),
        (b'[{"x": {"a": 1, "a": 2}}]', "the key 'a' occurs twice"),
        (b'{"a": NaN}', "NaN is not a finite number"),
        (b"[-Infinity]", "-Infinity is not a finite number"),
        (b"[1e999]", "'1e999' is not a finite number"),
        (b"[" + b"9" * 5000 + b"]", "limit"),
        (b'["\\ud800 Lily"]', "half of a surrogate pair"),
        (b'{"\\udc00": 1}', "half of a surrogate pair"),
    ],
)
def test_damage_is_named(content, fault, tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(DamagedFile, match=re.escape(f"{path} is damaged: ") + ".*" + re.escape(fault) + ".*; do this"):
        read_json(path, remedy="do this")


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ([], "it must be an object, not []"),
        ({**RIGHT, "other": 1}, "it has the unknown key 'other'"),
        ({k: v for k, v in RIGHT.items() if k != "rate"}, "it lacks 'rate'"),
        ({**RIGHT, "name": 3}, "name must be of type str, not 3"),
        ({**RIGHT, "count": 2.0}, "count must be of type int, not 2.0"),
        ({**RIGHT, "count": True}, "count must be of type int, not True"),
        ({**RIGHT, "rate": False}, "rate must be of type float, not False"),
        ({**RIGHT, "rate": None}, "rate must be of type float, not None"),
        ({**RIGHT, "flag": 1}, "flag must be of type bool, not 1"),
        ({**RIGHT, "name": ["x" * 100]}, "name must be of type str, not ['xxx"),
    ],
)
def test_another_form_is_named(content, fault, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content))
    with pytest.raises(DamagedFile, match=re.escape(f"{path} holds no circuit: {fault}")):
        read_json(path, remedy="do this", complaint="holds no circuit", keys=KEYS)


def test_unions_optional_and_other_keys():
    check_object({"a": None}, {"a": int | None})
    check_object({"a": 1}, {"a": float | None})
    check_object({"a": 1, "b": "x"}, {"a": int}, {"b": str, "c": int})
    check_object({"a": 1, "z": "x"}, {"a": int}, other_keys=True)
    with pytest.raises(ValueError, match=r"model\.a must be of type int \| None, not 'x'"):
        check_object({"a": "x"}, {"a": int | None}, where="model.")
    with pytest.raises(ValueError, match="model lacks 'a'"):
        check_object({}, {"a": int}, where="model.")


def test_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*absent\.json"):
        read_json(tmp_path / "absent.json", remedy="")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        read_json(tmp_path, remedy="")


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
