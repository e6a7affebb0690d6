"""Attention patterns of a layer in both streams, drawn by circuitsvis, without a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from sa_lens.config import Stream
from sa_lens.core.host import Host, device_of, has_ablated_stream, in_stream
from sa_lens.views.records import Attention, numbers

__all__ = ["AttentionView", "attention", "view"]


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
    if isinstance(text, str) and model.tokenizer is None:
        raise ValueError("the model has no tokenizer: give tokens instead of text")
    tokens = torch.tensor(_tokens(model.tokenizer, text)) if isinstance(text, str) else torch.as_tensor(text)
    tokens = tokens.reshape(1, -1) if tokens.ndim < 2 or len(tokens) == 1 else tokens
    if len(tokens) != 1:
        raise ValueError(f"attention of one text at a time, not of {len(tokens)}")
    streams: list[Stream] = [stream] if stream else ["clean", "ablated"] if has_ablated_stream(model) else ["clean"]
    name = f"blocks.{layer}.attn.hook_pattern"
    heads, patterns = [], []
    for one in streams:
        with torch.no_grad(), in_stream(model, one, position=position):
            _, cache = model.run_with_cache(tokens.to(device_of(model)), names_filter=name)
        for head, pattern in enumerate(cache[name][0].float().cpu().numpy()):
            heads.append(f"{one} {layer}.{head}")
            patterns.append(numbers(pattern))
    labels = (
        [str(token) for token in tokens[0].tolist()]
        if model.tokenizer is None
        else [model.tokenizer.decode([token]) for token in tokens[0].tolist()]
    )
    which = " and ".join(streams)
    return Attention(f"Attention of layer {layer}, {which} stream", tuple(labels), tuple(heads), tuple(patterns))


def _tokens(tokenizer: Any, text: str) -> list[int]:
    """The text after one begin-of-text token (end-of-text where the tokenizer has no other)."""
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return [*([] if begin is None else [begin]), *tokenizer.encode(text, add_special_tokens=False)]


class AttentionView:
    """An interactive picture of attention patterns; shows itself in a notebook, and saves as one offline file."""

    def __init__(self, record: Attention) -> None:
        self.record = record

    def html(self) -> str:
        """The picture as an HTML fragment with all it needs inside."""
        from circuitsvis.attention import attention_heads

        shown = attention_heads(
            attention=[[list(row) for row in pattern] for pattern in self.record.patterns],
            tokens=list(self.record.tokens),
            attention_head_names=list(self.record.heads),
        )
        # its other forms load the script from the network, after probing for one
        return str(shown.local_src)

    def _repr_html_(self) -> str:
        return self.html()

    def save(self, path: str | Path) -> Path:
        """Writes one HTML file that needs no network.

        Raises:
            ValueError: another ending than .html.
        """
        path = Path(path)
        if path.suffix != ".html":
            raise ValueError(f"{path.name}: attention is saved as .html, an interactive page")
        path.parent.mkdir(parents=True, exist_ok=True)
        page = (
            "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
            f"<title>{self.record.title}</title></head><body style='font-family:sans-serif;margin:1.5em'>"
            f"<h3>{self.record.title}</h3>{self.html()}</body></html>\n"
        )
        path.write_text(page, encoding="utf-8")
        return path


def view(record: Attention) -> AttentionView:
    """The picture of a record of attention: one small square a head, the chosen one large."""
    return AttentionView(record)
