"""`draw` makes a picture of a record, `show` shows it, `save` writes it to a file that needs no network.

What draws each kind of record is registered in the module of that kind.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from functools import partial, singledispatch
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import plotly.io as pio
from plotly.subplots import make_subplots

from sa_lens.data.whole_files import atomic_write
from sa_lens.places import output_file
from sa_lens.views.html_page import Column, Page, Picture, component
from sa_lens.views.records import Titled, to_json
from sa_lens.views.theme import lay_out, palette, small_print, wrap

IMAGES = (".png", ".svg", ".pdf", ".jpg", ".webp")
_USUAL = {"plotly_mimetype", "notebook", "jupyterlab", "vscode", "colab", "kaggle", "notebook_connected"}
"""Renderers that plotly chooses by itself in notebooks; any other is somebody's wish."""
_CONFIG = {"displaylogo": False, "responsive": True}


class Figure(Picture, go.Figure):
    """A plotly figure that shows itself in notebooks without a network, and saves itself.

    Plotly's own display of HTML asks a server for MathJax. This one carries plotly's script with the first figure of a
    notebook, and the figure's data for front ends that draw plotly figures themselves. A renderer chosen in
    `plotly.io.renderers.default` is respected.
    """

    libraries = ("plotly",)

    def fragment(self) -> str:
        content = json.loads(pio.to_json({**self.to_plotly_json(), "config": _CONFIG}, validate=False))
        return component("plotly", "", content, style=f"min-height:{self.layout.height or 450}px")

    def _repr_mimebundle_(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        content = json.loads(self.to_json(validate=False))
        return {
            "application/vnd.plotly.v1+json": {**content, "config": _CONFIG},
            "text/html": self._repr_html_(),
        }

    def _ipython_display_(self) -> None:
        if not self._display():
            super()._ipython_display_()

    def show(self, *args: Any, **kwargs: Any) -> None:
        """Shows the figure: in the notebook, or in a browser. Arguments are plotly's, and make it plotly's display."""
        if args or kwargs or not self._display():
            go.Figure.show(self, *args, **kwargs)

    def _display(self) -> bool:
        return set(str(pio.renderers.default or "").split("+")) <= _USUAL and super()._display()

    def save(self, path: str | Path, *, scale: float = 2) -> Path:
        """Writes the figure: `.html` (one file, plotly inside, no network needed), or an image.

        Args:
            scale: pixels per unit of the figure's size, for images.

        Raises:
            ValueError: another ending.
            RuntimeError: an image is asked for and kaleido or a Chrome browser is missing.
        """
        path = output_file(path)
        if path.suffix not in (".html", *IMAGES):
            raise ValueError(f"{path.name}: a figure is saved as .html, {', '.join(IMAGES)}")
        if path.suffix == ".html":
            self._write(path, path.stem, str(self.layout.paper_bgcolor or "white"))
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            import kaleido  # noqa: F401
        except ImportError as error:
            raise RuntimeError(
                f"{path.name}: images need kaleido (pip install 'sa-lens[png]') and Chrome or Chromium; .html needs "
                "neither"
            ) from error
        try:
            self.write_image(path, scale=scale)
        except RuntimeError as error:
            if "Chrome" not in str(error):
                raise
            raise RuntimeError(
                f"{path.name}: kaleido found no Chrome or Chromium to draw the image with; install one (such as "
                "Debian's chromium, or set BROWSER_PATH), or save as .html"
            ) from error
        return path


# --------------------------------------------------------------------------------------------------------------- verbs


@singledispatch
def draw(shown: object, *, dark: bool = False) -> Any:
    """Draws a record, and returns the picture: a plotly figure, or a page of HTML for texts, tables and circuits.

    Either shows itself as the last line of a notebook's cell, and can be changed before it is saved.

    Args:
        shown: a record, a circuit, or a table of patches; or a list of them and of pictures, drawn below one another
            on one page. A circuit takes the options of `circuit_map` as well, such as `skill=`; a table those of
            `patch_map`.
        dark: the dark look.

    Raises:
        TypeError: something that has no picture.
    """
    kinds = sorted(kind.__name__ for kind in draw.registry if kind not in (object, Picture, list))
    raise TypeError(f"there is no picture of a {type(shown).__name__}; there is one of {', '.join(kinds)}")


@draw.register
def _(shown: Picture) -> Any:
    return shown


@draw.register
def _(shown: list, *, dark: bool = False) -> Column:
    if not shown:
        raise ValueError("the list is empty: give at least one record or picture")
    return Column([part if isinstance(part, Picture) else draw(part, dark=dark) for part in shown], dark=dark)


def show(shown: Any, **options: Any) -> None:
    """Shows a record, or anything else that `draw` takes, in the notebook, or else in a browser.

    Args:
        shown: a record, a circuit, a table of patches, or a picture.
        options: those of `draw`, such as `dark=True`.
    """
    draw(shown, **options).show()


def save(shown: Any, path: str | Path, *, scale: float | None = None, **options: Any) -> Path:
    """Saves a record, or anything else that `draw` takes, in the format that the ending of the path names.

    `.html` is one file that needs no network; `.json` is the record itself, which `read` reads; `.png`, `.svg`, `.pdf`,
    `.jpg` and `.webp` are images of figures and circuits.

    Args:
        shown: a record, a circuit, a table of patches, or a picture.
        path: where; its folder is made if need be.
        scale: pixels per unit of the figure's size, for images; None: 2.
        options: those of `draw`, such as `dark=True`.

    Returns:
        The path.

    Raises:
        ValueError: an ending that does not fit.
        RuntimeError: an image is asked for and kaleido or a Chrome browser is missing.
    """
    if Path(path).suffix == ".json":
        record = to_record(shown, **{name: value for name, value in options.items() if name != "dark"})
        if is_dataclass(record):
            path = output_file(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(path, to_json(record).encode())
            return path
    return draw(shown, **options).save(path, **({} if scale is None else {"scale": scale}))


# -------------------------------------------------------------------------------------------------------------- panels


@dataclass(frozen=True)
class Panels:
    """Records of one kind, ready to be drawn next to one another on one colour scale."""

    traces: list[list[Any]]
    """Traces of each panel."""
    axes: list[tuple[dict[str, Any], dict[str, Any]]]
    """Settings of the x and y axis of each."""
    width: int
    """Pixels of a panel."""
    beside: int
    """Pixels of the colour bar and the outer margins."""
    gap: int
    """Pixels between two panels."""
    height: int
    """Pixels of the panels and what is below."""
    below: int | None = None
    """Pixels of the labels below a panel, if the panels stand below one another; None: they stand side by side."""
    layout: dict[str, Any] = field(default_factory=dict)
    """Other settings of the figure."""


class PanelPage(Page):
    """Records next to one another, drawn by our own script; `figure` draws the same with plotly, for images.

    Args:
        records: what to show; the title of the first is the heading.
        names: a name above each.
        script: what draws them.
        figure: the plotly figure.
    """

    def __init__(
        self,
        records: Sequence[Any],
        names: Sequence[str],
        script: PanelScript,
        figure: Callable[[], Figure],
        dark: bool,
    ) -> None:
        self.figure = figure
        head, panels = _head(records), []
        for name, record, content in zip(names, records, script.contents(records), strict=True):
            note, warnings = _rest(record, head)
            panels.append({"name": name, "note": note, "warnings": warnings, "content": content})
        body = component("sa_lens", script.name, {"panels": panels})
        super().__init__(head, lambda: body, dark=dark, libraries=("sa_lens",))

    def save(self, path: str | Path, *, scale: float = 2) -> Path:
        """Writes the page as `.html`, or the plotly figure as an image; see `Figure.save`."""
        return super().save(path) if Path(path).suffix == ".html" else self.figure().save(path, scale=scale)


@dataclass(frozen=True)
class PanelScript:
    """What draws records of one kind on a page."""

    name: str
    """Name of the script's function."""
    contents: Callable[[Sequence[Any]], list[dict[str, Any]]]
    """What it draws each of the records from."""


_panels: dict[type, tuple[Callable[[Sequence[Any], bool], Panels], PanelScript | None]] = {}


def register_panels(
    kind: type, make: Callable[[Sequence[Any], bool], Panels], script: PanelScript | None = None
) -> None:
    """Registers how records of a kind are drawn, alone by `draw` or next to one another by `side_by_side`.

    Args:
        make: draws them with plotly.
        script: draws them on a page instead, and leaves images to plotly.
    """
    _panels[kind] = make, script
    draw.register(kind, partial(_draw_panels, names=("",)))


@singledispatch
def to_record(shown: Any, **options: Any) -> Any:
    """Returns the record of an analysis's result, such as a circuit; a record as it is."""
    return shown


def register_result(kind: type, make: Callable[..., Any]) -> None:
    """Registers the record of an analysis's result, so that `draw` and `side_by_side` take the result itself."""
    to_record.register(kind, make)
    draw.register(kind, lambda shown, *, dark=False, **options: draw(make(shown, **options), dark=dark))


def _draw_panels(*records: Any, names: Sequence[str], dark: bool = False, title: str = "") -> Any:
    make, script = _panels[type(records[0])]
    titled = [replace(record, title=title or record.title) for record in records]

    def figure() -> Figure:
        return _plot_panels(titled, names, make(titled, dark), dark)

    return figure() if script is None else PanelPage(titled, names, script, figure, dark)


def _head(records: Sequence[Any]) -> Any:
    """The first record, with a note and warnings only where they are those of all."""
    first, *others = records
    note = first.note if all(record.note == first.note for record in others) else ""
    warnings = tuple(warning for warning in first.warnings if all(warning in record.warnings for record in others))
    return replace(first, note=note, warnings=warnings)


def _rest(record: Any, head: Any) -> tuple[str, list[str]]:
    """The note and the warnings of a record that its heading does not have."""
    warnings = [warning for warning in record.warnings if warning not in head.warnings]
    return "" if record.note == head.note else record.note, warnings


def _plot_panels(records: Sequence[Any], names: Sequence[str], panels: Panels, dark: bool) -> Figure:
    n, head = len(records), _head(records)
    stacked = panels.below is not None
    width = panels.beside + panels.width * (1 if stacked else n)
    captions = [
        f"<b>{wrap(name, panels.width - 20)}</b>{small_print(*_rest(record, head), panels.width - 20, dark, size=11)}"
        for name, record in zip(names, records, strict=True)
        if n > 1
    ]
    above = 20 + 17 * max(caption.count("<br>") for caption in captions) if captions else 0
    spacing = {"horizontal_spacing": panels.gap / (width - panels.beside)}
    bottom = {}
    if panels.below is not None:
        between = above + panels.below
        spacing = {"vertical_spacing": between / (n * (panels.height - panels.below) + (n - 1) * between)}
        bottom = {"bottom": panels.below}
    shape = (n, 1) if stacked else (1, n)
    figure = make_subplots(*shape, subplot_titles=captions or None, figure=Figure(), **spacing)
    figure.update_annotations(font_size=13, font_color=palette(dark).text, yanchor="bottom")
    for i, (traces, (x, y)) in enumerate(zip(panels.traces, panels.axes, strict=True), 1):
        place = {"row": i, "col": 1} if stacked else {"row": 1, "col": i}
        for trace in traces:
            figure.add_trace(trace, **place)
        figure.update_xaxes(x, **place)
        figure.update_yaxes(y, **place)
    height = (above + panels.height) * (n if stacked else 1)
    return lay_out(figure, head, width, height, dark, above=above, **bottom, **panels.layout)


def side_by_side(
    shown: Sequence[Any], title: str = "", *, names: Sequence[str] | None = None, dark: bool = False
) -> Any:
    """Draws heat maps or circuits next to one another on one colour scale, such as one for each stream or model.

    Heat maps become a plotly figure; those of many columns stand below one another. Circuits become a page whose
    sliders move together and on which a node has the same place in each; its method `figure` draws them with plotly.

    Args:
        shown: records of heat maps, or tables of patches; or circuits, or records of them.
        title: heading; empty: what their headings begin with alike.
        names: a name above each; default: their headings, without what the title says of all.
        dark: the dark look.

    Raises:
        ValueError: fewer than two, of different kinds, two that mean different things by colour, circuits of
            transformers of different shapes.
    """
    records: list[Titled] = [to_record(result) for result in shown]
    if len(records) < 2:
        raise ValueError(f"side_by_side needs two heat maps or circuits, not {len(records)}")
    for record in records:
        if type(record) not in _panels or type(record) is not type(records[0]):
            raise ValueError(f"side_by_side shows heat maps or circuits of one kind, not {type(record).__name__}")
        scales = [(shown.scale, getattr(shown, "colours", None)) for shown in (records[0], record)]  # type: ignore[attr-defined]
        if scales[0] != scales[1]:
            raise ValueError(f"side_by_side has one colour scale, but {scales[1][0]!r} is not {scales[0][0]!r}")
    alike, rest = _shared([record.title for record in records])
    if names is None:
        names = [record.title for record in records] if title else rest
    if len(names) != len(records):
        raise ValueError(f"{len(names)} names for {len(records)} panels")
    return _draw_panels(*records, names=names, dark=dark, title=title or alike)


def _shared(titles: Sequence[str]) -> tuple[str, list[str]]:
    """The parts, between commas, with which all the titles begin, and what is left of each.

    Titles that begin differently, or are alike to the end of one, are left as they are, below the first one.
    """
    parts = [title.split(", ") for title in titles]
    shortest = min(map(len, parts))
    n = next((i for i, column in enumerate(zip(*parts, strict=False)) if len(set(column)) > 1), shortest)
    if n in (0, shortest):
        return titles[0], [*titles]
    return ", ".join(parts[0][:n]), [", ".join(rest[n:]) for rest in parts]
