"""What is shown, as data: frozen records that go to JSON and back, from which every figure is drawn.

A record holds numbers, labels and units, and no colours, sizes or pixels: those are the theme's. Missing numbers are
None.
"""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sa_lens.config import from_dict, shown, suggestion
from sa_lens.data.reading import DamagedFile, check_object, parse_json
from sa_lens.views.text_records import (
    Attention,
    GateRaster,
    Guess,
    LensStream,
    LiveUnit,
    LogitLens,
    Predictions,
    Story,
    StreamPredictions,
    Track,
    UnitActivations,
)

__all__ = [
    "Attention",
    "Axis",
    "Bars",
    "CircuitEdge",
    "CircuitMap",
    "Curves",
    "GateRaster",
    "Guess",
    "HeatMap",
    "Histogram",
    "LensStream",
    "Level",
    "Line",
    "LiveUnit",
    "LogitLens",
    "Predictions",
    "Record",
    "Series",
    "Story",
    "StreamPredictions",
    "Table",
    "Track",
    "UnitActivations",
    "from_json",
    "number",
    "numbers",
    "read",
    "short",
    "to_json",
    "write",
]


@dataclass(frozen=True)
class Axis:
    """An axis with a label for each row or column."""

    title: str
    """What the axis shows, with its unit where it has one."""
    labels: tuple[str, ...]
    """A label for each place on it."""


@dataclass(frozen=True)
class HeatMap:
    """A table of numbers shown as colours; the first row is drawn at the bottom."""

    title: str
    """Heading."""
    note: str
    """A line below the heading: what the numbers mean, how many prompts."""
    x: Axis
    """Columns."""
    y: Axis
    """Rows, upward."""
    values: tuple[tuple[float | None, ...], ...]
    """A row of numbers for each label of y."""
    scale: str
    """What the colours mean, with unit."""
    colours: Literal["diverging", "sequential"] = "diverging"
    """`diverging`: centred at 0. `sequential`: from the smallest to the largest value."""

    def __post_init__(self) -> None:
        if len(self.values) != len(self.y.labels) or any(len(row) != len(self.x.labels) for row in self.values):
            raise ValueError(
                f"{self.title!r}: values must be {len(self.y.labels)} rows of {len(self.x.labels)} numbers, as the axes"
            )


@dataclass(frozen=True)
class Bars:
    """Numbers with names, the first at the top."""

    title: str
    """Heading."""
    note: str
    """A line below the heading."""
    labels: tuple[str, ...]
    """A name for each bar."""
    values: tuple[float | None, ...]
    """Length of each bar."""
    scale: str
    """What the lengths mean, with unit."""

    def __post_init__(self) -> None:
        if len(self.labels) != len(self.values):
            raise ValueError(f"{self.title!r}: {len(self.labels)} labels for {len(self.values)} values")


@dataclass(frozen=True)
class Line:
    """One curve."""

    name: str
    """What it belongs to, such as a run; lines of one name share a colour."""
    stream: str
    """`clean` (solid), `ablated` (dashed), or empty (solid)."""
    x: tuple[float, ...]
    """Where, rising."""
    y: tuple[float | None, ...]
    """How much."""
    low: tuple[float | None, ...] = ()
    """Lower ends of the intervals; empty: none."""
    high: tuple[float | None, ...] = ()
    """Upper ends of the intervals; empty: none."""

    def __post_init__(self) -> None:
        if len(self.x) != len(self.y):
            raise ValueError(f"line {self.name!r}: {len(self.x)} places for {len(self.y)} values")
        if {len(self.low), len(self.high)} not in ({0}, {len(self.x)}):
            raise ValueError(
                f"line {self.name!r}: {len(self.low)} and {len(self.high)} ends of intervals for {len(self.x)} places"
            )


@dataclass(frozen=True)
class Level:
    """A value to compare curves with."""

    value: float
    """Where on the y axis."""
    label: str
    """What it means."""


@dataclass(frozen=True)
class Curves:
    """Curves over one axis."""

    title: str
    """Heading."""
    note: str
    """A line below the heading."""
    x_title: str
    """What x is, with unit."""
    y_title: str
    """What y is, with unit."""
    lines: tuple[Line, ...]
    """The curves, in the order of the legend."""
    x_scale: Literal["linear", "log"] = "linear"
    """Spacing of the x axis."""
    levels: tuple[Level, ...] = ()
    """Values to compare the curves with."""
    moments: tuple[Level, ...] = ()
    """Values of x at which something changes."""


