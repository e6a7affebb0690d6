"""A text whose tokens take the colour of a number: changes of the masks, losses, single units."""

from __future__ import annotations

import hashlib
import html
from collections.abc import Sequence
from itertools import count

import torch
from jaxtyping import Int
from torch import Tensor

from sa_lens.core.host import Host, has_ablated_stream
from sa_lens.core.unit import Unit, checked_unit, unit_counts
from sa_lens.views.drawing import draw
from sa_lens.views.html_page import Page
from sa_lens.views.reading import Reading, read_streams
from sa_lens.views.records import Story, Track, number
from sa_lens.views.theme import colour_at, colour_scale, ink_on

_pictures = count()


def story(
    model: Host,
    text: str | Int[Tensor, " pos"],
    units: Sequence[Unit | str] = (),
    *,
    title: str = "A story, token by token",
) -> Story:
    """Returns a text with a number for each token, in several tracks to colour by.

    Tracks, as far as the model has them: units that entered (units, over all layers, that stay at this token and did
    not at the one before; where k is fixed, as many left), loss of this token in each stream and their difference, and
    for each chosen unit its value in each stream and its mask.

    Args:
        text: text, which gets one begin-of-text token, or tokens.
        units: units to show, as `Unit` or as text such as `L1.mlp.17`.
        title: heading.

    Raises:
        ValueError: a unit that the model does not have, or a text that it cannot read.
    """
    chosen = [checked_unit(model, unit) for unit in units]
    hard = has_ablated_stream(model) and model.gates.kind == "hard"  # type: ignore[attr-defined]
    sublayers = list(unit_counts(model)) if hard else list(dict.fromkeys(unit.sublayer for unit in chosen))
    return story_of(read_streams(model, text, sublayers=sublayers), chosen, title=title)


def story_of(reading: Reading, units: Sequence[Unit] = (), *, title: str = "A story, token by token") -> Story:
    """Returns the story of a text that was read with the sublayers of the units, or all if the gates are hard."""
    tokens, masks, values = reading.labels, reading.masks, reading.values
    tracks = []
    if masks and reading.model.gates.kind == "hard":  # type: ignore[attr-defined]
        live = torch.cat([mask[0] > 0 for mask in masks.values()], -1)
        entered = (live[1:] & ~live[:-1]).sum(-1).tolist()
        kept = int(live[0].sum())
        tracks.append(
            Track("units that entered", f"units of the {kept} that stay at a token", (None, *map(float, entered)))
        )
    losses = {stream: reading.loss(stream) for stream in reading.streams if len(tokens) > 1}
    for stream in losses:
        tracks.append(Track(f"loss, {stream}", "nats", (None, *map(number, losses[stream].tolist()))))
    if len(losses) == 2:
        difference = (losses["ablated"] - losses["clean"]).tolist()
        tracks.append(Track("ablated minus clean loss", "nats", (None, *map(number, difference)), "diverging"))
    for unit in units:
        for stream in reading.streams:
            of_unit = tuple(map(number, values[stream][unit.sublayer][0, :, unit.index].tolist()))
            tracks.append(Track(f"{unit}, {stream}", "value", of_unit, "diverging"))
        if unit.sublayer in masks:
            mask = masks[unit.sublayer][0, :, unit.index].tolist()
            tracks.append(Track(f"{unit}, mask", "1: stays", tuple(map(number, mask))))
    note = f"{len(tokens)} tokens; the loss at a token is that of predicting it from those before"
    return Story(title, note, tokens, tuple(tracks))


@draw.register
def _(record: Story, *, dark: bool = False) -> Page:
    """Draws a text in the colours of one of its tracks, with all numbers of a token at the mouse; needs no script."""
    return Page(record, lambda: _html(record, dark), dark=dark)


