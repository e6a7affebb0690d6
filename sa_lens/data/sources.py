"""Where text comes from: local files and folders, datasets on the Hub, generated stories.

A source knows what its text is (a key by content) before it reads any, so that tokens already on disk are found at
once. Blank documents are left out everywhere.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sa_lens.data.disk import fingerprint, key_of, locked, new_file
from sa_lens.data.hub import dataset_revision, require_hub

KINDS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".txt": "text", ".arrow": "arrow"}
"""Kinds of files, by suffix, with their names in `datasets`."""

LOCAL_TEXT = "name a local parquet, jsonl, txt or arrow file or folder in data.source, or `stories`"

BATCH = 1000
"""Documents read at a time."""

SPLIT_NAMES = {"training": "train", "valid": "validation", "val": "validation", "dev": "validation"}
_SPLIT_WORDS = {"train", "validation", "test", *SPLIT_NAMES}


@dataclass(frozen=True)
class Source:
    """A text as documents that can be read any number of times, always in the same order."""

    name: str
    """For messages."""
    fingerprint: str
    """Key of the content: equal keys, equal documents."""
    read: Callable[[], Iterator[str]]
    """Begins a pass over the documents."""


def open_source(
    source: str,
    *,
    column: str,
    split: str | None,
    max_documents: int | None,
    streaming: bool,
    cache: Path,
    progress: bool = True,
) -> Source:
    """The text behind `source`: an existing file or folder, else a dataset id on the Hub.

    Args:
        source: path or id.
        column: column that holds the text; a txt file has only `text`.
        split: for a folder or a Hub dataset; None: `validation` if there is one, else the only split. A single file
            has no splits and is read whole.
        max_documents: read at most so many.
        streaming: take the documents of a Hub dataset without downloading the rest; they are written to the cache
            once, by one process, so that every process of a larger run reads the same ones from there.
        cache: the cache folder.

    Raises:
        FileNotFoundError: `source` looks like a path and there is nothing there.
        HubUnreachable: a Hub dataset and no network.
        ValueError: no such dataset, or no such split.
    """
    path = Path(source).expanduser()
    limits = {"column": column, "max_documents": max_documents}
    if path.exists():
        read = _local_reader(path.resolve(), split, column)
        part = split if path.is_dir() else None
        # the ending says how a file is read, so the same bytes under another one are another text
        kind = {} if path.is_dir() else {"kind": KINDS.get(path.suffix.lower())}
        key = key_of({"content": fingerprint(path), "split": part, **kind, **limits})
        return Source(str(path), key, lambda: _cleaned(read(), max_documents))
    if source.startswith((".", "/", "~")) or source.count("/") > 1 or "\\" in source or path.suffix in KINDS:
        raise FileNotFoundError(f"no file or folder {source!r}")
    revision = dataset_revision(source, cache, LOCAL_TEXT)
    key = key_of({"hub": source, "revision": revision, "split": split, "streaming": streaming, **limits})

    def read_hub() -> Iterator[str]:
        batches = _hub_batches(source, revision, split, streaming)
        texts = _cleaned(_column(batches, column, source), max_documents)
        return _spooled(texts, cache / "documents" / f"{key}.jsonl", max_documents, progress) if streaming else texts

    return Source(source, key, read_hub)


def stories_source(n: int, seed: int, max_documents: int | None) -> Source:
    """Generated stories."""
    from sa_lens.data import stories

    origin = Path(str(stories.__file__))
    rules = fingerprint(origin) if origin.stem != "__init__" else key_of(_python_files(origin.parent))
    count = n if max_documents is None else min(n, max_documents)
    key = key_of({"stories": count, "seed": seed, "rules": rules})
    return Source("stories", key, lambda: _cleaned((s.text for s in stories.generate(count, seed)), None))


def story_words() -> list[str]:
    """Every word of the generated stories."""
    from sa_lens.data import stories

    return sorted(stories.vocabulary())


def _python_files(folder: Path) -> dict[str, str]:
    return {path.name: fingerprint(path) for path in sorted(folder.glob("*.py"))}


def _cleaned(texts: Iterable[Any], max_documents: int | None) -> Iterator[str]:
    return itertools.islice((text for text in texts if text and text.strip()), max_documents)


def _column(batches: Iterable[dict[str, list[Any]]], column: str, name: str) -> Iterator[str | None]:
    """The texts of one column.

    Raises:
        ValueError: no such column, or it holds no text.
    """
    for batch in batches:
        if column not in batch:
            raise ValueError(f"{name} has no column {column!r}; its columns: {', '.join(map(repr, batch))}")
        for text in batch[column]:
            if text is not None and not isinstance(text, str):
                raise ValueError(f"column {column!r} of {name} holds {type(text).__name__}, not text")
            yield text


def _local_reader(path: Path, split: str | None, column: str) -> Callable[[], Iterator[str | None]]:
    """Finds the files of a local source; reading begins when the result is called."""
    if path.is_dir() and ((path / "dataset_dict.json").is_file() or (path / "state.json").is_file()):
        return lambda: _column(_saved_batches(path, split), column, str(path))
    files = _files(path, split)
    kinds = {KINDS[file.suffix.lower()] for file in files}
    if len(kinds) > 1:
        raise ValueError(f"folder {path} mixes kinds of files ({', '.join(sorted(kinds))}); name one file")
    kind = kinds.pop()
    if kind == "text":
        if column != "text":
            raise ValueError(f"{path} is plain text and has no column {column!r}; its columns: 'text'")
        return lambda: itertools.chain.from_iterable(_text_documents(file) for file in files)
    return lambda: itertools.chain.from_iterable(
        _column(_file_batches(file, kind), column, str(file)) for file in files
    )


def _files(path: Path, split: str | None) -> list[Path]:
    if path.is_file():
        if path.suffix.lower() not in KINDS:
            raise ValueError(f"{path}: unknown kind of file {path.suffix!r}; known: {', '.join(KINDS)}")
        return [path]
    inside = (file for file in sorted(path.rglob("*")) if file.is_file() and file.suffix.lower() in KINDS)
    files = [file for file in inside if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    if not files:
        raise FileNotFoundError(f"folder {path} holds no file of a known kind ({', '.join(KINDS)})")
    by_split: dict[str, list[Path]] = {}
    for file in files:
        by_split.setdefault(_split_of(file.relative_to(path)), []).append(file)
    return by_split[_chosen_split(split, list(by_split), str(path))]


def _split_of(file: Path) -> str:
    """The split that a file's path names (`train-00.parquet`, `validation/0.parquet`); `train` if it names none."""
    words = re.findall(r"[a-z]+", file.with_suffix("").as_posix().lower())
    named = next((word for word in reversed(words) if word in _SPLIT_WORDS), "train")
    return SPLIT_NAMES.get(named, named)


