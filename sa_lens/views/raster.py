"""The gate raster: which units stay at each token of a text, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from itertools import groupby

import torch
from jaxtyping import Float, Int
from plotly import graph_objects as go
from torch import Tensor

from sa_lens.config import Stream
from sa_lens.core.host import Host, has_ablated_stream, weight
from sa_lens.core.unit import Sublayer, Unit, unit_counts
from sa_lens.data.tokenizers import token_text
from sa_lens.views.drawing import Figure, draw
from sa_lens.views.reading import Reading, read_streams
from sa_lens.views.records import GateRaster, LiveUnit, short
from sa_lens.views.theme import colour_bar, escape, label_axis, lay_out, palette, strong_scale
from sa_lens.views.wording import short_label

WIDEST = 1500
"""Pixels of the widest raster."""
MOST = 2_000
"""Units of a raster, unless more are asked for."""
UNITS_AT_ONCE = 1_024
"""Units whose logits are in memory at a time."""


def gate_raster(
    model: Host,
    text: str | Int[Tensor, " pos"],
    *,
    stream: Stream = "clean",
    top: int = 3,
    most: int = MOST,
    title: str = "Units that stay, token by token",
) -> GateRaster:
    """Returns which units the gates keep at each token of a text, with their values.

    Args:
        text: text, which gets one begin-of-text token, or tokens.
        stream: whose values to show; the masks are the same. In the ablated stream the value is the one after the mask.
        top: tokens to name for each unit: those whose logits it raises most, directly.
        most: units to show; of more, each sublayer shows equally many, which at some token add the longest vectors to
            the residual stream.
        title: heading.

    Raises:
        ValueError: a model without gates, gates that are soft and drop nothing, a text that the model cannot read, or
            a number out of range.
    """
    if not has_ablated_stream(model):
        raise ValueError(f"gate_raster needs gates, but this {type(model).__name__} has none")
    if model.gates.kind != "hard":  # type: ignore[attr-defined]
        raise ValueError("gate_raster needs hard gates: soft ones weigh units and drop none")
    if top < 0:
        raise ValueError(f"top={top} tokens per unit: give 0 or more")
    sublayers = list(unit_counts(model))
    if most < len(sublayers):
        raise ValueError(f"most={most} units: give at least {len(sublayers)}, one for each attention and MLP")
    return gate_raster_of(read_streams(model, text, sublayers=sublayers), stream, top=top, most=most, title=title)


def gate_raster_of(
    reading: Reading,
    stream: Stream = "clean",
    *,
    top: int = 3,
    most: int = MOST,
    title: str = "Units that stay, token by token",
) -> GateRaster:
    """Returns the raster of a text that was read in both streams with all sublayers."""
    model, masks = reading.model, {sublayer: mask[0] > 0 for sublayer, mask in reading.masks.items()}
    staying = {sublayer: live.any(0).nonzero()[:, 0] for sublayer, live in masks.items()}
    shown = {
        sublayer: _largest(model, sublayer, reading.values[stream][sublayer][0] * masks[sublayer], indices, room)
        for (sublayer, indices), room in zip(
            staying.items(), _shares(list(map(len, staying.values())), most), strict=True
        )
    }
    units = [Unit(*sublayer, index) for sublayer, indices in shown.items() for index in indices]
    lines = []
    for unit, promotes in zip(units, promoted_tokens(model, units, top), strict=True):
        positions = masks[unit.sublayer][:, unit.index].nonzero()[:, 0]
        lines.append(
            LiveUnit(
                name=str(unit),
                layer=unit.layer,
                site=unit.site,
                promotes=promotes,
                positions=tuple(positions.tolist()),
                values=tuple(map(short, reading.values[stream][unit.sublayer][0, positions, unit.index].tolist())),
                place=unit.place_in_heads(model.cfg.d_head),
            )
        )
    kept, total = sum(int(live[0].sum()) for live in masks.values()), sum(live.shape[-1] for live in masks.values())
    n_staying = sum(map(len, staying.values()))
    which = f"the {n_staying:,} that stay at one token or more"
    if len(units) < n_staying:
        which = f"{len(units):,} of {which}, which at some token add most to the residual stream"
    note = (
        f"{kept:,} of {total:,} units stay at each token; shown are {which}; "
        f"colour: value of the unit in the {stream} stream, over the root mean square (RMS) of the values shown of its "
        "sublayer"
    )
    return GateRaster(
        title, note, reading.labels, tuple(lines), f"value, {stream} stream", left_out=n_staying - len(units)
    )


def _shares(counts: Sequence[int], most: int) -> list[int]:
    """Returns how many of each count to take, equally many where there are enough, at most so many in all."""
    shares, left = [0] * len(counts), most
    for turn, i in enumerate(sorted(range(len(counts)), key=lambda i: counts[i])):
        shares[i] = min(counts[i], left // (len(counts) - turn))
        left -= shares[i]
    return shares


def _largest(
    model: Host, sublayer: Sublayer, values: Float[Tensor, "pos unit"], indices: Int[Tensor, " unit"], room: int
) -> list[int]:
    """Returns the units that at some token add the longest vectors to the residual stream, in their order."""
    if len(indices) > room:
        added = values[:, indices].abs().amax(0) * _output_weights(model, sublayer)[indices].float().norm(dim=-1)
        indices = indices[added.sort(descending=True, stable=True).indices[:room]].sort().values
    chosen: list[int] = indices.tolist()
    return chosen


def promoted_tokens(model: Host, units: Sequence[Unit], top: int) -> list[tuple[str, ...]]:
    """Returns for each unit the tokens whose logits it raises most, directly.

    These are the largest of its output weights, scaled by the final LayerNorm's weight, times the unembedding.
    """
    if not units or not top:
        return [()] * len(units)
    with torch.no_grad():
        unembed = weight(model, "unembed.W_U").float()
        scale = None
        if "ln_final.hook_scale" in model.hook_dict:
            # absent where it is folded into the unembedding
            with suppress(ValueError):
                scale = weight(model, "ln_final.w").float()
        best: list[list[int]] = []
        for start in range(0, len(units), UNITS_AT_ONCE):
            part = units[start : start + UNITS_AT_ONCE]
            directions = torch.cat(
                [
                    _output_weights(model, sublayer)[[unit.index for unit in of_sublayer]].float()
                    for sublayer, of_sublayer in groupby(part, lambda unit: unit.sublayer)
                ]
            )
            logits = (directions if scale is None else directions * scale) @ unembed
            best += logits.topk(min(top, logits.shape[-1])).indices.tolist()
    return [tuple(token_text(model.tokenizer, token) for token in row) for row in best]


def _output_weights(model: Host, sublayer: Sublayer) -> Float[Tensor, "unit d_model"]:
    if sublayer.site == "mlp":
        return weight(model, f"blocks.{sublayer.layer}.mlp.W_out")
    return weight(model, f"blocks.{sublayer.layer}.attn.W_O").flatten(0, 1)


@draw.register
def _(record: GateRaster, *, dark: bool = False) -> Figure:
    """Draws tokens across, units down; drag to zoom, double click to see all."""
    n, rows = len(record.tokens), len(record.units)
    groups: dict[tuple[int, str], list[int]] = {}
    for row, unit in enumerate(record.units):
        groups.setdefault((unit.layer, unit.site), []).append(row)
    z: list[list[float | None]] = [[None] * n for _ in range(rows)]
    hover = [[""] * n for _ in range(rows)]
    for members in groups.values():
        squares = [value * value for row in members for value in record.units[row].values]
        rms = (sum(squares) / max(1, len(squares))) ** 0.5 or 1.0
        for row in members:
            unit = record.units[row]
            promoted = ", ".join(escape(repr(token)) for token in unit.promotes)
            after = f"<br>promotes {promoted}" if promoted else ""
            name = f"<b>{escape(unit.name)}</b>" + (f", {unit.place}" if unit.place else "")
            for place, value in zip(unit.positions, unit.values, strict=True):
                z[row][place] = round(value / rms, 3)
                token = escape(repr(record.tokens[place]))
                hover[row][place] = f"{name}<br>position {place}, {token}<br>value {value:.4g}{after}"
    height = 11.0 if rows <= 100 else max(2.5, 1100 / rows)
    length = min(1.0, 260 / (height * max(1, rows) + 1))
    figure = Figure(
        go.Heatmap(
            z=z,
            x=list(range(n)),
            y=list(range(rows)),
            text=hover,
            hovertemplate="%{text}<extra></extra>",
            colorscale=strong_scale("diverging", dark),
            zmin=-3,
            zmax=3,
            hoverongaps=False,
            name=record.scale,
            colorbar=colour_bar(f"{record.scale}, over RMS", dark, len=length, yanchor="top", y=1),
        )
    )
    for members in list(groups.values())[1:]:
        figure.add_hline(y=members[0] - 0.5, line={"color": palette(dark).faint, "width": 1})
    places = range(0, n, max(1, n // 60))
    tokens = [short_label(record.tokens[place]) for place in places]
    x = label_axis(tokens, "token", places, tickangle=-90, tickfont={"size": 10})
    words = {"attn": "attention", "mlp": "neurons"}
    sites = [f"layer {layer} {words[site]} ({len(members)})" for (layer, site), members in groups.items()]
    middles = [(members[0] + members[-1]) / 2 for members in groups.values()]
    y = label_axis(sites, "", middles, autorange="reversed", tickfont={"size": 11})
    width = int(min(WIDEST, max(640, 260 + (26 if n <= 60 else 14) * n)))
    return lay_out(figure, record, width, int(110 + max(200, height * rows)), dark, xaxis=x, yaxis=y)
