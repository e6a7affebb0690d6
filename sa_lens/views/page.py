"""HTML of views: what draws itself with a library's script, and how each script is carried once a notebook or page.

A view is a piece of HTML with its data, something to read without any script, and a few lines that draw it as soon as
the page holds the library, whichever comes first. The library itself travels with the first view that a notebook
shows, and once in a saved page. Nothing is ever fetched from a server.
"""

from __future__ import annotations

import base64
import gzip
import html
import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, singledispatch
from pathlib import Path
from typing import Any, Literal

from sa_lens.data.writing import atomic_write
from sa_lens.views.theme import FONT, palette

Library = Literal["circuitsvis", "plotly"]

_LOADER = """<script>(function () {
var page = window.saLens = window.saLens || {libraries: {}};
page.drawn = page.drawn || 0;
page.draw = page.draw || function () {
  document.querySelectorAll(".sa-lens-view:not([data-drawn])").forEach(function (view) {
    var library = page.libraries[view.dataset.library];
    var data = view.querySelector("script[type='application/json']"), box = view.querySelector(".sa-lens-box");
    if (!library || !data || !box) return;
    view.setAttribute("data-drawn", "");
    box.id = "sa-lens-box-" + page.drawn++;
    box.textContent = "";
    try {
      var props = JSON.parse(data.textContent);
      if (view.dataset.library === "plotly") library.newPlot(box, props.data, props.layout, props.config);
      else library.render(box.id, library[view.dataset.component], props);
    } catch (error) {
      box.textContent = "This picture could not be drawn: " + error;
    }
  });
};
page.draw();
})();</script>"""

MISSING = (
    "This picture needs a script that the first picture of the notebook carries, and the output of that cell is gone "
    "or scripts are off. Run that cell again, or run sa_lens.views.load_scripts() in a cell of its own."
)


def inert(value: object) -> str:
    """JSON that may stand inside a script element whatever texts it holds."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def component(
    library: Library, name: str, props: Mapping[str, Any] | str, *, instead: str | None = None, style: str = ""
) -> str:
    """HTML of something that a library draws.

    Args:
        library: which; its script must be on the page, before or after this.
        name: what to draw; unused for plotly.
        props: what it is drawn from: a mapping, or JSON made by `inert`.
        instead: HTML to show while the library is missing; None: what to do about it.
        style: CSS of the box that is drawn into.
    """
    shown = instead if instead is not None else f"<p class='sa-lens-missing'>{html.escape(MISSING)}</p>"
    data = props if isinstance(props, str) else inert(props)
    return (
        f"<div class='sa-lens-view' data-library='{library}' data-component='{html.escape(name)}'>"
        f"<script type='application/json'>{data}</script>"
        f"<div class='sa-lens-box' style='{html.escape(style)}'>{shown}</div></div>{_LOADER}"
    )


def unparsed(text: str) -> str:
    """Text that looks the same and that HTML reads as text alone, for libraries that take text for HTML.

    An invisible word joiner after `<` and `&` keeps both from beginning a tag or an entity.
    """
    return text.replace("<", "<\u2060").replace("&", "&\u2060")


def packed(text: str) -> str:
    """Text compressed, the same bytes at any time, in letters that HTML leaves alone."""
    return base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode()


@cache
def library_source(library: Library) -> str:
    """A library's script, which puts it on the page under a name of ours and out of the way of module loaders."""
    if library == "plotly":
        from plotly.offline import get_plotlyjs

        source, found = get_plotlyjs(), "window.Plotly"
    else:
        import circuitsvis

        path = Path(circuitsvis.__file__).parent / "dist" / "cdn" / "iife.js"
        source, found = path.read_text(encoding="utf-8"), "CircuitsVis"
    return wrapped(library, source, found)


