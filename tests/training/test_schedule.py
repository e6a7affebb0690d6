"""The learning rate is the written formula, and torch's own cosine; the ablated stream comes in when it is said to."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sa_lens.config import GateConfig, RunConfig, TrainConfig
from sa_lens.training import learning_rate
from sa_lens.training.schedule import trains_ablated


def test_without_warmup_it_is_torchs_cosine() -> None:
    cfg = TrainConfig(steps=40, lr=0.3)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=cfg.lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40)
    for step in range(40):
        assert learning_rate(step, cfg) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        scheduler.step()
    assert learning_rate(40, cfg) == 0


def test_by_hand_with_warmup() -> None:
    cfg = TrainConfig(steps=10, lr=1.0, warmup_steps=2)
    # warm-up: 1/2, 2/2; then (1 + cos(pi * i / 8)) / 2 for i = 0 ... 7
    expected = [0.5, 1.0] + [(1 + math.cos(math.pi * i / 8)) / 2 for i in range(8)]
    assert [learning_rate(step, cfg) for step in range(10)] == pytest.approx(expected)


def test_by_hand_with_dense_steps() -> None:
    cfg = TrainConfig(steps=12, lr=1.0, dense_lr=2.0, warmup_steps=2, dense_share=1 / 3)
    # warm-up to the dense rate, which stays until the switch; then (1 + cos(pi * i / 8)) / 2 for i = 0 ... 7
    expected = [1.0, 2.0, 2.0, 2.0] + [(1 + math.cos(math.pi * i / 8)) / 2 for i in range(8)]
    assert [learning_rate(step, cfg) for step in range(12)] == pytest.approx(expected)
    without = dataclasses.replace(cfg, dense_lr=None)
    assert [learning_rate(step, without) for step in range(4)] == pytest.approx([0.5, 1.0, 1.0, 1.0])
    longer_warmup = dataclasses.replace(cfg, warmup_steps=6)
    expected = [2.0 * i / 6 for i in range(1, 7)] + [(1 + math.cos(math.pi * i / 6)) / 2 for i in range(6)]
    assert [learning_rate(step, longer_warmup) for step in range(12)] == pytest.approx(expected)


@given(steps=st.integers(2, 500), share=st.floats(0, 0.99), lr=st.floats(1e-6, 1))
def test_rises_in_warmup_then_falls(steps: int, share: float, lr: float) -> None:
    cfg = TrainConfig(steps=steps, lr=lr, warmup_steps=int(share * steps))
    rates = [learning_rate(step, cfg) for step in range(steps + 1)]
    warm = rates[: cfg.warmup_steps + 1]
    assert warm == sorted(warm)
    assert rates[cfg.warmup_steps :] == sorted(rates[cfg.warmup_steps :], reverse=True)
    assert max(rates) == pytest.approx(lr)
    assert rates[-1] == pytest.approx(0, abs=1e-12)


def test_the_ablated_stream_comes_in_by_hand() -> None:
    run = RunConfig(train=TrainConfig(steps=6, dense_share=0.5))
    assert [trains_ablated(step, run) for step in range(6)] == [False, False, False, True, True, True]
    assert trains_ablated(0, RunConfig(train=TrainConfig(steps=10)))
    dense = RunConfig(gates=GateConfig(scope="none"), train=TrainConfig(steps=10, dense_share=0.3))
    assert not any(trains_ablated(step, dense) for step in range(10))


def test_the_share_of_dense_steps() -> None:
    assert [TrainConfig(steps=steps, dense_share=0.65).dense_steps for steps in (4600, 100, 3)] == [2990, 65, 2]
    assert TrainConfig(steps=100, dense_share=0.65, freeze="base", init="runs/dense").dense_steps == 0
    for share in (-0.1, 1.0, 0.96):
        with pytest.raises(ValueError, match=rf"dense_share={share} must be from 0 to below 1, .* one of the 10 steps"):
            TrainConfig(steps=10, dense_share=share)