@dataclass(frozen=True)
class CircuitEdge:
    """An edge of a circuit."""

    source: str
    """Node that writes: `embed`, a head `a2.h5`, an MLP `m2`."""
    destination: str
    """Node that reads: a head, an MLP, or `logits`."""
    port: str
    """`q`, `k` or `v` of a head; empty for others."""
    score: float | None
    """Its score; None if it has none."""


@dataclass(frozen=True)
class CircuitMap:
    """A circuit: nodes by layer, and the edges between them."""

    title: str
    """Heading."""
    note: str
    """A line below the heading: how the circuit was found, how well the model does the task."""
    n_layers: int
    """Layers of the transformer."""
    n_heads: int
    """Heads of a layer."""
    attn_only: bool
    """Whether the transformer has no MLPs."""
    n_edges: int
    """Edges of the whole transformer."""
    edges: tuple[CircuitEdge, ...]
    """Edges of the circuit."""
    scale: str
    """What the scores mean, with unit."""


@dataclass(frozen=True)
class Series:
    """Counts of one thing in the bins of a histogram."""

    name: str
    """What was counted."""
    counts: tuple[int, ...]
    """How many fell into each bin."""


@dataclass(frozen=True)
class Histogram:
    """How often values of some size occur."""

    title: str
    """Heading."""
    note: str
    """A line below the heading."""
    x_title: str
    """What was measured, with unit."""
    edges: tuple[float, ...]
    """Ends of the bins, one more than there are bins."""
    series: tuple[Series, ...]
    """What was counted, in the order of the legend."""

    def __post_init__(self) -> None:
        for one in self.series:
            if len(one.counts) != len(self.edges) - 1:
                raise ValueError(
                    f"{self.title!r}: {len(one.counts)} counts of {one.name} for {len(self.edges) - 1} bins"
                )


@dataclass(frozen=True)
class Table:
    """A table of texts and numbers."""

    title: str
    """Heading."""
    note: str
    """A line below the heading."""
    columns: tuple[str, ...]
    """Heads of the columns, with units."""
    rows: tuple[tuple[str, ...], ...]
    """Cells as they are read."""
    numeric: tuple[bool, ...]
    """Whether a column holds numbers."""


Record = (
    HeatMap
    | Bars
    | Curves
    | Attention
    | CircuitMap
    | Story
    | Predictions
    | LogitLens
    | GateRaster
    | UnitActivations
    | Histogram
    | Table
)
"""Everything that can be drawn."""

_KINDS: dict[str, type] = {kind.__name__: kind for kind in typing.get_args(Record)}


def number(value: Any) -> float | None:
    """A float, or None for what is missing or not finite."""
    if value is None:
        return None
    found = float(value)
    return found if math.isfinite(found) else None


def short(value: float) -> float:
    """A number to six significant digits, as many as single precision is good for."""
    return float(f"{value:.6g}")


def numbers(values: Any) -> Any:
    """Nested tuples of `number`, from an array of any depth."""
    array = np.asarray(values, dtype=float)
    return tuple(numbers(part) for part in array) if array.ndim else number(array)


def to_json(record: Record) -> str:
    """The record as JSON, its kind under `kind`."""
    return json.dumps(
        {"kind": type(record).__name__, **dataclasses.asdict(record)}, allow_nan=False, ensure_ascii=False
    )


def from_json(text: str) -> Record:
    """The record that `to_json` wrote.

    Raises:
        ValueError: not a record, or of an unknown kind.
    """
    try:
        content = parse_json(text)
        check_object(content, {"kind": str}, other_keys=True)
        kind = content.pop("kind")
        if kind not in _KINDS:
            raise ValueError(f"its kind is {shown(kind)}{suggestion(kind, _KINDS)}")
        return typing.cast(Record, from_dict(_KINDS[kind], content))
    except ValueError as error:
        raise ValueError(f"not a record of {', '.join(_KINDS)}: {error}; text begins {text[:60]!r}") from error


def write(record: Record, path: str | Path) -> Path:
    """Writes the record as a JSON file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_json(record), encoding="utf-8")
    return path


def read(path: str | Path) -> Record:
    """Reads a record that `write` wrote.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a record.
    """
    try:
        return from_json(Path(path).read_bytes().decode())
    except ValueError as error:
        raise DamagedFile(f"{path} is damaged: {error}; write the record again") from error
