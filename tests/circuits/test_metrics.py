"""Metrics on logits worked out by hand, intervals, and skill against prompts run one by one."""

import dataclasses
import math

import pandas as pd
import pytest
import torch
from micro import gated, token_pairs

from sa_lens.circuits import metrics
from sa_lens.circuits.discovery.acdc import acdc
from sa_lens.circuits.discovery.eap import eap, eap_ig
from sa_lens.circuits.discovery.exact_effects import exact_effects
from sa_lens.circuits.discovery.gate_circuit import mask_shares
from sa_lens.circuits.discovery.relp import relp
from sa_lens.circuits.experiment import skill
from sa_lens.circuits.graph import Circuit, Graph
from sa_lens.circuits.judging.completeness import completeness, minimality
from sa_lens.circuits.judging.faithfulness import faithfulness
from sa_lens.circuits.metrics import kl
from sa_lens.circuits.patching.activation_patching import patch
from sa_lens.circuits.patching.node_attribution import attribute_nodes
from sa_lens.circuits.running.recorded_passes import last_logits
from sa_lens.core import HookedTransformer


@pytest.fixture
def three(pairs):
    """Three pairs whose answer is token 0 and whose wrong answer is token 1."""
    return dataclasses.replace(
        pairs.subset([0, 1, 2]), answers=torch.tensor([0, 0, 0]), wrong_answers=torch.tensor([1, 1, 1])
    )


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
    pd.testing.assert_frame_equal(skill(plain, pairs), table[table["stream"] == "clean"], rtol=1e-6)


def test_refusals(model, pairs):
    with pytest.raises(ValueError, match="token 99999 is beyond the model's vocabulary"):
        last_logits(model, dataclasses.replace(pairs, answers=torch.full_like(pairs.answers, 99999)))
    padded = {name: torch.nn.functional.pad(getattr(pairs, name), (60, 0)) for name in ("clean", "corrupt")}
    with pytest.raises(ValueError, match="longer than n_ctx=48"):
        last_logits(model, dataclasses.replace(pairs, **padded, lengths=pairs.lengths + 60))
    with pytest.raises(ValueError, match="metric='nll' is none of"):
        metrics.Metric.named("nll")
    with pytest.raises(ValueError, match="needs gates"):
        last_logits(model.to_hooked_transformer(), pairs, "ablated")


def difference(logits, pairs):
    return metrics.logit_difference(logits, pairs)


WRONG_METRICS = {
    "a float": lambda logits, pairs: 1.0,
    r"a tensor of shape \(\)": lambda logits, pairs: difference(logits, pairs).mean(),
    r"a tensor of shape \(\d, 1\)": lambda logits, pairs: difference(logits, pairs)[:, None],
    r"a tensor of shape \(\d, 61\)": lambda logits, pairs: logits,
    r"a tensor of shape \(1,\)": lambda logits, pairs: difference(logits, pairs)[:1],
    "values that are not finite": lambda logits, pairs: difference(logits, pairs) * torch.nan,
}

ANALYSES = {
    "patch": lambda *given, **options: patch(*given, positions="all", **options),
    "acdc": acdc,
    "acdc by passes": lambda *given, **options: acdc(*given, order=Graph.from_model(given[0]).edges, **options),
    "exact_effects": exact_effects,
    "exact_effects by passes": lambda *given, **options: exact_effects(
        *given, stream="ablated", masks="live", **options
    ),
    "eap": eap,
    "eap_ig": eap_ig,
    "relp": relp,
    "attribute_nodes": attribute_nodes,
    "faithfulness": lambda model, *given, **options: faithfulness(model, *given, [full(model)], **options),
    "completeness": lambda model, *given, **options: completeness(model, *given, full(model), **options),
    "minimality": lambda model, *given, **options: minimality(model, *given, full(model), **options),
}


def full(model):
    return Circuit.full(Graph.from_model(model))


@pytest.mark.parametrize("given", WRONG_METRICS)
@pytest.mark.parametrize("analysis", ANALYSES)
def test_every_analysis_refuses_a_metric_without_one_value_per_pair(analysis, given):
    for pairs in (token_pairs(1), token_pairs(3, lengths=(5, 6))):
        with pytest.raises(ValueError, match=f"metric '<lambda>' gave {given} for . pairs: it must give one finite"):
            ANALYSES[analysis](gated(n_layers=1), pairs, metric=WRONG_METRICS[given], progress=False)


@pytest.mark.parametrize("analysis", ANALYSES)
@pytest.mark.parametrize("size", [0, -1, 2.5, True])
def test_every_analysis_refuses_a_batch_without_a_prompt(analysis, size):
    with pytest.raises(ValueError, match=f"batch_size={size} must be a whole number of at least 1"):
        ANALYSES[analysis](gated(n_layers=1), token_pairs(3), batch_size=size, progress=False)
    with pytest.raises(ValueError, match=f"batch_size={size} must be"):
        mask_shares(gated(n_layers=1), token_pairs(3), batch_size=size)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda pairs: {"corrupt": pairs.corrupt[:, 1:]}, r"\(3, 7\) and corrupt prompts \(3, 6\) do not align"),
        (lambda pairs: {"corrupt": pairs.corrupt[:2]}, "do not align"),
        (lambda pairs: {"clean": pairs.clean[0], "corrupt": pairs.corrupt[0]}, "do not align"),
        (lambda pairs: {"clean": pairs.clean[:0], "corrupt": pairs.corrupt[:0]}, "at least one pair"),
        (lambda pairs: {"answers": pairs.answers[:2]}, r"answers has the shape \(2,\), but there are 3 pairs"),
        (lambda pairs: {"positions": {"end": torch.tensor([-1])}}, r"end has the shape \(1,\)"),
        (lambda pairs: {"clean": pairs.clean.float()}, "clean must be whole numbers of 0 or more, not torch.float32"),
        (lambda pairs: {"wrong_answers": pairs.answers - 99}, "wrong_answers must be whole numbers of 0 or more"),
        (lambda pairs: {"lengths": pairs.lengths + 1}, "lengths must be from 1 to the 7 tokens"),
        (lambda pairs: {"lengths": pairs.lengths * 0}, "lengths must be from 1 to the 7 tokens"),
    ],
)
def test_pairs_that_do_not_align_cannot_be_made(change, message):
    pairs = token_pairs(3)
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(pairs, **change(pairs))
