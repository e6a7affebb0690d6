"""The schedule is the written formula, and torch's own cosine."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sa_lens.config import TrainConfig
from sa_lens.training import learning_rate


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


@given(steps=st.integers(2, 500), share=st.floats(0, 0.99), lr=st.floats(1e-6, 1))
def test_rises_in_warmup_then_falls(steps: int, share: float, lr: float) -> None:
    cfg = TrainConfig(steps=steps, lr=lr, warmup_steps=int(share * steps))
    rates = [learning_rate(step, cfg) for step in range(steps + 1)]
    warm = rates[: cfg.warmup_steps + 1]
    assert warm == sorted(warm)
    assert rates[cfg.warmup_steps :] == sorted(rates[cfg.warmup_steps :], reverse=True)
    assert max(rates) == pytest.approx(lr)
    assert rates[-1] == pytest.approx(0, abs=1e-12)
