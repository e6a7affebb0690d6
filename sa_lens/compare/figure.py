"""The comparison as small multiples: a panel a column, a dot with its interval for each variant and stream."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go

from sa_lens.compare.columns import OTHER, WHOLE, column_named, in_order
from sa_lens.compare.grids import BASELINE
from sa_lens.compare.results import Comparison
from sa_lens.views import Figure, draw
from sa_lens.views.records import number
from sa_lens.views.theme import heading, palette, plain, template, wrapped

ACROSS = 3
"""Panels beside one another."""
WIDTH = 1080
"""Pixels of the figure."""
FENCE = 3.0
"""A mean so many interquartile ranges off the middle half is an arrow at the edge, so that the others can be read."""


@dataclass(frozen=True)
class Dots:
    """Means of one stream, one for each variant."""

    stream: str
    """`clean`, `ablated`, or empty for columns of the weights."""
    mean: tuple[float | None, ...]
    """Means over seeds; None: not available."""
    low: tuple[float | None, ...]
    """Lower ends of the 95 % intervals; None: fewer than two seeds."""
    high: tuple[float | None, ...]
    """Upper ends."""


@dataclass(frozen=True)
class Panel:
    """One column of the table."""

    title: str
    """What it is, with its unit."""
    dots: tuple[Dots, ...]
    """One for each stream."""
    reference: float | None
    """Mean of the baseline, drawn as a line."""


@dataclass(frozen=True)
class SmallMultiples:
    """Panels that share their variants."""

    title: str
    """Heading."""
    note: str
    """A line below the heading."""
    variants: tuple[str, ...]
    """Rows of every panel, from the top."""
    panels: tuple[Panel, ...]
    """The panels, in reading order."""


def small_multiples(comparison: Comparison, columns: tuple[str, ...] | None = None) -> SmallMultiples:
    """The record of the figure.

    Args:
        columns: which, in order; None: those that `COLUMNS` marks as drawn and all that it does not have.

    Raises:
        ValueError: an unknown column, or no value at all.
    """
    table = comparison.summary()
    table = table[table["n"] > 0]
    present = in_order(table["column"])
    marked = [name for name in present if column_named(name).drawn or column_named(name).theme == OTHER]
    chosen = (marked or present) if columns is None else list(columns)
    unknown = [name for name in chosen if name not in present]
    if unknown or not chosen:
        raise ValueError(
            f"no values of {', '.join(unknown) or 'any column'}; there are: {', '.join(present) or 'none'}"
        )
    variants = comparison.variants
    panels = []
    for name in chosen:
        some = table[table["column"] == name]
        dots = []
        for stream in ("clean", "ablated", WHOLE):
            of_stream = some[some["stream"] == stream].set_index("variant")
            if len(of_stream):
                ends = {
                    end: tuple(number(of_stream[end].get(variant)) for variant in variants)
                    for end in ("mean", "low", "high")
                }
                dots.append(Dots(stream, **ends))
        base = some[(some["variant"] == BASELINE) & (some["stream"] != "ablated")]
        panels.append(
            Panel(
                column_named(name).label,
                tuple(dots),
                float(base["mean"].iloc[0]) if len(base) else None,
            )
        )
    note = (
        f"means over {len(comparison.seeds)} seeds with 95 % intervals; dotted line: the dense baseline; arrows: means "
        "beyond the panel"
    )
    return SmallMultiples(f"Comparison {comparison.name}", note, variants, tuple(panels))


@draw.register
def figure_of_small_multiples(record: SmallMultiples, *, dark: bool = False) -> Figure:
    """The figure: filled dots for the clean stream and for the weights, open ones for the ablated stream."""
    from plotly.subplots import make_subplots

    colours = palette(dark)
    rows = math.ceil(len(record.panels) / ACROSS)
    height = 22 * len(record.variants) + 60
    title, room = heading(record.title, record.note, WIDTH, dark)
    total = room + rows * height + 102
    figure = Figure(
        make_subplots(
            rows,
            ACROSS,
            shared_yaxes=True,
            horizontal_spacing=0.03,
            vertical_spacing=min(0.9 / rows, 60 / (height * rows)),
            subplot_titles=[wrapped(panel.title, 0.9 * WIDTH / ACROSS) for panel in record.panels],
        )
    )
    seen: set[str] = set()
    places = list(range(len(record.variants)))
    for i, panel in enumerate(record.panels):
        at = {"row": i // ACROSS + 1, "col": i % ACROSS + 1}
        if panel.reference is not None:
            line = {"color": colours.faint, "width": 1, "dash": "dot"}
            figure.add_vline(x=panel.reference, line=line, exclude_empty_subplots=False, **at)
        edges = _edges(panel)
        figure.update_xaxes(range=edges, **at)
        for dots in panel.dots:
            kind = dots.stream or "weights"
            shift = {"clean": -0.14, "ablated": 0.14}.get(dots.stream, 0.0)
            rows_of = [y + shift for y in places]
            figure.add_trace(_dots(dots, edges, kind, rows_of, record.variants, dark, kind not in seen), **at)
            for arrow in _arrows(dots, edges, kind, rows_of, record.variants, dark):
                figure.add_trace(arrow, **at)
            seen.add(kind)
    figure.update_yaxes(
        tickvals=places, ticktext=[plain(name) for name in record.variants], range=[len(places) - 0.4, -0.6]
    )
    figure.update_annotations(font={"size": 12, "color": colours.text})
    figure.update_layout(
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
    return figure


def _edges(panel: Panel) -> tuple[float, float]:
    """Ends of the axis: round all means but outliers, and round their intervals as far as these leave means apart."""
    dots = [
        (mean, mean if low is None else low, mean if high is None else high)
        for some in panel.dots
        for mean, low, high in zip(some.mean, some.low, some.high, strict=True)
        if mean is not None
    ]
    means = [mean for mean, *_ in dots]
    lower, upper = np.quantile(means, (0.25, 0.75))
    reach = FENCE * (upper - lower) or math.inf
    inner = [dot for dot in dots if lower - reach <= dot[0] <= upper + reach]
    least, most = min(mean for mean, *_ in inner), max(mean for mean, *_ in inner)
    room = (most - least) or abs(most) or 1.0
    left = max(least - room, min(low for _, low, _ in inner))
    right = min(most + room, max(high for *_, high in inner))
    margin = 0.08 * ((right - left) or room)
    return float(left - margin), float(right + margin)


def _dots(
    dots: Dots,
    edges: tuple[float, float],
    kind: str,
    y: list[float],
    variants: tuple[str, ...],
    dark: bool,
    legend: bool,
) -> go.Scatter:
    """The means within the panel and their intervals."""
    means = [mean if mean is None or edges[0] <= mean <= edges[1] else None for mean in dots.mean]
    return go.Scatter(
        x=means,
        y=y,
        mode="markers",
        name=kind if kind == "weights" else f"{kind} stream",
        legendgroup=kind,
        showlegend=legend,
        customdata=[f"{name}, {kind}" for name in variants],
        error_x={
            "type": "data",
            "symmetric": False,
            "array": [_gap(high, mean) for high, mean in zip(dots.high, means, strict=True)],
            "arrayminus": [_gap(mean, low) for low, mean in zip(dots.low, means, strict=True)],
            "thickness": 1.5,
            "width": 0,
        },
        marker={"color": _colour(kind, dark), "size": 7, "symbol": "circle-open" if kind == "ablated" else "circle"},
        hovertemplate="%{customdata}<br><b>%{x:.4g}</b><extra></extra>",
    )


def _arrows(
    dots: Dots, edges: tuple[float, float], kind: str, y: list[float], variants: tuple[str, ...], dark: bool
) -> Iterator[go.Scatter]:
    """An arrow and a number at the edge for each mean beyond the panel."""
    inset = 0.03 * (edges[1] - edges[0])
    for name, mean, place in zip(variants, dots.mean, y, strict=True):
        if mean is None or edges[0] <= mean <= edges[1]:
            continue
        right = mean > edges[1]
        yield go.Scatter(
            x=[edges[1] - inset if right else edges[0] + inset],
            y=[place],
            mode="markers+text",
            text=[f"{mean:.3g}"],
            textposition="middle left" if right else "middle right",
            textfont={"size": 10, "color": _colour(kind, dark)},
            legendgroup=kind,
            showlegend=False,
            marker={"color": _colour(kind, dark), "size": 7, "symbol": f"triangle-{'right' if right else 'left'}"},
            hovertemplate=f"{name}, {kind}<br><b>{mean:.4g}</b><extra></extra>",
        )


def _colour(kind: str, dark: bool) -> str:
    return palette(dark).lines[{"clean": 0, "ablated": 1}.get(kind, 2)]


def _gap(above: float | None, below: float | None) -> float | None:
    return None if above is None or below is None else above - below
