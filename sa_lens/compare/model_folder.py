"""The models of a comparison on disk with their measurements; both are identified by everything they depend on.

    OUT/models/NAME-seedN-KEY/run/               the training run, resumable
    OUT/models/NAME-seedN-KEY/final/             the model after its last step
    OUT/models/NAME-seedN-KEY/done.json          written last: the model is finished
    OUT/models/NAME-seedN-KEY/MEASUREMENT-KEY.json   the values of a measurement

A key is a hash of inputs, so a changed setting makes a new folder or file and leaves the others as they are.
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
from sa_lens.compare.measurement import Measurement, Result
from sa_lens.config import RunConfig, convert, to_dict
from sa_lens.core.save_and_load import WEIGHTS, complete_steps
from sa_lens.data.cache import fingerprint, key_of
from sa_lens.data.whole_files import DamagedFile, atomic_write, read_json

AGAIN = "delete it, it will be made again"
FORMAT = 1
"""Version of the files; part of every key."""

_NO_CONSEQUENCE = {
    "train": (
        *("save_every", "log_every", "sample_tokens", "workers", "tracker", "eval_every", "eval_tokens", "cuda_graph"),
    ),
    "data": ("cache_dir",),
}
"""Settings without effect on the model after the last step."""


@dataclass(frozen=True)
class ModelFolder:
    """One model of a grid: a variant with a seed, and its folder."""

    grid: Grid
    variant: Variant
    seed: int
    out: Path
    """Folder of the comparison."""

    @property
    def name(self) -> str:
        """Variant and seed, as text."""
        return f"{self.variant.name}, seed {self.seed}"

    @property
    def baseline(self) -> ModelFolder | None:
        """The dense baseline with the same seed; None if this is the baseline."""
        if self.variant.name == BASELINE:
            return None
        return dataclasses.replace(self, variant=self.grid.variants[0])

    @property
    def config(self) -> RunConfig:
        """The run; a variant trained on the baseline starts from the baseline's last step."""
        base = self.baseline
        return self.grid.config(self.variant, self.seed, str(base.final) if base is not None else None)

    @property
    def key(self) -> str:
        """Hash of everything on which the model depends: files by content, the baseline by its own key."""
        base = self.baseline if self.variant.training == "gates" else None
        values = to_dict(self.grid.config(self.variant, self.seed, base.key if base is not None else None))
        if values["gates"]["rank"] is None:
            del values["gates"]["rank"]  # so that models from before this setting keep their keys
        for section, names in _NO_CONSEQUENCE.items():
            for name in names:
                del values[section][name]
        for name in ("source", "validation", "tokenizer", "keep_whole"):
            place = values["data"][name]
            if place is not None and place != "stories" and Path(place).expanduser().exists():
                values["data"][name] = _content(Path(place).expanduser())
        return key_of([FORMAT, values, self.variant.training])

    @property
    def path(self) -> Path:
        """Folder that holds everything of this model."""
        return self.out / "models" / f"{self.variant.name}-seed{self.seed}-{self.key[:10]}"

    @property
    def run(self) -> Path:
        """Folder of the training run."""
        return self.path / "run"

    @property
    def final(self) -> Path:
        """Folder of the model after its last step."""
        return self.path / "final"

    def trained(self) -> dict[str, Any] | None:
        """Returns the record of the finished model (hashes of weights and texts, seconds), or None.

        Raises:
            ValueError: `final` holds other weights than were recorded.
        """
        keys = {"weights": str, "text": dict, "seconds": float}
        record, weights = _read_record(self.path / "done.json", keys), self.final / WEIGHTS
        if record is not None and weights.is_file() and _content(weights) != record["weights"]:
            raise ValueError(
                f"{weights} has changed since this model was finished: restore it, or delete {self.path}, and it is "
                "made again"
            )
        return record

    def steps_done(self) -> int:
        """Returns how many steps of the training run are saved on disk."""
        steps = complete_steps(self.run) if self.run.is_dir() else []
        return int(steps[-1].name.removeprefix("step-")) if steps else 0

    def finish(self, text: dict[str, str], seconds: float) -> dict[str, Any]:
        """Records that the model in `final` is finished."""
        record = {"weights": fingerprint(self.final / WEIGHTS), "text": text, "seconds": seconds}
        _write_record(self.path / "done.json", {"model": self.name, **record})
        return record

    def result_file(self, measurement: Measurement, trained: dict[str, Any]) -> Path:
        """Returns the file with the values of a measurement; `trained` is the record of the model."""
        inputs = {**measurement.inputs, "weights": trained["weights"], "text": trained["text"]}
        base = self.baseline
        if measurement.against_baseline and base is not None:
            inputs["baseline"] = (base.trained() or {}).get("weights")
        return self.path / f"{measurement.label}-{key_of([FORMAT, inputs])[:10]}.json"

    def record_of(self, measurement: Measurement) -> dict[str, Any] | None:
        """Returns the file of a measurement's values, with its seconds."""
        trained = self.trained()
        keys = {"values": dict, "notes": list, "seconds": float}
        return None if trained is None else _read_record(self.result_file(measurement, trained), keys)

    def result(self, measurement: Measurement) -> Result | None:
        """Returns the values of a measurement, or None if it was not made with these settings on this model."""
        record = self.record_of(measurement)
        if record is None:
            return None
        try:
            values = convert("values", record["values"], dict[str, dict[str, float | None]])
            notes = convert("notes", record["notes"], tuple[str, ...])
        except ValueError as error:
            raise DamagedFile(
                f"the {measurement.label} of {self.name} in {self.path} is damaged: {error}; {AGAIN}"
            ) from error
        # in some files the names of columns begin with the task
        prefix = f"{measurement.task}_" if measurement.task else ""
        return Result({name.removeprefix(prefix): value for name, value in values.items()}, notes)

    def keep(self, measurement: Measurement, result: Result, seconds: float) -> None:
        """Writes the values of a measurement; a value that is not finite counts as missing."""
        trained = self.trained()
        if trained is None:
            raise ValueError(f"{self.name} is not trained, so nothing can have been measured on it")
        values = {
            column: {stream: x if x is not None and math.isfinite(x) else None for stream, x in of_stream.items()}
            for column, of_stream in result.values.items()
        }
        record = {"model": self.name, **measurement.inputs, "values": values, "notes": result.notes}
        _write_record(self.result_file(measurement, trained), {**record, "seconds": seconds})

    @contextmanager
    def hold(self) -> Iterator[bool]:
        """Locks the folder against other processes; yields False if one of them works on it."""
        from filelock import FileLock, Timeout

        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()


def model_folders(grid: Grid, out: Path) -> list[ModelFolder]:
    """Returns all models of a grid, seed by seed, with the baseline first."""
    return [ModelFolder(grid, variant, seed, out) for seed in grid.seeds for variant in grid.variants]


def _content(path: Path) -> str:
    """Returns the fingerprint of a file or folder; unchanged files (size and time) are not read again."""
    if not path.is_file():
        return fingerprint(path)
    state = path.stat()
    return _of_file(path.resolve(), state.st_size, state.st_mtime_ns)


@functools.cache
def _of_file(path: Path, size: int, changed: int) -> str:
    return fingerprint(path)


def _read_record(path: Path, keys: Mapping[str, type | UnionType]) -> dict[str, Any] | None:
    """Returns the content of a JSON file with at least these keys, or None if it does not exist."""
    if not path.is_file():
        return None
    record: dict[str, Any] = read_json(path, remedy=AGAIN, keys=keys, other_keys=True)
    return record


def _write_record(path: Path, record: dict[str, Any]) -> None:
    atomic_write(path, json.dumps(record, indent=1, allow_nan=False).encode())
