"""Bars and curves: single units by effect, losses over training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import plotly.graph_objects as go

from sa_lens.views.drawing import draw
from sa_lens.views.records import Bars, Curves, Line, number
from sa_lens.views.theme import heading, palette, plain, template

WIDTH = 860
"""Pixels of a chart."""
MOST_BARS = 40
"""Bars that a figure shows; the rest stay in the record."""


@draw.register
def figure_of_bars(record: Bars, *, dark: bool = False) -> go.Figure:
    """The figure of bars: the first 40, from the top."""
    colours = palette(dark)
    labels, values = [plain(label) for label in record.labels[:MOST_BARS]], record.values[:MOST_BARS]
    figure = go.Figure(
        go.Bar(
            x=list(values),
            y=list(range(len(values))),
            customdata=labels,
            orientation="h",
            marker={"color": [colours.positive if (v or 0) >= 0 else colours.negative for v in values]},
            hovertemplate=f"%{{customdata}}<br><b>%{{x:.4f}}</b> {record.scale}<extra></extra>",
        )
    )
    note = record.note
    if len(record.values) > MOST_BARS:
        note += f"; the first {MOST_BARS} of {len(record.values)}"
    title, room = heading(record.title, note, WIDTH, dark)
    figure.update_layout(
        template=template(dark),
        title=title,
        xaxis={"title": {"text": record.scale}, "zeroline": True, "zerolinecolor": colours.faint},
        yaxis={
            "autorange": "reversed",
            "tickvals": list(range(len(labels))),
            "ticktext": labels,
            "showgrid": False,
        },
        width=WIDTH,
        height=65 + room + 20 * len(labels),
        margin={"t": room},
        bargap=0.25,
    )
    return figure


def training_curves(
    runs: Mapping[str, str | Path] | Sequence[str | Path],
    kind: Literal["eval", "train"] = "eval",
    title: str = "Loss over training",
) -> Curves:
    """Losses of one or several runs, from their `metrics.jsonl`.

    Args:
        runs: run folders by name, or folders that give their own names.
        kind: `eval`: losses on the validation text. `train`: on the training batches.
        title: heading.

    Raises:
        FileNotFoundError: a folder without metrics.
        ValueError: no runs, an unknown kind, or a run without a record of that kind.
    """
    from sa_lens.training.metrics import MetricsFile

    if kind not in ("eval", "train"):
        raise ValueError(f"kind={kind!r} must be 'eval' or 'train'")
    named = dict(runs) if isinstance(runs, Mapping) else {Path(run).name: run for run in runs}
    if not named or len(named) < len(runs):
        raise ValueError("runs: give at least one run folder, and names if two folders are called the same")
    lines = []
    for name, folder in named.items():
        path = Path(folder) / "metrics.jsonl"
        if not path.is_file():
            raise FileNotFoundError(f"no metrics.jsonl in {folder}: name the folder of a training run")
        records = [record for record in MetricsFile(path).read() if record.get("kind") == kind]
        if not records:
            raise ValueError(f"{path} has no record of kind {kind!r} yet")
        for stream in ("clean", "ablated"):
            key = f"{stream}_loss" if kind == "eval" else stream
            points = [(record["step"], number(record.get(key))) for record in records]
            if any(loss is not None for _, loss in points):
                x, y = zip(*points, strict=True)
                lines.append(Line(name, stream, tuple(map(float, x)), tuple(y)))
    text = "validation text" if kind == "eval" else "training batches"
    return Curves(title, f"on the {text}", "optimizer steps", "loss, nats per token", tuple(lines))


@draw.register
def figure_of_curves(record: Curves, *, dark: bool = False) -> go.Figure:
    """The figure of curves: a colour for each name, the ablated stream dashed."""
    colours = palette(dark)
    names = list(dict.fromkeys(line.name for line in record.lines))
    figure = go.Figure()
    for line in record.lines:
        label = plain(f"{line.name}, {line.stream}" if line.stream else line.name)
        hover = f"{label}<br>{record.x_title} %{{x:,}}<br><b>%{{y:.4f}}</b> {record.y_title}<extra></extra>"
        figure.add_trace(
            go.Scatter(
                x=list(line.x),
                y=list(line.y),
                name=label,
                mode="lines+markers" if len(line.x) <= 60 else "lines",
                line={
                    "color": colours.lines[names.index(line.name) % len(colours.lines)],
                    "dash": "dash" if line.stream == "ablated" else "solid",
                    "width": 2,
                },
                marker={"size": 5},
                hovertemplate=hover,
            )
        )
    title, room = heading(record.title, record.note, WIDTH, dark)
    figure.update_layout(
        template=template(dark),
        title=title,
        xaxis={"title": {"text": record.x_title}, "rangemode": "tozero"},
        yaxis={"title": {"text": record.y_title}},
        showlegend=len(record.lines) > 1,
        width=WIDTH,
        height=480,
        margin={"t": room},
    )
    return figure
