"""`draw`: a plotly figure of a record, and `save`: the figure as a file that needs no network.

What draws each kind of record is registered in the module of that kind.
"""

from __future__ import annotations

from functools import singledispatch
from pathlib import Path

import plotly.graph_objects as go

IMAGES = (".png", ".svg", ".pdf", ".jpg", ".webp")


class Figure(go.Figure):
    """A plotly figure that saves itself."""

    def save(self, path: str | Path, *, scale: float = 2) -> Path:
        """Writes the figure to a file, as `sa_lens.views.save` does."""
        return save(self, path, scale=scale)


@singledispatch
def draw(shown: object, *, dark: bool = False) -> Figure:
    """A plotly figure of a record, of a circuit, or of a table of patches.

    Args:
        shown: a record of `sa_lens.views.records`, a circuit, or a table of `sa_lens.circuits.patching.patch`.
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
    path = Path(path)
    if path.suffix not in (".html", *IMAGES):
        raise ValueError(f"{path.name}: a figure is saved as .html, {', '.join(IMAGES)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".html":
        figure.write_html(
            path, include_plotlyjs=True, full_html=True, config={"displaylogo": False, "responsive": True}
        )
        return path
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
