"""Predictions and logit lenses agree with logits computed by hand."""

import copy
from dataclasses import replace

import pytest
import torch
from characters import EVIL, TOKENS, caches

from sa_lens.views import attention, draw, explore, logit_lens, predictions, save, story
from sa_lens.views.records import from_json, to_json


def log_probabilities(model, stream):
    with model.ablated() if stream == "ablated" else model.clean():
        return model(TOKENS[None])[0].log_softmax(-1)


def test_predictions_of_both_streams(model):
    record = predictions(model, TOKENS, top=3)
    assert [one.stream for one in record.streams] == ["clean", "ablated"]
    for one in record.streams:
        log_p = log_probabilities(model, one.stream)
        for t in range(len(TOKENS)):
            order = sorted(range(20), key=lambda token: -log_p[t, token])[:3]
            assert [guess.token for guess in one.top[t]] == list(map(str, order))
            assert [guess.log_probability for guess in one.top[t]] == pytest.approx(log_p[t, order].tolist(), rel=1e-5)
        actual = [float(log_p[t, TOKENS[t + 1]]) for t in range(len(TOKENS) - 1)]
        assert one.actual[:-1] == tuple(pytest.approx(value, rel=1e-5) for value in actual)
        assert one.actual[-1] is None
    assert from_json(to_json(record)) == record


def test_table_of_predictions(model, plain_model):
    record = predictions(model, TOKENS, top=3)
    text = draw(record).html()
    assert text.count("<tr>") == 1 + len(TOKENS)
    assert text.count("class='sa-lens-guess") == 2 * 3 * len(TOKENS)
    right = sum(guess.token == record.tokens[t + 1] for one in record.streams for t in range(6) for guess in one.top[t])
    assert text.count("sa-lens-right-guess'") == right
    assert "<script" not in text
    assert len(predictions(plain_model, TOKENS).streams) == 1
    with pytest.raises(ValueError, match="top=21"):
        predictions(model, TOKENS, top=21)
    with pytest.raises(ValueError, match="has none"):
        predictions(plain_model, TOKENS, stream="ablated")


@pytest.mark.parametrize("rows", [40, 41])
def test_a_table_shows_all_rows_or_says_that_more_follow(model, browser, tmp_path, rows):
    record = predictions(model, TOKENS, top=3)
    streams = [replace(one, top=(one.top * 6)[:rows], actual=(one.actual * 6)[:rows]) for one in record.streams]
    record = replace(record, tokens=(record.tokens * 6)[:rows], streams=tuple(streams))
    exploration = replace(explore(model, TOKENS).record, predictions=record)
    for shown in (record, exploration):
        opened = browser.open(save(shown, tmp_path / "page.html"), viewport={"width": 1280, "height": 900})
        box = opened.page.locator(".scroll:has(th:text('clean: expected'))")
        hidden = box.evaluate("box => box.scrollHeight > box.clientHeight + 1")
        line = opened.page.get_by_text("The table has 41 rows: scroll in it to see those that follow.")
        assert (hidden, line.count()) == ((False, 0) if rows == 40 else (True, 1))
        opened.page.close()


def test_an_empty_text_is_refused(reader):
    for view in (explore, story, predictions, logit_lens, attention):
        with pytest.raises(ValueError, match="the text is empty: give at least one character, or tokens"):
            view(reader, "")


def test_lens_is_the_end_of_the_model_at_each_layer(model):
    record = logit_lens(model, TOKENS)
    assert record.layers == ("embedding", "layer 0", "layer 1")
    cache = caches(model)
    for one in record.streams:
        names = ["blocks.0.hook_resid_pre", "blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
        for row, name in enumerate(names):
            logits = model.unembed(model.ln_final(cache[one.stream][name]))[0]
            log_p = logits.log_softmax(-1)
            assert one.top[row] == tuple(map(str, log_p.argmax(-1).tolist()))
            torch.testing.assert_close(torch.tensor(one.log_probability[row]), log_p.amax(-1), rtol=1e-5, atol=1e-5)
            actual = [float(log_p[t, TOKENS[t + 1]]) for t in range(6)]
            assert one.actual[row][:-1] == tuple(pytest.approx(value, abs=1e-5) for value in actual)
        torch.testing.assert_close(torch.tensor(one.log_probability[-1]), log_probabilities(model, one.stream).amax(-1))
    assert from_json(to_json(record)) == record


def test_figure_of_a_lens(reader):
    record = logit_lens(reader, EVIL)
    figure = draw(record)
    assert [trace.name for trace in figure.data] == ["clean", "ablated"]
    for trace, one in zip(figure.data, record.streams, strict=True):
        assert tuple(map(tuple, trace.z)) == one.log_probability
        assert all("<script>" not in cell for row in (*trace.text, *trace.customdata) for cell in row)
    assert "&lt;script&gt;" in figure.layout.xaxis.ticktext
    assert figure.layout.coloraxis.cmax == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_log_probabilities_of_a_narrow_model(model, dtype):
    narrow = copy.deepcopy(model).to(dtype)
    for found in predictions(narrow, TOKENS, top=2).streams:
        with torch.no_grad(), narrow.ablated() if found.stream == "ablated" else narrow.clean():
            log_p = narrow(TOKENS[None])[0].double().log_softmax(-1)
        for position, row in enumerate(found.top):
            expected = log_p[position].topk(2).values.tolist()
            assert [guess.log_probability for guess in row] == pytest.approx(expected, rel=1e-5)
