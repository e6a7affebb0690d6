"""The look of all figures, light and dark, safe for colour-blind eyes; and what their layouts have in common.

Nothing is set globally: each figure carries its own template.
"""

from __future__ import annotations

import html
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, TypeVar

import plotly.graph_objects as go

from sa_lens.views.records import Colours, Titled

_F = TypeVar("_F", bound=go.Figure)

FONT = "Inter, 'Segoe UI', 'Helvetica Neue', Arial, 'DejaVu Sans', sans-serif"


@dataclass(frozen=True)
class Palette:
    """Colours of a look."""

    background: str
    text: str
    faint: str
    """Secondary text."""
    grid: str
    lines: tuple[str, ...]
    """Of curves, in turn: Okabe and Ito's, in an order that keeps neighbours apart."""
    positive: str
    negative: str
    warning: str
    """Text of warnings."""
    diverging: tuple[str, ...]
    """From negative over zero to positive: blue, background, orange."""
    sequential: tuple[str, ...]
    """From little to much."""


LIGHT = Palette(
    background="#ffffff",
    text="#1b1f24",
    faint="#5b6470",
    grid="#e3e6ea",
    lines=("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#444444"),
    positive="#c85a0c",
    negative="#1f6db3",
    warning="#9a3f00",
    diverging=("#08306b", "#2171b5", "#85b8dc", "#f7f7f5", "#fdb777", "#d9650f", "#7a2f00"),
    sequential=("#f7f7f5", "#c9ddee", "#85b8dc", "#2f7fbd", "#0b4a8f", "#06264f"),
)
DARK = Palette(
    background="#14171c",
    text="#e8eaed",
    faint="#a3abb6",
    grid="#2c323b",
    lines=("#56b4e9", "#e69f00", "#2fc79a", "#e3a0c5", "#8fb8ff", "#ff8c42", "#c5cad1"),
    positive="#f2913d",
    negative="#58a6e0",
    warning="#ffb070",
    diverging=("#c3e1fa", "#58a6e0", "#255a88", "#20242b", "#8a4a12", "#f2913d", "#ffdcb5"),
    sequential=("#20242b", "#1f4a70", "#2f7fbd", "#6db6ea", "#b9dcf7", "#f2f8fd"),
)
_SIZE = {"family": FONT, "size": 13}


def palette(dark: bool = False) -> Palette:
    """Colours of the light or the dark look."""
    return DARK if dark else LIGHT


def css_variables(colours: Palette) -> str:
    """Returns the colours of a look as CSS custom properties, such as `--text`, and `--line-0` of the first curve."""
    named = vars(colours)
    single = {name: colour for name, colour in named.items() if isinstance(colour, str)}
    lines = {f"line-{i}": colour for i, colour in enumerate(colours.lines)}
    return "".join(f"--{name}:{colour};" for name, colour in (single | lines).items())


def colour_scale(kind: Colours, dark: bool = False) -> list[tuple[float, str]]:
    """Returns a colour scale as plotly takes it: (place from 0 to 1, colour)."""
    return _stops(getattr(palette(dark), kind), 0, 1)


def strong_scale(kind: Colours, dark: bool = False) -> list[tuple[float, str]]:
    """Returns `colour_scale` without the colours near zero that would vanish on the background."""
    colours = getattr(palette(dark), kind)
    if kind == "sequential":
        return _stops(colours[2:], 0, 1)
    half = len(colours) // 2
    return _stops(colours[:half], 0, 0.5) + _stops(colours[half + 1 :], 0.5, 1)


def _stops(colours: Sequence[str], start: float, end: float) -> list[tuple[float, str]]:
    n = len(colours) - 1
    return [(start + (end - start) * i / n, colour) for i, colour in enumerate(colours)]


def colour_at(scale: Sequence[tuple[float, str]], share: float) -> str:
    """Returns the colour at a place from 0 to 1 of a colour scale, which may jump."""
    share = min(max(share, 0.0), 1.0)
    i = max(j for j in range(len(scale) - 1) if scale[j][0] <= share and scale[j][0] < scale[j + 1][0])
    (start, low), (end, high) = scale[i], scale[i + 1]
    share = (share - start) / (end - start)
    mixed = [round((1 - share) * a + share * b) for a, b in zip(_channels(low), _channels(high), strict=True)]
    return "#" + "".join(f"{channel:02x}" for channel in mixed)


def _channels(colour: str) -> list[int]:
    """Red, green and blue from 0 to 255."""
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]


def fade(colour: str, opacity: float) -> str:
    """Returns a colour that lets what is below shine through."""
    return f"rgba({','.join(map(str, _channels(colour)))},{opacity})"


def contrast(first: str, second: str) -> float:
    """Returns the contrast of two colours, from 1 to 21, as the Web Content Accessibility Guidelines define it."""
    low, high = sorted(map(_luminance, (first, second)))
    return (high + 0.05) / (low + 0.05)


