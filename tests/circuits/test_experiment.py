"""An experiment checks its settings once, records once, and gives what single calls with the same settings give."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, get_args

import pandas as pd
import pytest
import torch
from micro import gated, plain, token_pairs

from sa_lens import circuits
from sa_lens.circuits import (
    Experiment,
    acdc,
    attribute_nodes,
    eap,
    eap_ig,
    experiment,
    faithfulness,
    patch,
    relp,
    skill,
)
from sa_lens.circuits.experiment import analysis
from sa_lens.circuits.metrics import METRICS, Metric
from sa_lens.circuits.running import recorded_passes
from sa_lens.config import MetricName

QUIET: dict[str, Any] = {"progress": False}


def test_masks_are_live_unless_a_method_has_only_frozen_ones() -> None:
    model, pairs = gated(n_layers=1), token_pairs(3)
    clean, ablated = Experiment(model, pairs), Experiment(model, pairs, stream="ablated")
    frozen = ablated.replace(masks="frozen")
    assert [exp.masks for exp in (clean, ablated, frozen)] == ["none", "live", "frozen"]
    assert eap(ablated, **QUIET).about["masks"] == "live"
    assert relp(ablated, **QUIET).about["masks"] == "frozen"
    assert attribute_nodes(ablated, "mlps", **QUIET)["masks"].unique() == ["frozen"]
    assert patch(ablated, "heads", **QUIET)["masks"].unique() == ["live"]
    for method in (relp, attribute_nodes):
        with pytest.raises(ValueError, match="masks='live' has no"):
            method(ablated.replace(masks="live"), **QUIET)


def test_acdc_searches_by_kl_and_the_others_by_logit_difference_unless_a_metric_is_given() -> None:
    exp = Experiment(plain(n_layers=1), token_pairs(3))
    assert acdc(exp, 0.1, **QUIET).circuit.about["metric"] == "kl"
    assert eap(exp, **QUIET).about["metric"] == "logit_difference"
    exp = exp.replace(metric="answer_log_probability")
    assert acdc(exp, 0.1, **QUIET).circuit.about["metric"] == "answer_log_probability"


def test_a_call_with_a_model_and_pairs_is_that_of_their_experiment() -> None:
    model, pairs = gated(n_layers=1), token_pairs(4, lengths=(6, 7))
    settings: dict[str, Any] = {"stream": "ablated", "masks": "frozen", "ablation": "mean", "batch_size": 3}
    exp = Experiment(model, pairs, **settings)
    for method in (eap, eap_ig):
        first, second = method(exp, **QUIET), method(model, pairs, **settings, **QUIET)
        assert torch.equal(first.scores.nan_to_num(), second.scores.nan_to_num())
        assert first.about == second.about
    assert acdc(exp, 0.1, **QUIET).circuit == acdc(model, pairs, 0.1, **settings, **QUIET).circuit
    with pytest.raises(TypeError, match="eap takes an Experiment, or a model and PromptPairs"):
        eap(model)  # type: ignore[call-arg, arg-type]


@pytest.mark.parametrize(("device", "wide", "kept"), [("cpu", 0, True), ("cpu", 1, False), ("cuda", 0, False)])
def test_an_analysis_of_a_wide_model_on_a_cpu_keeps_freed_memory(
    monkeypatch: pytest.MonkeyPatch, device: str, wide: int, kept: bool
) -> None:
    model, pairs = plain(n_layers=1), token_pairs(2)
    log: list[bool | str] = []

    @contextmanager
    def context(*, kept: bool) -> Iterator[None]:
        log.append(kept)
        try:
            yield
        finally:
            log.append("left")

    @analysis
    def fail(exp: Experiment) -> None:
        log.append("inside")
        raise KeyboardInterrupt

    monkeypatch.setattr(experiment, "kept_freed_memory", context)
    monkeypatch.setattr(experiment, "device_of", lambda _: torch.device(device))
    monkeypatch.setattr(experiment, "WIDE", model.cfg.d_model + wide)
    with pytest.raises(KeyboardInterrupt):
        fail(model, pairs)
    assert log == [kept, "inside", "left"]


def test_the_stream_is_an_argument_and_not_the_context() -> None:
    model, pairs = gated(n_layers=1), token_pairs(3)
    expected = skill(model, pairs, stream="ablated")
    with model.ablated(position=-1):
        for stream in ("clean", "ablated"):
            with pytest.raises(ValueError, match=r"takes the stream from stream=\.\.\., not from `with model.ablated"):
                patch(model, pairs, "heads", stream=stream)
        with model.clean():
            pd.testing.assert_frame_equal(skill(model, pairs, stream="ablated"), expected)


def test_what_analyses_share_is_recorded_once_until_it_is_released(monkeypatch: pytest.MonkeyPatch) -> None:
    model, pairs = gated(n_layers=1), token_pairs(4)
    recorded: list[str] = []
    plainly = recorded_passes.run_to_position

    def counted(*arguments: Any, **options: Any) -> Any:
        recorded.append("pass")
        return plainly(*arguments, **options)

    monkeypatch.setattr(recorded_passes, "run_to_position", counted)
    exp = Experiment(model, pairs, stream="ablated", masks="frozen", metric="kl")
    ranking = eap_ig(exp, **QUIET)
    alone = faithfulness(exp, ranking, sizes=[0.5, 1.0], levels=(), **QUIET)
    acdc(exp, 0.1, **QUIET)
    assert len(recorded) == 2, "one pass of the clean and one of the corrupt prompts"
    exp.release()
    assert faithfulness(exp, ranking, sizes=[0.5, 1.0], levels=(), **QUIET) == alone
    assert len(recorded) == 4


def test_recorded_passes_that_are_too_large_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sa_lens.circuits.experiment.MEMORY", 0)
    exp = Experiment(plain(n_layers=1), token_pairs(3))
    assert exp.passes is not exp.passes


def test_skill_and_other_pairs() -> None:
    model = gated(n_layers=1)
    first, second = token_pairs(5, seed=1), token_pairs(7, seed=2)
    exp = Experiment(model, first, stream="ablated")
    pd.testing.assert_frame_equal(exp.skill(), skill(model, first, "ablated"))
    other = exp.on(second)
    assert (other.about["n"], other.stream, other.masks) == (7, "ablated", "live")
    pd.testing.assert_frame_equal(other.skill(), skill(model, second, "ablated"))
    assert "stream='ablated'" in repr(other)


def test_metrics_are_those_that_config_names() -> None:
    assert set(METRICS) == set(get_args(MetricName))
    assert {name for name, metric in METRICS.items() if not metric.larger_is_better} == {"kl", "answer_rank"}
    worse_when_larger = Metric("rank", METRICS["answer_rank"].function, larger_is_better=False)
    model, pairs = plain(n_layers=1), token_pairs(3)
    by_name, by_object = (
        circuits.exact_effects(model, pairs, metric=metric, **QUIET) for metric in ("answer_rank", worse_when_larger)
    )
    assert torch.equal(by_name.scores.nan_to_num(), by_object.scores.nan_to_num())


def test_every_public_name_is_there_and_no_function_has_many_parameters() -> None:
    for name in circuits.__all__:
        public = getattr(circuits, name)
        if inspect.isfunction(public):
            assert len(inspect.signature(public).parameters) <= 8, name
    assert set(circuits.__all__) <= set(dir(circuits))
    with pytest.raises(AttributeError, match="no attribute 'circut'"):
        circuits.circut  # noqa: B018
