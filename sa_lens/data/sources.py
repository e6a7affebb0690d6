"""Sources of text: local files and folders, datasets on the Hub, generated stories.

A source knows what its text is (a key by content) before it reads any, so that tokens already on disk are found at
once. Blank documents are left out everywhere. How each kind of file is read: `text_files`.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from sa_lens.data import stories, text_files
from sa_lens.data.cache import cache_folder, fingerprint, key_of, make_once, new_file, visible_files
from sa_lens.data.hub import dataset_revision, require_hub
from sa_lens.places import local_path

LOCAL_TEXT = "name a local parquet, jsonl, txt or arrow file or folder in data.source, or `stories`"

_ROOM_FOR_STORIES = 1_000
"""Tokens that hold every word of the generated stories: 257 bytes and marks, some 540 words, and about 100 of these a
second time as the first word of a text or quotation."""
_STORIES_KEPT = 100_000
"""Generated stories that are kept in memory between passes over them: about 50 MB."""

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
    form: Callable[[], str | None] = lambda: None
    """Where documents begin and end, in words ("one on each line"), if that was decided by the look of the text."""


def path_of(source: str) -> Path:
    """Returns the path of a text, which does not exist if its name is a dataset id.

    Raises:
        FileNotFoundError: `source` looks like a path and there is nothing there.
    """
    path = local_path(source, "the name of the text")
    as_path = source.startswith((".", "/", "~")) or source.count("/") > 1 or "\\" in source
    if not path.exists() and (as_path or path.suffix in text_files.KINDS):
        raise FileNotFoundError(f"no file or folder {source!r}")
    return path


def open_source(
    source: str,
    *,
    column: str = "text",
    split: str | None = None,
    max_documents: int | None = None,
    streaming: bool = False,
    cache: Path | None = None,
    progress: bool = True,
) -> Source:
    """Opens the text behind a name: an existing file or folder, else a dataset id on the Hub.

    Args:
        source: path or id; an id may end in `@` and a revision, which is otherwise the current one.
        column: column that holds the text; a txt file has only `text`.
        split: for a folder or a Hub dataset; None: `validation` if there is one, else the only split. A single file
            has no splits and is read whole.
        max_documents: read at most this many documents; None: all.
        streaming: take the documents of a Hub dataset without downloading the rest; they are written to the cache
            once, by one process, so that every process of a larger run reads the same ones from there.
        cache: the cache folder; None: `$SA_LENS_CACHE`, else `~/.cache/sa_lens`.

    Raises:
        FileNotFoundError: `source` looks like a path and there is nothing there.
        HubUnreachable: a Hub dataset and no network.
        ValueError: the dataset or the split does not exist.
    """
    cache = cache_folder(None) if cache is None else cache
    path = path_of(source)
    limits = {"column": column, "max_documents": max_documents}
    if path.exists():
        parts = _files_of(path.resolve(), split)
        kinds = {text_files.kind_of(file) for file in parts}
        if len(kinds) > 1:
            raise ValueError(f"folder {path} mixes kinds of files ({', '.join(sorted(kinds))}); name one file")
        kind = kinds.pop() if kinds else "arrow"
        if kind == text_files.TEXT and column != "text":
            raise ValueError(f"{path} is plain text and has no column {column!r}; its columns: 'text'")
        part = split if path.is_dir() else None
        # the ending says how a file is read, so the same bytes under another ending are another text
        key = key_of({"content": fingerprint(path), "split": part, "kind": text_files.RULES[kind], **limits})
        form = functools.partial(text_files.form, parts) if kind == text_files.TEXT else lambda: None
        return Source(str(path), key, lambda: _skip_blank(text_files.texts(parts, column), max_documents), form)
    dataset_id, _, revision = source.partition("@")
    revision = revision or dataset_revision(dataset_id, cache, LOCAL_TEXT)
    key = key_of({"hub": dataset_id, "revision": revision, "split": split, "streaming": streaming, **limits})

    def read_hub() -> Iterator[str]:
        texts = _skip_blank(_hub_texts(dataset_id, revision, split, column, streaming), max_documents)
        return _keep(texts, cache / "documents" / f"{key}.jsonl", max_documents, progress) if streaming else texts

    return Source(source, key, read_hub)


def stories_source(n: int, seed: int, max_documents: int | None) -> Source:
    """Returns generated stories as a source; its key holds the fingerprint of the code that makes them."""
    rules = {path.name: fingerprint(path) for path in sorted(Path(str(stories.__file__)).parent.glob("*.py"))}
    count = n if max_documents is None else min(n, max_documents)
    key = key_of({"stories": count, "seed": seed, "rules": key_of(rules)})
    if count > _STORIES_KEPT:
        return Source("stories", key, lambda: (story.text for story in stories.generate(count, seed)))
    return Source("stories", key, lambda: iter(_story_texts(key, count, seed)))


@functools.lru_cache(maxsize=1)
def _story_texts(key: str, count: int, seed: int) -> tuple[str, ...]:
    """Returns the texts of generated stories, kept in memory because training data reads them several times."""
    return tuple(story.text for story in stories.generate(count, seed))


def story_words(vocab_size: int) -> list[str]:
    """Returns the words of the generated stories that a vocabulary of this size keeps whole: all, or only names."""
    return sorted(stories.vocabulary() if vocab_size >= _ROOM_FOR_STORIES else stories.NAMES)


def _skip_blank(texts: Iterable[str | None], max_documents: int | None) -> Iterator[str]:
    return itertools.islice((text for text in texts if text and text.strip()), max_documents)


def _files_of(path: Path, split: str | None) -> list[Path]:
    """Returns the files of a local text, in the order in which they are read."""
    if path.is_file():
        if path.stat().st_size == 0:
            raise ValueError(f"{path} is empty")
        text_files.kind_of(path)
        return [path]
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return text_files.saved_dataset(path, lambda splits: _choose_split(split, splits, str(path)))
    inside = [file for file in visible_files(path) if file.suffix.lower() in text_files.KINDS]
    if not inside:
        raise FileNotFoundError(f"folder {path} holds no file of a known kind ({', '.join(text_files.KINDS)})")
    by_split: dict[str, list[Path]] = {}
    for file in inside:
        by_split.setdefault(_split_of(file.relative_to(path)), []).append(file)
    return by_split[_choose_split(split, list(by_split), str(path))]


def _split_of(file: Path) -> str:
    """Returns the split that a file's path names (`train-00.parquet`, `validation/0.parquet`), else `train`."""
    words = re.findall(r"[a-z]+", file.with_suffix("").as_posix().lower())
    named = next((word for word in reversed(words) if word in _SPLIT_WORDS), "train")
    return SPLIT_NAMES.get(named, named)