def wrapped(library: Library, source: str, found: str) -> str:
    """A library's script as `library_source` gives it.

    Args:
        found: expression for the library, once its script has run.
    """
    # without the address of the source map, which developer tools would try to fetch
    lines = [line for line in source.splitlines() if not line.startswith("//# sourceMappingURL=")]
    source = "\n".join(lines).replace("</script", "<\\/script")
    return (
        "(function (module, exports, define, require) {\n"
        "var page = window.saLens = window.saLens || {libraries: {}};\n"
        f"if (page.libraries.{library}) return;\n"
        "window.PlotlyConfig = window.PlotlyConfig || {MathJaxConfig: 'local'};\n"
        f"{source}\n"
        f"page.libraries.{library} = {found};\n"
        "if (page.draw) page.draw();\n"
        "})();"
    )


@cache
def library_script(library: Library) -> str:
    """The script element of a library, for notebooks."""
    return f"<script data-sa-lens-library='{library}'>{library_source(library)}</script>"


@cache
def packed_script(library: Library) -> str:
    """The same at less than half the size, for files: the browser unpacks it."""
    return (
        f"<script data-sa-lens-library='{library}'>(async function () {{\n"
        f"var letters = atob('{packed(library_source(library))}');\n"
        "var bytes = Uint8Array.from(letters, function (letter) { return letter.charCodeAt(0); });\n"
        "var script = document.createElement('script');\n"
        "script.textContent = await new Response(\n"
        "  new Blob([bytes]).stream().pipeThrough(new DecompressionStream('gzip'))).text();\n"
        "document.head.append(script);\n"
        "})().catch(function (error) {\n"
        "document.querySelectorAll('.sa-lens-box').forEach(function (box) {\n"
        "  box.textContent = 'This picture could not be drawn, it needs a browser from 2023 or later: ' + error;\n"
        "});\n"
        "});</script>"
    )


def write_html(path: Path, title: str, libraries: Iterable[Library], body: str, background: str) -> None:
    """Writes a page that holds all it needs, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    page = (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{html.escape(title)}</title></head>"
        f"<body style='margin:0;background:{background}'>{body}{''.join(map(packed_script, libraries))}</body></html>\n"
    )
    # half a pair of surrogates, which UTF-8 cannot say, becomes a question mark
    atomic_write(path, page.encode("utf-8", "replace"))


# --------------------------------------------------------------------------------------------------- once a notebook


@dataclass(frozen=True)
class _Execution:
    """One run of one cell."""

    cell: str
    count: int


_carried: dict[str, _Execution] = {}


def _shell() -> Any:
    """The notebook's shell; None outside a notebook."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell if getattr(shell, "kernel", None) is not None else None


def in_notebook() -> bool:
    """Whether displays go to a notebook."""
    return _shell() is not None


def _execution(shell: Any) -> _Execution:
    parent = shell.get_parent() if hasattr(shell, "get_parent") else {}
    cell = (parent.get("metadata") or {}).get("cellId") or (shell.user_ns.get("In") or [""])[-1]
    return _Execution(str(cell), int(shell.execution_count))


def scripts_to_carry(libraries: Iterable[Library]) -> str:
    """The libraries' scripts that a display must carry here and now.

    In a notebook that is the first display of each library, and again if that very cell is run again, whose new
    output replaces the one with the script. Everywhere else, and where every output is a page of its own, a display
    carries all it needs.
    """
    shell = _shell()
    scripts = []
    for library in libraries:
        if shell is not None and "google.colab" not in sys.modules:
            here = _execution(shell)
            first = _carried.get(library)
            if first is not None and (first.cell != here.cell or first.count == here.count):
                continue
            _carried[library] = here
        scripts.append(library_script(library))
    return "".join(scripts)


class Scripts:
    """Both libraries' scripts, as something to display."""

    def _repr_html_(self) -> str:
        _carried.clear()
        return (
            scripts_to_carry(("circuitsvis", "plotly"))
            + "<p style='font-size:12px'>The scripts of sa_lens's views are on this page.</p>"
        )


