"""What each stream expects next, token by token, and what its residual stream would predict after each layer."""

from __future__ import annotations

import html
import math
from typing import Any

import torch
from jaxtyping import Float, Int
from plotly import graph_objects as go
from plotly.subplots import make_subplots
from torch import Tensor

from sa_lens.config import Stream
from sa_lens.core.host import Host, in_stream, streams_of
from sa_lens.data.tokenizers import token_text
from sa_lens.views.drawing import Figure, draw
from sa_lens.views.html_page import Page
from sa_lens.views.reading import Reading, read_streams
from sa_lens.views.records import Guess, LensStream, LogitLens, Predictions, StreamPredictions, short
from sa_lens.views.theme import (
    colour_at,
    colour_bar,
    colour_scale,
    escape,
    ink_on,
    label_axis,
    lay_out,
    palette,
    write_on,
)
from sa_lens.views.wording import read_text, short_label, visible

MOST_TEXTS = 700
"""Up to this many cells of a logit lens, each shows its token."""
MOST_ROWS = 40
"""Up to this many rows, the table of predictions is shown whole; a longer one scrolls, and a line says so."""


def predictions(
    model: Host, text: str | Int[Tensor, " pos"], *, top: int = 5, stream: Stream | None = None
) -> Predictions:
    """Returns the likeliest next tokens after each token of a text, with log-probabilities, in each stream.

    Args:
        text: text, which gets one begin-of-text token, or tokens.
        top: how many at each token.
        stream: whose predictions; None: every stream of the model.

    Raises:
        ValueError: `top` outside the vocabulary, a stream that the model does not have, or a text that it cannot read.
    """
    check_top(model, top)
    return predictions_of(read_streams(model, text, stream), top)


def check_top(model: Host, top: int) -> None:
    """Refuses a number of next tokens that the vocabulary does not have."""
    if not 1 <= top <= model.cfg.d_vocab:
        raise ValueError(f"top={top} must be from 1 to the vocabulary's {model.cfg.d_vocab}")


def predictions_of(reading: Reading, top: int = 5) -> Predictions:
    """Returns the predictions of a text that was read."""
    model, streams = reading.model, []
    for of_stream, log_p in reading.log_p.items():
        values, best = (x.tolist() for x in log_p.topk(top))
        streams.append(
            StreamPredictions(
                stream=of_stream,
                top=tuple(
                    tuple(
                        Guess(token_text(model.tokenizer, token), short(value))
                        for token, value in zip(*row, strict=True)
                    )
                    for row in zip(best, values, strict=True)
                ),
                actual=_actual(log_p, reading.tokens),
            )
        )
    note = (
        f"log-probabilities in nats: of the token that comes next, and of the {top} likeliest of "
        f"{model.cfg.d_vocab:,} tokens"
    )
    return Predictions("Predictions, token by token", note, reading.labels, tuple(streams))


def _actual(log_p: Float[Tensor, "pos d_vocab"], tokens: Int[Tensor, "1 pos"]) -> tuple[float | None, ...]:
    """Log-probability of each next token, and None at the end."""
    return (*map(short, log_p[:-1].gather(-1, tokens[0, 1:, None])[:, 0].tolist()), None)


@draw.register
def _(record: Predictions, *, dark: bool = False) -> Page:
    """Draws one row per token: the token that comes next, and what each stream expected; needs no script."""
    return Page(record, lambda: _html(record, dark), dark=dark)


def _html(record: Predictions, dark: bool) -> str:
    heads = "".join(
        f"<th class='right'>{name}: next</th><th>{name}: expected</th>"
        for name in (html.escape(of_stream.stream) for of_stream in record.streams)
    )
    rows = []
    for i, token in enumerate(record.tokens):
        following = record.tokens[i + 1] if i + 1 < len(record.tokens) else None
        cells = "".join(
            f"<td class='right'>{'' if of_stream.actual[i] is None else f'{of_stream.actual[i]:.2f}'}</td>"
            f"<td>{''.join(_guess(guess, following, dark) for guess in of_stream.top[i])}</td>"
            for of_stream in record.streams
        )
        rows.append(
            f"<tr><td class='right'>{i}</td><td><bdi>{html.escape(visible(token))}</bdi></td>"
            f"<td><bdi>{html.escape(visible(following or ''))}</bdi></td>{cells}</tr>"
        )
    long = len(rows) > MOST_ROWS
    whole = "" if long else " style='max-height:none'"
    below = (
        f"<p class='note'>The table has {len(rows)} rows: scroll in it to see those that follow.</p>" if long else ""
    )
    return (
        f"<style>{_STYLE}</style><div class='scroll'{whole}><table><thead><tr><th class='right'>position</th>"
        f"<th>token</th><th>next</th>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>{below}"
    )


def _guess(guess: Guess, following: str | None, dark: bool) -> str:
    share = math.exp(guess.log_probability)
    colour = colour_at(colour_scale("sequential", dark), share)
    right = " sa-lens-right-guess" if guess.token == following else ""
    tip = f"{guess.token!r}: log-probability {guess.log_probability:.3f} nats, probability {share:.2%}"
    return (
        f"<bdi class='sa-lens-guess{right}' style='background:{colour};color:{ink_on(colour)}' "
        f"title='{html.escape(tip, quote=True)}'>{html.escape(visible(guess.token))} "
        f"<small>{guess.log_probability:.2f}</small></bdi> "
    )


