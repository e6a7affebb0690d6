"""What each stream expects next, token by token, and what its residual stream would predict after each layer."""

from __future__ import annotations

import html
from typing import Any

import torch
from jaxtyping import Float, Int
from plotly import graph_objects as go
from plotly.subplots import make_subplots
from torch import Tensor

from sa_lens.config import Stream
from sa_lens.core.host import Host, in_stream, streams_of
from sa_lens.views.drawing import Figure, draw
from sa_lens.views.page import View, view
from sa_lens.views.records import Guess, LensStream, LogitLens, Predictions, StreamPredictions, short
from sa_lens.views.texts import read_text, token_text, visible
from sa_lens.views.theme import colour_at, colour_scale, heading, ink_on, palette, plain, template

__all__ = ["PredictionsView", "logit_lens", "predictions"]

MOST_TEXTS = 700
"""Cells of a logit lens up to which each shows its token."""


def predictions(
    model: Host, text: str | Int[Tensor, " pos"], *, top: int = 5, stream: Stream | None = None
) -> Predictions:
    """The likeliest next tokens after each token of a text, with log-probabilities, in each stream.

    Args:
        text: text, which gets one begin-of-text token, or tokens.
        top: how many at each token.
        stream: one stream; None: every one that the model has.

    Raises:
        ValueError: `top` outside the vocabulary, a stream that the model does not have, or a text that it cannot read.
    """
    if not 1 <= top <= model.cfg.d_vocab:
        raise ValueError(f"top={top} must be from 1 to the vocabulary's {model.cfg.d_vocab}")
    tokens, labels = read_text(model, text)
    found = []
    for one in streams_of(model, stream):
        with torch.no_grad(), in_stream(model, one):
            log_p = model(tokens)[0].float().log_softmax(-1)
        values, best = (x.tolist() for x in log_p.topk(top))
        found.append(
            StreamPredictions(
                stream=one,
                top=tuple(
                    tuple(Guess(token_text(model, token), short(value)) for token, value in zip(*row, strict=True))
                    for row in zip(best, values, strict=True)
                ),
                actual=_actual(log_p, tokens),
            )
        )
    note = (
        f"log-probabilities in nats: of the token that comes next, and of the {top} likeliest of "
        f"{model.cfg.d_vocab:,} tokens"
    )
    return Predictions("Predictions, token by token", note, labels, tuple(found))


def _actual(log_p: Float[Tensor, "pos d_vocab"], tokens: Int[Tensor, "1 pos"]) -> tuple[float | None, ...]:
    """Log-probability of each next token, and None at the end."""
    return (*map(short, log_p[:-1].gather(-1, tokens[0, 1:, None])[:, 0].tolist()), None)


