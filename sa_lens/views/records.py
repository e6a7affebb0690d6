"""What is shown, as data: frozen records that go to JSON and back, from which every picture is drawn.

A record holds numbers, labels and units of measurement, but no colours or sizes: those are the theme's. Missing numbers
are None.
"""

from __future__ import annotations

import json
import math
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from sa_lens.config import Site, from_dict, shown, suggestion
from sa_lens.data.whole_files import DamagedFile, check_object, parse_json

Colours = Literal["diverging", "sequential"]
"""`diverging`: centred at 0. `sequential`: from the smallest to the largest value."""


@dataclass(frozen=True)
class Titled:
    """What every record begins with."""

    title: str
    """Heading."""
    note: str
    """A line below the heading: what the numbers mean, and what they were measured on."""


@dataclass(frozen=True)
class OfAnalysis(Titled):
    """What every record of the result of an analysis begins with."""

    warnings: tuple[str, ...] = field(default=(), kw_only=True)
    """What speaks against trusting the numbers; stands below the heading of every picture."""


@dataclass(frozen=True)
class OfText(Titled):
    """What every record of one text begins with."""

    tokens: tuple[str, ...]
    """The text, token by token."""


# ------------------------------------------------------------------------------------------------------------ one text


@dataclass(frozen=True)
class Attention(OfText):
    """Attention patterns of heads on one text, in each stream."""

    streams: tuple[str, ...]
    """`clean`, `ablated`, or both."""
    heads: tuple[str, ...]
    """Name of each head, such as `1.3`: head 3 of layer 1."""
    patterns: tuple[tuple[tuple[tuple[float, ...], ...], ...], ...]
    """For each head, stream and query position, the share of attention that each key position gets."""

    def __post_init__(self) -> None:
        _check(self.title, len(self.heads), "heads", len(self.patterns), "patterns")
        for name, pattern in zip(self.heads, self.patterns, strict=True):
            _check(f"{self.title}, {name}", len(self.streams), "streams", len(pattern), "patterns")


@dataclass(frozen=True)
class Track:
    """A number for each token of a text."""

    name: str
    """What the numbers are, in a few words."""
    scale: str
    """What they mean, with unit."""
    values: tuple[float | None, ...]
    """One number per token; None where there is none."""
    colours: Colours = "sequential"
    """How numbers become colours."""


@dataclass(frozen=True)
class Story(OfText):
    """A text whose tokens take the colour of a number, one track of numbers at a time."""

    tracks: tuple[Track, ...]
    """What to colour by; the first is shown first."""

    def __post_init__(self) -> None:
        for track in self.tracks:
            _check(self.title, len(track.values), f"values of {track.name}", len(self.tokens), "tokens")


@dataclass(frozen=True)
class Guess:
    """A token that a stream expects next."""

    token: str
    """Its text."""
    log_probability: float
    """In nats."""


@dataclass(frozen=True)
class StreamPredictions:
    """What one stream expects after each token of a text."""

    stream: str
    """`clean` or `ablated`."""
    top: tuple[tuple[Guess, ...], ...]
    """The most likely next tokens at each position, the likeliest first."""
    actual: tuple[float | None, ...]
    """Log-probability of the token that does come next, nats; None at the end."""


@dataclass(frozen=True)
class Predictions(OfText):
    """What each stream expects after each token of a text."""

    streams: tuple[StreamPredictions, ...]
    """One entry per stream."""

    def __post_init__(self) -> None:
        for stream in self.streams:
            for values in (stream.top, stream.actual):
                _check(self.title, len(values), f"predictions, {stream.stream},", len(self.tokens), "tokens")


@dataclass(frozen=True)
class LensStream:
    """What the residual stream would predict after each layer, in one stream."""

    stream: str
    """`clean` or `ablated`."""
    top: tuple[tuple[str, ...], ...]
    """For each layer and position, the likeliest next token."""
    log_probability: tuple[tuple[float, ...], ...]
    """Its log-probability, nats."""
    actual: tuple[tuple[float | None, ...], ...]
    """Log-probability of the token that does come next, nats; None at the end."""


