"""Every kind of source gives the same documents, and bad ones are refused with the way out."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest

from sa_lens.data import fingerprint
from sa_lens.data.sources import Source, open_source, stories_source

TEXTS = ["One day, Tim\nsaw a cat.", "Zoë said “hi” 🐈.", "The end."]


def opened(source: Path | str, cache: Path, **options: Any) -> Source:
    settings: dict[str, Any] = {"column": "text", "split": None, "max_documents": None, "streaming": False}
    return open_source(str(source), **{**settings, **options}, cache=cache, progress=False)


def write_parquet(path: Path, texts: list[str | None], column: str = "text") -> None:
    datasets.Dataset.from_dict({column: texts, "length": [len(text or "") for text in texts]}).to_parquet(path)


def write_jsonl(path: Path, texts: list[str | None]) -> None:
    path.write_text("".join(json.dumps({"text": text, "n": 1}) + "\n" for text in texts), encoding="utf-8")


def write_arrow(path: Path, texts: list[str | None]) -> None:
    import pyarrow as pa

    table = pa.table({"text": texts})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


def write_txt(path: Path, texts: list[str | None]) -> None:
    path.write_text("\n<|endoftext|>\n".join(text or "" for text in texts) + "\n", encoding="utf-8")


WRITERS: dict[str, Callable[[Path, list[str | None]], None]] = {
    "a.parquet": write_parquet,
    "a.jsonl": write_jsonl,
    "a.arrow": write_arrow,
    "a.txt": write_txt,
}


@pytest.fixture(autouse=True)
def _quiet_datasets() -> Iterator[None]:
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_gives_its_documents_again_and_again(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name, [TEXTS[0], "", "  \n ", *TEXTS[1:]])
    source = opened(tmp_path / name, tmp_path)
    assert list(source.read()) == TEXTS
    assert list(source.read()) == TEXTS


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.arrow"])
def test_missing_values_are_left_out(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name, [None, *TEXTS])
    assert list(opened(tmp_path / name, tmp_path).read()) == TEXTS


def test_names_with_wildcard_characters(tmp_path: Path) -> None:
    folder = tmp_path / "run [1] * ?"
    folder.mkdir()
    write_parquet(folder / "a[b].parquet", list(TEXTS))
    assert list(opened(folder / "a[b].parquet", tmp_path).read()) == TEXTS


@pytest.mark.parametrize(
    ("content", "documents"),
    [
        ("a\nb\n<|endoftext|>\n\nc\n<|endoftext|>\n", ["a\nb", "c"]),
        ("a\nb\n\n\nc\n", ["a\nb", "c"]),
        ("a\nb\nc", ["a", "b", "c"]),
        ("a\r\nb\r\n", ["a", "b"]),
        ("just one", ["just one"]),
    ],
)
def test_documents_of_a_txt_file(content: str, documents: list[str], tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(content.encode())
    assert list(opened(path, tmp_path).read()) == documents


def test_a_json_array(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": text} for text in TEXTS]))
    assert list(opened(path, tmp_path).read()) == TEXTS


def test_max_documents_counts_documents_with_text(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["", *TEXTS])
    assert list(opened(tmp_path / "a.jsonl", tmp_path, max_documents=2).read()) == TEXTS[:2]


def test_splits_of_a_folder_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    (folder / "valid").mkdir(parents=True)
    write_jsonl(folder / "train-1.jsonl", [TEXTS[1]])
    write_jsonl(folder / "train-0.jsonl", [TEXTS[0]])
    write_jsonl(folder / "valid" / "0.jsonl", [TEXTS[2]])
    (folder / "README.md").write_text("not data")
    assert list(opened(folder, tmp_path, split="train").read()) == TEXTS[:2]
    assert list(opened(folder, tmp_path, split="validation").read()) == TEXTS[2:]
    assert list(opened(folder, tmp_path).read()) == TEXTS[2:], "unnamed: the validation split"
    with pytest.raises(ValueError, match="no split 'test'; its splits: 'train', 'validation'"):
        opened(folder, tmp_path, split="test")


def test_folders_written_by_save_to_disk(tmp_path: Path) -> None:
    train, test = (datasets.Dataset.from_dict({"text": part}) for part in (TEXTS[:2], TEXTS[2:]))
    train.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(tmp_path / "two")
    assert list(opened(tmp_path / "one", tmp_path, split="train").read()) == TEXTS[:2]
    assert list(opened(tmp_path / "two", tmp_path, split="test").read()) == TEXTS[2:]
    with pytest.raises(ValueError, match="no split 'validation'"):
        list(opened(tmp_path / "two", tmp_path, split="validation").read())


def test_keys_follow_content_and_settings(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", list(TEXTS))
    write_jsonl(tmp_path / "b.jsonl", list(TEXTS))
    write_jsonl(tmp_path / "c.jsonl", [*TEXTS, "more"])
    key = opened(tmp_path / "a.jsonl", tmp_path).fingerprint
    assert opened(tmp_path / "b.jsonl", tmp_path).fingerprint == key
    assert opened(tmp_path / "c.jsonl", tmp_path).fingerprint != key
    assert opened(tmp_path / "a.jsonl", tmp_path, max_documents=2).fingerprint != key
    assert opened(tmp_path / "a.jsonl", tmp_path, column="other").fingerprint != key


def test_fingerprint_of_files_and_folders(tmp_path: Path) -> None:
    folder = tmp_path / "f"
    folder.mkdir()
    (folder / "x").write_text("1")
    before = fingerprint(folder)
    (folder / ".hidden").write_text("2")
    assert fingerprint(folder) == before
    (folder / "x").rename(folder / "y")
    assert fingerprint(folder) != before
    assert fingerprint(folder / "y") == "6b86b273ff34fce19d6b804eff5a3f5747ada4eaa22f1d49c01e52ddb7875b4b"  # sha256sum
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        fingerprint(tmp_path / "missing")


@pytest.mark.parametrize("name", ["missing.parquet", "./missing", "/missing/folder", "~/missing", "a/b/c"])
def test_missing_files_are_not_taken_for_datasets(name: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        opened(name, tmp_path)


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.arrow"])
def test_a_wrong_column_names_the_columns(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name, list(TEXTS))
    with pytest.raises(ValueError, match=r"has no column 'story'; its columns: 'text'"):
        list(opened(tmp_path / name, tmp_path, column="story").read())


def test_plain_text_has_one_column(tmp_path: Path) -> None:
    write_txt(tmp_path / "a.txt", list(TEXTS))
    with pytest.raises(ValueError, match="is plain text and has no column 'story'"):
        opened(tmp_path / "a.txt", tmp_path, column="story")


def test_a_column_without_text(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", list(TEXTS))
    with pytest.raises(ValueError, match=r"column 'length' of .* holds int, not text"):
        list(opened(tmp_path / "a.parquet", tmp_path, column="length").read())


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.arrow", "a.txt"])
def test_damaged_files_are_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"\xff\xfe{ this is neither")
    with pytest.raises(ValueError, match=f"cannot read .*{name}"):
        list(opened(tmp_path / name, tmp_path).read())


@pytest.mark.parametrize("name", WRITERS)
def test_empty_files_are_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match=f"{name} is empty"):
        list(opened(tmp_path / name, tmp_path).read())


def test_unknown_kinds_and_mixtures_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.docx").write_text("x")
    with pytest.raises(ValueError, match=r"unknown kind of file '.docx'; known: .parquet"):
        opened(tmp_path / "a.docx", tmp_path)
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(FileNotFoundError, match="holds no file of a known kind"):
        opened(folder, tmp_path)
    write_txt(folder / "a.txt", list(TEXTS))
    write_jsonl(folder / "a.jsonl", list(TEXTS))
    with pytest.raises(ValueError, match="mixes kinds of files"):
        opened(folder, tmp_path)


@pytest.mark.parametrize("name", WRITERS)
def test_local_files_need_no_network(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        pytest.fail("the network was asked")

    WRITERS[name](tmp_path / name, list(TEXTS))
    for place in ("socket.getaddrinfo", "socket.socket.connect"):
        monkeypatch.setattr(place, refuse)
    monkeypatch.setattr("datasets.load.get_session", refuse)
    counting = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS
    assert list(opened(tmp_path / name, tmp_path).read()) == TEXTS
    assert counting == datasets.config.HF_UPDATE_DOWNLOAD_COUNTS


@pytest.fixture
def fake_hub(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A Hub with one dataset, which records what is asked of it."""
    asked: list[dict[str, Any]] = []
    rows = datasets.Dataset.from_dict({"text": [*TEXTS, "never taken"]})

    def load_dataset(name: str, *, split: str, revision: str, streaming: bool) -> Any:
        asked.append({"name": name, "split": split, "revision": revision, "streaming": streaming})
        return rows.to_iterable_dataset() if streaming else rows

    monkeypatch.setattr("sa_lens.data.hub.probe", lambda: None)
    monkeypatch.setattr("sa_lens.data.sources.dataset_revision", lambda *_: "r1")
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *_, **__: ["train", "validation"])
    return asked


