"""Bars, curves and histograms: single units by effect, losses over training, faithfulness, values of units."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from sa_lens.config import Stream
from sa_lens.core.host import Host, streams_of
from sa_lens.core.unit import Unit, checked_unit
from sa_lens.units import stream_units
from sa_lens.views.drawing import Figure, draw
from sa_lens.views.records import Bars, Curves, Histogram, Level, Line, Series, number
from sa_lens.views.theme import escape, fade, label_axis, lay_out, palette
from sa_lens.views.wording import TASKS, mask_warnings, metric_words, skill_warnings

WIDTH = 860
"""Pixels of a chart."""
MOST_BARS = 40
"""Bars that a figure shows; the rest stay in the record."""


# ---------------------------------------------------------------------------------------------------------------- bars


@draw.register
def _(record: Bars, *, dark: bool = False) -> Figure:
    colours = palette(dark)
    labels, values = [escape(label) for label in record.labels[:MOST_BARS]], record.values[:MOST_BARS]
    figure = Figure(
        go.Bar(
            x=list(values),
            y=list(range(len(values))),
            customdata=labels,
            orientation="h",
            marker={"color": [colours.positive if (v or 0) >= 0 else colours.negative for v in values]},
            hovertemplate=f"%{{customdata}}<br><b>%{{x:.4f}}</b> {record.scale}<extra></extra>",
        )
    )
    if len(record.values) > MOST_BARS:
        record = replace(record, note=f"{record.note}; the first {MOST_BARS} of {len(record.values)}")
    x = {"title": {"text": record.scale}, "zeroline": True, "zerolinecolor": colours.faint}
    y = label_axis(record.labels[:MOST_BARS], autorange="reversed")
    return lay_out(figure, record, WIDTH, 65 + 20 * len(labels), dark, xaxis=x, yaxis=y, bargap=0.25)


# -------------------------------------------------------------------------------------------------------------- curves


def training_curves(
    runs: Mapping[str, str | Path] | Sequence[str | Path],
    kind: Literal["eval", "train"] = "eval",
    title: str = "Loss over training",
) -> Curves:
    """Returns the losses of one or several runs, from their `metrics.jsonl`.

    Where a run trains the clean stream alone at first, a mark says from which step on the ablated one is trained too.

    Args:
        runs: run folders by name, or folders that give their own names.
        kind: `eval`: losses on the validation text. `train`: on the training batches.
        title: heading.

    Raises:
        FileNotFoundError: a folder without metrics.
        ValueError: no runs, an unknown kind, or a run without a record of that kind.
    """
    from sa_lens.training.run_log import MetricsFile

    if kind not in ("eval", "train"):
        raise ValueError(f"kind={kind!r} must be 'eval' or 'train'")
    named = dict(runs) if isinstance(runs, Mapping) else {Path(run).name: run for run in runs}
    if not named or len(named) < len(runs):
        raise ValueError("runs: give at least one run folder, and names if two folders are called the same")
    lines, switches = [], []
    for name, folder in named.items():
        path = Path(folder) / "metrics.jsonl"
        if not path.is_file():
            raise FileNotFoundError(f"no metrics.jsonl in {folder}: name the folder of a training run")
        written = MetricsFile(path).read()
        records = [record for record in written if record.get("kind") == kind]
        if not records:
            raise ValueError(f"{path} has no record of kind {kind!r} yet")
        switches += [record["step"] for record in written if record.get("streams") == 1][-1:]
        for stream in ("clean", "ablated"):
            key = f"{stream}_loss" if kind == "eval" else stream
            points = [(record["step"], number(record.get(key))) for record in records]
            if any(loss is not None for _, loss in points):
                x, y = zip(*points, strict=True)
                lines.append(Line(name, stream, tuple(map(float, x)), tuple(y)))
    text = "validation text" if kind == "eval" else "training batches"
    moments = tuple(Level(float(step), "ablated stream trained from here") for step in sorted({*switches}))
    return Curves(title, f"on the {text}", "optimizer steps", "loss, nats per token", tuple(lines), moments=moments)


def faithfulness_chart(
    curves: pd.DataFrame | Mapping[str, pd.DataFrame],
    *,
    x: Literal["edges", "share"] = "edges",
    y: Literal["f", "kl"] = "f",
    title: str | None = None,
    note: str | None = None,
) -> Curves:
    """Returns curves of how well circuits of growing size do what the whole model does.

    Args:
        curves: tables with one row per size: `edges`, `share`, `f`, `kl`, and perhaps intervals `f_low`, `f_high`. A
            table may hold several curves, told apart by its columns `ranking`, `method`, `order` and `stream`
            (`sa_lens.circuits.curves_table` makes such a table); a mapping names each table. Warnings are those of the
            column `warnings`, or follow from `pair_accuracy` and `masks`.
        x: number of edges, or their share of all, on a log axis (sizes of 0 have no place on it).
        y: faithfulness f (0: as the empty circuit, 1: as the full model), or KL from the full model in nats.
        title: heading; None: what is shown.
        note: a line below the heading; None: task, number of pairs and skill, where the tables have them.

    Raises:
        ValueError: no curve, a table without these columns, or an unknown choice.
    """
    if x not in ("edges", "share") or y not in ("f", "kl"):
        raise ValueError(f"x={x!r} must be 'edges' or 'share', y={y!r} 'f' or 'kl'")
    tables = dict(curves) if isinstance(curves, Mapping) else {"": curves}
    lines: list[Line] = []
    warned: dict[str, list[str]] = {}
    for label, table in tables.items():
        missing = [column for column in (x, y) if column not in table]
        if missing or not len(table):
            raise ValueError(
                f"the table {label!r} has {len(table)} rows and lacks {missing or 'no column'}: a curve needs a row "
                f"for each size, with {x!r} and {y!r}"
            )
        by = [column for column in ("ranking", "method", "order", "stream") if column in table]
        several = {column for column in by if column != "order" or table[column].nunique() > 1}
        for keys, rows in table.groupby(by, sort=False) if by else [((), table)]:
            named = dict(zip(by, keys, strict=True))
            stream = str(named.pop("stream", ""))
            parts = [label, *(str(value) for column, value in named.items() if column in several)]
            name = ", ".join(part for part in parts if part)
            for warning in _curve_warnings(rows, stream):
                warned.setdefault(warning, []).append(", ".join(part for part in (name, stream) if part))
            rows = rows[rows[x] > 0].sort_values(x)
            ends = [f"{y}_low", f"{y}_high"]
            low, high = [tuple(map(number, rows[end])) for end in ends] if set(ends) <= {*rows} else ((), ())
            lines.append(
                Line(
                    name,
                    stream,
                    tuple(map(float, rows[x])),
                    tuple(map(number, rows[y])),
                    low,
                    high,
                )
            )
    words = {"edges": "edges in the circuit", "share": "share of all edges"}
    if not lines:
        raise ValueError("no curve to show: give at least one table")
    return Curves(
        title if title is not None else {"f": "Faithfulness by size", "kl": "KL from the full model by size"}[y],
        note if note is not None else _curve_note(tables.values()),
        words[x],
        {"f": "faithfulness f (1: as the full model)", "kl": "KL from the full model, nats"}[y],
        tuple(lines),
        x_scale="log",
        levels=(Level(0.9, "f = 0.9"), Level(1.0, "full model")) if y == "f" else (),
        warnings=tuple(
            warning if len(names) == len(lines) else f"{'; '.join(names)}: {warning}"
            for warning, names in warned.items()
        ),
    )


def _curve_warnings(rows: pd.DataFrame, stream: str) -> list[str]:
    """The warnings of a curve's analysis, or those that its skill and its masks give."""
    if "warnings" in rows:
        return [warning for warning in rows["warnings"].unique() if warning]
    accuracy = float(rows["pair_accuracy"].min()) if "pair_accuracy" in rows else None
    return skill_warnings(accuracy) + mask_warnings(stream, rows["masks"].iloc[0] if "masks" in rows else None)


