"""The text on which a run was trained: it is recorded with the model, found again later, and compared by its tokens.

The `config.json` of a run holds, under `text`, the fingerprints of the tokens, and the paths of the configuration's
files relative to the run folder, or the revision of a dataset. So the text is located from any working directory, also
if run and text move together, and a text that has changed since is never used in its place.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from sa_lens.catalogue import CONFIG
from sa_lens.config import RunConfig
from sa_lens.core.save_and_load import read_config
from sa_lens.data import PreparedData
from sa_lens.data.cache import cache_folder
from sa_lens.data.hub import last_revision
from sa_lens.data.whole_files import check_object
from sa_lens.places import local_path

PATHS = ("data.source", "data.validation", "data.keep_whole", "data.tokenizer", "train.init")
"""Settings that may name a file or folder."""

_TEXTS = ("data.source", "data.validation")
_NO_PATHS = ("stories", "bpe")


def record(run: RunConfig, data: PreparedData, folder: Path, given: RunConfig) -> dict[str, Any]:
    """Returns the entry of `config.json` about the text of a run.

    Args:
        run: with paths that hold in the current folder.
        folder: the run folder.
        given: the configuration as it is stored.
    """
    paths: dict[str, dict[str, str]] = {}
    revisions: dict[str, str] = {}
    for key in PATHS:
        value = _setting(run, key)
        if value is None or value in _NO_PATHS:
            continue
        if local_path(value, key).exists():
            from_run = _seen_from(folder.resolve(), local_path(value, key).resolve())
            paths[key] = {"given": _setting(given, key), "from_run": from_run}
        elif key in _TEXTS:
            dataset_id, _, revision = value.partition("@")
            revision = revision or last_revision(dataset_id, cache_folder(run.data.cache_dir)) or ""
            revisions |= {key: revision} if revision else {}
    fingerprints = {"train": data.train.fingerprint, "validation": data.validation.fingerprint}
    return {**fingerprints, "paths": paths, "revisions": revisions}


def read_record(folder: Path) -> dict[str, Any]:
    """Returns the entry of a run's `config.json` about its text; empty if there is none.

    Raises:
        ValueError: the record is damaged.
    """
    path = folder / CONFIG
    text = read_config(folder).get("text") if path.is_file() else None
    if text is None:
        return {}
    try:
        check_object(text, {"train": str, "validation": str, "paths": dict}, {"revisions": dict}, where="text.")
        check_object(text.get("revisions", {}), {}, dict.fromkeys(_TEXTS, str), where="text.revisions.")
        for key, places in text["paths"].items():
            check_object(places, {"given": str, "from_run": str}, where=f"text.paths.{key}.")
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; take it from a copy of the run") from error
    return text


def candidates(run: RunConfig, folder: Path, text: dict[str, Any], keys: Iterable[str] = PATHS) -> Iterator[RunConfig]:
    """Yields the configuration with paths that exist: relative to the run folder, and to the current folder.

    Datasets have the recorded revision. A setting that differs from the recorded one is left unchanged.

    Args:
        text: record from `read_record`.
        keys: settings that are needed.

    Raises:
        FileNotFoundError: a file or folder of the run is in neither place.
    """
    for key, revision in text.get("revisions", {}).items():
        if "@" not in _setting(run, key) and not local_path(_setting(run, key), key).exists():
            run = _replace(run, {key: f"{_setting(run, key)}@{revision}"})
    places: dict[str, dict[str, str]] = text.get("paths", {})
    stands: dict[str, Path] = {}
    beside: dict[str, Path] = {}
    for key in keys:
        if key in places and _setting(run, key) == places[key]["given"]:
            stands[key] = local_path(places[key]["given"], key)
            beside[key] = (folder.resolve() / places[key]["from_run"]).resolve()
            if not stands[key].exists() and not beside[key].exists():
                raise FileNotFoundError(
                    f"{key}={places[key]['given']!r} of {folder} is neither in the current folder nor at "
                    f"{beside[key]}, where it lay as seen from the run: put it back, or work in the folder in "
                    "which the run was trained"
                )
    whole = all(path.exists() for path in stands.values())
    moved = {key: str(path) for key, path in beside.items() if path.exists()}
    # a text that lies where it did is likelier to be the run's than one of the same name in the current folder
    if not whole or any(not stands[key].samefile(path) for key, path in moved.items()):
        yield _replace(run, moved)
    if whole:
        yield run


def differing_texts(data: PreparedData, text: dict[str, Any]) -> list[str]:
    """Returns which of the texts, train and validation, differ from those of the record; none if it is empty."""
    now = {"train": data.train.fingerprint, "validation": data.validation.fingerprint}
    return [name for name, fingerprint in now.items() if text.get(name, fingerprint) != fingerprint]


def _setting(run: RunConfig, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(run, section), name)


def _replace(run: RunConfig, values: dict[str, str]) -> RunConfig:
    for key, value in values.items():
        section, name = key.split(".")
        run = dataclasses.replace(run, **{section: dataclasses.replace(getattr(run, section), **{name: value})})
    return run


def _seen_from(folder: Path, path: Path) -> str:
    try:
        return os.path.relpath(path, folder)
    except ValueError:  # another drive
        return str(path)
