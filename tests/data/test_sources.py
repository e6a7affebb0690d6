"""Every kind of source gives the same documents, and bad ones are refused with the way out."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest

from sa_lens.data.cache import fingerprint
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
def fake_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """A Hub with one dataset of two JSON files, whose other column changes; records which files are asked for."""
    import huggingface_hub

    asked: list[str] = []
    repository = tmp_path / "repository"
    repository.mkdir()
    (repository / "0.jsonl").write_text("".join(json.dumps({"text": text, "n": None}) + "\n" for text in TEXTS[:2]))
    (repository / "1.jsonl").write_text(
        "".join(json.dumps({"text": text, "n": "x"}) + "\n" for text in [TEXTS[2], "!"])
    )
    root = "hf://datasets/some/stories@r1/"

    def builder(name: str, *, revision: str, trust_remote_code: bool) -> Any:
        assert (name, revision, trust_remote_code) == ("some/stories", "r1", False)
        files = {"train": [f"{root}0.jsonl", f"{root}1.jsonl"], "validation": [f"{root}0.jsonl"]}
        return SimpleNamespace(config=SimpleNamespace(data_files=files))

    class FileSystem:
        def open(self, place: str, mode: str) -> Any:
            asked.append(place.removeprefix(root))
            return (repository / place.removeprefix(root)).open(mode)

        def resolve_path(self, place: str) -> Any:
            return SimpleNamespace(path_in_repo=place.removeprefix(root))

    def download(name: str, inside: str, *, repo_type: str, revision: str) -> str:
        assert (name, repo_type, revision) == ("some/stories", "dataset", "r1")
        asked.append(inside)
        return str(repository / inside)

    monkeypatch.setattr("sa_lens.data.hub.probe", lambda: None)
    monkeypatch.setattr("sa_lens.data.sources.dataset_revision", lambda *_: "r1")
    monkeypatch.setattr(datasets, "load_dataset_builder", builder)
    monkeypatch.setattr(huggingface_hub, "HfFileSystem", FileSystem)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return asked


def test_a_streamed_dataset_is_fetched_once(fake_hub: list[str], tmp_path: Path) -> None:
    source = opened("some/stories", tmp_path, split="train", streaming=True, max_documents=2)
    assert fake_hub == [], "nothing is fetched before it is read"
    assert list(source.read()) == TEXTS[:2]
    again = opened("some/stories", tmp_path, split="train", streaming=True, max_documents=2)
    assert list(again.read()) == TEXTS[:2]
    assert set(fake_hub) == {"0.jsonl"}, "no file is fetched beyond what is taken"


def test_a_dataset_of_the_hub_is_read_as_local_files_are(fake_hub: list[str], tmp_path: Path) -> None:
    assert list(opened("some/stories", tmp_path, split="train").read()) == [*TEXTS, "!"]
    assert list(opened("some/stories", tmp_path).read()) == TEXTS[:2], "unnamed: the validation split"
    assert fake_hub == ["0.jsonl", "1.jsonl", "0.jsonl"]


def test_a_dataset_of_other_files_is_read_by_datasets(
    fake_hub: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SimpleNamespace(data_files={"train": ["hf://datasets/some/stories@r1/a.csv"]})
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, **__: SimpleNamespace(config=config))
    rows = datasets.Dataset.from_dict({"text": TEXTS, "n": [1, 2, 3]})
    asked = {}

    def load_dataset(name: str, **options: Any) -> Any:
        asked[name] = options
        return rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert list(opened("some/stories", tmp_path, split="train").read()) == TEXTS
    expected = {"split": "train", "revision": "r1", "streaming": False, "trust_remote_code": False}
    assert asked == {"some/stories": expected}
    with pytest.raises(ValueError, match="has no column 'story'; its columns: 'text', 'n'"):
        list(opened("some/stories", tmp_path, split="train", column="story").read())


def test_a_revision_may_be_named(fake_hub: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    current = opened("some/stories", tmp_path, split="train")
    monkeypatch.setattr("sa_lens.data.sources.dataset_revision", lambda *_: pytest.fail("the Hub was asked"))
    named = opened("some/stories@r1", tmp_path, split="train")
    assert named.fingerprint == current.fingerprint
    assert list(named.read()) == [*TEXTS, "!"]
    assert opened("some/stories@r0", tmp_path, split="train").fingerprint != current.fingerprint


def test_a_damaged_copy_of_a_streamed_dataset_is_refused(fake_hub: list[str], tmp_path: Path) -> None:
    source = opened("some/stories", tmp_path, split="train", streaming=True, max_documents=2)
    assert list(source.read()) == TEXTS[:2]
    (copy,) = (tmp_path / "documents").glob("*.jsonl")
    copy.write_text(json.dumps("another") + "\n")
    with pytest.raises(ValueError, match="in the cache is damaged; delete it and"):
        list(source.read())


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


# ---------------------------------------------------------------------------------------- only the text column is read

CHANGING: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "null, then text": ({"n": None}, {"n": "x"}),
    "whole, then broken": ({"n": 1}, {"n": 1.5}),
    "a list, then an object": ({"n": [1]}, {"n": {"a": 2}}),
    "a key that comes later": ({}, {"k": 1}),
    "a key that goes": ({"k": 1}, {}),
    "not a number, and huge": ({"n": float("nan")}, {"n": 10**400}),
}


@pytest.mark.parametrize("change", CHANGING)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_other_columns_may_change(change: str, name: str, tmp_path: Path) -> None:
    before, after = CHANGING[change]
    rows = [{"text": TEXTS[0], **before}, {"text": TEXTS[1], **after}, {"text": TEXTS[2], **after}]
    content = json.dumps(rows) if name == "a.json" else "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / name).write_text(content)
    assert list(opened(tmp_path / name, tmp_path).read()) == TEXTS


@pytest.mark.parametrize("rows", [[{"text": None}, {"text": "a"}], [{}, {"text": "a"}], [{"text": "a"}, {}, {"n": 1}]])
def test_rows_without_text_hold_no_document(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert list(opened(tmp_path / "a.jsonl", tmp_path).read()) == ["a"]


@pytest.mark.parametrize("kind", ["parquet", "stream", "file"])
def test_columns_that_nobody_could_decode(kind: str, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    image = {"huggingface": json.dumps({"info": {"features": {"image": {"_type": "Image"}}}})}
    table = pa.table({"image": [b"no image", None, b""], "text": TEXTS}).replace_schema_metadata(image)
    path = tmp_path / ("a.parquet" if kind == "parquet" else "a.arrow")
    if kind == "parquet":
        pa.parquet.write_table(table, path)
    else:
        writer = pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file
        with writer(path, table.schema) as out:
            out.write_table(table)
    assert list(opened(path, tmp_path).read()) == TEXTS


@pytest.mark.parametrize("text", ["text", "large_string", "dictionary"])
def test_every_type_of_text_column(text: str, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    types = {"text": pa.string(), "large_string": pa.large_string()}
    types |= {"dictionary": pa.dictionary(pa.int32(), pa.string())}
    pa.parquet.write_table(pa.table({"text": pa.array([*TEXTS, None], types[text])}), tmp_path / "a.parquet")
    assert list(opened(tmp_path / "a.parquet", tmp_path).read()) == TEXTS


def test_what_is_wrong_in_a_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    for line, complaint in {
        '{"text": "a"': "cannot read .*a.jsonl as json: line 2",
        '{"text": 3}': "column 'text' of .*a.jsonl holds int, not text",
        "[1]": "line 2 of .*a.jsonl holds list, not an object",
        r'{"text": "\ud83d"}': "line 2 of .*a.jsonl holds half of a surrogate pair",
    }.items():
        path.write_text('{"text": "fine"}\n' + line + "\n")
        with pytest.raises(ValueError, match=complaint):
            list(opened(path, tmp_path).read())


# ------------------------------------------------------------------------------------------------ parts that are empty


def empty_parquet(path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    pa.parquet.write_table(pa.table({"text": pa.array([], pa.string())}), path)


def parquet_without_columns(path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    pa.parquet.write_table(pa.table({}), path)


EMPTY: dict[str, Callable[[Path], Any]] = {
    "b.parquet": empty_parquet,
    "c.parquet": parquet_without_columns,
    "b.jsonl": Path.touch,
    "c.jsonl": lambda path: path.write_text("\n \n"),
    "b.arrow": lambda path: write_arrow(path, []),
    "b.txt": Path.touch,
    "c.txt": lambda path: path.write_text("\n\r\n  \n"),
}


@pytest.mark.parametrize("name", EMPTY)
def test_a_shard_without_rows_holds_nothing(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    kind = Path(name).suffix
    WRITERS[f"a{kind}"](folder / f"a{kind}", list(TEXTS[:2]))
    EMPTY[name](folder / name)
    WRITERS[f"a{kind}"](folder / f"d{kind}", list(TEXTS[2:]))
    assert list(opened(folder, tmp_path, split="train").read()) == TEXTS


def test_an_array_without_rows_and_a_split_without_rows(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[]")
    assert list(opened(tmp_path / "a.json", tmp_path).read()) == []
    features = datasets.Features({"text": datasets.Value("string")})
    empty = datasets.Dataset.from_dict({"text": []}, features=features)
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": TEXTS}), "test": empty}).save_to_disk(
        tmp_path / "d"
    )
    assert list(opened(tmp_path / "d", tmp_path, split="train").read()) == TEXTS
    assert list(opened(tmp_path / "d", tmp_path, split="test").read()) == []


def test_a_truncated_shard_is_not_an_empty_one(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    write_parquet(folder / "a.parquet", list(TEXTS))
    (folder / "b.parquet").touch()
    with pytest.raises(ValueError, match=r"cannot read .*b\.parquet as parquet"):
        list(opened(folder, tmp_path, split="train").read())


# ------------------------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize(
    "name",
    ["a::b", "zip::a", "x y#z%20", "we{ird}[x]*?", "~t", "~", "naïve 🐈", "'\"\\", "-flag", "two\nlines", "hf://a"],
)
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "txt", "saved"])
def test_any_file_name(name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = tmp_path / (f"plain.{kind}" if kind != "saved" else "plain")
    if kind == "saved":
        datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(plain)
    else:
        WRITERS[f"a.{kind}"](plain, list(TEXTS))
    path = tmp_path / f"{name}{plain.suffix}"
    path.parent.mkdir(parents=True, exist_ok=True)
    plain.rename(path)
    assert list(opened(path, tmp_path / "cache", split="train" if kind == "saved" else None).read()) == TEXTS
    monkeypatch.chdir(tmp_path)
    if name != "~":
        assert list(opened(str(path.relative_to(tmp_path)), tmp_path / "cache").read()) == TEXTS


@pytest.mark.parametrize("name", ["", " ", "\t"])
def test_an_empty_name_is_never_the_current_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_txt(tmp_path / "a.txt", list(TEXTS))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="the name of the text is empty"):
        opened(name, tmp_path)