_STYLE = (
    ".sa-lens td bdi{white-space:pre}"
    ".sa-lens-guess{display:inline-block;padding:0 5px;margin:1px 0;border-radius:3px;border:1px solid transparent}"
    ".sa-lens-right-guess{font-weight:700;border-color:currentColor}"
    "@media print{.sa-lens-guess{print-color-adjust:exact;-webkit-print-color-adjust:exact}}"
)


def logit_lens(model: Host, text: str | Int[Tensor, " pos"], *, stream: Stream | None = None) -> LogitLens:
    """Returns what the residual stream would predict if the final LayerNorm and unembedding read it after each layer.

    The ablated stream is read where all positions are ablated.

    Args:
        text: text, which gets one begin-of-text token, or tokens.
        stream: whose predictions; None: every stream of the model.

    Raises:
        ValueError: a stream that the model does not have, or a text that it cannot read.

    Source: nostalgebraist, "interpreting GPT: the logit lens" (2020).
    """
    tokens, labels = read_text(model, text)
    n_layers = model.cfg.n_layers
    names = ["blocks.0.hook_resid_pre", *(f"blocks.{layer}.hook_resid_post" for layer in range(n_layers))]
    streams = []
    for of_stream in streams_of(model, stream):
        with torch.no_grad(), in_stream(model, of_stream):
            _, cache = model.run_with_cache(tokens, names_filter=lambda name: name in names)
            # the model's own end reads each layer, put in the place of the last
            rows = [_read_at_the_end(model, tokens, names[-1], cache[name]) for name in names]
        best = [row.max(-1) for row in rows]
        streams.append(
            LensStream(
                stream=of_stream,
                top=tuple(tuple(token_text(model.tokenizer, token) for token in row.indices.tolist()) for row in best),
                log_probability=tuple(tuple(map(short, row.values.tolist())) for row in best),
                actual=tuple(_actual(row, tokens) for row in rows),
            )
        )
    note = "the likeliest next token if the residual stream were read there; colour: its log-probability"
    rows_named = ("embedding", *(f"layer {layer}" for layer in range(n_layers)))
    return LogitLens("Logit lens", note, labels, rows_named, tuple(streams))


def _read_at_the_end(
    model: Host, tokens: Int[Tensor, "1 pos"], last: str, resid: Float[Tensor, "1 pos d_model"]
) -> Float[Tensor, "pos d_vocab"]:
    def put(_: Tensor, hook: Any) -> Tensor:
        return resid

    logits = model.run_with_hooks(tokens, fwd_hooks=[(last, put)])
    return logits[0].float().log_softmax(-1)


@draw.register
def _(record: LogitLens, *, dark: bool = False) -> Figure:
    """Draws one panel per stream, tokens across, layers upward."""
    n, rows, panels = len(record.tokens), len(record.layers), len(record.streams)
    # up to 25 tokens fit across the page of a notebook
    cell = max(36, min(62, 920 // n))
    each = 34 * rows + 60
    scale = colour_scale("sequential", dark)
    # just below 0 where every token is certain
    lowest = min(-1e-9, *(value for of_stream in record.streams for row in of_stream.log_probability for value in row))
    figure = make_subplots(
        rows=panels,
        cols=1,
        shared_xaxes=True,
        vertical_spacing=50 / (panels * each) if panels > 1 else 0,
        subplot_titles=[f"<b>{escape(of_stream.stream)} stream</b>" for of_stream in record.streams],
        figure=Figure(),
    )
    figure.update_annotations(font_size=13, font_color=palette(dark).text, x=0, xanchor="left")
    for i, of_stream in enumerate(record.streams, 1):
        figure.add_trace(
            go.Heatmap(
                z=[list(row) for row in of_stream.log_probability],
                x=list(range(n)),
                y=list(range(rows)),
                text=[
                    [
                        write_on(colour_at(scale, 1 - value / lowest), short_label(token, cell // 7))
                        for token, value in zip(*row, strict=True)
                    ]
                    for row in zip(of_stream.top, of_stream.log_probability, strict=True)
                ],
                texttemplate="%{text}" if n * rows <= MOST_TEXTS else None,
                textfont={"size": 11},
                customdata=[[_hover(record, of_stream, row, place) for place in range(n)] for row in range(rows)],
                hovertemplate="%{customdata}<extra></extra>",
                coloraxis="coloraxis",
                xgap=1.5,
                ygap=1.5,
                name=of_stream.stream,
            ),
            row=i,
            col=1,
        )
        figure.update_yaxes(label_axis(record.layers), row=i, col=1)
    tokens = [short_label(token, 9) for token in record.tokens]
    figure.update_xaxes(label_axis(tokens, tickangle=-60, showticklabels=False))
    figure.update_xaxes(title={"text": "token read"}, showticklabels=True, row=panels, col=1)
    bar = colour_bar("log-probability, nats", dark, len=0.6)
    colours = {"colorscale": scale, "cmin": lowest, "cmax": 0, "colorbar": bar}
    width = int(min(1800, max(620, 190 + cell * n)))
    return lay_out(figure, record, width, 130 + panels * each, dark, above=20, bottom=110, coloraxis=colours)


def _hover(record: LogitLens, of_stream: LensStream, row: int, place: int) -> str:
    actual = of_stream.actual[row][place]
    following = "" if actual is None else f"<br>next: {escape(repr(record.tokens[place + 1]))} {actual:.3f} nats"
    return (
        f"position {place}, after {escape(repr(record.tokens[place]))}<br>{escape(record.layers[row])}, "
        f"{escape(of_stream.stream)} stream<br><b>{escape(repr(of_stream.top[row][place]))}</b> "
        f"{of_stream.log_probability[row][place]:.3f} nats{following}"
    )
