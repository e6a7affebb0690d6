"""Histograms, such as those of a unit's values in each stream."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import plotly.graph_objects as go

from sa_lens.core.host import Host, streams_of
from sa_lens.units.activations import stream_units
from sa_lens.views.coloured_text import UnitPlace, checked_unit
from sa_lens.views.drawing import Figure, draw
from sa_lens.views.records import Histogram, Series
from sa_lens.views.texts import unit_name
from sa_lens.views.theme import faded, heading, palette, plain, template

__all__ = ["histogram", "unit_histogram"]

WIDTH = 860
"""Pixels of a histogram."""


def histogram(
    values: Mapping[str, Any], title: str, x_title: str, *, note: str = "", bins: int | None = None
) -> Histogram:
    """The record of how often values of some size occur, with the same bins for all.

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
    arrays = {name: np.asarray(found, dtype=float).ravel() for name, found in values.items()}
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
    model: Host, text: Any, unit: UnitPlace, *, n_tokens: int | None = None, bins: int | None = None
) -> Histogram:
    """Histogram of a unit's values over a text: in the clean stream, and in the ablated stream where the unit stays.

    Args:
        text: a token file, or blocks of tokens `[block pos]`.
        unit: (layer, kind, unit), kind `attn` or `mlp`.
        n_tokens: tokens to read at most; None: all.
        bins: number of bins; None: 60.

    Raises:
        ValueError: a unit that the model does not have, or a text that does not fit.
    """
    site, index = checked_unit(model, unit)
    streams = streams_of(model)
    clean, ablated = [], []
    n = stays = 0
    for batch in stream_units(model, text, streams, sites=[site], n_tokens=n_tokens, progress=False):
        n += batch.tokens.numel()
        clean.append(batch.values["clean"][site][..., index].flatten().float().cpu().numpy())
        if site in batch.masks:
            live = batch.masks[site][..., index] > 0
            stays += int(live.sum())
            ablated.append(batch.values["ablated"][site][..., index][live].float().cpu().numpy())
    values = {"clean": np.concatenate(clean)}
    note = f"{n:,} tokens"
    if ablated:
        note += f"; stays at {stays:,} of them ({stays / n:.2%})"
        if stays:
            values["ablated, where it stays"] = np.concatenate(ablated)
    name = unit_name(model, site.layer, site.kind, index)
    return histogram(values, name[0].upper() + name[1:], "value of the unit", note=note, bins=bins)


@draw.register
def figure_of_histogram(record: Histogram, *, dark: bool = False) -> Figure:
    """The figure of a histogram, counts on a log axis."""
    colours = palette(dark)
    edges = record.edges
    figure = Figure()
    for i, one in enumerate(record.series):
        colour = colours.lines[i % len(colours.lines)]
        figure.add_trace(
            go.Bar(
                x=[(low + high) / 2 for low, high in pairwise(edges)],
                y=list(one.counts),
                width=[high - low for low, high in pairwise(edges)],
                customdata=[f"{low:.4g} to {high:.4g}" for low, high in pairwise(edges)],
                name=plain(one.name),
                marker={"color": faded(colour, 0.4), "line": {"color": colour, "width": 1.2}},
                hovertemplate=f"{plain(one.name)}<br>%{{customdata}}<br><b>%{{y:,}}</b><extra></extra>",
            )
        )
    title, room = heading(record.title, record.note, WIDTH, dark)
    figure.update_layout(
        template=template(dark),
        title=title,
        barmode="overlay",
        bargap=0,
        xaxis={"title": {"text": plain(record.x_title)}},
        yaxis={"title": {"text": "count (log scale)"}, "type": "log", "dtick": 1},
        showlegend=len(record.series) > 1,
        width=WIDTH,
        height=400,
        margin={"t": room},
    )
    return figure
