"""The figure of a comparison: one panel per column, with a dot and its interval for each variant and stream."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sa_lens.compare.columns import OTHER, WEIGHTS, column_named, in_order, with_task
from sa_lens.compare.grids import BASELINE
from sa_lens.compare.verdicts import Comparison
from sa_lens.views import Figure
from sa_lens.views.theme import heading, palette, plain, template, wrapped

if TYPE_CHECKING:
    import pandas as pd

ACROSS = 3
"""Panels beside one another."""
WIDTH = 1080
"""Pixels of the figure."""
FENCE = 3.0
"""A mean so many interquartile ranges off the middle half is an arrow at the edge, so that the others can be read."""
NOTE = "means over {} seeds with 95 % intervals; dotted line: the dense baseline; arrows: means beyond the panel"


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
    places = in_order(zip(table["task"], table["column"], strict=True))
    drawn = [p for p in places if column_named(p[1]).drawn or column_named(p[1]).theme == OTHER]
    chosen = (drawn or places) if columns is None else [place for place in places if place[1] in columns]
    unknown = {*(columns or ())} - {name for _, name in places}
    if unknown or not chosen:
        known = ", ".join(dict.fromkeys(name for _, name in places))
        raise ValueError(f"no values of {', '.join(sorted(unknown)) or 'any column'}; there are: {known or 'none'}")
    colours, variants = palette(dark), comparison.variants
    titles = [with_task(column_named(name).label, task) for task, name in chosen]
    rows = math.ceil(len(chosen) / ACROSS)
    height = 22 * len(variants) + 60
    title, room = heading(f"Comparison {comparison.name}", NOTE.format(len(comparison.seeds)), WIDTH, dark)
    total = room + rows * height + 102
    drawing = Figure(
        make_subplots(
            rows,
            ACROSS,
            shared_yaxes=True,
            horizontal_spacing=0.03,
            vertical_spacing=min(0.9 / rows, 60 / (height * rows)),
            subplot_titles=[wrapped(title, 0.9 * WIDTH / ACROSS) for title in titles],
        )
    )
    named: set[str] = set()
    for i, (task, name) in enumerate(chosen):
        cell = {"row": i // ACROSS + 1, "col": i % ACROSS + 1}
        means = table[(table["task"] == task) & (table["column"] == name)]
        baseline = means[(means["variant"] == BASELINE) & (means["stream"] != "ablated")]
        for value in baseline["mean"]:
            line = {"color": colours.faint, "width": 1, "dash": "dot"}
            drawing.add_vline(x=float(value), line=line, exclude_empty_subplots=False, **cell)
        edges = _edges(means)
        drawing.update_xaxes(range=edges, **cell)
        for stream in ("clean", "ablated", WEIGHTS):
            of_stream = means[means["stream"] == stream].set_index("variant").reindex(variants)
            if of_stream["mean"].notna().any():
                dots = _Dots(stream or "weights", of_stream, edges, dark)
                drawing.add_trace(dots.inside(legend=dots.kind not in named), **cell)
                for arrow in dots.beyond():
                    drawing.add_trace(arrow, **cell)
                named.add(dots.kind)
    drawing.update_yaxes(
        tickvals=[*range(len(variants))], ticktext=[*map(plain, variants)], range=[len(variants) - 0.4, -0.6]
    )
    drawing.update_annotations(font={"size": 12, "color": colours.text})
    drawing.update_layout(
        template=template(dark),
        title=title,
        width=WIDTH,
        height=total,
        margin={"t": room + 62, "b": 40},
        legend={
            **{"orientation": "h", "x": 0, "xanchor": "left", "xref": "container"},
            **{"y": 1 - room / total, "yanchor": "top", "yref": "container"},
        },
    )
    return drawing


def _edges(means: pd.DataFrame) -> tuple[float, float]:
    """Ends of the axis: round all means but outliers, and round their intervals as far as these leave means apart."""
    lower, upper = means["mean"].quantile([0.25, 0.75])
    reach = FENCE * (upper - lower) or math.inf
    inner = means[means["mean"].between(lower - reach, upper + reach)]
    least, most = inner["mean"].min(), inner["mean"].max()
    room = (most - least) or abs(most) or 1.0
    left = max(least - room, inner["low"].fillna(inner["mean"]).min())
    right = min(most + room, inner["high"].fillna(inner["mean"]).max())
    margin = 0.08 * ((right - left) or room)
    return float(left - margin), float(right + margin)


@dataclass
class _Dots:
    """The means of a panel in one stream."""

    kind: str
    """`clean`, `ablated` or `weights`."""
    means: pd.DataFrame
    """`mean`, `low` and `high` by variant; NaN: not available."""
    edges: tuple[float, float]
    """Ends of the panel."""
    dark: bool

    def inside(self, legend: bool) -> go.Scatter:
        """The means within the panel and their intervals."""
        shown = self.means.where(self.means["mean"].between(*self.edges))
        return go.Scatter(
            x=_plain(shown["mean"]),
            y=self.y(),
            mode="markers",
            name=self.kind if self.kind == "weights" else f"{self.kind} stream",
            legendgroup=self.kind,
            showlegend=legend,
            customdata=[f"{variant}, {self.kind}" for variant in shown.index],
            error_x={
                "type": "data",
                "symmetric": False,
                "array": _plain(shown["high"] - shown["mean"]),
                "arrayminus": _plain(shown["mean"] - shown["low"]),
                "thickness": 1.5,
                "width": 0,
            },
            marker=self.marker("circle-open" if self.kind == "ablated" else "circle"),
            hovertemplate="%{customdata}<br><b>%{x:.4g}</b><extra></extra>",
        )

    def beyond(self) -> Iterator[go.Scatter]:
        """An arrow and a number at the edge for each mean beyond the panel."""
        low, high = self.edges
        inset = 0.03 * (high - low)
        for variant, mean, y in zip(self.means.index, self.means["mean"], self.y(), strict=True):
            if math.isnan(mean) or low <= mean <= high:
                continue
            right = mean > high
            yield go.Scatter(
                x=[high - inset if right else low + inset],
                y=[y],
                mode="markers+text",
                text=[f"{mean:.3g}"],
                textposition="middle left" if right else "middle right",
                textfont={"size": 10, "color": self.marker("")["color"]},
                legendgroup=self.kind,
                showlegend=False,
                marker=self.marker(f"triangle-{'right' if right else 'left'}"),
                hovertemplate=f"{variant}, {self.kind}<br><b>{mean:.4g}</b><extra></extra>",
            )

    def y(self) -> list[float]:
        """Heights of the dots: a row per variant, with the two streams side by side."""
        shift = {"clean": -0.14, "ablated": 0.14}.get(self.kind, 0.0)
        return [row + shift for row in range(len(self.means))]

    def marker(self, symbol: str) -> dict[str, object]:
        colour = palette(self.dark).lines[{"clean": 0, "ablated": 1}.get(self.kind, 2)]
        return {"color": colour, "size": 7, "symbol": symbol}


def _plain(values: pd.Series) -> list[float | None]:
    return [None if np.isnan(value) else float(value) for value in values]
