"""The effect of each edge is what a run of the circuit without that edge gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from micro import gated, plain, token_pairs

from sa_lens.circuits.discovery.exact_effects import exact_effects
from sa_lens.circuits.experiment import Experiment
from sa_lens.circuits.graph import Circuit
from sa_lens.circuits.metrics import METRICS, kl, logit_difference
from sa_lens.circuits.running.circuit_by_hooks import CircuitRunner
from sa_lens.circuits.tasks.pairs import PromptPairs

SMALL: dict[str, Any] = {"n_heads": 2, "d_mlp": 16}
DOUBLE: dict[str, Any] = {**SMALL, "dtype": torch.float64}


def slow(model: Any, pairs: PromptPairs, metric: Any, **choices: Any) -> Circuit:
    """A run of the circuit without each edge in turn."""
    runner = CircuitRunner(Experiment(model, pairs, **choices))
    full = Circuit.full(runner.graph)
    whole = runner(full.mask)
    plain_function = METRICS[metric].function if isinstance(metric, str) else metric

    def function(logits: torch.Tensor, pairs: PromptPairs) -> torch.Tensor:
        return kl(logits, whole) if metric == "kl" else plain_function(logits, pairs)

    worse = 1 if metric in ("kl", "answer_rank") else -1
    scores = torch.full_like(full.scores, torch.nan)
    for to, source in runner.graph.exists.nonzero().tolist():
        mask = runner.graph.exists.clone()
        mask[to, source] = False
        without = function(runner(mask), pairs).double().mean()
        scores[to, source] = worse * (without - function(whole, pairs).double().mean())
    return Circuit(runner.graph, full.mask, scores)


def assert_same(model: Any, pairs: PromptPairs, metric: Any, tolerance: float, **choices: Any) -> Circuit:
    found = exact_effects(model, pairs, metric=metric, progress=False, **choices)
    expected = slow(model, pairs, metric, **choices)
    exists = found.graph.exists
    assert bool(found.mask[exists].all())
    assert (found.scores[exists] - expected.scores[exists]).abs().max() < tolerance
    assert expected.scores[exists].abs().max() > 1e-3
    return found


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"normalization_type": "RMS", "positional_embedding_type": "rotary", "rotary_dim": 6},
        {"attn_only": True},
        {"parallel_attn_mlp": True},
        {"n_key_value_heads": 1},
    ],
    ids=str,
)
def test_equals_runs_without_each_edge(changes: dict[str, Any]) -> None:
    found = assert_same(plain(**DOUBLE, **changes), token_pairs(n=3), "logit_difference", 1e-9)
    assert found.about["shortcuts"] == "on"


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("ablation", ["resample", "zero", "mean"])
def test_equals_runs_in_the_ablated_stream(scope: str, ablation: str) -> None:
    pairs = token_pairs(n=5, lengths=(6, 8))
    found = assert_same(gated(scope, **DOUBLE), pairs, "kl", 1e-9, ablation=ablation, stream="ablated", masks="frozen")
    assert (found.about["masks"], found.about["shortcuts"]) == ("frozen", "on")
    assert abs(found.about["value"]) < 1e-12


@pytest.mark.parametrize("metric", ["pair_accuracy", "answer_rank", "answer_log_probability", logit_difference])
def test_takes_any_metric_with_its_own_sign(metric: Any) -> None:
    assert_same(plain(**DOUBLE), token_pairs(n=5), metric, 1e-9)


def test_float32_on_prompts_of_several_lengths() -> None:
    assert_same(plain(**SMALL), token_pairs(n=7, lengths=(6, 8)), "logit_difference", 2e-5)


@pytest.mark.parametrize("scope", ["local", "global", "both", "ablated"])
def test_live_gates_choose_again_without_each_edge(scope: str) -> None:
    model, pairs = gated(scope, **DOUBLE), token_pairs(n=5, lengths=(6, 8))
    found = assert_same(model, pairs, "logit_difference", 1e-12, stream="ablated", masks="live", batch_size=3)
    alone = "choose again in all layers" in found.about["shortcuts"]
    assert alone == (scope in ("global", "both"))
    frozen = exact_effects(model, pairs, stream="ablated", masks="frozen", progress=False)
    assert (frozen.scores - found.scores).abs().nan_to_num().max() > 1e-3


@pytest.mark.parametrize("stream", ["clean", "ablated"])
def test_some_edges_have_the_effects_that_they_have_among_all(stream: Any) -> None:
    exp = Experiment(gated(**DOUBLE), token_pairs(n=3), stream=stream)
    every = exact_effects(exp, progress=False)
    best = every.keep(9)
    found = exact_effects(exp, best, progress=False)
    assert found.mask.equal(best.mask)
    assert (found.scores[best.mask] - every.scores[best.mask]).abs().max() < 1e-12
    assert bool(found.scores[~best.mask].isnan().all())
    assert exact_effects(exp, ["embed->logits"], progress=False).scores.isnan().logical_not().sum() == 1
    with pytest.raises(ValueError, match="names no node"):
        exact_effects(exp, ["embed->nowhere"], progress=False)
    with pytest.raises(ValueError, match="edges is empty"):
        exact_effects(exp, [], progress=False)


def test_models_without_shortcuts_are_run_whole(caplog: pytest.LogCaptureFixture) -> None:
    found = assert_same(plain(**DOUBLE, attn_scores_soft_cap=5.0), token_pairs(n=3), "kl", 1e-12)
    assert "soft cap" in found.about["shortcuts"]
    assert "soft cap" in caplog.text


def test_state_is_left_and_scores_may_be_written_to(tmp_path: Any) -> None:
    model, pairs = gated(), token_pairs()
    before = dict(vars(model.cfg))
    found = exact_effects(model, pairs, progress=False)
    assert vars(model.cfg) == before
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    again = exact_effects(model, pairs, progress=False)
    assert torch.equal(found.scores.nan_to_num(), again.scores.nan_to_num())
    found.scores[0, 0] = 1.0
    assert Circuit.load(found.save(tmp_path / "effects.json")).about["method"] == "exact"
    assert len(found.keep(7)) == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"metric": "likelihood"}, "metric='likelihood' is none of"),
        ({"metric": lambda logits, pairs: kl(logits, logits * torch.nan)}, "gave values that are not finite"),
        ({"ablation": "noise"}, "ablation='noise' is not one of"),
        ({"masks": "live"}, "needs stream='ablated'"),
        ({"batch_size": 0}, "batch_size=0 must be a whole number of at least 1"),
    ],
)
def test_bad_input_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        exact_effects(gated(), token_pairs(), progress=False, **arguments)
