"""A report as one HTML file that opens from disk, needs no server and asks the network for nothing.

The page is a short skeleton, a style sheet, a script and packs. A pack is a part of the report, or plotly's script, as
compressed JSON or text in base64; the script unpacks one when it is first wanted, so that the page is ready long before
all of it has been read. Data reach the page as text nodes only, and its security policy allows no other script and no
connection.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from string import Template

from sa_lens import views
from sa_lens.data.whole_files import atomic_write
from sa_lens.places import output_file
from sa_lens.report.contents import Report
from sa_lens.report.packing import pack
from sa_lens.views import records
from sa_lens.views.html_page import SHARED, assets, compress, wrap_library
from sa_lens.views.theme import DARK, FONT, LIGHT, css_variables

_ASSETS = resources.files("sa_lens.report") / "assets"
_SCRIPTS = ("base", "colours", "charts", "texts", "overview", "stories", "circuits", "units", "sections")
"""Parts of the page's script, in order, after those that it shares with single views."""


def read(path: str | Path) -> Report:
    """Reads a report from a JSON file that `save` wrote.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a report.
    """
    return records.read(path, [Report])


def save(report: Report, path: str | Path) -> Path:
    """Saves a report as one HTML file, or as JSON that `read` reads; the same report gives the same bytes.

    Args:
        path: the file, ending in .html or .json; its folder is made if need be. It is written whole or not at all.

    Returns:
        The path.

    Raises:
        ValueError: another ending, or a page of a report without models or with two of the same name.
        IsADirectoryError: the path is a folder.
    """
    path = output_file(path)
    if path.suffix == ".json":
        return views.save(report, path)
    if path.suffix != ".html":
        raise ValueError(f"{path.name}: a report is one page, give a name that ends in .html (or .json)")
    names = [model.name for model in report.models]
    if not names:
        raise ValueError("the report has no models: there is nothing to show")
    if len(set(names)) < len(names):
        raise ValueError(f"models are picked by name, and {names} are not all different")
    content = _page(report)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, content)
    return path


def _page(report: Report) -> bytes:
    script = _script()
    packs = {name: json.dumps(part, separators=(",", ":"), allow_nan=False) for name, part in pack(report).items()}
    packs["palettes"] = json.dumps({"light": asdict(LIGHT), "dark": asdict(DARK), "font": FONT})
    # plotly's bundle of lines, bars and pies: a quarter of the whole
    plotly = gzip.decompress((_ASSETS / "plotly-basic.min.js.gz").read_bytes()).decode()
    packs["plotly"] = wrap_library("plotly", plotly, "window.Plotly")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = Template(_asset("report.html")).substitute(
        policy=(
            f"default-src 'none'; script-src 'sha256-{digest}' blob:; style-src 'unsafe-inline'; img-src data:; "
            "base-uri 'none'; form-action 'none'"
        ),
        title=html.escape(report.title),
        version=html.escape(report.version),
        style=_style(),
        packs="\n".join(
            f'<script type="text/plain" id="pack-{name}">{compress(text)}</script>' for name, text in packs.items()
        ),
        script=script,
    )
    # half a pair of surrogates, which UTF-8 cannot say, becomes a question mark
    return page.encode("utf-8", "replace")


def _asset(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")


def _script() -> str:
    parts = "\n".join([assets(*SHARED), *(_asset(f"{name}.js") for name in _SCRIPTS)])
    return f'(() => {{\n"use strict";\n{parts}\n}})();'


def _style() -> str:
    light, dark = css_variables(LIGHT), css_variables(DARK)
    return (
        f":root{{{light}color-scheme:light;--font:{FONT}}}\n"
        f"@media (prefers-color-scheme:dark){{:root:not([data-theme=light]){{{dark}color-scheme:dark}}}}\n"
        f":root[data-theme=dark]{{{dark}color-scheme:dark}}\n" + assets("circuit.css") + _asset("report.css")
    )
