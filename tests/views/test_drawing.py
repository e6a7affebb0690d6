"""Saved figures need no network, and a missing browser is named."""

import re
import struct
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import url2pathname

import pytest

from sa_lens.views import draw, save, show
from sa_lens.views.records import Axis, Bars, HeatMap, Table

RECORD = Bars("units", "", ("a", "b"), (1.0, -2.0), "share")


def test_html_holds_everything_once(tmp_path):
    path = save(RECORD, tmp_path / "deep" / "figure.html")
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=", text), "loads something from elsewhere"
    # plotly's own script is several megabytes, compressed here
    assert 1e6 < len(text) < 2.2e6
    assert all(word in text for word in ("units", "share"))


def test_a_saved_figure_is_drawn_without_a_network(tmp_path, browser):
    opened = browser.open(save(RECORD, tmp_path / "figure.html"))
    opened.page.locator(".main-svg").first.wait_for(state="attached")
    assert "share" in opened.page.locator(".sa-lens-box").inner_text()
    assert opened.clean()
    opened.page.close()


@pytest.mark.slow
def test_png_has_the_size_of_the_figure(tmp_path):
    pytest.importorskip("kaleido", reason="images need kaleido")
    path = tmp_path / "figure.png"
    # in a process of its own, since a browser on a busy machine may take minutes to start
    program = (
        "from sa_lens.views import save; from sa_lens.views.records import Bars; "
        f"save(Bars('units', '', ('a', 'b'), (1.0, -2.0), 'share'), {str(path)!r}, scale=1)"
    )
    try:
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        pytest.skip("the browser did not answer within a minute")
    if "found no Chrome" in done.stderr:
        pytest.skip("images need Chrome or Chromium")
    assert done.returncode == 0, done.stderr
    figure = draw(RECORD)
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", content[16:24]) == (figure.layout.width, figure.layout.height)


def test_missing_browser_and_unknown_format(tmp_path, monkeypatch):
    pytest.importorskip("kaleido", reason="images need kaleido")
    figure = draw(RECORD)

    def fails(*args, **kwargs):
        raise RuntimeError("Kaleido requires Google Chrome to be installed.")

    monkeypatch.setattr(type(figure), "write_image", fails)
    with pytest.raises(RuntimeError, match=r"figure\.png: kaleido found no Chrome or Chromium.*\.html"):
        save(figure, tmp_path / "figure.png")
    with pytest.raises(ValueError, match=r"saved as \.html, \.png"):
        save(figure, tmp_path / "figure.gif")


def test_missing_kaleido(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "kaleido", None)
    with pytest.raises(RuntimeError, match=r"pip install 'sa-lens\[png\]'"):
        save(draw(RECORD), tmp_path / "figure.png")


def test_show_opens_a_browser_outside_notebooks(monkeypatch):
    table = Table("Skill", "", ("stream",), (("clean",),), (False,))
    addresses = []
    monkeypatch.setattr("webbrowser.open", lambda address: addresses.append(address) or len(addresses) == 1)
    assert show(table) is None
    assert "Skill" in Path(url2pathname(urlparse(addresses[0]).path)).read_text(encoding="utf-8")
    with pytest.raises(RuntimeError, match="no browser opens here"):
        show(table)


def test_save_takes_what_show_takes(tmp_path):
    figure = draw(RECORD)
    assert save(figure, tmp_path / "figure.html").read_bytes() == save(RECORD, tmp_path / "figure.html").read_bytes()
    with pytest.raises(ValueError, match=r"saved as \.html, \.png"):
        save(figure, tmp_path / "figure.json")


def test_a_list_is_one_page_with_each_script_once(tmp_path):
    heat_map = HeatMap("Where?", "", Axis("x", ("a",)), Axis("y", ("0",)), ((1.0,),), "share")
    bars = Bars("Which?", "", ("L0.mlp.1",), (2.0,), "change")
    page = save([heat_map, draw(bars), Table("What?", "", ("n",), (("1",),), (True,))], tmp_path / "all.html")
    text = page.read_text(encoding="utf-8")
    assert text.index("Where?") < text.index("Which?") < text.index("What?")
    assert text.count("data-sa-lens-library='plotly'") == 1
    assert "background:#fff" not in draw([heat_map], dark=True).fragment()
    with pytest.raises(ValueError, match="the list is empty"):
        draw([])
