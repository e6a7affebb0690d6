"""The comparison as small multiples: a panel a column, a dot with its interval for each variant and stream."""

from __future__ import annotations

import math
from dataclasses import dataclass

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
    note = f"means over {len(comparison.seeds)} seeds with 95 % intervals; dotted line: the dense baseline"
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
        for dots in panel.dots:
            kind = dots.stream or "weights"
            shift = {"clean": -0.14, "ablated": 0.14}.get(dots.stream, 0.0)
            figure.add_trace(
                _dots(dots, kind, [y + shift for y in places], record.variants, dark, kind not in seen), **at
            )
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


def _dots(dots: Dots, kind: str, y: list[float], variants: tuple[str, ...], dark: bool, legend: bool) -> go.Scatter:
    colours = palette(dark)
    colour = colours.lines[{"clean": 0, "ablated": 1}.get(kind, 2)]
    return go.Scatter(
        x=list(dots.mean),
        y=y,
        mode="markers",
        name=kind if kind == "weights" else f"{kind} stream",
        legendgroup=kind,
        showlegend=legend,
        customdata=[f"{name}, {kind}" for name in variants],
        error_x={
            "type": "data",
            "symmetric": False,
            "array": [_gap(high, mean) for high, mean in zip(dots.high, dots.mean, strict=True)],
            "arrayminus": [_gap(mean, low) for low, mean in zip(dots.low, dots.mean, strict=True)],
            "thickness": 1.5,
            "width": 0,
        },
        marker={"color": colour, "size": 7, "symbol": "circle-open" if kind == "ablated" else "circle"},
        hovertemplate="%{customdata}<br><b>%{x:.4g}</b><extra></extra>",
    )


def _gap(above: float | None, below: float | None) -> float | None:
    return None if above is None or below is None else above - below
