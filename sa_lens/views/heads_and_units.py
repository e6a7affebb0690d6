"""Attention patterns of heads, and values of the most active units, on one text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import torch
from jaxtyping import Int
from torch import Tensor

from sa_lens.config import Site, Stream
from sa_lens.core.host import Host, streams_of
from sa_lens.core.unit import Unit, unit_counts
from sa_lens.units.activations import read_units
from sa_lens.views.drawing import draw
from sa_lens.views.html_page import Page, component, escape_markup
from sa_lens.views.reading import Reading, read_streams
from sa_lens.views.records import Attention, Colours, OfText, UnitActivations, numbers, short
from sa_lens.views.theme import colour_at, colour_scale
from sa_lens.views.wording import read_text, short_label

STEPS = 65
"""Colours of a scale, an odd number, so that one of them is the middle."""


def attention(
    model: Host,
    text: str | Int[Tensor, " pos"],
    layer: int | Sequence[int] | None = None,
    *,
    heads: Sequence[str] | None = None,
    stream: Stream | None = None,
    position: int | None = None,
) -> Attention:
    """Returns the attention patterns of heads, in each stream.

    Args:
        text: text, which gets one begin-of-text token, or tokens.
        layer: a layer or several, whose heads are all shown; None: every layer.
        heads: these heads alone, such as `["1.3", "0.2"]` (head 3 of layer 1, head 2 of layer 0).
        stream: whose patterns; None: every stream of the model, and the picture shows their difference as well.
        position: where the ablated stream is ablated; None: at all positions, each attending to clean keys.

    Raises:
        ValueError: no such layer or head, layers and heads both, more than one text, or text for a model without a
            tokenizer.
    """
    chosen = chosen_heads(model, layer, heads)
    layers = sorted({of for of, _ in chosen})
    return attention_of(read_streams(model, text, stream, layers=layers, position=position), chosen, position)


def chosen_heads(
    model: Host, layer: int | Sequence[int] | None, heads: Sequence[str] | None = None
) -> list[tuple[int, int]]:
    """Returns heads as (layer, place in the layer), each once, those of layers or those that are named."""
    n_layers, n_heads = model.cfg.n_layers, model.cfg.n_heads
    if heads is None:
        layers = range(n_layers) if layer is None else [layer] if isinstance(layer, int) else layer
        for of in layers:
            if not 0 <= of < n_layers:
                raise ValueError(f"layer {of} is not there: the model's are 0 to {n_layers - 1}")
        chosen = [(of, head) for of in layers for head in range(n_heads)]
    else:
        if layer is not None:
            raise ValueError(f"layer={layer!r} and heads={list(heads)}: give one of them, since a head names its layer")
        known = {f"{of}.{head}": (of, head) for of in range(n_layers) for head in range(n_heads)}
        for name in heads:
            if name not in known:
                raise ValueError(f"no head {name!r}: the model's are 0.0 to {n_layers - 1}.{n_heads - 1}")
        chosen = [known[name] for name in heads]
    if not chosen:
        raise ValueError("no head to show: name at least one layer or head")
    return list(dict.fromkeys(chosen))


def attention_of(reading: Reading, chosen: Sequence[tuple[int, int]], position: int | None = None) -> Attention:
    """Returns the patterns of heads of a text that was read with their layers."""
    layers = sorted({layer for layer, _ in chosen})
    patterns = {
        stream: {layer: pattern.cpu().numpy().round(6) for layer, pattern in of_stream.items()}
        for stream, of_stream in reading.patterns.items()
    }
    where = f"layer {layers[0]}" if len(layers) == 1 else f"layers {', '.join(map(str, layers[:-1]))} and {layers[-1]}"
    note = "share of its attention that each token (downward) gives to itself and to those before it (to the right)"
    if "ablated" in reading.streams:
        note += "; in the ablated stream, " + (
            "earlier tokens are read as the clean stream has them" if position is None else f"position {position} alone"
        )
    return Attention(
        f"Attention of {where}, {' and '.join(reading.streams)} stream",
        note,
        reading.labels,
        reading.streams,
        tuple(f"{layer}.{head}" for layer, head in chosen),
        tuple(tuple(numbers(patterns[stream][layer][head]) for stream in reading.streams) for layer, head in chosen),
    )


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
    """Draws small pictures of every head, and the one whose streams differ most at large."""
    props = {
        "tokens": [short_label(token, 9) for token in record.tokens],
        "heads": record.heads,
        "streams": record.streams,
        # whole thousandths, and nothing of what comes later
        "shares": [
            [[[round(1000 * share) for share in row[: i + 1]] for i, row in enumerate(rows)] for rows in of_head]
            for of_head in record.patterns
        ],
        "scales": {kind: _steps(kind, dark) for kind in get_args(Colours)},
    }
    return Page(record, lambda: component("sa_lens", "attentionHeads", props), dark=dark, libraries=("sa_lens",))


def _steps(kind: Colours, dark: bool) -> list[str]:
    """A colour scale as a row of colours."""
    scale = colour_scale(kind, dark)
    return [colour_at(scale, step / (STEPS - 1)) for step in range(STEPS)]


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
