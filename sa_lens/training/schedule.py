"""The learning rate as a function of the step."""

from __future__ import annotations

import math

from sa_lens.config import TrainConfig


def learning_rate(step: int, cfg: TrainConfig) -> float:
    """Learning rate of optimizer step `step`, counted from 0.

    A linear warm-up over `w = warmup_steps` steps, `lr * (step + 1) / w`, then half a cosine,
    `lr * (1 + cos(pi * (step - w) / (steps - w))) / 2`, which reaches 0 after the last step.

    Args:
        step: from 0 to `cfg.steps`; a run takes steps 0 to `cfg.steps - 1`.
    """
    if step < cfg.warmup_steps:
        return cfg.lr * ((step + 1) / cfg.warmup_steps)
    done = (step - cfg.warmup_steps) / (cfg.steps - cfg.warmup_steps)
    return cfg.lr * (1 + math.cos(math.pi * done)) / 2