@dataclass(frozen=True)
class LogitLens(OfText):
    """What the residual stream would predict after each layer."""

    layers: tuple[str, ...]
    """Name of each row, in the order of computation."""
    streams: tuple[LensStream, ...]
    """One entry per stream."""


@dataclass(frozen=True)
class LiveUnit:
    """A unit that a gate keeps at some tokens of a text."""

    name: str
    """Such as `L1.mlp.17`."""
    layer: int
    """Its layer."""
    site: Site
    """`attn`: an attention unit; `mlp`: a neuron."""
    promotes: tuple[str, ...]
    """Tokens whose logits it raises most, directly."""
    positions: tuple[int, ...]
    """Tokens at which it stays, rising."""
    values: tuple[float, ...]
    """Its value at each of them."""
    place: str = ""
    """Head and channel of an attention unit, such as `head 2, channel 1`; empty for a neuron."""

    def __post_init__(self) -> None:
        _check(self.name, len(self.positions), "positions", len(self.values), "values")


@dataclass(frozen=True)
class GateRaster(OfText):
    """Which units stay at each token of a text; units that never stay are left out."""

    units: tuple[LiveUnit, ...]
    """Layer by layer, attention units first."""
    scale: str
    """What the values mean."""
    left_out: int = 0
    """How many more units stay at one token or more, but add less to the residual stream than those shown."""


@dataclass(frozen=True)
class UnitActivations(OfText):
    """Values of the most active units on a text, to browse unit by unit."""

    streams: tuple[str, ...]
    """`clean`, and `ablated` if the model has gates."""
    units: tuple[str, ...]
    """Names of the units, layer by layer."""
    values: tuple[tuple[tuple[float, ...], ...], ...]
    """For each token, stream and unit, the value."""


@dataclass(frozen=True)
class Exploration(OfText):
    """The working set of a prompt: the records of its views."""

    story: Story
    """Its tokens, to colour by losses, changes of the masks and units."""
    predictions: Predictions
    """What each stream expects after each token."""
    attention: Attention
    """Where heads look."""
    gates: GateRaster | None
    """Which units stay; None for a model without hard gates."""


# -------------------------------------------------------------------------------------------------------------- charts


@dataclass(frozen=True)
class Axis:
    """An axis with a label for each row or column."""

    title: str
    """What the axis shows, with its unit where it has one."""
    labels: tuple[str, ...]
    """One label per row or column."""


@dataclass(frozen=True)
class HeatMap(OfAnalysis):
    """A table of numbers shown as colours; the first row is drawn at the bottom."""

    x: Axis
    """Columns."""
    y: Axis
    """Rows, upward."""
    values: tuple[tuple[float | None, ...], ...]
    """A row of numbers for each label of y."""
    scale: str
    """What the colours mean, with unit."""
    colours: Colours = "diverging"
    """How numbers become colours."""

    def __post_init__(self) -> None:
        if len(self.values) != len(self.y.labels) or any(len(row) != len(self.x.labels) for row in self.values):
            raise ValueError(
                f"{self.title!r}: values must be {len(self.y.labels)} rows of {len(self.x.labels)} numbers, as the axes"
            )


@dataclass(frozen=True)
class Bars(OfAnalysis):
    """Numbers with names, the first at the top."""

    labels: tuple[str, ...]
    """Name of each bar."""
    values: tuple[float | None, ...]
    """Length of each bar."""
    scale: str
    """What the lengths mean, with unit."""

    def __post_init__(self) -> None:
        _check(self.title, len(self.labels), "labels", len(self.values), "values")


@dataclass(frozen=True)
class Line:
    """One curve."""

    name: str
    """What it belongs to, such as a run; lines with the same name share a colour."""
    stream: str
    """`clean` (solid), `ablated` (dashed), or empty (solid)."""
    x: tuple[float, ...]
    """Places, rising."""
    y: tuple[float | None, ...]
    """Values."""
    low: tuple[float | None, ...] = ()
    """Lower ends of the intervals; empty: none."""
    high: tuple[float | None, ...] = ()
    """Upper ends of the intervals; empty: none."""

    def __post_init__(self) -> None:
        _check(self.name, len(self.x), "places", len(self.y), "values")
        if self.low or self.high:
            _check(self.name, len(self.low), "lower ends", len(self.x), "places")
            _check(self.name, len(self.high), "upper ends", len(self.x), "places")


