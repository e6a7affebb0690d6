"""Pictures in HTML: what a library's script draws, and how each script is carried once per notebook or page.

A picture is a piece of HTML with its data, something to read without any script, and a few lines that draw it as soon
as the page holds the library, whichever comes first. The library itself travels with the first picture that a notebook
shows, and once in a saved page. Nothing is ever fetched from a server.
"""

from __future__ import annotations

import base64
import gzip
import html
import json
import sys
import tempfile
import webbrowser
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

from sa_lens.data.whole_files import atomic_write
from sa_lens.places import output_file
from sa_lens.views.records import Titled
from sa_lens.views.theme import FONT, css_variables, palette

Library = Literal["circuitsvis", "plotly", "sa_lens"]

_ASSETS = resources.files("sa_lens.views") / "assets"
SHARED = ("elements.js", "graph.js", "circuit_view.js")
"""Parts of our own script that the report has as well, in order."""
_COMPONENTS = {"circuitPanels": "circuit.css", "attentionHeads": "attention.css"}
"""What our own script draws, each with its style sheet."""

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


def json_for_script(value: object) -> str:
    """Returns JSON that may stand inside a script element, whatever texts it holds."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def component(library: Library, name: str, props: Mapping[str, Any], *, style: str = "") -> str:
    """Returns the HTML of something that a library draws.

    Args:
        library: which; its script must be on the page, before or after this.
        name: what to draw; unused for plotly.
        props: what it is drawn from.
        style: CSS of the box that is drawn into.
    """
    missing = f"<p class='sa-lens-missing'>{html.escape(MISSING)}</p>"
    own = f"<style>{assets(_COMPONENTS[name])}</style>" if library == "sa_lens" else ""
    return (
        f"{own}<div class='sa-lens-view' data-library='{library}' data-component='{html.escape(name)}'>"
        f"<script type='application/json'>{json_for_script(props)}</script>"
        f"<div class='sa-lens-box' style='{html.escape(style)}'>{missing}</div></div>{_LOADER}"
    )


def escape_markup(text: str) -> str:
    """Returns text that looks the same and holds no markup, for libraries that take text for HTML.

    An invisible word joiner after `<` and `&` keeps both from beginning a tag or an entity.
    """
    return text.replace("<", "<\u2060").replace("&", "&\u2060")


def compress(text: str) -> str:
    """Compresses text into letters that HTML leaves alone; the same text gives the same letters."""
    return base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode()


def assets(*names: str) -> str:
    """Returns files of scripts or style sheets of our own, one after another."""
    return "\n".join((_ASSETS / name).read_text(encoding="utf-8") for name in names)


@cache
def library_source(library: Library) -> str:
    """Returns a library's script, which registers it under a name of ours and out of the way of module loaders."""
    if library == "plotly":
        from plotly.offline import get_plotlyjs

        return wrap_library(library, get_plotlyjs(), "window.Plotly")
    if library == "sa_lens":
        render = "(id, make, props) => document.getElementById(id).append(make(props))"
        source = assets(*SHARED, "circuit_panels.js", "attention.js")
        return wrap_library(library, source, f"{{render: {render}, {', '.join(_COMPONENTS)}}}")
    import circuitsvis

    path = Path(circuitsvis.__file__).parent / "dist" / "cdn" / "iife.js"
    return wrap_library(library, path.read_text(encoding="utf-8"), "CircuitsVis")


def wrap_library(library: Library, source: str, name: str) -> str:
    """Returns a library's script as `library_source` gives it.

    Args:
        name: of the library in its own script.
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
        f"page.libraries.{library} = {name};\n"
        "if (page.draw) page.draw();\n"
        "})();"
    )


@cache
def library_script(library: Library) -> str:
    """Returns the script element of a library, for notebooks."""
    return f"<script data-sa-lens-library='{library}'>{library_source(library)}</script>"


@cache
def compressed_script(library: Library) -> str:
    """Returns the same at less than half the size, for files: the browser unpacks it."""
    return (
        f"<script data-sa-lens-library='{library}'>(async function () {{\n"
        f"var letters = atob('{compress(library_source(library))}');\n"
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


# --------------------------------------------------------------------------------------------------- once a notebook


@dataclass(frozen=True)
class _Execution:
    """One run of one cell."""

    cell: str
    count: int


_carried: dict[str, _Execution] = {}


def notebook_shell() -> Any:
    """Returns the notebook's shell; None outside a notebook."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell if getattr(shell, "kernel", None) is not None else None


def _execution(shell: Any) -> _Execution:
    parent = shell.get_parent() if hasattr(shell, "get_parent") else {}
    cell = (parent.get("metadata") or {}).get("cellId") or (shell.user_ns.get("In") or [""])[-1]
    return _Execution(str(cell), int(shell.execution_count))


def scripts_to_carry(libraries: Iterable[Library]) -> str:
    """Returns the libraries' scripts that a display must carry here and now.

    In a notebook that is the first display of each library, and again if that very cell is run again, whose new
    output replaces the one with the script. Everywhere else, and where every output is a page of its own, a display
    carries all it needs.
    """
    shell = notebook_shell()
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


# ------------------------------------------------------------------------------------------------------------ pictures