def _choose_split(split: str | None, splits: list[str], name: str) -> str:
    if split is None:
        split = "validation" if "validation" in splits else splits[0] if len(splits) == 1 else None
    if split not in splits:
        wanted = "no split is named" if split is None else f"no split {split!r}"
        raise ValueError(f"{name}: {wanted}; its splits: {', '.join(map(repr, splits))}")
    return split


def _hub_texts(dataset_id: str, revision: str, split: str | None, column: str, streaming: bool) -> Iterator[str | None]:
    """Yields the texts of a Hub dataset; the Hub is not asked before the first one is needed.

    Files of a known kind are read as local ones are, the text column alone; others by `datasets`.
    """
    require_hub(f"dataset {dataset_id!r}", LOCAL_TEXT)
    import datasets
    import huggingface_hub

    # before version 4 `datasets` ran the Python file of a dataset that has one
    builder = datasets.load_dataset_builder(dataset_id, revision=revision, trust_remote_code=False)
    data_files = builder.config.data_files or {}
    by_split = {str(name): [str(place) for place in places] for name, places in data_files.items()}
    suffixes = {Path(place).suffix.lower() for place in itertools.chain(*by_split.values())}
    if not by_split or not suffixes <= set(text_files.KINDS):
        names = [] if split else datasets.get_dataset_split_names(dataset_id, revision=revision)
        split = split or _choose_split(None, names, dataset_id)
        rows = datasets.load_dataset(
            dataset_id, split=split, revision=revision, streaming=streaming, trust_remote_code=False
        )
        columns = rows.column_names or []
        if column not in columns:
            raise text_files.missing_column_error(dataset_id, column, columns)
        for batch in rows.select_columns([column]).iter(text_files.BATCH):
            yield from (text_files.as_text(text, column, dataset_id) for text in batch[column])
        return
    hub = huggingface_hub.HfFileSystem()
    for place in by_split[_choose_split(split, list(by_split), dataset_id)]:
        if streaming:
            opener = functools.partial(hub.open, place, "rb")
            yield from text_files.file_texts(opener, text_files.kind_of(Path(place)), column, place)
        else:
            name = hub.resolve_path(place).path_in_repo  # type: ignore[union-attr]
            local = huggingface_hub.hf_hub_download(dataset_id, name, repo_type="dataset", revision=revision)
            yield from text_files.texts([Path(local)], column)


def _keep(texts: Iterable[str], path: Path, total: int | None, progress: bool) -> Iterator[str]:
    """Yields the texts; the first pass writes them to `path`, one JSON string per line, and later ones read it."""
    from tqdm.auto import tqdm

    def download() -> None:
        with new_file(path) as temporary, temporary.open("w", encoding="utf-8") as out:
            for text in tqdm(texts, total=total, desc="documents", unit="", disable=not progress):
                out.write(json.dumps(text) + "\n")

    make_once(path, download)
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)