def load_scripts() -> Scripts:
    """The scripts of all views, to display in a cell of their own.

    Views need no such cell. It helps where the cell of the first view is to be cleared or deleted: displayed at the top
    of a notebook, it is what all later views rely on.
    """
    return Scripts()


# -------------------------------------------------------------------------------------------------------------- views


def style_of(dark: bool) -> str:
    """The style sheet of a look, for what stands inside an element of class `sa-lens`."""
    c = palette(dark)
    look = "sa-lens-dark" if dark else "sa-lens-light"
    return (
        f"<style>.{look}{{font:14px/1.5 {FONT};color:{c.text};background:{c.background};padding:14px 20px;"
        "max-width:1100px;overflow-x:auto}"
        f".{look} h3{{font-size:17px;margin:0 0 2px;color:{c.text}}}"
        f".{look} .sa-lens-box h3{{font-size:14px;color:inherit}}"
        f".{look} .note{{font-size:12px;color:{c.faint};margin:0 0 10px}}"
        f".{look} .sa-lens-missing{{border:1px dashed {c.faint};padding:10px;color:{c.faint}}}"
        f".{look} table{{border-collapse:collapse;font-size:13px;color:{c.text};font-variant-numeric:tabular-nums}}"
        f".{look} th{{text-align:left;color:{c.faint};font-weight:600;position:sticky;top:0;background:{c.background}}}"
        f".{look} th,.{look} td{{padding:3px 12px 3px 0;border-bottom:1px solid {c.grid};text-align:left;"
        "vertical-align:top}"
        # notebooks have styles of their own for the rows and cells of tables
        f".sa-lens.{look} table tbody tr:nth-child(n){{background:{c.background}}}"
        f".sa-lens.{look} table th,.sa-lens.{look} table td{{text-align:left;max-width:none;white-space:normal}}"
        f".sa-lens.{look} table .right{{text-align:right}}"
        f".{look} .scroll{{max-height:540px;overflow:auto}}"
        f".{look} bdi{{white-space:pre-wrap}}"
        "@media print{.sa-lens .scroll{max-height:none}}</style>"
    )


class View(ABC):
    """A picture of a record in HTML: shows itself in a notebook, and saves as one page that needs no network."""

    libraries: tuple[Library, ...] = ()
    """What draws it."""

    def __init__(self, record: Any, *, dark: bool = False) -> None:
        self.record = record
        self.dark = dark

    @abstractmethod
    def body(self) -> str:
        """What stands below the heading."""

    def fragment(self) -> str:
        """The picture as HTML without the libraries, which the page must hold."""
        note = getattr(self.record, "note", "")
        return (
            f"{style_of(self.dark)}<div class='sa-lens {'sa-lens-dark' if self.dark else 'sa-lens-light'}'>"
            f"<h3>{html.escape(self.record.title)}</h3>"
            + (f"<p class='note'>{html.escape(note)}</p>" if note else "")
            + f"{self.body()}</div>"
        )

    def html(self) -> str:
        """The picture as HTML with all it needs inside."""
        return "".join(map(library_script, self.libraries)) + self.fragment()

    def _repr_html_(self) -> str:
        return scripts_to_carry(self.libraries) + self.fragment()

    def save(self, path: str | Path) -> Path:
        """Writes one HTML file that needs no network.

        Raises:
            ValueError: another ending than .html.
        """
        path = Path(path)
        if path.suffix != ".html":
            raise ValueError(f"{path.name}: this view is saved as .html, an interactive page")
        write_html(path, self.record.title, self.libraries, self.fragment(), palette(self.dark).background)
        return path


@singledispatch
def view(record: Any, *, dark: bool = False) -> Any:
    """The picture of a record: a page of HTML for texts and tables, a plotly figure for all else.

    Either shows itself in a notebook and has `.save(path)`.

    Args:
        record: a record of `sa_lens.views.records`.
        dark: the dark look.

    Raises:
        TypeError: something that has no picture.
    """
    from sa_lens.views.drawing import draw

    return draw(record, dark=dark)
