"""The gate raster: which units stay at each token of a text, layer by layer."""

from __future__ import annotations

from contextlib import suppress

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


def gate_raster(
    model: Host,
    text: str | Int[Tensor, " pos"],
    *,
    stream: Stream = "clean",
    top: int = 3,
    title: str = "Units that stay, token by token",
) -> GateRaster:
    """Returns which units the gates keep at each token of a text, with their values.

    Args:
        text: text, which gets one begin-of-text token, or tokens.
        stream: whose values to show; the masks are the same. In the ablated stream the value is the one after the mask.
        top: tokens to name for each unit: those whose logits it raises most, directly.
        title: heading.

    Raises:
        ValueError: a model without gates, gates that are soft and drop nothing, or a text that the model cannot read.
    """
    if not has_ablated_stream(model):
        raise ValueError(f"gate_raster needs gates, but this {type(model).__name__} has none")
    if model.gates.kind != "hard":  # type: ignore[attr-defined]
        raise ValueError("gate_raster needs hard gates: soft ones weigh units and drop none")
    if top < 0:
        raise ValueError(f"top={top} tokens per unit: give 0 or more")
    return gate_raster_of(read_streams(model, text, sublayers=list(unit_counts(model))), stream, top=top, title=title)


def gate_raster_of(
    reading: Reading, stream: Stream = "clean", *, top: int = 3, title: str = "Units that stay, token by token"
) -> GateRaster:
    """Returns the raster of a text that was read in both streams with all sublayers."""
    model, units, kept = reading.model, [], 0
    for sublayer, mask in reading.masks.items():
        live = mask[0] > 0
        kept += int(live[0].sum())
        chosen = live.any(0).nonzero()[:, 0].tolist()
        promoted = promoted_tokens(model, sublayer, chosen, top)
        for index, names in zip(chosen, promoted, strict=True):
            positions = live[:, index].nonzero()[:, 0]
            units.append(
                LiveUnit(
                    name=str(Unit(*sublayer, index)),
                    layer=sublayer.layer,
                    site=sublayer.site,
                    promotes=names,
                    positions=tuple(positions.tolist()),
                    values=tuple(map(short, reading.values[stream][sublayer][0, positions, index].tolist())),
                    place=Unit(*sublayer, index).place_in_heads(model.cfg.d_head),
                )
            )
    total = sum(mask.shape[-1] for mask in reading.masks.values())
    note = (
        f"{kept} of {total:,} units stay at each token; shown are the {len(units):,} that stay at one token or more; "
        f"colour: value of the unit in the {stream} stream, over the root mean square (RMS) of the values shown of its "
        "sublayer"
    )
    return GateRaster(title, note, reading.labels, tuple(units), f"value, {stream} stream")


def promoted_tokens(model: Host, sublayer: Sublayer, units: list[int], top: int) -> list[tuple[str, ...]]:
    """Returns for each unit the tokens whose logits it raises most, directly: its output weights, scaled by the final
    LayerNorm's weight, times the unembedding less its mean over the vocabulary."""
    if not units or not top:
        return [()] * len(units)
    with torch.no_grad():
        if sublayer.site == "mlp":
            out: Float[Tensor, "unit d_model"] = weight(model, f"blocks.{sublayer.layer}.mlp.W_out")
        else:
            out = weight(model, f"blocks.{sublayer.layer}.attn.W_O").flatten(0, 1)
        directions = out[units].float()
        if "ln_final.hook_scale" in model.hook_dict:
            # absent where it is folded into the unembedding
            with suppress(ValueError):
                directions = directions * weight(model, "ln_final.w").float()
        unembed = weight(model, "unembed.W_U").float()
        logits = directions @ (unembed - unembed.mean(-1, keepdim=True))
        best = logits.topk(min(top, logits.shape[-1])).indices.tolist()
    return [tuple(token_text(model.tokenizer, token) for token in row) for row in best]


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
