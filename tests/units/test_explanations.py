"""Units wired to fire on a token, on a pair, on nothing: their explanations, and scores that agree with slow twins."""

import numpy as np
import pandas as pd
import pytest
import torch

import sa_lens as sa
from sa_lens.core import HookedTransformerConfig
from sa_lens.core.unit import Unit
from sa_lens.units.contexts import ANY, Fill, Texts, answer, likely_tokens, read_scores
from sa_lens.units.explanations import correlation, explain, firing_places, judge, silent_places, token_list, window_of
from sa_lens.units.firing import calibrate

V, N_CTX = 12, 32


@pytest.fixture(scope="module")
def planted():
    """Neuron 0 fires on token 3, neuron 1 on token 5 after token 4, neuron 2 on any token two after token 7, neuron 3
    never. A head copies the previous token, another the one before that.
    """
    cfg = HookedTransformerConfig(
        n_layers=1,
        d_model=3 * V + N_CTX,
        n_heads=2,
        d_head=N_CTX,
        d_mlp=4,
        n_ctx=N_CTX,
        d_vocab=V,
        act_fn="relu",
        normalization_type=None,
        device="cpu",
        use_attn_scale=False,
    )
    model = sa.SelfAblatingTransformer(cfg, sa.GateConfig(k_attn=2 * N_CTX, k_mlp=4))
    here, place = slice(0, V), slice(V, V + N_CTX)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_gate" not in name:
                parameter.zero_()
        model.W_E[:, here] = torch.eye(V)
        model.W_pos[:, place] = torch.eye(N_CTX)
        attn, mlp = model.blocks[0].attn, model.blocks[0].mlp
        for head, back in enumerate((1, 2)):
            for at in range(back, N_CTX):
                attn.W_Q[head, V + at, at - back] = 100.0
            attn.W_K[head, place, :] = torch.eye(N_CTX)
            attn.W_V[head, here, :V] = torch.eye(V)
            copied = slice(V + N_CTX + head * V, V + N_CTX + (head + 1) * V)
            attn.W_O[head, :V, copied] = torch.eye(V)
        previous, before = V + N_CTX, 2 * V + N_CTX
        mlp.W_in[3, 0] = 2.0
        mlp.W_in[5, 1] = mlp.W_in[previous + 4, 1] = 1.0
        mlp.b_in[1] = -1.0
        mlp.W_in[before + 7, 2] = 3.0
        mlp.b_in[3] = -1.0
    return model


@pytest.fixture(scope="module")
def text():
    return torch.randint(0, V, (260, N_CTX), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=["clean", "ablated"])
def found(request, planted, text):
    thresholds = calibrate(planted, text[:20], request.param, progress=False)[request.param]
    chosen = [Unit(0, "mlp", index) for index in range(4)]
    return explain(planted, text[20:], thresholds, chosen, context=4, substitutes=3, snippets=24, progress=False)


def test_planted_units_are_explained(found):
    token, pair, gap, dead = found.table.to_dict("records")
    assert token["pattern"] == "[3]"
    assert pair["pattern"] == "4 [5]"
    # any of the tokens after `7 _`
    assert set(found.units[2].trie.patterns()[0].tokens[1:]) <= {ANY, 7}
    for row in (token, pair):
        assert (row["text_f1"], row["f1"], row["detection"]) == (1.0, 1.0, 1.0)
        assert row["simulation"] == pytest.approx(1, abs=1e-3)
        assert row["kept"] == 1
    assert gap["f1"] > 0.9
    assert token["list_f1"] == 1
    assert pair["list_f1"] == pair["list_recall"] == 0
    assert not dead["live"]
    assert not dead["explained"]
    assert dead["pattern"] == ""
    assert np.isnan(dead["f1"])
    summary = found.summary
    assert (summary["units"], summary["live"], summary["judged"], summary["coverage"]) == (4, 3, 3, 1)
    assert summary["f1"] == pytest.approx(np.mean([1, 1, gap["f1"]]))
    assert summary["f1_gain"] == pytest.approx(summary["f1"] - summary["list_f1"])


def test_importance_names_the_tokens_that_matter(found):
    contexts = found.units[1].contexts
    pairs = [context for context in contexts if context.tokens == (5, 4)]
    # of 12 tokens, random text before a lone 5 ends in 4 often enough to pass for a context now and then
    assert len(pairs) >= 0.8 * len(contexts) > 0
    for context in pairs:
        assert min(context.importance) > 0.6
        assert context.activation == pytest.approx(1)