@dataclass(frozen=True)
class Level:
    """A value to compare curves with."""

    value: float
    """Place on the axis."""
    label: str
    """What it means."""


@dataclass(frozen=True)
class Curves(OfAnalysis):
    """Curves over one axis."""

    x_title: str
    """What x is, with unit."""
    y_title: str
    """What y is, with unit."""
    lines: tuple[Line, ...]
    """The curves, in the order of the legend."""
    x_scale: Literal["linear", "log"] = "linear"
    """Spacing of the x axis."""
    levels: tuple[Level, ...] = ()
    """Values of y to compare the curves with."""
    moments: tuple[Level, ...] = ()
    """Values of x at which something changes."""


@dataclass(frozen=True)
class Series:
    """Counts of one quantity in the bins of a histogram."""

    name: str
    """What was counted."""
    counts: tuple[int, ...]
    """How many fell into each bin."""


@dataclass(frozen=True)
class Histogram(Titled):
    """How often values of each size occur."""

    x_title: str
    """What was measured, with unit."""
    edges: tuple[float, ...]
    """Ends of the bins, one more than there are bins."""
    series: tuple[Series, ...]
    """What was counted, in the order of the legend."""

    def __post_init__(self) -> None:
        for series in self.series:
            _check(self.title, len(series.counts), f"counts of {series.name}", len(self.edges) - 1, "bins")


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
class CircuitMap(OfAnalysis):
    """A circuit: nodes by layer, and the edges between them."""

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
class Table(Titled):
    """A table of texts and numbers."""

    columns: tuple[str, ...]
    """Headings of the columns, with units."""
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
    | Exploration
    | Histogram
    | Table
)
"""Everything that can be drawn."""

_R = TypeVar("_R")


def _check(name: str, n: int, what: str, m: int, of: str) -> None:
    if n != m:
        raise ValueError(f"{name!r}: {n} {what} for {m} {of}")


def number(value: Any) -> float | None:
    """Returns a float, or None for what is missing or not finite."""
    return float(value) if value is not None and math.isfinite(value) else None


def short(value: float) -> float:
    """Rounds a number to six significant digits, the precision of float32."""
    return float(f"{value:.6g}")


def numbers(values: Any) -> Any:
    """Returns nested tuples of `number`, from an array of any depth."""
    array = np.asarray(values, dtype=float)
    return tuple(numbers(part) for part in array) if array.ndim else number(array)


# ---------------------------------------------------------------------------------------------------------------- JSON


def to_json(record: Any) -> str:
    """Returns a record, or a report, as JSON; the name of its class stands under `kind`."""
    content = {"kind": type(record).__name__, **vars(record)}
    return json.dumps(content, default=vars, allow_nan=False, ensure_ascii=False, separators=(",", ":"))


def from_json(text: str, kinds: Sequence[type[_R]] = typing.get_args(Record)) -> _R:
    """Returns the record that `to_json` wrote.

    Args:
        kinds: classes of which it may be.

    Raises:
        ValueError: not a record, or of an unknown kind.
    """
    known = {kind.__name__: kind for kind in kinds}
    try:
        content = parse_json(text)
        check_object(content, {"kind": str}, other_keys=True)
        kind = content.pop("kind")
        if kind not in known:
            raise ValueError(f"its kind is {shown(kind)}{suggestion(kind, known)}")
        return from_dict(known[kind], content)
    except ValueError as error:
        raise ValueError(f"not a record of {', '.join(known)}: {error}; text begins {text[:60]!r}") from error


def read(path: str | Path, kinds: Sequence[type[_R]] = typing.get_args(Record)) -> _R:
    """Reads a record from a JSON file that `save` wrote.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a record.
    """
    try:
        return from_json(Path(path).read_bytes().decode(), kinds)
    except ValueError as error:
        raise DamagedFile(f"{path} is damaged: {error}; save the record again") from error
