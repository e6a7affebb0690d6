"""Metrics on logits worked out by hand, intervals, and skill against prompts run one by one."""

import math

import pytest
import torch
from transformer_lens import HookedTransformer

from sa_lens.circuits import metrics
from sa_lens.circuits.metrics import bootstrap_interval, kl, last_logits, skill


@pytest.fixture
def three(pairs):
    """Three pairs whose answer is token 0 and whose wrong answer is token 1."""
    from dataclasses import replace

    return replace(pairs.subset([0, 1, 2]), answers=torch.tensor([0, 0, 0]), wrong_answers=torch.tensor([1, 1, 1]))


def test_metrics_by_hand(three):
    logits = torch.tensor([[2.0, 1.0, 0.0], [1.0, 1.0, 0.0], [1.0, 0.0, 3.0]])
    assert metrics.logit_difference(logits, three).tolist() == [1, 0, 1]
    # the tie in the second row is wrong
    assert metrics.pair_accuracy(logits, three).tolist() == [1, 0, 1]
    assert metrics.top1_accuracy(logits, three).tolist() == [1, 0, 0]
    assert metrics.answer_rank(logits, three).tolist() == [0, 1, 1]
    expected = 2 - math.log(math.exp(2) + math.exp(1) + 1)
    assert metrics.answer_log_probability(logits, three)[0].item() == pytest.approx(expected)


def test_kl_by_hand():
    p, q = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.25, 0.5]])
    # 0.5 ln 2 + 0 + 0.25 ln 0.5
    assert kl(q.log(), p.log()).item() == pytest.approx(0.25 * math.log(2))
    assert kl(p.log() + 7, p.log()).item() == pytest.approx(0, abs=1e-7)


def test_interval_covers_and_narrows():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)) + 3
    wide, narrow = bootstrap_interval(values[:25]), bootstrap_interval(values)
    assert wide.low < wide.mean < wide.high
    assert narrow.mean == pytest.approx(values.double().mean().item())
    # a normal mean has standard error 1 / sqrt(n)
    assert narrow.high - narrow.low == pytest.approx(2 * 1.96 / 20, rel=0.15)
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)
    assert bootstrap_interval(values) == narrow
    assert bootstrap_interval(values, seed=1) != narrow
    with pytest.raises(ValueError, match="level"):
        bootstrap_interval(values, level=95)


@pytest.mark.parametrize("stream", ["clean", "ablated"])
def test_last_logits_are_those_of_each_prompt_alone(stream, model, pairs):
    for prompt, texts in (("clean", pairs.clean), ("corrupt", pairs.corrupt)):
        found = last_logits(model, pairs, stream, prompt, batch_size=5)
        for i in range(len(pairs)):
            streams = model.run_streams(texts[i : i + 1, -int(pairs.lengths[i]) :])
            expected = streams.clean_logits if stream == "clean" else streams.ablated_logits
            torch.testing.assert_close(found[i], expected[0, -1], rtol=1e-5, atol=1e-5)


def test_skill_has_a_row_a_stream(model, pairs):
    table = skill(model, pairs)
    assert table["stream"].tolist() == ["clean", "ablated"]
    for _, row in table.iterrows():
        logits = last_logits(model, pairs, row["stream"])
        assert row["n"] == 12
        for name in ("pair_accuracy", "top1_accuracy", "logit_difference"):
            assert row[name] == pytest.approx(metrics.METRICS[name](logits, pairs).mean().item())
            assert row[f"{name}_low"] <= row[name] <= row[f"{name}_high"]
        assert row["able"] == (row["pair_accuracy"] >= 0.8)
    plain: HookedTransformer = model.to_hooked_transformer()
    assert skill(plain, pairs).equals(table[table["stream"] == "clean"])


def test_refusals(model, pairs):
    from dataclasses import replace

    with pytest.raises(ValueError, match="token 99999 is beyond the model's vocabulary"):
        last_logits(model, replace(pairs, answers=torch.full_like(pairs.answers, 99999)))
    with pytest.raises(ValueError, match="longer than n_ctx=48"):
        last_logits(model, replace(pairs, lengths=pairs.lengths + 60))
    with pytest.raises(ValueError, match="metric='nll' is none of"):
        metrics.metric_named("nll", None)
    with pytest.raises(ValueError, match="needs gates"):
        last_logits(model.to_hooked_transformer(), pairs, "ablated")
