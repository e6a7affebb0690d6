"""Views ask no network for anything, and a notebook or page carries each script once."""

import json
import re
import shutil
import socket
import subprocess
import types
from html.parser import HTMLParser

import pytest
from characters import EVIL, TOKENS

from sa_lens.views import (
    attention,
    draw,
    gate_raster,
    html_page,
    load_scripts,
    predictions,
    save,
    show,
    story,
    unit_activations,
)
from sa_lens.views.html_page import component, escape_markup, json_for_script, library_script

CARRIED = "data-sa-lens-library='{}'"


class Elements(HTMLParser):
    """What a browser would make of a page: its elements, and the texts of its scripts."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.scripts = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.tags and self.tags[-1] == "script" and self.cdata_elem == "script":
            self.scripts[-1] += data


class Shell:
    """As much of a notebook's shell as a display sees."""

    kernel = object()

    def __init__(self):
        self.execution_count, self.cell, self.user_ns = 0, "", {"In": [""]}

    def run(self, cell, *shown, known=True):
        """The outputs of one run of a cell."""
        self.execution_count += 1
        self.cell = cell if known else None
        self.user_ns["In"].append(f"source of {cell}")
        return [one._repr_html_() for one in shown]

    def get_parent(self):
        return {"metadata": {"cellId": self.cell} if self.cell else {}}


@pytest.fixture
def shell(monkeypatch):
    found = Shell()
    monkeypatch.setattr(html_page, "_carried", {})
    monkeypatch.setitem(__import__("sys").modules, "IPython", types.SimpleNamespace(get_ipython=lambda: found))
    return found


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked for")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def carries(text, library="circuitsvis"):
    return text.count(CARRIED.format(library))


@pytest.mark.usefixtures("no_network")
def test_no_view_asks_the_network(model, shell):
    made = [
        *(attention(model, TOKENS, 0), story(model, TOKENS), predictions(model, TOKENS)),
        *(unit_activations(model, TOKENS), gate_raster(model, TOKENS)),
    ]
    shown = [text for record in made for text in shell.run("a", draw(record))]
    assert len(shown) == 5
    for text in shown:
        loads = [(name, value) for name, value in Elements(text).attributes if name in ("src", "href", "crossorigin")]
        assert not loads
        assert "import(" not in re.sub(r"<script data-sa-lens-library.*?</script>", "", text, flags=re.DOTALL)


@pytest.mark.parametrize("known", [True, False])
def test_a_notebook_carries_a_script_once(model, shell, known):
    shown, figure = draw(unit_activations(model, TOKENS)), draw(gate_raster(model, TOKENS))
    first = shell.run("one", shown, shown, figure, known=known)
    assert [carries(text) for text in first] == [1, 0, 0]
    assert [carries(text, "plotly") for text in first] == [0, 0, 1]
    later = shell.run("two", shown, figure, known=known) + shell.run("two", shown, known=known)
    assert [carries(text) + carries(text, "plotly") for text in later] == [0, 0, 0]
    assert all("sa-lens-view" in text for text in [*first, *later])
    # the new output takes the place of the one that carried the script
    again = shell.run("one", shown, shown, known=known)
    assert [carries(text) for text in again] == [1, 0]
    assert [carries(text) for text in shell.run("three", shown, known=known)] == [0]


def test_scripts_can_be_loaded_again(model, shell):
    shown = draw(unit_activations(model, TOKENS))
    shell.run("one", shown)
    (text,) = shell.run("two", load_scripts())
    assert [carries(text, library) for library in ("circuitsvis", "plotly", "sa_lens")] == [1, 1, 1]
    # from here on that cell is the one which carries
    assert carries(shell.run("one", shown)[0]) == 0
    assert carries(shell.run("two", load_scripts())[0]) == 1


def test_every_output_of_its_own_page_carries_its_script(model, shell, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "google.colab", types.ModuleType("google.colab"))
    shown = draw(unit_activations(model, TOKENS))
    assert [carries(text) for text in shell.run("one", shown, shown)] == [1, 1]


def test_outside_a_notebook_a_display_has_all_it_needs(model):
    shown = draw(unit_activations(model, TOKENS))
    assert [carries(shown._repr_html_()) for _ in range(2)] == [1, 1]
    assert carries(shown.html()) == 1


