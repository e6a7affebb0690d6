"""Schedules: the learning rate, and the streams that are trained, by step."""

from __future__ import annotations

import math

from sa_lens.config import RunConfig, TrainConfig


def learning_rate(step: int, cfg: TrainConfig) -> float:
    """Returns the learning rate of optimizer step `step`, counted from 0.

    A linear warm-up over `warmup_steps` steps, then `dense_lr` until the `dense_steps` are over, then half a cosine
    from `lr`, which reaches 0 after the last step: with `s = max(warmup_steps, dense_steps)`
    `lr * (1 + cos(pi * (step - s) / (steps - s))) / 2`. The rate is the same with and without gates.

    Args:
        step: from 0 to `cfg.steps`; a run takes steps 0 to `cfg.steps - 1`.
    """
    dense_lr = cfg.dense_lr if cfg.dense_lr is not None else cfg.lr
    if step < cfg.warmup_steps:
        return (dense_lr if cfg.dense_steps else cfg.lr) * ((step + 1) / cfg.warmup_steps)
    if step < cfg.dense_steps:
        return dense_lr
    start = max(cfg.warmup_steps, cfg.dense_steps)
    return cfg.lr * (1 + math.cos(math.pi * (step - start) / (cfg.steps - start))) / 2


def trains_ablated(step: int, run: RunConfig) -> bool:
    """Returns whether optimizer step `step` trains the ablated stream: after the dense steps, in a model with gates."""
    return run.gates.gated and step >= run.train.dense_steps