def test_snippets_are_of_their_halves_and_hold_true_scores(found, planted, text):
    first = {tuple(row) for row in text[20:140].unfold(1, 4, 1).flatten(0, 1).tolist()}
    second = {tuple(row) for row in text[140:].unfold(1, 5, 1).flatten(0, 1).tolist()}
    unit = found.units[1]
    for snippet in unit.fitted:
        assert len(snippet.tokens) < 4 or snippet.tokens in first
        assert snippet.tokens[-2:] == (4, 5)
        assert snippet.scores[-1] > unit.level
    for snippet in (*unit.firing, *unit.silent):
        assert len(snippet.tokens) < 5 or snippet.tokens in second
    assert all(max(snippet.scores) > unit.level for snippet in unit.firing)
    assert all(max(snippet.scores) <= unit.level for snippet in unit.silent)
    assert len(unit.silent) == len(unit.firing) > 0


def test_the_same_seed_gives_the_same_table(planted, text):
    thresholds = calibrate(planted, text[:20], progress=False)["clean"]
    one, two, three = (
        explain(planted, text[20:], thresholds, 3, context=3, snippets=4, seed=seed, progress=False).table
        for seed in (1, 1, 2)
    )
    pd.testing.assert_frame_equal(one, two)
    assert not one.equals(three)
    assert len(one) == 3
    assert one["live"].all()


# --------------------------------------------------------------------------------------------------------------- parts


def test_a_unit_is_read_where_it_fires(planted, text):
    """Scores of cut and padded snippets are those of the whole prompts, one by one."""
    rows, at = text[:7].numpy(), np.array([0, 5, 31, 8, 3, 2, 9])
    for unit in (Unit(0, "mlp", 2), Unit(0, "attn", 4)):
        for stream in ("clean", "ablated"):
            found = read_scores(planted, stream, unit, rows, at)
            for row, place, score in zip(rows, at, found, strict=True):
                run = planted.ablated() if stream == "ablated" else planted.clean()
                with torch.no_grad(), run:
                    _, cache = planted.run_with_cache(torch.from_numpy(row[None, : place + 1]))
                expected = cache[unit.sublayer.value_hook].flatten(2)[0, -1, unit.index]
                assert score == pytest.approx(float(expected.abs() if unit.site == "attn" else expected))


@pytest.mark.parametrize("scope", ["local", "global"])
def test_many_units_at_once_are_read_as_one_by_one(text, scope):
    """Without hooks, texts of several lengths and units of all layers together, as by a pass under hooks for each."""
    cfg = HookedTransformerConfig(
        n_layers=3,
        d_model=12,
        n_heads=2,
        d_head=6,
        d_mlp=20,
        n_ctx=N_CTX,
        d_vocab=V,
        act_fn="gelu_new",
        device="cpu",
        dtype=torch.float64,
        seed=0,
    )
    model = sa.SelfAblatingTransformer(cfg, sa.GateConfig(scope=scope, k_attn=4, k_mlp=5))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    rng = np.random.default_rng(0)
    units = [Unit(layer, site, index) for layer in range(3) for site in ("attn", "mlp") for index in (0, 7)]
    asked = [(rng.integers(V, size=(n, 9 + n % 3)), rng.integers(9, size=n)) for n in range(1, len(units) + 1)]

    def asking(rows, at):
        return (yield Texts(rows, at))

    for stream in ("clean", "ablated"):
        jobs = [(unit, asking(*texts)) for unit, texts in zip(units, asked, strict=True)]
        found = answer(model, stream, jobs, 12)
        for unit, (rows, at), scores in zip(units, asked, found, strict=True):
            np.testing.assert_allclose(scores, read_scores(model, stream, unit, rows, at), atol=1e-6)
        assert any((scores > 0.1).any() for scores in found)


