"""A circuit found by any method and judged on other pairs."""

from __future__ import annotations

import math
from typing import get_args

import pandas as pd
import pytest
import torch
from known import known_model, known_pairs, path
from micro import gated, token_pairs

from sa_lens.circuits.discovery.acdc import acdc
from sa_lens.circuits.experiment import Experiment, skill
from sa_lens.circuits.find_and_judge import circuit_table, find_circuit
from sa_lens.circuits.graph import Circuit
from sa_lens.circuits.judging.circuit_metric import CircuitMetric
from sa_lens.config import Method

RANKINGS = [method for method in get_args(Method) if method not in ("acdc", "gate")]


def halves() -> tuple:
    pairs = known_pairs()
    return pairs.subset([0, 2]), pairs.subset([1, 3])


@pytest.mark.parametrize("method", ["acdc", *RANKINGS])
def test_the_known_circuit_is_found(method: Method) -> None:
    """Each method finds the head that writes the answer, from half of the pairs, and it is faithful on the others."""
    model = known_model({(1, 1): 3.0})
    found = find_circuit(model, *halves(), method, tau=1e-3, progress=False)
    assert {str(edge) for edge in found.circuit} == set(path(1, 1))
    row = found.row()
    assert row["f"] == pytest.approx(1, abs=1e-5)
    assert row["edges"] == row["connected"] == row["edges_0.9"] == 2
    assert row["able"]
    assert not found.warnings


def test_shared_runs_change_nothing() -> None:
    """Methods of the same experiments find what each finds alone."""
    model, pairs = known_model({(0, 0): 1.0, (1, 1): 3.0}), halves()
    exp = Experiment(model, pairs[0])
    judge = exp.on(pairs[1])
    for method in ("eap", "exact"):
        shared = find_circuit(exp, judge, method, progress=False)  # type: ignore[arg-type]
        alone = find_circuit(model, *pairs, method, progress=False)  # type: ignore[arg-type]
        assert shared.circuit == alone.circuit
        assert {**shared.row(), "seconds": 0} == pytest.approx({**alone.row(), "seconds": 0}, nan_ok=True)


def test_the_size_asked_for() -> None:
    model = known_model({(0, 0): 1.0, (1, 1): 3.0})
    found = find_circuit(model, *halves(), "exact", edges=2, progress=False)
    assert {str(edge) for edge in found.circuit} == set(path(1, 1))
    assert found.row()["f"] == pytest.approx(0.75, abs=1e-5)
    assert found.row()["edges_0.9"] == 4


@pytest.mark.parametrize("stream", ["clean", "ablated"])
@pytest.mark.parametrize("method", get_args(Method))
def test_each_figure_is_that_of_the_part_it_comes_from(method: Method, stream: str) -> None:
    model, masks = gated(), "frozen" if stream == "ablated" else None
    find, report = token_pairs(seed=1), token_pairs(seed=2)
    found = find_circuit(
        model, find, report, method, edges=None if method == "acdc" else 9, stream=stream, masks=masks, progress=False
    )
    row = found.row()
    expected = skill(model, report, stream).iloc[0]
    assert row["pair_accuracy"] == expected["pair_accuracy"]
    assert row["stream"] == stream
    if method == "acdc":
        assert found.circuit == acdc(model, find, stream=stream, masks=masks, progress=False).circuit
    else:
        assert len(found.circuit) == 9
        assert found.circuit == found.ranking.keep(9)
    measure = CircuitMetric(Experiment(model, report, stream=stream, masks=masks))
    assert row["f"] == pytest.approx(measure.f(found.circuit.mask), abs=1e-4)
    assert row["masks"] == (masks or "none")
    assert row["ablation"] == "resample"
    assert (row["tau"], row["steps"]) == (0.01 if method == "acdc" else "", 5 if method == "eap-ig" else "")
    no_embedding = Circuit.full(found.circuit.graph).mask
    no_embedding[:, 0] = False
    if stream == "ablated":
        assert row["masks_alone"] == pytest.approx(measure.f(no_embedding), abs=1e-4)
        assert "masks alone" in found.summary()
    else:
        assert math.isnan(row["masks_alone"])
    empty = Circuit.of(found.circuit.graph)
    if stream == "clean":
        assert row["corrupt_kl"] == pytest.approx(float(measure(empty.mask).kl.mean()), rel=1e-4)


def test_a_task_that_the_model_cannot_do_is_named() -> None:
    model = gated()
    report = token_pairs(seed=2)
    found = find_circuit(model, token_pairs(seed=1), report, "eap", edges=5, progress=False)
    assert not found.skill["able"]
    assert any("does not do" in warning for warning in found.warnings)
    assert "does not do" in found.summary()


def test_prompts_that_score_alike_give_a_warning_and_no_shares() -> None:
    model = known_model({(1, 1): 3.0})
    with torch.no_grad():
        model.W_U.mul_(1e-3)
    found = find_circuit(model, *halves(), "eap", progress=False)
    assert found.curve is None
    assert math.isnan(found.row()["f"])
    assert any("minimum_gap" in warning for warning in found.warnings)
    assert "no faithfulness" in found.summary()


def test_files(tmp_path) -> None:
    found = find_circuit(known_model({(1, 1): 3.0}), *halves(), "eap", progress=False)
    folder = found.save(tmp_path / "a" / "b")
    assert Circuit.load(folder / "circuit.json") == found.circuit
    assert torch.equal(Circuit.load(folder / "ranking.json").scores.nan_to_num(), found.ranking.scores.nan_to_num())
    assert pd.read_csv(folder / "edges.csv")["edge"].tolist() == [str(edge) for edge in found.circuit]
    assert pd.read_csv(folder / "summary.csv")["edges"].item() == 2
    assert len(pd.read_csv(folder / "curve.csv")) == len(found.curve.table())


def test_table_names_its_parts() -> None:
    found = find_circuit(known_model({(1, 1): 3.0}), *halves(), "eap", progress=False)
    assert circuit_table({("dense", 0): found, ("dense", 1): found}, ("model", "seed"))["seed"].tolist() == [0, 1]


def test_bad_input() -> None:
    model = known_model({(1, 1): 3.0})
    find, report = halves()
    with pytest.raises(ValueError, match="method='best' is not one of 'acdc', 'eap'"):
        find_circuit(model, find, report, "best")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="edges=3 has no meaning for ACDC"):
        find_circuit(model, find, report, "acdc", edges=3)
    with pytest.raises(ValueError, match="2 clean prompts are in `find` and in `report`"):
        find_circuit(model, find, find, "eap")
    with pytest.raises(ValueError, match="gates"):
        find_circuit(model, find, report, "gate")
    with pytest.raises(ValueError, match="choose from 0"):
        find_circuit(model, find, report, "eap", edges=1000, progress=False)