def test_a_streamed_dataset_is_fetched_once(fake_hub: list[dict[str, Any]], tmp_path: Path) -> None:
    source = opened("some/stories", tmp_path, split="train", streaming=True, max_documents=3)
    assert fake_hub == [], "nothing is fetched before it is read"
    assert list(source.read()) == TEXTS
    again = opened("some/stories", tmp_path, split="train", streaming=True, max_documents=3)
    assert list(again.read()) == TEXTS
    assert fake_hub == [{"name": "some/stories", "split": "train", "revision": "r1", "streaming": True}]


def test_a_dataset_of_the_hub(fake_hub: list[dict[str, Any]], tmp_path: Path) -> None:
    source = opened("some/stories", tmp_path)
    assert list(source.read()) == [*TEXTS, "never taken"]
    assert fake_hub == [{"name": "some/stories", "split": "validation", "revision": "r1", "streaming": False}]


def test_generated_stories() -> None:
    from sa_lens.data import stories

    assert list(stories_source(5, 3, None).read()) == [story.text for story in stories.generate(5, 3)]
    assert list(stories_source(5, 3, 2).read()) == [story.text for story in stories.generate(2, 3)]
    assert len({stories_source(n, seed, None).fingerprint for n in (5, 6) for seed in (0, 1)}) == 4


def test_the_same_bytes_read_as_another_kind_are_another_text(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", list(TEXTS))
    (tmp_path / "a.txt").write_bytes((tmp_path / "a.jsonl").read_bytes())
    (tmp_path / "b.jsonl").write_bytes((tmp_path / "a.jsonl").read_bytes())
    lines, text, copied = (opened(tmp_path / name, tmp_path / "cache") for name in ("a.jsonl", "a.txt", "b.jsonl"))
    assert list(lines.read()) != list(text.read())
    assert lines.fingerprint != text.fingerprint
    assert lines.fingerprint == copied.fingerprint
