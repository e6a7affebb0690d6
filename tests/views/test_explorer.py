"""The page of a prompt holds its views' records, opens offline, and follows the prompt in a notebook."""

import sys
import types

import pytest
import traitlets
from characters import EVIL, TOKENS

from sa_lens.views import (
    attention,
    draw,
    explore,
    gate_raster,
    html_page,
    predictions,
    read,
    save,
    show,
    story,
)
from sa_lens.views.records import from_json, to_json


def test_record_is_that_of_its_views(reader, plain_model):
    record = explore(reader, EVIL, units=["L1.mlp.7"], top=3, heads=["1.1", "0.0"]).record
    assert record.story == story(reader, EVIL, ["L1.mlp.7"])
    assert record.predictions == predictions(reader, EVIL, top=3)
    assert record.attention == attention(reader, EVIL, heads=["1.1", "0.0"])
    assert record.gates == gate_raster(reader, EVIL)
    assert record.tokens == record.story.tokens
    assert from_json(to_json(record)) == record
    plain = explore(plain_model, TOKENS, layer=1, units=["L0.attn.5"]).record
    assert plain.gates is None
    assert plain.story == story(plain_model, TOKENS, ["L0.attn.5"])
    assert plain.attention == attention(plain_model, TOKENS, 1)
    assert "clean stream" in plain.title


def test_each_stream_reads_a_prompt_once(model, monkeypatch):
    passes = []
    run = type(model).run_with_hooks
    monkeypatch.setattr(type(model), "run_with_hooks", lambda *args, **kwargs: passes.append(1) or run(*args, **kwargs))
    explore(model, TOKENS)
    assert len(passes) == 2


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_saved_page(reader, browser, tmp_path, width, dark):
    explorer = explore(reader, EVIL, dark=dark)
    opened = browser.open(save(explorer, tmp_path / "prompt.html"), viewport={"width": width, "height": 900})
    page = opened.page
    page.locator(".main-svg").first.wait_for(state="attached")
    headings = page.locator("h3").all_inner_texts()
    assert headings == [
        "A prompt in the clean and ablated streams",
        *(explorer.record.story.title, explorer.record.predictions.title),
        *(explorer.record.attention.title, explorer.record.gates.title),
    ]
    assert page.locator(".sa-lens-story bdi").all_text_contents()[1:3] == ["<script>", "a"]
    assert page.locator(".head-card").count() == 4
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    plot = page.locator(".js-plotly-plot").bounding_box()
    assert plot["x"] + plot["width"] <= width
    assert opened.clean()
    page.close()
    assert read(save(explorer, tmp_path / "prompt.json")) == explorer.record


class Handle:
    """A display that can be updated."""

    def __init__(self, bundle):
        self.texts = [bundle["text/html"]]

    def update(self, bundle, raw):
        assert raw
        self.texts.append(bundle["text/html"])


class Text(traitlets.HasTraits):
    """As much of ipywidgets' field as the explorer uses."""

    value = traitlets.Unicode()
    description = traitlets.Unicode()
    continuous_update = traitlets.Bool()
    layout = traitlets.Dict()


class Label(Text):
    """A text to read."""


@pytest.fixture
def notebook(monkeypatch):
    """What a notebook displays, in order: fields, and pages as handles."""
    displayed = []
    shell = types.SimpleNamespace(kernel=object(), execution_count=1, user_ns={"In": [""]})

    def display(shown, raw=False, display_id=None):
        displayed.append(Handle(shown) if raw else shown)
        return displayed[-1] if display_id else None

    monkeypatch.setattr(html_page, "_carried", {})
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setitem(sys.modules, "IPython.display", types.SimpleNamespace(display=display))
    return displayed


def check_typing(explorer, box, page, reader):
    """A prompt in the field takes the place of the one shown, and a prompt that cannot be read leaves it."""
    box.value = "abc"
    assert explorer.prompt == "abc"
    assert explorer.record == explore(reader, "abc").record
    assert len(page.texts) == 2
    assert draw(explorer.record.predictions).fragment() in page.texts[1]
    box.value = "abc" * 9
    assert "this model reads from 1 to n_ctx=16 of them" in explorer._message.value
    assert (explorer.prompt, len(page.texts)) == ("abc", 2)
    box.value = "abcd"
    assert explorer._message.value == ""
    assert (explorer.prompt, len(page.texts)) == ("abcd", 3)
    explorer.prompt = "ab"
    assert (box.value, explorer.record, len(page.texts)) == ("ab", explore(reader, "ab").record, 4)


def test_typing_another_prompt(reader, notebook, monkeypatch):
    boxes = types.SimpleNamespace(
        Text=Text, Label=Label, VBox=lambda children: types.SimpleNamespace(children=children)
    )
    monkeypatch.setitem(sys.modules, "ipywidgets", boxes)
    explorer = explore(reader, "ab")
    show(explorer)
    group, page = notebook
    box, message = group.children
    assert (box.value, message.value, box.continuous_update) == ("ab", "", False)
    # the page keeps the scripts that it brought, also when it changes
    check_typing(explorer, box, page, reader)
    assert all(text.count("data-sa-lens-library=") == 2 for text in page.texts)


@pytest.fixture
def fields():
    """Before the stand-in for IPython, which it needs as it is."""
    return pytest.importorskip("ipywidgets", reason="not in the tests' environment, where it would draw progress bars")


def test_typing_into_ipywidgets(fields, reader, notebook):
    explorer = explore(reader, "ab")
    explorer._ipython_display_()
    group, page = notebook
    assert isinstance(group, fields.VBox)
    check_typing(explorer, group.children[0], page, reader)


def test_without_ipywidgets(reader, notebook, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    explorer = explore(reader, "ab")
    show(explorer)
    assert "pip install 'sa-lens[notebook]'" in capsys.readouterr().out
    (page,) = notebook
    with pytest.raises(ValueError, match="this model reads from 1 to n_ctx=16"):
        explorer.prompt = "abc" * 9
    assert (explorer.prompt, len(page.texts)) == ("ab", 1)
    explorer.prompt = "abc"
    assert len(page.texts) == 2
    # shown in a second cell, both change
    show(explorer)
    explorer.prompt = TOKENS
    assert [len(one.texts) for one in notebook] == [3, 2]


def test_refusals(model):
    with pytest.raises(ValueError, match="top=21"):
        explore(model, TOKENS, top=21)
    with pytest.raises(ValueError, match="no unit"):
        explore(model, TOKENS, units=["L7.mlp.0"])
    with pytest.raises(ValueError, match=r"no head '9.9'"):
        explore(model, TOKENS, heads=["9.9"])
    with pytest.raises(ValueError, match="no tokenizer"):
        explore(model, "Once")