def _curve_note(tables: Iterable[pd.DataFrame]) -> str:
    """What all tables agree on, and the skill of the models."""

    def values(column: str) -> list[Any]:
        return list(dict.fromkeys(value for table in tables if column in table for value in table[column]))

    tables = list(tables)
    parts = [TASKS.get(str(task), str(task)) for task in values("task")]
    parts += [f"{', '.join(map(metric_words, values('metric')))}"] * bool(values("metric"))
    parts += [f"{', '.join(map(str, values('ablation')))} ablation"] * bool(values("ablation"))
    parts += [f"{', '.join(map(str, values('n')))} pairs"] * bool(values("n"))
    if accuracies := values("pair_accuracy"):
        parts.append("pair accuracy " + ", ".join(f"{accuracy:.2f}" for accuracy in accuracies))
    return "; ".join(parts)


def _label(line: Line) -> str:
    return escape(f"{line.name}, {line.stream}" if line.stream else line.name)


@draw.register
def _(record: Curves, *, dark: bool = False) -> Figure:
    colours = palette(dark)
    names = list(dict.fromkeys(line.name for line in record.lines))
    figure = Figure()
    for add, place, levels, corner in (
        (figure.add_hline, "y", record.levels, "top left"),
        (figure.add_vline, "x", record.moments, "top right"),
    ):
        for level in levels:
            add(
                **{place: level.value},
                line={"color": colours.faint, "width": 1, "dash": "dot"},
                annotation={"text": escape(level.label), "font": {"size": 11, "color": colours.faint}},
                annotation_position=corner,
            )
    for line in record.lines:
        label = _label(line)
        colour = colours.lines[names.index(line.name) % len(colours.lines)]
        if line.low:
            figure.add_trace(_band(line, colour))
        figure.add_trace(
            go.Scatter(
                x=list(line.x),
                y=list(line.y),
                name=label,
                mode="lines+markers" if len(line.x) <= 60 else "lines",
                line={"color": colour, "dash": "dash" if line.stream == "ablated" else "solid", "width": 2},
                marker={"size": 5},
                hovertemplate=(
                    f"{label}<br>{record.x_title} %{{x:,}}<br><b>%{{y:.4f}}</b> {record.y_title}<extra></extra>"
                ),
                legendgroup=label,
            )
        )
    log = {"type": "log", "dtick": "D2" if _decades(record) < 3 else 1}
    x = {"title": {"text": record.x_title}, **(log if record.x_scale == "log" else {"rangemode": "tozero"})}
    y = {"title": {"text": record.y_title}}
    return lay_out(figure, record, WIDTH, 396, dark, xaxis=x, yaxis=y, showlegend=len(record.lines) > 1)