def _luminance(colour: str) -> float:
    shares = (channel / 255 for channel in _channels(colour))
    red, green, blue = (share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def ink_on(colour: str) -> str:
    """Returns black or white, whichever reads better on a colour: the contrast is always more than 4.5."""
    return max("#000000", "#ffffff", key=lambda ink: contrast(ink, colour))


def write_on(colour: str, text: str) -> str:
    """Returns text for a cell of a heat map of that colour, as plotly takes it; its own choice of ink reads badly."""
    return f"<span style='color:{ink_on(colour)}'>{escape(text)}</span>"


@cache
def template(dark: bool = False) -> go.layout.Template:
    """Returns the plotly template of the light or the dark look."""
    colours = palette(dark)
    axis = {
        "gridcolor": colours.grid,
        "linecolor": colours.grid,
        "zerolinecolor": colours.grid,
        "tickfont": {**_SIZE, "size": 12, "color": colours.text},
        "title": {"font": {**_SIZE, "color": colours.faint}, "standoff": 8},
        "automargin": True,
        "ticks": "",
    }
    return go.layout.Template(
        layout={
            "font": {**_SIZE, "color": colours.text},
            "title": {
                **{"x": 0, "xref": "container", "xanchor": "left", "y": 1, "yref": "container", "yanchor": "top"},
                **{"pad": {"l": 20, "t": 18}, "font": {"size": 17}},
            },
            "paper_bgcolor": colours.background,
            "plot_bgcolor": colours.background,
            "colorway": list(colours.lines),
            "xaxis": axis,
            "yaxis": axis,
            "hoverlabel": {"font": _SIZE},
            "legend": {"bgcolor": "rgba(0,0,0,0)"},
            "margin": {"l": 60, "r": 30, "t": 80, "b": 55},
        }
    )


# ------------------------------------------------------------------------------------------------------------- layouts


def escape(text: str) -> str:
    """Returns text that plotly shows as it is, where it would read markup."""
    return html.escape(text, quote=False)


def wrap(text: str, width: float, letter: float = 6.6) -> str:
    """Breaks text into lines of so many pixels, safe from markup.

    Args:
        letter: mean width of a letter, in pixels; the default is that of small print.
    """
    lines = textwrap.wrap(text, max(12, int(width / letter)), break_long_words=False)
    return "<br>".join(map(escape, lines))


def heading(
    title: str, note: str, width: float, dark: bool = False, warnings: Sequence[str] = ()
) -> tuple[dict[str, str], int]:
    """Returns plotly's title (heading, and below it warnings and note in small print), and its height in pixels.

    Args:
        width: of the figure, in pixels.
    """
    text = f"<b>{wrap(title, width - 40, letter=10.4)}</b>" + small_print(note, warnings, width - 40, dark)
    # plotly spaces the lines of small print by the size of the heading
    return {"text": text}, 40 + 22 * (1 + text.count("<br>"))


def small_print(note: str, warnings: Sequence[str], width: float, dark: bool = False, size: int = 12) -> str:
    """Returns warnings and a note as lines below a heading, each in its colour, in plotly's markup."""
    look = palette(dark)
    lines = [(f"Warning: {warning}", look.warning) for warning in warnings] + [(note, look.faint)] * bool(note)
    return "".join(
        f"<br><span style='font-size:{size}px;color:{colour}'>{wrap(line, width, 0.55 * size)}</span>"
        for line, colour in lines
    )


def lay_out(
    figure: _F, record: Titled, width: int, height: int, dark: bool, *, above: int = 0, bottom: int = 55, **layout: Any
) -> _F:
    """Gives a figure its heading, its template and its size, and returns it.

    Args:
        height: of everything below the heading, in pixels.
        above: pixels between the heading and the axes, part of the height.
        bottom: pixels below the axes, part of the height.
        layout: plotly's other settings.
    """
    title, room = heading(record.title, record.note, width, dark, getattr(record, "warnings", ()))
    margin = {"t": room + above, "b": bottom}
    size = {"width": width, "height": room + height}
    return figure.update_layout(template=template(dark), title=title, margin=margin, **size, **layout)


def label_axis(labels: Sequence[str], title: str = "", places: Sequence[float] | None = None, **more: Any) -> Any:
    """Returns plotly's settings of an axis that names rows or columns.

    Args:
        places: where the labels stand; None: 0, 1, 2, ...
    """
    return {
        "title": {"text": escape(title)},
        "tickvals": list(range(len(labels)) if places is None else places),
        "ticktext": [escape(label) for label in labels],
        "showgrid": False,
        "zeroline": False,
        **more,
    }


def colour_bar(title: str, dark: bool, side: Literal["top", "right"] = "top", **more: Any) -> Any:
    """Returns plotly's settings of a colour bar, with its title wrapped above it, or beside it."""
    # the empty line keeps the title off the bar
    text = wrap(title, 110) + "<br>\u00a0" if side == "top" else escape(title)
    about = {"text": text, "side": side, "font": {"size": 12, "color": palette(dark).faint}}
    return {"title": about, "thickness": 12, "outlinewidth": 0, "tickfont": {"size": 11}, **more}
