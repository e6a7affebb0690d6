"""Cells on disk: trained models and measured groups of columns, each found again by what went into it.

    OUT/models/NAME-seedN-KEY/run/        the training run, resumable
    OUT/models/NAME-seedN-KEY/final/      the model after its last step
    OUT/models/NAME-seedN-KEY/done.json   written last: the model is finished
    OUT/models/NAME-seedN-KEY/GROUP-KEY.json     the figures of a group of columns

A key is a hash of inputs, so a changed setting makes a new cell and leaves the others as they are.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any

from sa_lens.compare.grids import BASELINE, Grid, Variant
from sa_lens.compare.subject import Group, Measured, inputs_of
from sa_lens.config import RunConfig, convert, to_dict
from sa_lens.core.checkpoints import WEIGHTS, complete_steps
from sa_lens.data.disk import fingerprint, key_of
from sa_lens.data.reading import DamagedFile, read_json
from sa_lens.data.writing import atomic_write

AGAIN = "delete it, it will be made again"
FORMAT = 1
"""Version of the files; part of every key."""

_NO_CONSEQUENCE = {
    "train": ("save_every", "log_every", "sample_tokens", "workers", "tracker", "eval_every", "eval_tokens"),
    "data": ("cache_dir",),
}
"""Settings that change nothing in the model after the last step."""


@dataclass(frozen=True)
class Cell:
    """One model of a grid."""

    grid: Grid
    variant: Variant
    seed: int
    out: Path
    """Folder of the comparison."""

    @property
    def name(self) -> str:
        """Variant and seed, for people."""
        return f"{self.variant.name}, seed {self.seed}"

    @property
    def baseline(self) -> Cell | None:
        """The dense baseline of the same seed; None where this is it."""
        if self.variant.name == BASELINE:
            return None
        return dataclasses.replace(self, variant=self.grid.variants[0])

    @property
    def config(self) -> RunConfig:
        """The run; a variant trained on the baseline starts from its last step."""
        base = self.baseline
        return self.grid.config(self.variant, self.seed, str(base.final) if base is not None else None)

    @property
    def key(self) -> str:
        """Hash of all that makes the model what it is: files by content, the baseline by its own key."""
        base = self.baseline if self.variant.training == "gates" else None
        values = to_dict(self.grid.config(self.variant, self.seed, base.key if base is not None else None))
        for section, names in _NO_CONSEQUENCE.items():
            for name in names:
                del values[section][name]
        for name in ("source", "validation", "tokenizer", "keep_whole"):
            place = values["data"][name]
            if place is not None and place != "stories" and Path(place).expanduser().exists():
                values["data"][name] = _content(Path(place).expanduser())
        return key_of([FORMAT, values, self.variant.training])

    @property
    def folder(self) -> Path:
        """Where everything of this model is."""
        return self.out / "models" / f"{self.variant.name}-seed{self.seed}-{self.key[:10]}"

    @property
    def run(self) -> Path:
        """The training run."""
        return self.folder / "run"

    @property
    def final(self) -> Path:
        """The model after its last step."""
        return self.folder / "final"

    def trained(self) -> dict[str, Any] | None:
        """What is recorded of the finished model: hash of its weights, of both texts, seconds; None if not finished.

        Raises:
            ValueError: `final` holds other weights than were recorded.
        """
        keys = {"weights": str, "text": dict, "seconds": float}
        record, weights = read_record(self.folder / "done.json", keys), self.final / WEIGHTS
        if record is not None and weights.is_file() and _content(weights) != record["weights"]:
            raise ValueError(
                f"{weights} has changed since this model was finished: restore it, or delete {self.folder}, and it is "
                "made again"
            )
        return record

    def steps_done(self) -> int:
        """Steps of the training run that are safe on disk."""
        steps = complete_steps(self.run) if self.run.is_dir() else []
        return int(steps[-1].name.removeprefix("step-")) if steps else 0

    def finish(self, text: dict[str, str], seconds: float) -> dict[str, Any]:
        """Records that the model in `final` is finished."""
        record = {"weights": fingerprint(self.final / WEIGHTS), "text": text, "seconds": seconds}
        write_record(self.folder / "done.json", {"cell": self.name, **record})
        return record

    def group_file(self, group: Group, trained: dict[str, Any]) -> Path:
        """Where the figures of a group are; `trained` is what `trained()` gave."""
        inputs = {**inputs_of(group), "weights": trained["weights"], "text": trained["text"]}
        base = self.baseline
        if group.against_baseline and base is not None:
            inputs["baseline"] = (base.trained() or {}).get("weights")
        return self.folder / f"{group.name}-{key_of([FORMAT, inputs])[:10]}.json"

    def measured(self, group: Group) -> Measured | None:
        """The figures of a group; None if it was not measured with these settings on this model."""
        record = self.record_of(group)
        if record is None:
            return None
        try:
            values = convert("values", record["values"], dict[str, dict[str, float | None]])
            return Measured(values, convert("notes", record["notes"], tuple[str, ...]))
        except ValueError as error:
            raise DamagedFile(
                f"the {group.name} of {self.name} in {self.folder} is damaged: {error}; {AGAIN}"
            ) from error

    def record_of(self, group: Group) -> dict[str, Any] | None:
        """The file of a group's figures, with its seconds."""
        trained = self.trained()
        keys = {"values": dict, "notes": list, "seconds": float}
        return None if trained is None else read_record(self.group_file(group, trained), keys)

    def keep(self, group: Group, measured: Measured, seconds: float) -> None:
        """Writes the figures of a group; one that is not finite counts as missing."""
        trained = self.trained()
        if trained is None:
            raise ValueError(f"{self.name} is not trained, so nothing can have been measured on it")
        values = {
            column: {stream: x if x is not None and math.isfinite(x) else None for stream, x in of_stream.items()}
            for column, of_stream in measured.values.items()
        }
        record = {"cell": self.name, **inputs_of(group), "values": values, "notes": measured.notes}
        write_record(self.group_file(group, trained), {**record, "seconds": seconds})

    @contextmanager
    def held(self) -> Iterator[bool]:
        """Holds the cell against other processes; yields False if one of them works on it."""
        from filelock import FileLock, Timeout

        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()


def _content(path: Path) -> str:
    """Fingerprint of a text; a file is read again only if its size or time of change differs."""
    if not path.is_file():
        return fingerprint(path)
    found = path.stat()
    return _of_file(path.resolve(), found.st_size, found.st_mtime_ns)


@functools.cache
def _of_file(path: Path, size: int, changed: int) -> str:
    return fingerprint(path)


def cells_of(grid: Grid, seeds: tuple[int, ...], out: Path) -> list[Cell]:
    """All cells, seed by seed, each seed's baseline first."""
    return [Cell(grid, variant, seed, out) for seed in seeds for variant in grid.variants]


def read_record(path: Path, keys: Mapping[str, type | UnionType]) -> dict[str, Any] | None:
    """The content of a JSON file with these keys among others; None if there is no file.

    Raises:
        DamagedFile: a damaged file.
    """
    if not path.is_file():
        return None
    record: dict[str, Any] = read_json(path, remedy=AGAIN, keys=keys, other_keys=True)
    return record


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Writes a JSON file, whole or not at all."""
    atomic_write(path, json.dumps(record, indent=1, allow_nan=False).encode())
