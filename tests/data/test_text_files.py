"""What a plain text file is taken for: the rule, and all that must not change it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from sa_lens.data import text_files

LISTED = "\n".join(f"Story {i}." for i in range(50)) + "\n"
SPACED = "\n\n".join(f"Story {i}\ngoes on." for i in range(50)) + "\n"
SEPARATED = "\n<|endoftext|>\n".join(f"Story {i}\n\ngoes on." for i in range(50)) + "\n"

TEXTS = {"one on each line": LISTED, "between blank lines": SPACED, "between lines <|endoftext|>": SEPARATED}

EDGES: dict[str, Callable[[str], str]] = {
    "as it is": lambda text: text,
    "no line end at the end": lambda text: text.rstrip("\n"),
    "blank line at the beginning": lambda text: "\n" + text,
    "blank lines at the end": lambda text: text + "\n\n \n",
    "carriage returns": lambda text: text.replace("\n", "\r\n") + "\r\n",
    "old carriage returns": lambda text: text.replace("\n", "\r"),
    "byte-order mark": lambda text: "\ufeff" + text,
    "two files with byte-order marks": lambda text: text.replace("\n<|endo", "\n\ufeff<|endo"),
    "spaces on blank lines": lambda text: text.replace("\n\n", "\n \t\n"),
    "spaces after separators": lambda text: text.replace("<|endoftext|>", "<|endoftext|>  "),
    "separators at the edges": lambda text: f"<|endoftext|>\n{text}<|endoftext|>\n" if "<|" in text else text,
    "a blank line in the middle": lambda text: text.replace("\nStory 25", "\n\nStory 25"),
}


def read(path: Path) -> list[str]:
    return [text for text in text_files.texts([path], "text") if text is not None and text.strip()]


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("form", TEXTS)
def test_edges_do_not_change_the_form(form: str, edge: str, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(EDGES[edge](TEXTS[form]).encode())
    assert text_files.form([path]) == form
    documents = read(path)
    assert len(documents) == 50
    assert [document.split("\n")[0].rstrip(".") for document in documents] == [f"Story {i}" for i in range(50)]
    assert "\r" not in "".join(documents)


def test_spaces_at_the_end_of_a_line_belong_to_the_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("One. \nTwo.")
    assert read(tmp_path / "a.txt") == ["One. ", "Two."]


@pytest.mark.parametrize(("lines", "form"), [(20, "between blank lines"), (21, "one on each line")])
def test_one_gap_for_every_twenty_lines(lines: int, form: str, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\n".join(["a line"] * (lines - 5) + ["", ""] + ["a line"] * 5))
    assert text_files.form([path]) == form
    assert len(read(path)) == (2 if form == "between blank lines" else lines)


def test_forms_of_several_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(LISTED)
    (tmp_path / "b.txt").write_text(SPACED)
    (tmp_path / "c.txt").touch()
    both = [tmp_path / name for name in ("a.txt", "b.txt", "c.txt")]
    assert text_files.form(both) == "one on each line, or between blank lines"
    assert len(list(text_files.texts(both, "text"))) == 100


@pytest.mark.parametrize("content", [b"One.\n\0\0\0", "One.\n".encode("utf-16-le"), b"One.\nTw\0o."])
def test_what_is_no_text_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot read .*a.txt as text: line [12] holds a NUL character"):
        read(tmp_path / "a.txt")