def _chosen_split(split: str | None, splits: list[str], name: str) -> str:
    if split is None:
        split = "validation" if "validation" in splits else splits[0] if len(splits) == 1 else None
    if split not in splits:
        wanted = "no split is named" if split is None else f"no split {split!r}"
        raise ValueError(f"{name}: {wanted}; its splits: {', '.join(map(repr, splits))}")
    return split


def _saved_batches(path: Path, split: str | None) -> Iterator[dict[str, list[Any]]]:
    """A dataset written by `save_to_disk`."""
    import datasets

    loaded = datasets.load_from_disk(str(path))
    if isinstance(loaded, datasets.DatasetDict):
        loaded = loaded[_chosen_split(split, list(loaded), str(path))]
    return loaded.iter(batch_size=BATCH)


def _file_batches(file: Path, kind: str, **options: Any) -> Iterator[dict[str, list[Any]]]:
    """The rows of a local file; every failure to read it is a ValueError that names it."""
    import datasets

    if file.stat().st_size == 0:
        raise ValueError(f"{file} is empty")
    try:
        # Streamed, so that no second copy of the text is written to the cache of `datasets`.
        with _without_counting():
            rows = datasets.load_dataset(kind, data_files=[_literal(file)], split="train", streaming=True, **options)
        yield from rows.iter(batch_size=BATCH)
    except Exception as error:  # the readers' own errors have no common base
        raise ValueError(f"cannot read {file} as {kind}: {type(error).__name__}: {error}") from error


@contextlib.contextmanager
def _without_counting() -> Iterator[None]:
    """Keeps `datasets` from reporting the use of its file readers over the network, which hangs where there is none."""
    from datasets import config

    counting, config.HF_UPDATE_DOWNLOAD_COUNTS = config.HF_UPDATE_DOWNLOAD_COUNTS, False
    try:
        yield
    finally:
        config.HF_UPDATE_DOWNLOAD_COUNTS = counting


def _literal(file: Path) -> str:
    """The path with characters that `datasets` reads as wildcards put in brackets."""
    return re.sub(r"([*?\[])", r"[\1]", str(file))


def _text_documents(file: Path) -> Iterator[str]:
    r"""The documents of a txt file: between lines `<|endoftext|>` if there are any, else between blank lines if there
    are any, else one a line."""

    def lines() -> Iterator[str]:
        for batch in _file_batches(file, "text", keep_linebreaks=True):
            yield from batch["text"]

    seen = {line.strip() for line in lines() if line.strip() in ("", "<|endoftext|>")}
    separator = "<|endoftext|>" if "<|endoftext|>" in seen else "" if seen else None
    document: list[str] = []
    for line in lines():
        if separator is None:
            yield line.rstrip("\r\n")
        elif line.strip() == separator:
            yield "".join(document).strip("\r\n")
            document = []
        else:
            document.append(line)
    yield "".join(document).strip("\r\n")


def _hub_batches(dataset_id: str, revision: str, split: str | None, streaming: bool) -> Iterator[dict[str, list[Any]]]:
    """The rows of a Hub dataset; nothing is asked of the Hub before the first is wanted."""
    require_hub(f"dataset {dataset_id!r}", LOCAL_TEXT)
    import datasets

    if split is None:
        splits = datasets.get_dataset_split_names(dataset_id, revision=revision)
        split = _chosen_split(None, list(splits), dataset_id)
    yield from datasets.load_dataset(dataset_id, split=split, revision=revision, streaming=streaming).iter(BATCH)


def _spooled(texts: Iterable[str], path: Path, total: int | None, progress: bool) -> Iterator[str]:
    """The texts, written to `path` (one JSON string a line) on the first pass, read from there on later ones."""
    from tqdm.auto import tqdm

    if not path.is_file():
        with locked(path):
            if not path.is_file():
                with new_file(path) as temporary, temporary.open("w", encoding="utf-8") as out:
                    for text in tqdm(texts, total=total, desc="documents", unit="", disable=not progress):
                        out.write(json.dumps(text) + "\n")
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)
