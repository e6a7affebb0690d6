"""A frozen base is held in bfloat16 while gates train, and nothing but its products notices."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from tiny_runs import MakeRun, interrupt_at, records, same, weights

from sa_lens.config import GateConfig, RunConfig
from sa_lens.core import SelfAblatingTransformer, TwoStreamLoss
from sa_lens.core.gate import belongs_to_gate
from sa_lens.training import Interrupted, evaluate_run, train, training_setup
from sa_lens.training.narrow_base import NarrowBase
from sa_lens.training.optimizer import decays

GATES = GateConfig(k_attn=4, k_mlp=8)


@pytest.fixture
def dense(make_run: MakeRun, tmp_path: Path) -> Path:
    """A trained model without gates, whose weights are no numbers of bfloat16."""
    return train(make_run(GateConfig(scope="none")), tmp_path / "dense", progress=False).folder


def gated(make_run: MakeRun, init: Path) -> RunConfig:
    return make_run(GATES, init=str(init), freeze="base", precision="bf16")


def rounded(folder: Path, to: Path) -> Path:
    """The model with the matrices of its base rounded to bfloat16, in another folder."""
    model = SelfAblatingTransformer.from_pretrained(folder)
    for name, parameter in model.named_parameters():
        if decays(name):
            parameter.data = parameter.data.bfloat16().float()
    return model.save_pretrained(to)


def gates_of(model: SelfAblatingTransformer) -> dict[str, torch.Tensor]:
    return {name: w for name, w in weights(model).items() if belongs_to_gate(name)}


def test_the_base_that_is_saved_is_exact(make_run: MakeRun, tmp_path: Path, dense: Path) -> None:
    result = train(gated(make_run, dense), tmp_path / "gated", progress=False)
    before = weights(SelfAblatingTransformer.from_pretrained(dense))
    best, last = (SelfAblatingTransformer.from_pretrained(result.folder, which=w) for w in ("best", "last"))
    for model in (result.model, best, last):
        assert same(before, {name: w for name, w in weights(model).items() if not belongs_to_gate(name)})
    assert any((w.bfloat16().float() != w).any() for w in before.values()), "rounding would have been seen"
    # and it is the exact model whose losses are reported; rounding would change them by 1e-4
    measured = evaluate_run(str(result.folder), tokens=160, which="last", device="cpu")
    assert dataclasses.asdict(measured) == pytest.approx(dataclasses.asdict(result.evaluation), rel=2e-6)
    assert not [p for p in result.folder.rglob("*") if "base" in p.name or "scratch" in p.name]


def test_gates_are_trained_on_the_rounded_base(
    make_run: MakeRun, tmp_path: Path, dense: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gates are bit for bit those of a float32 base that was rounded beforehand."""
    narrow = train(gated(make_run, dense), tmp_path / "narrow", progress=False)
    twin = rounded(dense, tmp_path / "rounded")
    monkeypatch.setattr(training_setup, "holds_narrow_base", lambda run: False)
    wide = train(gated(make_run, twin), tmp_path / "wide", progress=False)
    assert same(gates_of(narrow.model), gates_of(wide.model))
    assert records(narrow.folder, "train", timed=False) == records(wide.folder, "train", timed=False)
    # without rounding beforehand they are others
    exact = train(gated(make_run, dense), tmp_path / "exact", progress=False)
    assert not same(gates_of(narrow.model), gates_of(exact.model))


def test_an_interrupted_run_ends_as_if_it_had_not_been(
    make_run: MakeRun, tmp_path: Path, dense: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = gated(make_run, dense)
    whole = train(run, tmp_path / "whole", progress=False)
    interrupt_at(monkeypatch, 6)
    with pytest.raises(Interrupted):
        train(run, tmp_path / "parts", progress=False)
    resumed = train(run, tmp_path / "parts", resume=True, progress=False)
    assert same(weights(resumed.model), weights(whole.model))
    assert records(resumed.folder, timed=False) == records(whole.folder, timed=False)


def test_types_while_it_trains(tmp_path: Path) -> None:
    model = SelfAblatingTransformer.from_pretrained("stories-local").freeze_base()
    before = weights(model)
    base = NarrowBase(model, tmp_path)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.bfloat16 if decays(name) else torch.float32), name
        assert torch.equal(parameter, before[name].to(parameter.dtype)), name
    assert not list(tmp_path.iterdir())
    tokens = torch.arange(10)[None]
    terms = TwoStreamLoss(model, path="fused", dtype=torch.bfloat16)(tokens)
    terms.total.backward()
    assert terms.total.dtype == torch.float32
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.gate_parameters())
    with base.exact():
        assert same(before, weights(model))
    assert model.embed.W_E.dtype == torch.bfloat16
    base.restore()
    assert same(before, weights(model))
