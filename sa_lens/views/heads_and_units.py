"""Attention patterns of heads, and values of the most active units, on one text; circuitsvis draws both."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from sa_lens.config import Site, Stream
from sa_lens.core.host import Host, in_stream, streams_of
from sa_lens.core.unit import Unit, unit_counts
from sa_lens.units.activations import read_units
from sa_lens.views.drawing import draw
from sa_lens.views.html_page import Page, component, escape_markup
from sa_lens.views.records import Attention, OfText, UnitActivations, numbers, short
from sa_lens.views.wording import read_text


def attention(
    model: Host,
    text: str | Int[Tensor, " pos"],
    layer: int,
    *,
    stream: Stream | None = None,
    position: int | None = None,
) -> Attention:
    """Returns the attention patterns of every head of a layer.

    Args:
        text: text, which gets one begin-of-text token, or tokens.
        layer: the layer.
        stream: whose patterns; None: every stream of the model.
        position: where the ablated stream is ablated; None: at all positions, each attending to clean keys.

    Raises:
        ValueError: no such layer, more than one text, or text for a model without a tokenizer.
    """
    n_layers = model.cfg.n_layers
    if not 0 <= layer < n_layers:
        raise ValueError(f"layer {layer} is not there: the model's are 0 to {n_layers - 1}")
    tokens, labels = read_text(model, text)
    streams = streams_of(model, stream)
    name = f"blocks.{layer}.attn.hook_pattern"
    heads, patterns = [], []
    for of_stream in streams:
        with torch.no_grad(), in_stream(model, of_stream, position=position):
            _, cache = model.run_with_cache(tokens, names_filter=name)
        for head, pattern in enumerate(cache[name][0].float().cpu().numpy()):
            heads.append(f"{of_stream} {layer}.{head}")
            patterns.append(numbers(pattern.round(6)))
    which = " and ".join(streams)
    return Attention(f"Attention of layer {layer}, {which} stream", "", labels, tuple(heads), tuple(patterns))


def unit_activations(
    model: Host, text: str | Int[Tensor, " pos"], *, site: Site = "mlp", most: int = 24
) -> UnitActivations:
    """Returns the values of the most active units of each layer at every token, in each stream, to browse.

    Args:
        text: text, which gets one begin-of-text token, or tokens.
        site: `mlp` for neurons, `attn` for attention units.
        most: units of each layer: those with the largest absolute value in the clean stream on this text.

    Raises:
        ValueError: an unknown site, `most` below 1, or a text that the model cannot read.
    """
    tokens, labels = read_text(model, text)
    sublayers = [sublayer for sublayer in unit_counts(model) if sublayer.site == site]
    if not sublayers:
        allowed = " or ".join(sorted({repr(sublayer.site) for sublayer in unit_counts(model)}))
        raise ValueError(f"site={site!r} must be {allowed} for this model")
    if most < 1:
        raise ValueError(f"most={most} units of a layer: show at least 1")
    streams = streams_of(model)
    values, _ = read_units(model, tokens, streams, sublayers)
    parts, names = [], []
    for sublayer in sublayers:
        # ties go to the lowest unit
        order = values["clean"][sublayer][0].abs().amax(0).sort(descending=True, stable=True).indices[:most]
        parts.append(torch.stack([values[stream][sublayer][0][:, order].float().cpu() for stream in streams], 1))
        names += [str(Unit(*sublayer, index)) for index in order.tolist()]
    words = {"mlp": "neurons", "attn": "attention units"}[site]
    note = (
        f"{len(names) // len(sublayers)} per layer, the largest first; in the ablated stream the value after the mask"
    )
    return UnitActivations(
        f"The most active {words}",
        note,
        labels,
        streams,
        tuple(names),
        tuple(tuple(tuple(map(short, row)) for row in rows) for rows in torch.cat(parts, -1).tolist()),
    )


@draw.register
def _(record: Attention, *, dark: bool = False) -> Page:
    patterns = [[[round(share, 4) for share in row] for row in pattern] for pattern in record.patterns]
    return _page(record, "AttentionHeads", dark, attention=patterns, attentionHeadNames=record.heads)


@draw.register
def _(record: UnitActivations, *, dark: bool = False) -> Page:
    dimensions = {"firstDimensionName": "Stream", "secondDimensionName": "Unit"}
    labels = {"firstDimensionLabels": record.streams, "secondDimensionLabels": record.units}
    return _page(record, "TextNeuronActivations", dark, activations=record.values, **dimensions, **labels)


def _page(record: OfText, name: str, dark: bool, **props: Any) -> Page:
    props["tokens"] = [escape_markup(token) for token in record.tokens]
    # circuitsvis knows black on white alone: turned round for the dark look
    style = "background:#fff;color:#111;padding:10px;" + ("filter:invert(0.9) hue-rotate(180deg)" if dark else "")
    body = component("circuitsvis", name, props, style=style)
    return Page(record, lambda: body, dark=dark, libraries=("circuitsvis",))
