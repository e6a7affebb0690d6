"""The figure of a comparison: one panel per column, with a dot and its interval for each variant and stream."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sa_lens.compare.columns import OTHER, WEIGHTS, column_named, sort_columns, task_title
from sa_lens.compare.grids import BASELINE
from sa_lens.compare.verdicts import Comparison
from sa_lens.views import Figure, draw
from sa_lens.views.records import Titled
from sa_lens.views.theme import label_axis, lay_out, palette, wrap

if TYPE_CHECKING:
    import pandas as pd

ACROSS = 3
"""Panels beside one another."""
WIDTH = 1080
"""Pixels of the figure."""
FENCE = 3.0
"""A mean so many interquartile ranges off the middle half is an arrow at the edge, so that the others can be read."""
NOTE = "means over {} seeds with 95 % intervals; dotted line: the dense baseline; arrows: means beyond the panel"
_STREAMS = {"clean": (0, -0.14, "circle"), "ablated": (1, 0.14, "circle-open"), WEIGHTS: (2, 0.0, "circle")}
"""Colour, shift and symbol of the dots of each stream."""


@draw.register
def figure(comparison: Comparison, columns: Sequence[str] | None = None, *, dark: bool = False) -> Figure:
    """Draws means and intervals of a comparison.

    Dots are filled for the clean stream and for the weights, and open for the ablated stream.

    Args:
        columns: which, in the order of the table, in every task; None: those that `COLUMNS` marks as drawn, and all
            that it does not have.
        dark: the dark look.

    Raises:
        ValueError: an unknown column, or no value at all.
    """
    table = comparison.summary()
    table = table[table["n"] > 0]
    places = sort_columns(zip(table["task"], table["column"], strict=True))
    drawn = [place for place in places if column_named(place[1]).drawn or column_named(place[1]).theme == OTHER]
    chosen = (drawn or places) if columns is None else [place for place in places if place[1] in columns]
    unknown = {*(columns or ())} - {name for _, name in places}
    if unknown or not chosen:
        known = ", ".join(dict.fromkeys(name for _, name in places))
        raise ValueError(f"no values of {', '.join(sorted(unknown)) or 'any column'}; there are: {known or 'none'}")
    variants = comparison.variants
    rows, height = math.ceil(len(chosen) / ACROSS), 22 * len(variants) + 60
    panels = make_subplots(
        rows,
        ACROSS,
        shared_yaxes=True,
        horizontal_spacing=0.03,
        vertical_spacing=min(0.9 / rows, 60 / (height * rows)),
        subplot_titles=[
            wrap(task_title(column_named(name).label, task), 0.9 * WIDTH / ACROSS) for task, name in chosen
        ],
    )
    named: set[str] = set()
    for i, (task, name) in enumerate(chosen):
        cell = {"row": i // ACROSS + 1, "col": i % ACROSS + 1}
        means = table[(table["task"] == task) & (table["column"] == name)]
        for value in means[(means["variant"] == BASELINE) & (means["stream"] != "ablated")]["mean"]:
            line = {"color": palette(dark).faint, "width": 1, "dash": "dot"}
            panels.add_vline(x=float(value), line=line, exclude_empty_subplots=False, **cell)
        edges = _edges(means)
        panels.update_xaxes(range=edges, **cell)
        for stream in _STREAMS:
            of_stream = means[means["stream"] == stream].set_index("variant").reindex(variants)
            for trace in _dots(of_stream, stream, edges, dark):
                panels.add_trace(trace.update(showlegend=trace.showlegend and stream not in named), **cell)
                named.add(stream)
    panels.update_yaxes(**label_axis(variants, range=[len(variants) - 0.4, -0.6], showgrid=True))
    panels.update_annotations(font={"size": 12, "color": palette(dark).text})
    record = Titled(f"Comparison {comparison.name}", NOTE.format(len(comparison.seeds)))
    laid_out = lay_out(Figure(panels), record, WIDTH, rows * height + 102, dark, above=62, bottom=40)
    top = 1 - (laid_out.layout.margin.t - 62) / laid_out.layout.height
    legend = {"orientation": "h", "x": 0, "xanchor": "left", "y": top, "yanchor": "top"}
    return laid_out.update_layout(legend={**legend, "xref": "container", "yref": "container"})


def _edges(means: pd.DataFrame) -> tuple[float, float]:
    """Returns the ends of the axis: all means except outliers are inside, and their intervals if possible."""
    lower, upper = means["mean"].quantile([0.25, 0.75])
    reach = FENCE * (upper - lower) or math.inf
    inner = means[means["mean"].between(lower - reach, upper + reach)]
    least, most = inner["mean"].min(), inner["mean"].max()
    room = (most - least) or abs(most) or 1.0
    left = max(least - room, inner["low"].fillna(inner["mean"]).min())
    right = min(most + room, inner["high"].fillna(inner["mean"]).max())
    margin = 0.08 * ((right - left) or room)
    return float(left - margin), float(right + margin)


def _dots(means: pd.DataFrame, stream: str, edges: tuple[float, float], dark: bool) -> Iterator[go.Scatter]:
    """Adds the means of a stream with their intervals, and an arrow with a number for each mean outside the panel."""
    if means["mean"].isna().all():
        return
    colour, shift, symbol = _STREAMS[stream]
    kind, (low, high) = stream or "weights", edges
    common: dict[str, Any] = {"legendgroup": kind, "marker": {"color": palette(dark).lines[colour], "size": 7}}
    inside = means.where(means["mean"].between(low, high))
    ends = {"array": _plain(inside["high"] - inside["mean"]), "arrayminus": _plain(inside["mean"] - inside["low"])}
    yield go.Scatter(
        x=_plain(inside["mean"]),
        y=[row + shift for row in range(len(means))],
        mode="markers",
        name=f"{kind} stream" if stream else kind,
        showlegend=True,
        customdata=[f"{variant}, {kind}" for variant in means.index],
        error_x={"type": "data", "symmetric": False, **ends, "thickness": 1.5, "width": 0},
        hovertemplate="%{customdata}<br><b>%{x:.4g}</b><extra></extra>",
        **common,
    ).update(marker_symbol=symbol)
    for row, (variant, mean) in enumerate(means["mean"].items()):
        if math.isnan(mean) or low <= mean <= high:
            continue
        side, other = ("right", "left") if mean > high else ("left", "right")
        yield go.Scatter(
            x=[high - 0.03 * (high - low) if mean > high else low + 0.03 * (high - low)],
            y=[row + shift],
            mode="markers+text",
            text=[f"{mean:.3g}"],
            textposition=f"middle {other}",
            textfont={"size": 10, "color": palette(dark).lines[colour]},
            showlegend=False,
            hovertemplate=f"{variant}, {kind}<br><b>{mean:.4g}</b><extra></extra>",
            **common,
        ).update(marker_symbol=f"triangle-{side}")


def _plain(values: pd.Series) -> list[float | None]:
    return [None if np.isnan(value) else float(value) for value in values]