class PredictionsView(View):
    """A row a token: the token that comes next, and what each stream expected; needs no script."""

    def body(self) -> str:
        record: Predictions = self.record
        heads = "".join(
            f"<th class='right'>{html.escape(one.stream)}: next</th><th>{html.escape(one.stream)}: expected</th>"
            for one in record.streams
        )
        rows = []
        for i, token in enumerate(record.tokens):
            following = record.tokens[i + 1] if i + 1 < len(record.tokens) else None
            cells = "".join(
                f"<td class='right'>{'' if one.actual[i] is None else f'{one.actual[i]:.2f}'}</td>"
                f"<td>{''.join(self._guess(guess, following) for guess in one.top[i])}</td>"
                for one in record.streams
            )
            rows.append(
                f"<tr><td class='right'>{i}</td><td><bdi>{_visible(token)}</bdi></td>"
                f"<td><bdi>{'' if following is None else _visible(following)}</bdi></td>{cells}</tr>"
            )
        return (
            f"<style>{_STYLE}</style><div class='scroll'><table><thead><tr><th class='right'>position</th>"
            f"<th>token</th><th>next</th>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        )

    def _guess(self, guess: Guess, following: str | None) -> str:
        share = 2.718281828459045**guess.log_probability
        colour = colour_at(colour_scale("sequential", self.dark), share)
        right = " sa-lens-right-guess" if guess.token == following else ""
        tip = f"{guess.token!r}: log-probability {guess.log_probability:.3f} nats, probability {share:.2%}"
        return (
            f"<bdi class='sa-lens-guess{right}' style='background:{colour};color:{ink_on(colour)}' "
            f"title='{html.escape(tip, quote=True)}'>{_visible(guess.token)} <small>{guess.log_probability:.2f}</small>"
            "</bdi> "
        )


view.register(Predictions, PredictionsView)


_STYLE = (
    ".sa-lens-guess{display:inline-block;padding:0 5px;margin:1px 0;border-radius:3px;border:1px solid transparent}"
    ".sa-lens-guess small{opacity:0.75}"
    ".sa-lens-right-guess{font-weight:700;border-color:currentColor}"
    "@media print{.sa-lens-guess{print-color-adjust:exact;-webkit-print-color-adjust:exact}}"
)


def _visible(token: str) -> str:
    """A token as HTML text in which line breaks and lonely spaces can be seen."""
    return html.escape(token if token.strip() else token.replace("\n", "¶").replace(" ", "␣"))


def logit_lens(model: Host, text: str | Int[Tensor, " pos"], *, stream: Stream | None = None) -> LogitLens:
    """What the residual stream would predict, were it read after each layer: final LayerNorm and unembedding at once.

    The ablated stream is read where all positions are ablated.

    Args:
        text: text, which gets one begin-of-text token, or tokens.
        stream: one stream; None: every one that the model has.

    Raises:
        ValueError: a stream that the model does not have, or a text that it cannot read.

    Source: nostalgebraist, "interpreting GPT: the logit lens" (2020).
    """
    tokens, labels = read_text(model, text)
    n_layers = model.cfg.n_layers
    names = ["blocks.0.hook_resid_pre", *(f"blocks.{layer}.hook_resid_post" for layer in range(n_layers))]
    found = []
    for one in streams_of(model, stream):
        with torch.no_grad(), in_stream(model, one):
            _, cache = model.run_with_cache(tokens, names_filter=lambda name: name in names)
            # the model's own end reads each layer, put in the place of the last
            rows = [_read_at_the_end(model, tokens, names[-1], cache[name]) for name in names]
        best = [row.max(-1) for row in rows]
        found.append(
            LensStream(
                stream=one,
                top=tuple(tuple(token_text(model, token) for token in row.indices.tolist()) for row in best),
                log_probability=tuple(tuple(map(short, row.values.tolist())) for row in best),
                actual=tuple(_actual(row, tokens) for row in rows),
            )
        )
    note = "the likeliest next token if the residual stream were read there; colour: its log-probability"
    rows_named = ("embedding", *(f"layer {layer}" for layer in range(n_layers)))
    return LogitLens("Logit lens", note, labels, rows_named, tuple(found))


def _read_at_the_end(
    model: Host, tokens: Int[Tensor, "1 pos"], last: str, resid: Float[Tensor, "1 pos d_model"]
) -> Float[Tensor, "pos d_vocab"]:
    def put(_: Tensor, hook: Any) -> Tensor:
        return resid

    logits = model.run_with_hooks(tokens, fwd_hooks=[(last, put)])
    return logits[0].float().log_softmax(-1)


@draw.register
def figure_of_lens(record: LogitLens, *, dark: bool = False) -> Figure:
    """The figure of a logit lens: one panel a stream, tokens across, layers upward."""
    colours = palette(dark)
    n, rows = len(record.tokens), len(record.layers)
    cell = 62 if n <= 24 else 46
    figure = make_subplots(
        rows=len(record.streams),
        cols=1,
        shared_xaxes=True,
        vertical_spacing=50 / (len(record.streams) * (34 * rows + 60)) if len(record.streams) > 1 else 0,
        subplot_titles=[f"<b>{plain(one.stream)} stream</b>" for one in record.streams],
        figure=Figure(),
    )
    figure.update_annotations(font_size=13, font_color=colours.text, x=0, xanchor="left")
    for i, one in enumerate(record.streams, 1):
        texts = [[plain(visible(token, 9 if cell > 50 else 6)) for token in row] for row in one.top]
        hover = [
            [
                f"position {at}, after {plain(repr(record.tokens[at]))}<br>{plain(record.layers[row])}, "
                f"{plain(one.stream)} stream<br><b>{plain(repr(token))}</b> {one.log_probability[row][at]:.3f} nats"
                + (
                    f"<br>next: {plain(repr(record.tokens[at + 1]))} {one.actual[row][at]:.3f} nats"
                    if one.actual[row][at] is not None
                    else ""
                )
                for at, token in enumerate(tokens)
            ]
            for row, tokens in enumerate(one.top)
        ]
        figure.add_trace(
            go.Heatmap(
                z=[list(row) for row in one.log_probability],
                x=list(range(n)),
                y=list(range(rows)),
                text=texts,
                texttemplate="%{text}" if n * rows <= MOST_TEXTS else None,
                textfont={"size": 11},
                customdata=hover,
                hovertemplate="%{customdata}<extra></extra>",
                coloraxis="coloraxis",
                xgap=1.5,
                ygap=1.5,
                name=one.stream,
            ),
            row=i,
            col=1,
        )
        figure.update_yaxes(
            tickvals=list(range(rows)), ticktext=list(record.layers), showgrid=False, zeroline=False, row=i, col=1
        )
    figure.update_xaxes(
        tickvals=list(range(n)),
        ticktext=[plain(visible(token, 9)) for token in record.tokens],
        tickangle=-60,
        showgrid=False,
        zeroline=False,
        showticklabels=False,
    )
    figure.update_xaxes(title={"text": "token read"}, showticklabels=True, row=len(record.streams), col=1)
    lowest = min(value for one in record.streams for row in one.log_probability for value in row)
    width = int(min(1800, max(620, 190 + cell * n)))
    title, room = heading(record.title, record.note, width, dark)
    figure.update_layout(
        template=template(dark),
        title=title,
        width=width,
        height=room + 130 + len(record.streams) * (34 * rows + 60),
        margin={"t": room + 20, "b": 110},
        coloraxis={
            "colorscale": colour_scale("sequential", dark),
            "cmin": lowest,
            "cmax": 0,
            "colorbar": {
                "title": {"text": "log-probability,<br>nats<br>\u00a0", "side": "top", "font": {"size": 12}},
                "thickness": 12,
                "outlinewidth": 0,
                "len": 0.6,
            },
        },
    )
    return figure