def _decades(record: Curves) -> float:
    """Powers of ten that the x axis spans."""
    xs = [x for line in record.lines for x in line.x if x > 0]
    return math.log10(max(xs) / min(xs)) if xs else 0.0


def _band(line: Line, colour: str) -> go.Scatter:
    """The interval of a curve as a pale band."""
    ends = [(x, low, high) for x, low, high in zip(line.x, line.low, line.high, strict=True) if None not in (low, high)]
    return go.Scatter(
        x=[x for x, _, _ in ends] + [x for x, _, _ in reversed(ends)],
        y=[high for _, _, high in ends] + [low for _, low, _ in reversed(ends)],
        mode="lines",
        fill="toself",
        fillcolor=fade(colour, 0.15),
        line={"width": 0},
        hoverinfo="skip",
        showlegend=False,
        legendgroup=_label(line),
        name="interval",
    )


# ---------------------------------------------------------------------------------------------------------- histograms


def histogram(
    values: Mapping[str, Any], title: str, x_title: str, *, note: str = "", bins: int | None = None
) -> Histogram:
    """Returns how often values of each size occur, with the same bins for all.

    Args:
        values: arrays of numbers by name.
        title: heading.
        x_title: what the values are, with unit.
        note: a line below the heading.
        bins: number of bins, all equally wide; None: 60.

    Raises:
        ValueError: nothing to count, a value that is not finite, or fewer than one bin.
    """
    bins = 60 if bins is None else bins
    arrays = {name: np.asarray(array, dtype=float).ravel() for name, array in values.items()}
    if not arrays or not all(array.size for array in arrays.values()):
        raise ValueError("histogram needs at least one value under each name")
    if bins < 1:
        raise ValueError(f"bins={bins} must be at least 1")
    everything = np.concatenate(list(arrays.values()))
    if not np.isfinite(everything).all():
        raise ValueError(f"histogram counts finite values; {int((~np.isfinite(everything)).sum())} are not")
    edges = np.histogram_bin_edges(everything, bins)
    counted = {name: np.histogram(array, edges)[0] for name, array in arrays.items()}
    return Histogram(
        title,
        note,
        x_title,
        tuple(map(float, edges)),
        tuple(Series(name, tuple(map(int, counts))) for name, counts in counted.items()),
    )


