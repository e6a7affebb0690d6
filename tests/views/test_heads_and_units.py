"""Records hold the patterns and values of both streams; their page needs no network."""

import re

import numpy as np
import pytest
import torch
from characters import TOKENS, caches

from sa_lens.views import attention, draw, save, unit_activations
from sa_lens.views.records import Attention, from_json, to_json
from sa_lens.views.theme import palette


def test_patterns_of_both_streams(model):
    tokens = torch.tensor([0, 5, 6, 7, 6])
    record = attention(model, tokens, 1)
    assert (record.heads, record.streams) == (("1.0", "1.1"), ("clean", "ablated"))
    assert record.tokens == ("0", "5", "6", "7", "6")
    _, clean = model.run_with_cache(tokens[None])
    with model.ablated():
        _, ablated = model.run_with_cache(tokens[None])
    expected = torch.stack([clean["pattern", 1][0], ablated["pattern", 1][0]], 1)
    np.testing.assert_allclose(np.array(record.patterns), expected, atol=1e-6)
    assert not np.allclose(record.patterns[0][0], record.patterns[0][1])
    plain = attention(model.to_hooked_transformer(), tokens, 1)
    assert plain.patterns == tuple(of_head[:1] for of_head in record.patterns)
    alone = attention(model, tokens[None], 1, stream="ablated")
    assert (alone.streams, alone.patterns) == (("ablated",), tuple(of_head[1:] for of_head in record.patterns))
    assert from_json(to_json(record)) == record


def test_heads_of_several_layers(model):
    cache = caches(model)
    every = attention(model, TOKENS)
    assert every.heads == ("0.0", "0.1", "1.0", "1.1")
    assert every == attention(model, TOKENS, [0, 1])
    chosen = attention(model, TOKENS, heads=["1.1", "0.0"])
    assert chosen.heads == ("1.1", "0.0")
    for (layer, head), of_head in zip(((1, 1), (0, 0)), chosen.patterns, strict=True):
        for stream, pattern in zip(chosen.streams, of_head, strict=True):
            np.testing.assert_allclose(pattern, cache[stream]["pattern", layer][0, head], atol=1e-6)
    with model.ablated(position=-1):
        _, at_the_end = model.run_with_cache(TOKENS[None])
    last = attention(model, TOKENS, heads=["1.1"], position=-1)
    np.testing.assert_allclose(last.patterns[0][1], at_the_end["pattern", 1][0, 1], atol=1e-6)
    assert "position -1 alone" in last.note


def test_the_page_reads_out_both_streams_and_their_difference(reader, browser, tmp_path):
    record = attention(reader, "abcde")
    opened = browser.open(save(record, tmp_path / "attention.html"), viewport={"width": 390, "height": 900})
    page = opened.page
    assert page.locator(".head-card").evaluate_all("cards => cards.map((card) => card.dataset.head)") == [*record.heads]
    assert page.locator(".large figcaption").all_inner_texts() == ["clean", "ablated", "difference"]
    moved = [np.abs(np.subtract(ablated, clean)).sum() / 2 / 6 for clean, ablated in record.patterns]
    head = int(np.argmax(moved))
    # the head that moves most is at large at first
    assert page.locator(".head-card[aria-pressed=true]").get_attribute("data-head") == record.heads[head]
    head = 0 if head else 1
    page.locator(f"[data-head='{record.heads[head]}']").click()
    difference = page.locator(".large canvas").nth(2)
    # the row of token 4, from the right end, where nothing is, leftward into the pattern
    width, query, key = difference.bounding_box()["width"], 4, 1
    for x in range(int(width) - 3, 0, -4):
        difference.hover(position={"x": x, "y": 0.6 * width}, force=True)
        text = page.locator(".readout").inner_text()
        if f"({key}):" in text:
            break
    clean, ablated = (record.patterns[head][i][query][key] for i in range(2))
    assert (
        f"Head {record.heads[head]}, “d” ({query}) looks at “a” ({key}): clean {clean:.3f}, ablated {ablated:.3f}"
        in text
    )
    assert float(text.split("difference ")[1]) == pytest.approx(ablated - clean, abs=1.1e-3)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert opened.clean()
    page.close()