def test_figures_show_themselves(model, shell, monkeypatch):
    figure = draw(gate_raster(model, TOKENS))
    shell.run("one")
    bundle = figure._repr_mimebundle_()
    assert set(bundle) == {"application/vnd.plotly.v1+json", "text/html"}
    assert bundle["application/vnd.plotly.v1+json"]["data"][0]["type"] == "heatmap"
    data = json.loads(Elements(figure.fragment()).scripts[0])
    assert data["layout"]["title"]["text"] == figure.layout.title.text
    assert "mathjax" not in figure.fragment().lower()
    displayed = []
    display_module = types.SimpleNamespace(display=lambda bundle, raw: displayed.append(bundle))
    monkeypatch.setitem(__import__("sys").modules, "IPython.display", display_module)
    figure.show()
    show(gate_raster(model, TOKENS))
    figure._ipython_display_()
    assert [set(one) for one in displayed] == [set(bundle)] * 3, "by show() as well, HTML is there for saved notebooks"
    show(story(model, TOKENS), dark=True)
    assert set(displayed[-1]) == {"text/html"}


def test_saved_page(model, tmp_path):
    path = save(attention(model, TOKENS, 0), tmp_path / "a.html", dark=True)
    text = path.read_text(encoding="utf-8")
    assert carries(text, "sa_lens") == 1
    assert "Attention of layer 0" in text
    with pytest.raises(ValueError, match=r"not a figure: save it as \.html"):
        save(attention(model, TOKENS, 0), tmp_path / "a.png")
    # plotly, compressed
    assert 1e6 < save(gate_raster(model, TOKENS), tmp_path / "b.html").stat().st_size < 2.2e6


def test_markup_in_data_stays_data(reader):
    elements = Elements(draw(attention(reader, EVIL, 0)).fragment())
    assert elements.tags.count("script") == 2
    assert "<script>" in json.loads(elements.scripts[0])["tokens"][1], "our own script makes a text of it"
    record = unit_activations(reader, EVIL)
    elements = Elements(draw(record).fragment())
    assert elements.tags.count("script") == 2, "the data and the loader"
    tokens = json.loads(elements.scripts[0])["tokens"]
    assert [token.replace("\u2060", "") for token in tokens] == list(record.tokens)
    # circuitsvis puts tokens into the page as HTML
    for token in tokens:
        assert not Elements(token).tags
    assert escape_markup("<script>&lt;") == "<\u2060script>&\u2060lt;"
    text = component("plotly", "", {"a": "</script><script>alert(1)</script>"})
    assert Elements(text).tags.count("script") == 2
    assert "<script>" not in json_for_script(["<script>"])


def test_library_scripts_are_whole():
    for library in ("circuitsvis", "plotly", "sa_lens"):
        text = library_script(library)
        assert text.count("</script>") == 1
        assert text.endswith("</script>")
        assert "sourceMappingURL=" not in text.splitlines()[-4]


@pytest.mark.slow
def test_a_browser_draws_what_comes_before_and_after_the_script(reader, shell, tmp_path):
    """A page of outputs: pictures before and after the scripts, and one whose script never comes."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs Chromium")
    shown, figure = draw(unit_activations(reader, EVIL)), draw(gate_raster(reader, EVIL))
    outputs = shell.run("one", shown, figure)
    later = shell.run("two", shown, figure, draw(story(reader, EVIL)), draw(predictions(reader, EVIL)))
    cleared = component("circuitsvis", "TextNeuronActivations", {}).replace("circuitsvis", "gone")
    page_text = "<!doctype html><meta charset='utf-8'><body>" + "".join([*later, *outputs, cleared])
    (tmp_path / "page.html").write_text(page_text, encoding="utf-8")
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND"]
    done = subprocess.run(
        [
            *(browser, *flags, f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=8000", "--dump-dom"),
            (tmp_path / "page.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    dom = re.sub(r"<script.*?</script>", "", done.stdout, flags=re.DOTALL)
    assert dom.count("data-drawn") == 4
    assert dom.count('class="main-svg"') >= 2, "plotly drew twice"
    assert dom.count("Unit:") == 2, "circuitsvis drew twice"
    assert dom.count("This picture needs a script") == 1
    assert "could not be drawn" not in dom
    assert "alert" not in dom
