"""The log of a run: loss terms, which stay on the device until they are needed, and the file `metrics.jsonl`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sa_lens.config import RunConfig
from sa_lens.core import LossTerms
from sa_lens.data.whole_files import DamagedFile, atomic_write, check_object, parse_json


class TrainingDiverged(RuntimeError):
    """A loss, gradient or weight is not finite."""


class Window:
    """Loss terms and gradient norms of the steps since the last record.

    Adding a step copies nothing off the device; `fetch` does, once for all steps since it was last called. All rows of
    a window have the same terms: `means` empties it before the first step whose terms differ.

    Args:
        names: names of the terms in the order of a row; they are set again when the terms change.
        mean_over_processes: averages a tensor over all processes.
    """

    def __init__(self, names: tuple[str, ...], mean_over_processes: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        self.names = names
        self.mean_over_processes = mean_over_processes
        self.fetched: list[list[float]] = []
        self._pending: list[Float[Tensor, " term"]] = []

    def add(self, row: Float[Tensor, " term"]) -> None:
        """Adds the row of one step."""
        self._pending.append(row)

    def fetch(self, step: int) -> None:
        """Brings the pending rows to the CPU and checks them.

        Args:
            step: steps taken so far, the last pending row's included.

        Raises:
            TrainingDiverged: a value is not finite; the message names the first such step and its terms.
        """
        if self._pending:
            rows = self.mean_over_processes(torch.stack(self._pending)).tolist()
            first = step - len(rows) + 1
            for offset, row in enumerate(rows):
                bad = [
                    f"{name} = {value}" for name, value in zip(self.names, row, strict=True) if not math.isfinite(value)
                ]
                if bad:
                    raise TrainingDiverged(f"at step {first + offset} {' and '.join(bad)}")
            self.fetched += rows
            self._pending = []

    def means(self) -> dict[str, float]:
        """Returns the mean of each term over the fetched rows, which are then deleted."""
        means = {
            name: math.fsum(column) / len(column)
            for name, column in zip(self.names, zip(*self.fetched, strict=True), strict=True)
        }
        self.fetched = []
        return means


def term_names(run: RunConfig, ablated: bool) -> tuple[str, ...]:
    """Returns the names of the values of a step: those of `term_row`, and the norm of the gradient.

    Args:
        ablated: whether the step trains the ablated stream (`schedule.trains_ablated`).
    """
    if not ablated:
        return ("loss", "clean", "grad_norm")
    reconstruction = ("reconstruction",) if run.loss.reconstruction else ()
    return ("loss", "clean", "ablated", *reconstruction, "grad_norm")


def term_row(terms: LossTerms) -> Float[Tensor, " term"]:
    """Returns the terms that are not None in one float32 tensor without gradient."""
    return torch.stack([value.detach().float() for value in terms if value is not None])


class MetricsFile:
    """`metrics.jsonl`: one JSON object per line, appended during the run.

    Every record has `kind` (train | eval | measured | sample) and `step` (optimizer steps taken before it).
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, record: dict[str, Any]) -> None:
        """Adds a record, without values that are None or not finite numbers."""
        kept = {k: v for k, v in record.items() if v is not None and (not isinstance(v, float) or math.isfinite(v))}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(kept) + "\n")

    def read(self) -> list[dict[str, Any]]:
        """Returns all records, without a last line that was cut off.

        Raises:
            DamagedFile: another line is no record.
        """
        if not self.path.is_file():
            return []
        lines = self.path.read_bytes().splitlines()
        records = []
        for number, line in enumerate(lines, 1):
            try:
                record = parse_json(line)
                check_object(record, {"kind": str, "step": int}, other_keys=True)
                if record["kind"] != "sample":
                    check_object(
                        record, {"kind": str, "step": int} | dict.fromkeys({*record} - {"kind", "step"}, float)
                    )
            except ValueError as error:
                if number < len(lines):
                    raise DamagedFile(f"{self.path} is damaged: line {number}: {error}; delete this line") from error
            else:
                records.append(record)
        return records

    def drop_after(self, step: int) -> None:
        """Removes records of later steps, which a resumed run will write again."""
        if self.path.is_file():
            kept = [record for record in self.read() if record["step"] <= step]
            atomic_write(self.path, "".join(json.dumps(record) + "\n" for record in kept).encode())
