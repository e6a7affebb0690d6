"""Gates that are fitted to a text start near the largest units of a model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_runs import MakeRun, interrupt_at, same, weights

from sa_lens.config import GateConfig, RunConfig, TrainConfig
from sa_lens.core import SelfAblatingTransformer
from sa_lens.core.gate import top_k_mask
from sa_lens.training import Interrupted, fit_gates, loop, train
from sa_lens.training.gate_fit import RIDGE

BLOCKS = torch.randint(3, 1000, (40, 32), generator=torch.Generator().manual_seed(0))


def gated(**options: object) -> SelfAblatingTransformer:
    dense = SelfAblatingTransformer.from_pretrained("stories-dense")
    return SelfAblatingTransformer.from_hooked(dense, GateConfig(k_attn=8, k_mlp=8, **options))


def streams(model: SelfAblatingTransformer, layer: int, kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What a gate reads, its scores, and the values of its units, by rows of tokens."""
    point = {"attn": f"blocks.{layer}.attn.hook_z", "mlp": f"blocks.{layer}.mlp.hook_post"}[kind]
    _, cache = model.run_with_cache(BLOCKS)
    with model.ablated():
        _, ablated = model.run_with_cache(BLOCKS)
    read = cache["resid_pre", layer].flatten(0, 1)
    scores = ablated[f"blocks.{layer}.{kind}_gate.hook_scores"].flatten(2).flatten(0, 1)
    return read.double().numpy(), scores.double().numpy(), cache[point].flatten(0, 1).double().numpy()


def fitted_by_numpy(read: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Predictions of ridge regression, as least squares on rows to which the ridge is appended as further rows."""
    inputs = np.concatenate([read, np.ones((len(read), 1))], axis=1)
    penalty = np.sqrt(RIDGE * (inputs**2).sum(0))
    penalty[-1] = 0
    rows = np.concatenate([inputs, np.diag(penalty)])
    goals = np.concatenate([targets, np.zeros((len(penalty), targets.shape[1]))])
    return inputs @ np.linalg.lstsq(rows, goals, rcond=None)[0]


def standard(x: np.ndarray) -> np.ndarray:
    return (x - x.mean()) / x.std()


@pytest.mark.parametrize(("unit", "kind"), [("channel", "attn"), ("channel", "mlp"), ("head", "attn")])
def test_scores_are_those_of_least_squares(unit: str, kind: str) -> None:
    model = SelfAblatingTransformer.from_hooked(
        SelfAblatingTransformer.from_pretrained("stories-dense"),
        GateConfig(k_attn=2 if unit == "head" else 8, k_mlp=8, attn_unit=unit),
    )
    before = weights(model)
    fit_gates(model, BLOCKS)
    read, scores, values = streams(model, 2, kind)
    sizes = np.linalg.norm(values, axis=-1) if unit == "head" else np.abs(values).reshape(len(values), -1)
    assert standard(scores) == pytest.approx(standard(fitted_by_numpy(read, np.sqrt(sizes))), abs=1e-4)
    # of the size of drawn gates: that of an entry of what they read
    assert scores.std() == pytest.approx(np.abs(read).mean(), rel=1e-4)
    assert same(*({n: w for n, w in x.items() if "_gate." not in n} for x in (before, weights(model))))


@pytest.mark.parametrize("scores", ["learned", "ablated"])
def test_low_rank_gates_get_the_best_scores_of_their_rank(scores: str) -> None:
    by_rank = {}
    for rank in (None, 5):
        model = gated(rank=rank, scores=scores)
        fit_gates(model, BLOCKS)
        read, _, _ = streams(model, 2, "mlp")
        gate = model.blocks[2].mlp_gate
        by_rank[rank] = gate.project(torch.tensor(read, dtype=torch.float32)[None], None)[0].detach().double().numpy()
    full, mean = by_rank[None], by_rank[None].mean(0)
    u, s, v = np.linalg.svd(full - mean, full_matrices=False)
    best = (u[:, :5] * s[:5]) @ v[:5] + mean
    assert np.abs(best - full).max() > 0.1
    assert by_rank[5] == pytest.approx(best, abs=1e-3)
    assert full.mean() == pytest.approx(0, abs=1e-3)
    drawn = gated(rank=5).blocks[2].mlp_gate.B_local.detach().norm()
    assert float(gate.B_local.detach().norm()) == pytest.approx(float(drawn), rel=0.1)


def test_masks_are_nearer_to_the_largest_values_and_the_ablated_loss_falls() -> None:
    model = gated()

    def overlap() -> float:
        _, scores, values = streams(model, 1, "mlp")
        masks = top_k_mask(torch.tensor(scores), 8) & top_k_mask(torch.tensor(np.abs(values)), 8)
        return float(masks.sum(1).double().mean()) / 8

    before, loss = overlap(), model.run_streams(BLOCKS).ablated_loss
    fit_gates(model, BLOCKS)
    assert before < 0.1
    assert overlap() > 0.4
    assert model.run_streams(BLOCKS).ablated_loss < loss


def test_a_run_fits_its_gates_once(make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = train(make_run(GateConfig(scope="none")), tmp_path / "dense", progress=False)
    run = make_run(GateConfig(k_attn=4, k_mlp=8), init=str(dense.folder), freeze="base", fit_tokens=400, steps=5)
    whole = train(run, tmp_path / "whole", progress=False)
    # at a negligible rate the gates are those that `fit_gates` makes
    still = dataclasses.replace(run, train=dataclasses.replace(run.train, lr=1e-12))
    result = train(still, tmp_path / "still", progress=False)
    twin = SelfAblatingTransformer.from_hooked(SelfAblatingTransformer.from_pretrained(dense.folder), run.gates)
    text = loop.set_up.__globals__["load_text_and_model"](run, progress=False)[0].train
    fit_gates(twin, text.blocks(16, stop=25))
    for name, weight in weights(twin).items():
        assert torch.allclose(weight, weights(result.model)[name], atol=1e-6), name
    # a resumed run does not fit again
    interrupt_at(monkeypatch, 3)
    with pytest.raises(Interrupted):
        train(run, tmp_path / "parts", progress=False)
    resumed = train(run, tmp_path / "parts", resume=True, progress=False)
    assert same(weights(resumed.model), weights(whole.model))


def test_what_cannot_be_fitted_is_refused() -> None:
    with pytest.raises(ValueError, match=r"fit_tokens=100 fits gates to an existing model: name it in train\.init"):
        TrainConfig(fit_tokens=100)
    for gates in (GateConfig("global"), GateConfig(scores="random-token")):
        with pytest.raises(ValueError, match=r"fits learned local gates alone.*set train\.fit_tokens=0"):
            RunConfig(gates=gates, train=TrainConfig(init="stories-dense", fit_tokens=100))
    with pytest.raises(ValueError, match="scope 'global' with scores 'learned' cannot be fitted"):
        fit_gates(gated_globally(), BLOCKS)
    with pytest.raises(ValueError, match="64 tokens are too few for a fit of 128 dimensions"):
        fit_gates(gated(), BLOCKS[:2])


def gated_globally() -> SelfAblatingTransformer:
    dense = SelfAblatingTransformer.from_pretrained("stories-dense")
    return SelfAblatingTransformer.from_hooked(dense, GateConfig("global"))
