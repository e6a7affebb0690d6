"""`draw`: a plotly figure of a record, and `save`: the figure as a file that needs no network.

What draws each kind of record is registered in the module of that kind.
"""

from __future__ import annotations

import json
from functools import singledispatch
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import plotly.io as pio

from sa_lens.places import output_file
from sa_lens.views.page import component, in_notebook, inert, scripts_to_carry, write_html

IMAGES = (".png", ".svg", ".pdf", ".jpg", ".webp")


_USUAL = {"plotly_mimetype", "notebook", "jupyterlab", "vscode", "colab", "kaggle", "notebook_connected"}
"""Renderers that plotly chooses by itself in notebooks; any other is somebody's wish."""
_CONFIG = {"displaylogo": False, "responsive": True}


class Figure(go.Figure):
    """A plotly figure that saves itself, and that shows itself in notebooks without a network.

    Plotly's own display of HTML asks a server for MathJax. This one carries plotly's script with the first figure of a
    notebook, and the figure's data for front ends that draw plotly figures themselves. A renderer chosen in
    `plotly.io.renderers.default` is respected.
    """

    def fragment(self) -> str:
        """The figure as HTML without plotly's script, which the page must hold."""
        return _fragment(self)

    def _repr_mimebundle_(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        content = json.loads(self.to_json(validate=False))
        return {
            "application/vnd.plotly.v1+json": {**content, "config": _CONFIG},
            "text/html": scripts_to_carry(("plotly",)) + self.fragment(),
        }

    def _repr_html_(self) -> str:
        return scripts_to_carry(("plotly",)) + self.fragment()

    def _ipython_display_(self) -> None:
        if not self._displayed():
            super()._ipython_display_()

    def show(self, *args: Any, **kwargs: Any) -> None:
        """Shows the figure: in the notebook, or in a browser. Arguments are plotly's, and make it plotly's display."""
        if args or kwargs or not self._displayed():
            super().show(*args, **kwargs)

    def _displayed(self) -> bool:
        """Displays the figure if this is a notebook and nobody wished another renderer; whether it did."""
        if not in_notebook() or not set(str(pio.renderers.default or "").split("+")) <= _USUAL:
            return False
        from IPython.display import display

        display(self._repr_mimebundle_(), raw=True)
        return True

    def save(self, path: str | Path, *, scale: float = 2) -> Path:
        """Writes the figure to a file, as `sa_lens.views.save` does."""
        return save(self, path, scale=scale)


def _fragment(figure: go.Figure) -> str:
    content = figure.to_plotly_json()
    shown = pio.to_json({"data": content["data"], "layout": content["layout"], "config": _CONFIG}, validate=False)
    height = figure.layout.height or 450
    return component("plotly", "", inert(json.loads(shown)), style=f"min-height:{height}px")


@singledispatch
def draw(shown: object, *, dark: bool = False) -> Figure:
    """A plotly figure of a record, of a circuit, or of a table of patches.

    Args:
        shown: a record of `sa_lens.views.records`, a circuit, or a table of `sa_lens.circuits.patch`.
        dark: the dark look.

    A circuit takes the options of `circuit_map` as well, such as `skill=`.

    Raises:
        TypeError: something that has no figure.
    """
    kinds = sorted(kind.__name__ for kind in draw.registry if kind is not object)
    raise TypeError(f"there is no figure of a {type(shown).__name__}; figures are of {', '.join(kinds)}")


def save(figure: go.Figure, path: str | Path, *, scale: float = 2) -> Path:
    """Writes a figure: `.html` (one file, plotly inside, no network needed), or an image.

    Args:
        path: where; the ending chooses the format.
        scale: pixels per unit of the figure's size, for images.

    Raises:
        ValueError: another ending.
        RuntimeError: an image is asked for and kaleido or a Chrome browser is missing.
    """
    path = output_file(path)
    if path.suffix not in (".html", *IMAGES):
        raise ValueError(f"{path.name}: a figure is saved as .html, {', '.join(IMAGES)}")
    if path.suffix == ".html":
        write_html(path, path.stem, ("plotly",), _fragment(figure), str(figure.layout.paper_bgcolor or "white"))
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        import kaleido  # noqa: F401
    except ImportError as error:
        raise RuntimeError(
            f"{path.name}: images need kaleido (pip install 'sa-lens[png]') and Chrome or Chromium; .html needs neither"
        ) from error
    try:
        figure.write_image(path, scale=scale)
    except RuntimeError as error:
        if "Chrome" not in str(error):
            raise
        raise RuntimeError(
            f"{path.name}: kaleido found no Chrome or Chromium to draw the image with; install one (such as Debian's "
            "chromium, or set BROWSER_PATH), or save as .html"
        ) from error
    return path