def unit_histogram(
    model: Host, text: Any, unit: Unit | str, *, n_tokens: int | None = None, bins: int | None = None
) -> Histogram:
    """Returns a histogram of a unit's values over a text: in the clean stream, and where it stays in the ablated one.

    Args:
        text: a token file, or blocks of tokens `[block pos]`.
        unit: a `Unit`, or text such as `L1.mlp.17`.
        n_tokens: tokens to read at most; None: all.
        bins: number of bins; None: 60.

    Raises:
        ValueError: a unit that the model does not have, or a text that does not fit.
    """
    unit = checked_unit(model, unit)
    values, n = unit_values(model, text, [unit], n_tokens)
    of_unit = values[unit]
    note, counted = f"{n:,} tokens", {"clean": of_unit["clean"]}
    if "ablated" in of_unit:
        stays = len(of_unit["ablated"])
        note += f"; stays at {stays:,} of them ({stays / n:.2%})"
        if stays:
            counted["ablated, where it stays"] = of_unit["ablated"]
    return histogram(counted, str(unit), "value of the unit", note=note, bins=bins)


def unit_values(
    model: Host, text: Any, units: Sequence[Unit], n_tokens: int | None = None
) -> tuple[dict[Unit, dict[Stream, np.ndarray]], int]:
    """Returns the values of units over a text by stream (ablated: where they stay), and the number of tokens."""
    streams = streams_of(model)
    sublayers = list(dict.fromkeys(unit.sublayer for unit in units))
    parts: dict[Unit, dict[Stream, list[np.ndarray]]] = {unit: {stream: [] for stream in streams} for unit in units}
    n = 0
    for batch in stream_units(model, text, streams, sublayers=sublayers, n_tokens=n_tokens, progress=False):
        n += batch.tokens.numel()
        for unit, by_stream in parts.items():
            for stream, of_stream in by_stream.items():
                x = batch.values[stream][unit.sublayer][..., unit.index]
                if stream == "ablated" and unit.sublayer in batch.masks:
                    x = x[batch.masks[unit.sublayer][..., unit.index] > 0]
                of_stream.append(x.flatten().float().cpu().numpy())
    return {
        unit: {stream: np.concatenate(of_stream) for stream, of_stream in by_stream.items()}
        for unit, by_stream in parts.items()
    }, n


@draw.register
def _(record: Histogram, *, dark: bool = False) -> Figure:
    colours = palette(dark)
    bins = list(pairwise(record.edges))
    figure = Figure()
    for i, series in enumerate(record.series):
        colour = colours.lines[i % len(colours.lines)]
        figure.add_trace(
            go.Bar(
                x=[(low + high) / 2 for low, high in bins],
                y=list(series.counts),
                width=[high - low for low, high in bins],
                customdata=[f"{low:.4g} to {high:.4g}" for low, high in bins],
                name=escape(series.name),
                marker={"color": fade(colour, 0.4), "line": {"color": colour, "width": 1.2}},
                hovertemplate=f"{escape(series.name)}<br>%{{customdata}}<br><b>%{{y:,}}</b><extra></extra>",
            )
        )
    x, y = (
        {"title": {"text": escape(record.x_title)}},
        {"title": {"text": "count (log scale)"}, "type": "log", "dtick": 1},
    )
    layout: dict[str, Any] = {"barmode": "overlay", "bargap": 0, "showlegend": len(record.series) > 1}
    return lay_out(figure, record, WIDTH, 316, dark, xaxis=x, yaxis=y, **layout)