def _html(record: Story, dark: bool) -> str:
    # names of radio buttons are shared by a whole page
    digest = hashlib.sha256(repr(record).encode()).hexdigest()[:8]
    name = f"sa-lens-story-{digest}-{next(_pictures)}"
    scales = [_Colours(track, dark) for track in record.tracks]
    radios, labels, legends, rules = [], [], [], []
    for i, scale in enumerate(scales):
        button = f"{name}-{i}"
        radios.append(f"<input type='radio' name='{name}' id='{button}'{' checked' * (i == 0)}>")
        labels.append(f"<label for='{button}'>{html.escape(scale.track.name)}</label>")
        legends.append(f"<div class='legend legend-{i}'>{scale.legend()}</div>")
        rules.append(
            f"#{button}:checked~.tokens bdi{{background:var(--b{i});color:var(--c{i},inherit)}}"
            f"#{button}:checked~.legend-{i}{{display:flex}}"
            f"#{button}:checked~.choices label[for='{button}']{{text-decoration:underline;font-weight:700}}"
            f"#{button}:focus-visible~.choices label[for='{button}']{{outline:2px solid}}"
        )
    tokens = "".join(_token(i, token, scales) for i, token in enumerate(record.tokens))
    return (
        f"<style>{_STYLE}{''.join(rules)}</style><div class='sa-lens-story'>{''.join(radios)}"
        f"<div class='choices'>{''.join(labels)}</div>{''.join(legends)}<div class='tokens'>{tokens}</div></div>"
    )


def _token(i: int, token: str, scales: Sequence[_Colours]) -> str:
    tip = "\n".join([f"{i}  {token!r}", *(scale.words(i) for scale in scales)])
    style = "".join(scale.css(k, i) for k, scale in enumerate(scales))
    # line breaks show as a sign and break the line
    text = html.escape(token).replace("\n", "¶<br>")
    return f"<bdi style='{style}' data-tip='{html.escape(tip, quote=True)}'>{text}</bdi>"


_STYLE = (
    ".sa-lens-story input{position:absolute;opacity:0}"
    ".sa-lens-story .choices{display:flex;flex-wrap:wrap;gap:4px 16px;font-size:13px;margin-bottom:6px}"
    ".sa-lens-story label{cursor:pointer}"
    ".sa-lens-story .legend{display:none;align-items:center;gap:6px;font-size:12px;margin-bottom:10px}"
    ".sa-lens-story .legend i{display:inline-block;width:140px;height:10px;border-radius:2px}"
    ".sa-lens-story .tokens{line-height:1.9;padding-bottom:110px;position:relative}"
    ".sa-lens-story bdi{padding:2px 0;margin-right:1px;border-radius:2px}"
    ".sa-lens-story bdi:hover{outline:1px solid}"
    ".sa-lens-story bdi:hover::after{content:attr(data-tip);position:absolute;left:0;bottom:0;white-space:pre-wrap;"
    "background:#333;color:#fff;padding:6px 10px;border-radius:4px;font-size:12px;line-height:1.4;z-index:2}"
    "@media print{.sa-lens-story bdi{print-color-adjust:exact;-webkit-print-color-adjust:exact}}"
)


class _Colours:
    """Colours of a track."""

    def __init__(self, track: Track, dark: bool) -> None:
        self.track = track
        self.scale = colour_scale(track.colours, dark)
        known = [value for value in track.values if value is not None]
        self.low, self.high = min(known, default=0.0), max(known, default=1.0)
        if track.colours == "diverging":
            self.high = max(-self.low, self.high)
            self.low = -self.high

    def words(self, i: int) -> str:
        """The number of a token."""
        value = self.track.values[i]
        return f"{self.track.name}: {'none' if value is None else f'{value:.4g}'} {self.track.scale}"

    def css(self, index: int, i: int) -> str:
        """Custom properties of a token: background and ink; none where there is no number."""
        value = self.track.values[i]
        if value is None:
            return ""
        share = (value - self.low) / (self.high - self.low) if self.high > self.low else 0.0
        colour = colour_at(self.scale, share)
        return f"--b{index}:{colour};--c{index}:{ink_on(colour)};"

    def legend(self) -> str:
        stops = ",".join(f"{colour} {100 * share:.0f}%" for share, colour in self.scale)
        return (
            f"<span>{self.low:.3g}</span><i style='background:linear-gradient(to right,{stops})'></i>"
            f"<span>{self.high:.3g} {html.escape(self.track.scale)}</span>"
        )
