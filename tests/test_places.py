"""Where output goes is checked before the work: nothing is made, and whatever is in the way is named."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sa_lens.catalogue import results_folder
from sa_lens.places import output_file, output_folder


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with `file`, the empty folder `empty` and the folder `full`."""
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("x")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_what_can_be_written_is_returned_and_nothing_is_made(place: Path) -> None:
    for name in ("empty", "full", "new", "new/below/that", str(place / "new"), ".", "lr-0.1", "new.html/below"):
        assert output_folder(name) == Path(name)
    assert output_folder("empty", free=True) == Path("empty")
    for name in ("file", "new.html", "new/below/that.html", "full/a"):
        assert output_file(name) == Path(name)
    assert sorted(path.name for path in place.rglob("*")) == ["a", "empty", "file", "full"]


@pytest.mark.parametrize("name", ["", " ", "\t"])
def test_an_empty_name_is_never_the_current_folder(place: Path, name: str) -> None:
    for check in (output_folder, output_file):
        with pytest.raises(ValueError, match="the place to write to has an empty name"):
            check(name)


def test_what_cannot_be_written_is_named(place: Path) -> None:
    with pytest.raises(NotADirectoryError, match="file is a file: name a folder"):
        output_folder("file")
    for name in ("new.html", "below/new.CSV"):
        with pytest.raises(NotADirectoryError, match=r"(?i)new\.(html|csv) has the ending of a file.* such as .*new$"):
            output_folder(name)
    with pytest.raises(IsADirectoryError, match=r"full is a folder: name the file to write"):
        output_file("full")
    for check in (output_folder, output_file):
        for name in ("file/a", "file/a/b", str(place / "file" / "a.html")):
            with pytest.raises(NotADirectoryError, match=r"file is a file, so that nothing can be written below it"):
                check(name)
    with pytest.raises(FileExistsError, match="full exists and is not empty: name another folder"):
        output_folder("full", free=True)


def test_a_folder_without_permission_is_named(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "full")
    for check in (output_folder, output_file):
        with pytest.raises(PermissionError, match="full: you may not write there; name another place"):
            check("full/new/a")
        check("empty/new/a")


def test_results_never_take_the_place_of_the_name_of_a_model(place: Path) -> None:
    """A folder `owner/name` would be loaded in place of the Hub's model of that id from then on."""
    assert results_folder("full") == Path("full")
    assert results_folder("owner/name") == Path("runs/owner--name")
    assert results_folder("stories-local") == Path("runs/stories-local")