class Picture(ABC):
    """Something drawn: the last line of a notebook's cell shows it, and so does `show`; `save` writes it to a file."""

    libraries: tuple[Library, ...] = ()
    """Scripts that draw it."""

    @abstractmethod
    def fragment(self) -> str:
        """Returns the picture as HTML without the libraries, which the page must hold."""

    def html(self) -> str:
        """Returns the picture as HTML with all it needs inside."""
        return "".join(map(library_script, self.libraries)) + self.fragment()

    def _repr_html_(self) -> str:
        return scripts_to_carry(self.libraries) + self.fragment()

    def _repr_mimebundle_(self, *_: Any, **__: Any) -> dict[str, Any]:
        return {"text/html": self._repr_html_()}

    def show(self) -> None:
        """Shows the picture: in the notebook, or else in a browser."""
        if not self._display():
            path = Path(tempfile.mkdtemp(prefix="sa_lens-")) / "picture.html"
            if not webbrowser.open(self.save(path).as_uri()):
                raise RuntimeError(f"no browser opens here; the picture is in {path}")

    def _display(self) -> bool:
        """Displays the picture if this is a notebook; returns whether it did."""
        if notebook_shell() is None:
            return False
        from IPython.display import display

        display(self._repr_mimebundle_(), raw=True)
        return True

    def save(self, path: str | Path) -> Path:
        """Writes one HTML file that needs no network.

        Raises:
            ValueError: another ending than .html.
        """
        path = output_file(path)
        if path.suffix != ".html":
            raise ValueError(f"{path.name}: this view is an HTML page, not a figure: save it as .html")
        self._write(path, path.stem, "white")
        return path

    def _write(self, path: Path, title: str, background: str) -> None:
        page = (
            "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
            "<meta name='viewport' content='width=device-width, initial-scale=1'>"
            f"<title>{html.escape(title)}</title></head><body style='margin:0;background:{background}'>"
            f"{self.fragment()}{''.join(map(compressed_script, self.libraries))}</body></html>\n"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        # half a pair of surrogates, which UTF-8 cannot say, becomes a question mark
        atomic_write(path, page.encode("utf-8", "replace"))


class Column(Picture):
    """Pictures below one another on one page; each scrolls by itself where it is wider than the page.

    Args:
        pictures: from top to bottom.
        title: of the page in the browser.
    """

    def __init__(self, pictures: Sequence[Picture], title: str = "", *, dark: bool = False) -> None:
        self.pictures, self.title, self.dark = pictures, title, dark
        self.libraries = tuple(dict.fromkeys(library for picture in pictures for library in picture.libraries))

    def fragment(self) -> str:
        return "".join(f"<div style='overflow-x:auto'>{picture.fragment()}</div>" for picture in self.pictures)

    def _write(self, path: Path, title: str, background: str) -> None:
        super()._write(path, self.title or title, palette(self.dark).background)


class _Scripts(Picture):
    """All libraries' scripts."""

    libraries = get_args(Library)

    def fragment(self) -> str:
        return "<p style='font-size:12px'>The scripts of sa_lens's views are on this page.</p>"

    def _repr_html_(self) -> str:
        _carried.clear()
        return super()._repr_html_()


def load_scripts() -> Picture:
    """Puts the scripts of all views into a cell of their own.

    Views need no such cell. It helps if the cell of the first view is to be cleared or deleted: at the top of a
    notebook, it is what all later views rely on.
    """
    return _Scripts()


class Page(Picture):
    """A picture in HTML: heading, note, and a body.

    Args:
        record: whose title and note stand above the body.
        body: gives the HTML below them.
        libraries: scripts that the body needs.
    """

    def __init__(
        self, record: Titled, body: Callable[[], str], *, dark: bool = False, libraries: tuple[Library, ...] = ()
    ) -> None:
        self.record, self.body, self.dark, self.libraries = record, body, dark, libraries

    def fragment(self) -> str:
        warnings = [
            f"<p class='warning'>Warning: {html.escape(warning)}</p>"
            for warning in getattr(self.record, "warnings", ())
        ]
        note = f"<p class='note'>{html.escape(self.record.note)}</p>" if self.record.note else ""
        return (
            f"{_style(self.dark)}<div class='sa-lens {'sa-lens-dark' if self.dark else 'sa-lens-light'}'>"
            f"<h3>{html.escape(self.record.title)}</h3>{''.join(warnings)}{note}{self.body()}</div>"
        )

    def _write(self, path: Path, title: str, background: str) -> None:
        super()._write(path, self.record.title, palette(self.dark).background)


def _style(dark: bool) -> str:
    """The style sheet of a look, for what stands inside an element of class `sa-lens`."""
    c = palette(dark)
    look = "sa-lens-dark" if dark else "sa-lens-light"
    return (
        f"<style>.{look}{{{css_variables(c)}font:14px/1.5 {FONT};color:{c.text};background:{c.background};"
        "padding:14px 20px;max-width:1100px;overflow-x:auto}"
        f".{look} h3{{font-size:17px;margin:0 0 2px;color:{c.text}}}"
        f".{look} .sa-lens-box h3{{font-size:14px;color:inherit}}"
        f".{look} .note{{font-size:12px;color:{c.faint};margin:0 0 10px}}"
        f".{look} .warning{{font-size:13px;color:{c.warning};border-left:3px solid;padding-left:8px;margin:4px 0 6px}}"
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