def test_colours_of_the_difference(browser, tmp_path):
    """Less attention is blue, more is orange, and none the colour of zero."""
    clean, ablated = (
        ((1.0, 0.0, 0.0), (0.5, 0.5, 0.0), (0.2, 0.2, 0.6)),
        ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.2, 0.2, 0.6)),
    )
    record = Attention("t", "", ("a", "b", "c"), ("clean", "ablated"), ("0.0", "0.1"), ((clean, ablated),) * 2)
    opened = browser.open(save(record, tmp_path / "attention.html"))
    pixel = """canvas => [[0, 0], [0, 1], [1, 1], [2, 2], [2, 0]].map(([x, y]) =>
        [...canvas.getContext("2d").getImageData(x, y, 1, 1).data]
            .map((part) => part.toString(16).padStart(2, "0")).join(""))"""
    cards = opened.page.locator("[data-head='0.0'] canvas")
    light = palette()
    low, zero, high = (light.diverging[i] + "ff" for i in (0, 3, 6))
    assert ["#" + colour for colour in cards.nth(2).evaluate(pixel)] == [zero, low, high, zero, "#00000000"]
    assert "#" + cards.nth(0).evaluate(pixel)[0] == light.sequential[-1] + "ff"
    opened.page.close()


def test_page_needs_no_network(model, tmp_path):
    path = save(attention(model, torch.tensor([0, 5, 6]), 0), tmp_path / "attention.html")
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=", text)
    assert not re.search(r"import[^;]{0,80}https?://", text)
    assert text.count("data-sa-lens-library=") == 1
    with pytest.raises(ValueError, match=r"save it as \.html"):
        save(attention(model, torch.tensor([0]), 0), tmp_path / "attention.png")


@pytest.mark.parametrize("site", ["mlp", "attn"])
def test_unit_activations(model, plain_model, site):
    record = unit_activations(model, TOKENS, site=site, most=3)
    assert record.streams == ("clean", "ablated")
    found = caches(model)
    for layer in range(2):
        values = {s: (found[s]["post" if site == "mlp" else "z", layer])[0].flatten(1) for s in record.streams}
        largest = values["clean"].abs().amax(0).topk(3).indices
        shown = torch.tensor(record.values)[:, :, 3 * layer : 3 * layer + 3]
        torch.testing.assert_close(
            shown, torch.stack([values[s][:, largest] for s in record.streams], 1), rtol=1e-5, atol=1e-6
        )
        first = int(largest[0])
        assert record.units[3 * layer] == f"L{layer}.{site}.{first}"
    assert from_json(to_json(record)) == record
    assert draw(record).html().count("data-sa-lens-library=") == 1
    assert unit_activations(plain_model, TOKENS, site=site).streams == ("clean",)


def test_refusals(model):
    with pytest.raises(ValueError, match="layer 2 is not there"):
        attention(model, torch.tensor([0]), 2)
    with pytest.raises(ValueError, match=r"no head '2.0': the model's are 0.0 to 1.1"):
        attention(model, torch.tensor([0]), heads=["2.0"])
    with pytest.raises(ValueError, match="give one of them"):
        attention(model, torch.tensor([0]), 1, heads=["1.0"])
    with pytest.raises(ValueError, match="no head to show"):
        attention(model, torch.tensor([0]), [])
    with pytest.raises(ValueError, match="no tokenizer"):
        attention(model, "Once", 0)
    with pytest.raises(ValueError, match="not of 2"):
        attention(model, torch.zeros(2, 3, dtype=torch.long), 0)
    with pytest.raises(ValueError, match="site='head'"):
        unit_activations(model, TOKENS, site="head")
    with pytest.raises(ValueError, match="most=0"):
        unit_activations(model, TOKENS, most=0)