def test_rows_hold_the_context_where_they_say(text):
    source = text.numpy()
    fill = Fill(source, 5, np.random.default_rng(0))
    contexts = [(3,), (1, ANY, 2), (ANY, 4)]
    rows, at = fill.rows(contexts, 3, draws=4)
    windows = {tuple(w) for row in source.tolist() for w in zip(*(row[i:] for i in range(5)), strict=False)}
    for i, (row, place) in enumerate(zip(rows.tolist(), at, strict=True)):
        context = contexts[i // 4]
        for back, token in enumerate(context):
            assert token in (ANY, row[place - back])
        assert place - len(context) + 1 == 5
        assert tuple(row[:5]) in windows
    assert len({tuple(row[:5]) for row in rows.tolist()}) > 6


def test_likely_tokens_are_the_models_own(text):
    cfg = sa.ModelConfig(n_layers=1, d_model=8, n_heads=2, n_ctx=N_CTX, d_vocab=V, init="gpt2")
    model = sa.SelfAblatingTransformer(cfg)
    found = likely_tokens(model, text[:3].numpy(), 2)
    logits = model(text[:3]).detach()
    for row in range(3):
        assert (found[row, 0] == int(text[row, 0])).all()
        for at in range(1, N_CTX):
            assert found[row, at].tolist() == logits[row, at - 1].argsort(descending=True)[:2].tolist()


def test_snippets_are_the_strongest_and_a_draw_of_the_rest():
    rng = np.random.default_rng(0)
    scores = rng.random((6, 20))
    places = firing_places(scores, 0.5, 8, 4, rng)
    assert len(places) == 8
    assert places[0] == np.unravel_index(scores.argmax(), scores.shape)
    assert all(scores[place] > 0.5 for place in places)
    strong = [scores[place] for place in places[:4]]
    assert strong == sorted(strong, reverse=True)
    for i, (block, at) in enumerate(places):
        assert all(block != other or abs(at - place) >= 4 for other, place in places[:i])
    assert firing_places(scores, 2.0, 8, 4, rng) == []


def test_silent_snippets_hold_no_firing():
    rng = np.random.default_rng(0)
    fires = rng.random((5, 30)) < 0.1
    places = silent_places(fires, 1000, 8, rng)
    expected = [
        (block, at) for block in range(5) for at in range(7, 30) if not fires[block, window_of(at, 8, 2, 30)].any()
    ]
    assert sorted(places) == expected
    assert len(silent_places(fires, 3, 8, rng)) == 3


def test_scores_agree_with_a_loop():
    rng = np.random.default_rng(3)
    scores, predicted = rng.random((4, 15)), rng.random((4, 15))
    firing, silent = [(0, 3), (2, 14), (2, 12)], [(1, 7), (3, 5)]
    found = judge(predicted, scores, 0.7, firing, silent, 4)

    def cells(places):
        return {(b, t) for b, at in places for t in range(max(0, at - 3), min(15, at + 2))}

    def f1(where):
        tp = sum(predicted[c] > 0.7 and scores[c] > 0.7 for c in where)
        said, so = sum(predicted[c] > 0.7 for c in where), sum(scores[c] > 0.7 for c in where)
        precision, recall = tp / said, tp / so
        return precision, recall, 2 * precision * recall / (precision + recall)

    everything = [(b, t) for b in range(4) for t in range(15)]
    names = ("precision", "recall", "f1")
    assert [found[name] for name in names] == pytest.approx(f1(cells(firing)))
    assert [found[f"text_{name}"] for name in names] == pytest.approx(f1(everything))
    both = sorted(cells(firing) | cells(silent))
    x, y = [predicted[c] for c in both], [scores[c] for c in both]
    assert found["simulation"] == pytest.approx(np.corrcoef(x, y)[0, 1])
    told = [[any(predicted[c] > 0.7 for c in cells([place])) for place in places] for places in (firing, silent)]
    assert found["detection"] == pytest.approx((np.mean(told[0]) + 1 - np.mean(told[1])) / 2)


def test_a_token_list_holds_what_fires_with_its_mean():
    tokens, scores = np.array([[1, 2, 1], [1, 3, 3]]), np.array([[5.0, 1.0, 0.0], [4.0, 3.0, 0.0]])
    assert list(token_list(tokens, scores, 2.5).items()) == [(1, 3.0), (3, 1.5)]


def test_correlation_of_constants():
    assert correlation(np.ones(3), np.arange(3.0)) == 0
    assert np.isnan(correlation(np.arange(3.0), np.ones(3)))


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"units": 0}, "units=0"),
        ({"units": "some"}, "units='some'"),
        ({"units": [Unit(0, "mlp", 4)]}, "no unit L0.mlp.4"),
        ({"snippets": 1}, "snippets=1"),
        ({"substitutes": -1}, "substitutes=-1"),
        ({"context": 40}, "context=40"),
        ({"n_tokens": 40}, "1 blocks"),
    ],
)
def test_bad_input_is_refused(planted, text, changes, message):
    thresholds = calibrate(planted, text[:20], progress=False)["clean"]
    with pytest.raises(ValueError, match=message):
        explain(planted, text[20:], thresholds, **{"progress": False, **changes})


def test_thresholds_of_another_model_are_refused(planted, text):
    cfg = sa.ModelConfig(n_layers=1, d_model=8, n_heads=2, n_ctx=N_CTX, d_vocab=V)
    thresholds = calibrate(sa.SelfAblatingTransformer(cfg), text[:4], progress=False)["clean"]
    with pytest.raises(ValueError, match="another shape"):
        explain(planted, text[20:], thresholds, progress=False)
