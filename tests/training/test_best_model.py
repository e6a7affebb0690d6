"""The best model has the lowest validation loss of the stream that counts."""

from __future__ import annotations

import dataclasses

import pytest

from sa_lens.config import GateConfig, RunConfig, TrainConfig
from sa_lens.training.best_model import is_best, selection_loss
from sa_lens.training.evaluation import Evaluation

LOSSES = Evaluation(tokens=10, clean_loss=2.0, clean_perplexity=7.4, clean_bits_per_byte=1.0)
BOTH = dataclasses.replace(LOSSES, ablated_loss=3.0)
RUN = RunConfig(train=TrainConfig(steps=10, warmup_steps=1, dense_share=0.4))


def test_the_ablated_stream_decides_if_there_is_one() -> None:
    assert selection_loss(BOTH) == 3.0
    assert selection_loss(LOSSES) == 2.0


@pytest.mark.parametrize(("best", "expected"), [(None, True), (3.1, True), (3.0, False), (2.9, False)])
def test_a_lower_loss_is_better(best: float | None, expected: bool) -> None:
    assert is_best(BOTH, 10, RUN, best) is expected


def test_a_model_whose_ablated_stream_was_not_trained_does_not_count() -> None:
    assert [is_best(BOTH, step, RUN, None) for step in (3, 4, 5)] == [False, False, True]
    dense = dataclasses.replace(RUN, gates=GateConfig(scope="none"))
    assert [is_best(LOSSES, step, dense, None) for step in (3, 4, 5)] == [True, True, True]
