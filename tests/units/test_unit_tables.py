"""Planted units are described as they were planted; every figure agrees with the whole array at once."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

import sa_lens as sa
from sa_lens.core import norms_and_activations
from sa_lens.core.unit import Sublayer, unit_counts
from sa_lens.statistics import gini, hoyer
from sa_lens.units import unit_tables
from sa_lens.units.activations import TOKENS_AT_ONCE
from sa_lens.units.firing import calibrate
from sa_lens.units.labels import label_stories
from sa_lens.units.unit_tables import CoActivation, Moments, TokenClasses, TokenTally, specialization, word_classes

CLASSES = TokenClasses(("low", "planted", "high"), torch.tensor([0] * 3 + [1] * 5 + [2] * 16))


def unit_row(record, unit, site="mlp", stream="clean", layer=0):
    table = record.table
    found = table[(table.stream == stream) & (table.site == site) & (table.unit == unit) & (table.layer == layer)]
    assert len(found) == 1
    return found.iloc[0]


@pytest.fixture(scope="module")
def described(planted, even_text):
    return specialization(planted, even_text, even_text, classes=CLASSES, progress=False)


def test_a_neuron_wired_to_a_token_class(described, even_text):
    row = unit_row(described, 0)
    assert row.live
    assert row.firing_rate == pytest.approx(float(((even_text >= 3) & (even_text <= 6)).float().mean()))
    assert row.effective_tokens == pytest.approx(4, abs=0.1)
    assert row.effective_classes == pytest.approx(1)
    assert 3 <= row.top_token <= 6
    assert row.effective_positions > 14
    assert row.partner_jaccard < 0.5


def test_a_pair_that_fires_together(described):
    first, second = unit_row(described, 1), unit_row(described, 2)
    assert (first.partner, first.partner_jaccard) == ("L0.mlp.2", 1.0)
    assert (second.partner, second.partner_jaccard) == ("L0.mlp.1", 1.0)
    assert first.effective_tokens == pytest.approx(1)
    assert first.top_token == 7
    assert first.top_token_share == 1
    assert described.coactivation(0).loc["L0.mlp.1", "L0.mlp.2"] == 1


def test_another_share_of_the_percentile(gated, text, calibration):
    usual = specialization(gated, text, calibration, progress=False).table
    rules = calibrate(gated, calibration, ("clean", "ablated"), share=0.3, progress=False)
    low = specialization(gated, text, rules, progress=False).table
    assert low.firing_rate.equals(usual["firing_rate_0.3"])
    assert (low.effective_tokens > usual.effective_tokens).any()
    assert low.attrs["share"] == 0.3


def test_a_dead_neuron(described):
    row = unit_row(described, 3)
    assert not row.live
    assert row.firing_rate == row["firing_rate_0.3"] == 0
    assert row.threshold == np.inf
    assert np.isnan([row.effective_tokens, row.effective_classes, row.mean_position, row["kurtosis"], row.gini]).all()
    assert row.top_token == -1
    assert row.partner is None or row.partner_jaccard == 0


def test_a_neuron_that_always_fires_and_one_of_late_positions(described, even_text):
    always, late = unit_row(described, 4), unit_row(described, 5)
    assert always.firing_rate == 1
    assert always.effective_tokens == pytest.approx(described.table.attrs["effective_tokens_of_text"], rel=1e-4)
    assert always.mean_position == pytest.approx(0.5)
    assert always.effective_positions == pytest.approx(16)
    assert late.firing_rate == 0.5
    assert late.mean_position == pytest.approx(0.75)
    assert late.effective_positions == pytest.approx(8)


def test_every_figure_agrees_with_the_whole_array(gated, text, calibration):
    rules = calibrate(gated, calibration, ("clean", "ablated"), progress=False)
    record = specialization(gated, text, rules, classes=CLASSES, progress=False)
    tokens = text.flatten().numpy()
    places = np.tile(np.arange(16), len(text))
    with torch.no_grad():
        caches = {"clean": gated.run_with_cache(text)[1]}
        with gated.ablated():
            caches["ablated"] = gated.run_with_cache(text)[1]
    for stream, cache in caches.items():
        for sublayer in unit_counts(gated):
            x = cache[sublayer.value_hook].flatten(2).flatten(0, 1)
            some = record.table.query("stream == @stream and layer == @sublayer.layer and site == @sublayer.site")
            fired = rules[stream].fires(sublayer, x).numpy()
            for share in (0.3, 0.7):
                np.testing.assert_allclose(
                    some[f"firing_rate_{share}"],
                    dataclasses.replace(rules[stream], share=share).fires(sublayer, x).double().mean(0),
                )
            if stream == "ablated":
                np.testing.assert_allclose(some.mask_rate, cache[sublayer.mask_hook].flatten(2).double().mean((0, 1)))
            else:
                assert some.mask_rate.isna().all()
            np.testing.assert_allclose(some.firing_rate, fired.mean(0))
            np.testing.assert_allclose(some.hoyer, hoyer(x), rtol=1e-4)
            np.testing.assert_allclose(some.gini, gini(x), rtol=1e-5)
            kurtosis = stats.kurtosis(x.double().numpy())
            np.testing.assert_allclose(some["kurtosis"], kurtosis, rtol=1e-3, atol=1e-3)
            for _, row in some.iterrows():
                on = fired[:, row.unit]
                if not on.any():
                    continue
                counts = np.bincount(tokens[on], minlength=24)
                assert row.effective_tokens == pytest.approx(np.exp(stats.entropy(counts)))
                assert counts[row.top_token] == counts.max()
                assert row.top_token_share == pytest.approx(counts.max() / on.sum())
                classes = np.bincount(CLASSES.of_token.numpy()[tokens[on]])
                assert row.effective_classes == pytest.approx(np.exp(stats.entropy(classes)))
                assert row.effective_positions == pytest.approx(np.exp(stats.entropy(np.bincount(places[on]))))
                assert row.mean_position == pytest.approx((places[on] + 0.5).mean() / 16)
    for layer in range(2):
        fired = np.concatenate(
            [
                rules["clean"].fires(s, caches["clean"][s.value_hook].flatten(2).flatten(0, 1)).numpy()
                for s in (Sublayer(layer, "attn"), Sublayer(layer, "mlp"))
            ],
            1,
        )
        both = fired.T.astype(float) @ fired
        either = fired.sum(0)[:, None] + fired.sum(0)[None] - both
        expected = np.divide(both, either, out=np.zeros_like(both), where=either > 0)
        np.testing.assert_allclose(record.coactivation(layer), expected)


def test_batches_do_not_change_the_table(gated, text, calibration, monkeypatch):
    rules = calibrate(gated, calibration, "ablated", progress=False)
    whole = specialization(gated, text, rules, "ablated", progress=False).table
    monkeypatch.setitem(TOKENS_AT_ONCE, "cpu", 16)
    single = specialization(gated, text, rules, "ablated", progress=False).table
    for name in whole.select_dtypes("number"):
        np.testing.assert_allclose(whole[name], single[name], rtol=1e-4, atol=1e-5)


def test_bounds_keep_what_they_say(gated, text, calibration, monkeypatch):
    for name, value in {"DISTINCT_TOKENS": 5, "COACTIVATION_UNITS": 7, "PARTNERS": 2}.items():
        monkeypatch.setattr(unit_tables, name, value)
    record = specialization(gated, text, calibration, "clean", coactivation_tokens=64, sample_tokens=20, progress=False)
    frequencies = torch.bincount(text.flatten(), minlength=24)
    top = frequencies.argsort(descending=True, stable=True)[:5]
    share = 1 - float(frequencies[top].sum()) / text.numel()
    assert record.table.attrs["share_of_other_tokens"] == pytest.approx(share)
    assert record.table.effective_tokens.max() <= 6
    assert record.coactivation(0).shape == (7, 7)
    assert (record.table.partners.map(len) <= 2).all()
    without = specialization(gated, text, calibration, "clean", coactivation_tokens=0, progress=False)
    assert without.coactivations == {}
    with pytest.raises(ValueError, match="was not counted"):
        without.coactivation(0)


def test_same_text_same_table(gated, text, calibration):
    first, second = (specialization(gated, text, calibration, progress=False).table for _ in range(2))
    assert first.equals(second)


def test_bad_input_gets_a_clear_error(gated, planted, text, calibration):
    with pytest.raises(ValueError, match="repeats token 4"):
        specialization(gated, torch.full((3, 16), 4), calibration, progress=False)
    with pytest.raises(ValueError, match="must be 'clean' or 'ablated'"):
        specialization(gated, text, calibration, "masked", progress=False)
    with pytest.raises(ValueError, match="needs gates"):
        specialization(planted, text, calibration, "ablated", progress=False)
    with pytest.raises(ValueError, match="sample_tokens=0"):
        specialization(gated, text, calibration, sample_tokens=0, progress=False)
    rules = calibrate(planted, calibration, progress=False)
    with pytest.raises(ValueError, match="another shape"):
        specialization(gated, text, rules, "clean", progress=False)
    with pytest.raises(ValueError, match="not for stream='ablated'"):
        specialization(gated, text, calibrate(gated, calibration, progress=False), progress=False)
    few = TokenClasses(("one",), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="covers 3 tokens"):
        specialization(gated, text, calibration, "clean", classes=few, progress=False)


def test_word_classes_go_by_lexicon_then_spelling(story_tokenizer):
    classes = word_classes(story_tokenizer, len(story_tokenizer) + 3)

    def class_of(text):
        tokens = story_tokenizer(text, add_special_tokens=False)["input_ids"]
        assert len(tokens) == 1, text
        return classes.names[classes.of_token[tokens[0]]]

    assert class_of(" the") == "DET"
    assert class_of(" Lily") == "PROPN"
    assert class_of(" ball") == "NOUN"
    assert class_of(" to") == "ADP"
    assert class_of(",") == "PUNCT"
    assert class_of(" ") == "space"
    assert class_of("q") == "piece"
    assert class_of("7") == "NUM"
    assert class_of("<|endoftext|>") == "special"
    assert len(classes.of_token) == len(story_tokenizer) + 3
    assert classes.names[classes.of_token[-1]] == "special"


@pytest.fixture
def x():
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(500, 4, generator=generator)
    x[:, 1] = x[:, 1].relu() ** 3
    x[:, 2] = 0
    x[:, 3] = 1000 + 0.1 * x[:, 3]
    return x


@pytest.mark.parametrize("batch", [500, 64, 7])
def test_moments_in_batches_agree_with_scipy_on_the_whole(x, batch):
    moments = Moments()
    for part in x.split(batch):
        moments.add(part)
    whole = x.double().numpy()
    np.testing.assert_allclose(moments.mean(), whole.mean(0), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(moments.variance(), whole.var(0), rtol=1e-4, atol=1e-9)
    some = [0, 1, 3]
    np.testing.assert_allclose(moments.kurtosis()[some], stats.kurtosis(whole[:, some]), rtol=1e-3, atol=1e-3)
    assert moments.kurtosis()[2].isnan()
    np.testing.assert_allclose(moments.squares(), (whole**2).sum(0), rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(moments.absolute(), np.abs(whole).sum(0), rtol=1e-5)


def test_no_kurtosis_where_the_fourth_power_underflows(x):
    moments = Moments()
    moments.add(x * 1e-12)
    assert moments.variance()[0] > 0
    assert moments.kurtosis()[0].isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_that_are_rounding_errors_of_the_largest_unit_are_negligible(dtype):
    eps, moments = torch.finfo(dtype).eps, Moments()
    values = torch.randn(500, 4, dtype=dtype, generator=torch.Generator().manual_seed(0))
    moments.add(values * torch.tensor([1.0, 100 * eps, 2 * eps, 0.0], dtype=dtype))
    assert moments.negligible().tolist() == [False, False, True, True]


def test_the_table_does_not_depend_on_how_gelu_is_rounded(monkeypatch):
    # far below zero, GELU is a small multiple of the rounding error, zero or not according to the processor
    model = sa.SelfAblatingTransformer.from_pretrained("stories-local").double()
    tokens = label_stories(model.tokenizer, 24, n_ctx=64, seed=1).tokens[:12]
    rules = calibrate(model, tokens, ("clean", "ablated"), progress=False)
    expected = specialization(model, tokens, rules, progress=False).table

    def without_cancellation(x):
        return x * torch.sigmoid(1.5957691216057308 * (x + 0.044715 * x**3))

    monkeypatch.setitem(norms_and_activations.ACTIVATIONS, "gelu_new", without_cancellation)
    found = specialization(model, tokens, rules, progress=False).table
    assert expected.hoyer.isna().any()
    pd.testing.assert_frame_equal(found, expected, rtol=1e-6, atol=1e-9)


def test_token_tally_and_pairs_agree_with_loops():
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randint(0, 5, (60,), generator=generator)
    fired = (torch.rand(60, 4, generator=generator) < 0.3).float()
    fired[:, 3] = 0
    slot_of = torch.tensor([0, 2, 1, 2, 2])
    tally, company = TokenTally(slot_of, 3, 4, exact=True), CoActivation(torch.arange(4), "abcd")
    for part in (slice(0, 25), slice(25, None)):
        tally.add(tokens[part], fired[part])
        company.add(fired[part])
    for slot in range(3):
        for unit in range(4):
            expected = sum(float(fired[i, unit]) for i in range(60) if slot_of[tokens[i]] == slot)
            assert tally.counts[slot, unit] == expected
    for a in range(4):
        for b in range(4):
            both = sum(bool(fired[i, a]) and bool(fired[i, b]) for i in range(60))
            either = sum(bool(fired[i, a]) or bool(fired[i, b]) for i in range(60))
            assert float(company.jaccard()[a, b]) == pytest.approx(both / either if either else 0)
    values, places = company.partners(2)
    assert (places != torch.arange(4)[:, None]).all()
    assert (values[:, 0] >= values[:, 1]).all()


def test_of_equally_good_partners_the_lower_index_comes_first():
    company = CoActivation(torch.arange(40), [str(unit) for unit in range(40)])
    company.add(torch.ones(3, 40, dtype=torch.float64))
    assert company.partners(3)[1].tolist() == [[i for i in range(4) if i != unit][:3] for unit in range(40)]
