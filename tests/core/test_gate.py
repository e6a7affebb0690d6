"""The mask has exactly k ones, the lowest index wins ties, and its gradient is that of the surrogate."""

from __future__ import annotations

import math

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings

from sa_lens.config import GateConfig
from sa_lens.core.gate import Gate, gate_mask, surrogate_weights, top_k_mask

SURROGATES = [("sigmoid", 1.0), ("sigmoid", 0.1), ("sigmoid", 3.0), ("softmax", 1.0), ("softmax", 0.4)]

few_values = st.sampled_from([-math.inf, -1.5, -0.0, 0.0, 1.0, 2.0, math.inf])
any_value = st.floats(-1e6, 1e6, width=32)


@st.composite
def scores_and_k(draw):
    """Rows of scores, often with ties or constant, and a k from 1 to their length."""
    n = draw(st.integers(1, 12))
    elements = draw(st.sampled_from([few_values, any_value, st.just(0.25)]))
    rows = draw(hnp.arrays(np.float32, (draw(st.integers(1, 3)), n), elements=elements))
    return torch.from_numpy(rows), draw(st.integers(1, n))


@given(scores_and_k())
@settings(deadline=None, max_examples=300)
def test_exactly_k_ones_and_the_lowest_index_wins(case):
    scores, k = case
    mask = top_k_mask(scores, k)
    assert mask.dtype == torch.bool
    assert (mask.sum(-1) == k).all()
    assert mask.float().tolist() == [oracle.slow_top_k(row, k) for row in scores.tolist()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_constant_scores_keep_the_first_k_units(dtype):
    mask = top_k_mask(torch.full((2, 3, 700), 0.1, dtype=dtype), 300)
    assert mask[..., :300].all()
    assert not mask[..., 300:].any()


@given(scores_and_k(), st.sampled_from(SURROGATES))
@settings(deadline=None, max_examples=200)
def test_hard_masks_are_finite_zeros_and_ones_for_any_scores(case, surrogate):
    """Also with a graph, and for infinite scores, which force units in or out."""
    scores, k = case
    name, temperature = surrogate
    for needs_grad in (False, True):
        leaf = scores.clone().requires_grad_(needs_grad)
        mask = gate_mask(leaf, k, GateConfig(surrogate=name, temperature=temperature))
        assert mask.tolist() == [oracle.slow_top_k(row, k) for row in scores.tolist()]
        if needs_grad and mask.requires_grad:
            mask.square().sum().backward()
            assert leaf.grad is not None
            assert leaf.grad.isfinite().all()


@pytest.mark.parametrize(("surrogate", "temperature"), SURROGATES)
def test_soft_weights_by_scalar_arithmetic(surrogate, temperature):
    scores = torch.randn(4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for k in (1, 3, 8, 9):
        expected = [oracle.slow_surrogate(row, k, surrogate, temperature) for row in scores.tolist()]
        torch.testing.assert_close(
            surrogate_weights(scores, k, surrogate, temperature),
            torch.tensor(expected, dtype=torch.float64),
            rtol=1e-12,
            atol=1e-14,
        )


def test_soft_weights_of_a_row_worked_by_hand():
    # k = 1: s_(1) = 3, s_(2) = 1, so g = 2, D = 2, T = 1: shifted = 0.5, -0.5, -1.5
    weights = surrogate_weights(torch.tensor([3.0, 1.0, -1.0], dtype=torch.float64), 1, "sigmoid", 1.0)
    v = [1 / (1 + math.exp(-x)) for x in (0.5, -0.5, -1.5)]
    assert weights.tolist() == pytest.approx([x / sum(v) for x in v], rel=1e-11)


@pytest.mark.parametrize(("surrogate", "temperature"), SURROGATES)
@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_the_gradient_is_that_of_the_surrogate_by_finite_differences(surrogate, temperature, kind):
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(3, 7, dtype=torch.float64, generator=generator)
    direction = torch.randn(3, 7, dtype=torch.float64, generator=generator)
    step = 1e-6
    for k in (1, 3, 6):
        leaf = scores.clone().requires_grad_()
        mask = gate_mask(leaf, k, GateConfig(surrogate=surrogate, temperature=temperature, kind=kind))
        (mask * direction).sum().backward()
        expected = torch.empty_like(scores)
        for index in np.ndindex(*scores.shape):
            up, down = scores.clone(), scores.clone()
            up[index] += step
            down[index] -= step
            ends = []
            for end in (up, down):
                rows = [oracle.slow_surrogate(row, k, surrogate, temperature) for row in end.tolist()]
                ends.append((torch.tensor(rows, dtype=torch.float64) * direction).sum())
            expected[index] = (ends[0] - ends[1]) / (2 * step)
        torch.testing.assert_close(leaf.grad, expected, rtol=1e-5, atol=1e-7)
        if kind == "hard":
            assert mask.tolist() == [oracle.slow_top_k(row, k) for row in scores.tolist()]
        else:
            assert torch.equal(mask, surrogate_weights(scores, k, surrogate, temperature))


@pytest.mark.parametrize("surrogate", ["sigmoid", "softmax"])
@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_a_tie_at_the_threshold_passes_no_gradient_and_no_nan(surrogate, kind):
    scores = torch.tensor([[1.0, 0.5, 0.5, -1.0], [2.0, 1.0, 0.0, -1.0], [0.3, 0.3, 0.3, 0.3]], requires_grad=True)
    mask = gate_mask(scores, 2, GateConfig(surrogate=surrogate, kind=kind))
    (mask * torch.tensor([1.0, -2.0, 3.0, 0.5])).sum().backward()
    assert scores.grad is not None
    assert torch.equal(scores.grad[[0, 2]], torch.zeros(2, 4))
    assert (scores.grad[1] != 0).all()
    assert not mask.isnan().any()


@pytest.mark.parametrize("surrogate", ["sigmoid", "softmax"])
@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_all_units_give_ones_and_no_gradient(surrogate, kind):
    scores = torch.randn(2, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    mask = gate_mask(scores, 5, GateConfig(surrogate=surrogate, kind=kind))
    assert torch.equal(mask, torch.ones(2, 5))
    (mask.sum() + 0 * scores.sum()).backward()
    assert torch.equal(scores.grad, torch.zeros(2, 5))


@pytest.mark.parametrize("scope", ["local", "global", "both"])
def test_scores_are_float32_in_narrow_precision(scope):
    gate = Gate(GateConfig(scope=scope, k_attn=2, k_mlp=2), 2, 8, (6,), dtype=torch.bfloat16)
    gate.reset_parameters(torch.Generator().manual_seed(0))
    x = torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
    expected = 0
    for source in ("local", "global"):
        if hasattr(gate, f"W_{source}"):
            expected = (
                expected + x.float() @ getattr(gate, f"W_{source}").float() + getattr(gate, f"b_{source}").float()
            )
    for autocast in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            scores = gate.project(x, x)
            assert scores.dtype == torch.float32
            torch.testing.assert_close(scores, expected)
            assert (gate.select(scores).flatten(2).sum(-1) == 2).all()


def test_gate_weights_follow_the_generator_and_are_never_zero():
    def drawn(seed: int) -> dict[str, torch.Tensor]:
        gate = Gate(GateConfig(scope="both"), 8, 64, (4, 16))
        gate.reset_parameters(torch.Generator().manual_seed(seed))
        return dict(gate.named_parameters())

    first, again, other = drawn(0), drawn(0), drawn(1)
    assert sorted(first) == ["W_global", "W_local", "b_global", "b_local"]
    for name, weight in first.items():
        assert torch.equal(weight, again[name])
        assert not torch.equal(weight, other[name])
        assert (weight != 0).all()
        assert weight.abs().max() <= 1 / 8
        assert weight.abs().max() > 0.9 / 8
    assert not torch.equal(first["W_global"], first["W_local"])


def test_static_scores_are_one_draw_for_all_tokens_and_token_scores_are_not():
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1))
    masks = {}
    for scores in ("random-static", "random-token"):
        gate = Gate(GateConfig(scores=scores), 8, 64, (4, 16))
        gate.reset_parameters(torch.Generator().manual_seed(0))
        assert not any(parameter.requires_grad for parameter in gate.parameters())
        masks[scores] = gate.select(gate.project(x, None))
        assert (masks[scores].flatten(2).sum(-1) == 8).all()
    assert (masks["random-static"] == masks["random-static"][:1, :1]).all()
    assert not (masks["random-token"] == masks["random-token"][:1, :1]).all()
