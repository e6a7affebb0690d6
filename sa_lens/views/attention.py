"""Attention patterns of a layer in both streams, drawn by circuitsvis, without a network."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from sa_lens.config import Stream
from sa_lens.core.host import Host, in_stream, streams_of
from sa_lens.views.page import View, component, unparsed, view
from sa_lens.views.records import Attention, numbers
from sa_lens.views.texts import read_text

__all__ = ["AttentionView", "attention"]


def attention(
    model: Host,
    text: str | Int[Tensor, " pos"],
    layer: int,
    *,
    stream: Stream | None = None,
    position: int | None = None,
) -> Attention:
    """Attention patterns of every head of a layer.

    Args:
        text: text, which gets one begin-of-text token, or tokens.
        layer: the layer.
        stream: one stream; None: every one that the model has.
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
    for one in streams:
        with torch.no_grad(), in_stream(model, one, position=position):
            _, cache = model.run_with_cache(tokens, names_filter=name)
        for head, pattern in enumerate(cache[name][0].float().cpu().numpy()):
            heads.append(f"{one} {layer}.{head}")
            patterns.append(numbers(pattern.round(6)))
    which = " and ".join(streams)
    return Attention(f"Attention of layer {layer}, {which} stream", labels, tuple(heads), tuple(patterns))


class AttentionView(View):
    """Attention patterns: one small square a head, the chosen one large."""

    libraries = ("circuitsvis",)

    def body(self) -> str:
        patterns = [[[round(share, 4) for share in row] for row in pattern] for pattern in self.record.patterns]
        props = {
            "attention": patterns,
            "tokens": [unparsed(token) for token in self.record.tokens],
            "attentionHeadNames": self.record.heads,
        }
        return component("circuitsvis", "AttentionHeads", props, style=card(self.dark))


view.register(Attention, AttentionView)


def card(dark: bool) -> str:
    """Style of what circuitsvis draws, which knows black on white alone: turned round for the dark look."""
    return "background:#fff;color:#111;padding:10px;" + ("filter:invert(0.9) hue-rotate(180deg)" if dark else "")
