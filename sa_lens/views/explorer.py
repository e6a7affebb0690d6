"""The whole working set of a prompt on one page: its tokens, what each stream expects, attention, and units that stay.

In a notebook the page is live: another prompt takes its place. What stands there is ordinary HTML, so a saved notebook
shows the last prompt without a kernel.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

from jaxtyping import Int
from torch import Tensor

from sa_lens.core.host import Host, has_ablated_stream
from sa_lens.core.unit import Unit, checked_unit, unit_counts
from sa_lens.views.coloured_text import story_of
from sa_lens.views.drawing import draw, to_record
from sa_lens.views.heads_and_units import attention_of, chosen_heads
from sa_lens.views.html_page import Library, Page, Picture, notebook_shell, scripts_to_carry
from sa_lens.views.next_tokens import check_top, predictions_of
from sa_lens.views.raster import gate_raster_of
from sa_lens.views.reading import read_streams
from sa_lens.views.records import Exploration, GateRaster
from sa_lens.views.theme import palette

LIBRARIES: tuple[Library, ...] = ("sa_lens", "plotly")
HIGHEST = 900
"""Pixels of the raster; a drag zooms in where it holds more units than can be told apart."""


class Explorer(Picture):
    """The working set of a prompt, as `explore` makes it.

    Set `prompt` to another text, and the page in the notebook changes. `record` holds its numbers; `show` and `save`
    take the explorer as they take any record.
    """

    libraries = LIBRARIES

    def __init__(self, model: Host, prompt: str | Int[Tensor, " pos"], dark: bool, **choices: Any) -> None:
        self.model, self.dark, self.choices = model, dark, choices
        self.record: Exploration = _explore(model, prompt, **choices)
        self._prompt = prompt
        self._box: Any = None
        self._shown: list[tuple[Any, str]] = []

    @property
    def prompt(self) -> str | Int[Tensor, " pos"]:
        """The prompt that is shown. A new one is read at once, and shown wherever the explorer is displayed.

        Raises:
            ValueError: a prompt that the model cannot read; the last one stays.
        """
        return self._prompt

    @prompt.setter
    def prompt(self, prompt: str | Int[Tensor, " pos"]) -> None:
        self.record = _explore(self.model, prompt, **self.choices)
        self._prompt = prompt
        if self._box is not None and isinstance(prompt, str):
            self._box.value = prompt
        for handle, scripts in self._shown:
            handle.update({"text/html": scripts + self.fragment()}, raw=True)

    def fragment(self) -> str:
        return str(draw(self.record, dark=self.dark).fragment())

    def _ipython_display_(self) -> None:
        if not self._display():
            print(f"{self.record.title}: {''.join(self.record.tokens)!r}")

    def _display(self) -> bool:
        if notebook_shell() is None:
            return False
        from IPython.display import display

        if isinstance(self._prompt, str):
            box = self._make_box()
            if box is None:
                print("For a box to type prompts into: pip install 'sa-lens[notebook]'. Without it, set .prompt.")
            else:
                display(box)
        scripts = scripts_to_carry(self.libraries)
        handle = display({"text/html": scripts + self.fragment()}, raw=True, display_id=True)
        self._shown.append((handle, scripts))
        return True

    def _make_box(self) -> Any:
        """A field for the prompt, with room for what is wrong with it; None without ipywidgets."""
        try:
            import ipywidgets
        except ImportError:
            return None
        layout = {"width": "auto"}
        if self._box is None:
            self._box = ipywidgets.Text(
                value=str(self._prompt), description="Prompt", continuous_update=False, layout=layout
            )
            self._message = ipywidgets.Label(layout=layout)
            self._box.observe(self._typed, names="value")
        return ipywidgets.VBox([self._box, self._message])

    def _typed(self, change: Any) -> None:
        self._message.value = ""
        if change["new"] == self._prompt:
            return
        try:
            self.prompt = change["new"]
        except ValueError as error:
            self._message.value = f"{error}."


def explore(
    model: Host,
    prompt: str | Int[Tensor, " pos"],
    *,
    units: Sequence[Unit | str] = (),
    top: int = 5,
    layer: int | Sequence[int] | None = None,
    heads: Sequence[str] | None = None,
    dark: bool = False,
) -> Explorer:
    """Shows the working set of a prompt on one live page: tokens, predictions, attention, and the gates' choice.

    In a notebook there is a field above the page into which you type the next prompt, if ipywidgets is there (the extra
    `notebook`); `explorer.prompt = "..."` does the same without it. Saved as HTML, it is the page of the last prompt.
    Each stream reads a prompt in one pass.

    Args:
        prompt: text, which gets one begin-of-text token, or tokens.
        units: units whose values can colour the tokens, as in `story`.
        top: likeliest next tokens at each token, as in `predictions`.
        layer: layers whose attention is shown; None: all.
        heads: heads whose attention is shown, as in `attention`.
        dark: the dark look.

    Raises:
        ValueError: a prompt that the model cannot read, or a unit, layer or head that it does not have.
    """
    return Explorer(model, prompt, dark, units=units, top=top, layer=layer, heads=heads)


to_record.register(Explorer, lambda explorer, **_: explorer.record)


def _explore(
    model: Host,
    prompt: str | Int[Tensor, " pos"],
    units: Sequence[Unit | str],
    top: int,
    layer: int | Sequence[int] | None,
    heads: Sequence[str] | None,
) -> Exploration:
    check_top(model, top)
    chosen, at = [checked_unit(model, unit) for unit in units], chosen_heads(model, layer, heads)
    hard = has_ablated_stream(model) and model.gates.kind == "hard"  # type: ignore[attr-defined]
    sublayers = list(unit_counts(model)) if hard else list(dict.fromkeys(unit.sublayer for unit in chosen))
    reading = read_streams(model, prompt, sublayers=sublayers, layers=sorted({layer for layer, _ in at}))
    streams = " and ".join(reading.streams)
    return Exploration(
        f"A prompt in the {streams} stream{'s' * (len(reading.streams) > 1)}",
        f"{len(reading.labels)} tokens",
        reading.labels,
        story_of(reading, chosen),
        predictions_of(reading, top),
        attention_of(reading, at),
        gate_raster_of(reading) if hard else None,
    )


@draw.register
def _(record: Exploration, *, dark: bool = False) -> Page:
    """Draws the tokens, the predictions, attention and the raster below one another, each as wide as the page."""

    def body() -> str:
        parts = [draw(part, dark=dark).fragment() for part in (record.story, record.predictions, record.attention)]
        parts += [_fluid(record.gates, dark)] if record.gates is not None else []
        return f"<style>{_STYLE}</style>" + "".join(f"<section class='sa-lens-part'>{part}</section>" for part in parts)

    return Page(record, body, dark=dark, libraries=LIBRARIES)


def _fluid(gates: GateRaster, dark: bool) -> str:
    """The raster as wide as its place, heading and note in HTML, labels and colour bar where they leave it room."""
    figure = draw(gates, dark=dark)
    height = min(HIGHEST, figure.layout.height - figure.layout.margin.t + 60)
    labels = [label.replace(" ", "<br>", 2).replace("<br>", " ", 1) for label in figure.layout.yaxis.ticktext]
    figure.update_layout(title=None, width=None, autosize=True, height=height, margin={"t": 60, "l": 10, "r": 10})
    figure.update_yaxes(ticktext=labels)
    about = figure.data[0].colorbar.title.text.replace("<br>", " ").rstrip("\u00a0 ")
    figure.data[0].colorbar = {
        **{"title": {"text": about, "side": "top", "font": {"size": 12, "color": palette(dark).faint}}},
        **{"orientation": "h", "x": 0, "xanchor": "left", "y": 1, "yanchor": "bottom", "len": 200, "lenmode": "pixels"},
        **{"thickness": 10, "outlinewidth": 0, "tickfont": {"size": 11}},
    }
    title, note = html.escape(gates.title), html.escape(gates.note)
    return f"<h3>{title}</h3><p class='note'>{note}</p>{figure.fragment()}"


_STYLE = ".sa-lens-part{margin-top:18px;min-width:0}.sa-lens-part .sa-lens{padding:0;max-width:none}"
