"""A tiny run, two layers, a 400-token vocabulary, 16 positions, and ways to compare what came of it."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sa_lens.config import DataConfig, GateConfig, LossConfig, ModelConfig, RunConfig, TrainConfig
from sa_lens.core import SelfAblatingTransformer
from sa_lens.training import loop

MakeRun = Callable[..., RunConfig]


def tiny_run(
    cache: str | Path, gates: GateConfig | None = None, loss: LossConfig | None = None, **train: Any
) -> RunConfig:
    """Configuration of a run of about half a second.

    Args:
        cache: folder for token files.
        train: changes to the training section.
    """
    settings: dict[str, Any] = {
        "steps": 12,
        "batch_size": 4,
        "lr": 1e-2,
        "eval_every": 6,
        "eval_tokens": 160,
        "save_every": 4,
        "log_every": 3,
        "sample_tokens": 0,
    }
    return RunConfig(
        model=ModelConfig(n_layers=2, d_model=16, n_heads=2, n_ctx=16, attn_scale=True, init="gpt2"),
        gates=gates if gates is not None else GateConfig(k_attn=4, k_mlp=8),
        loss=loss if loss is not None else LossConfig(),
        data=DataConfig(n_stories=200, vocab_size=900, cache_dir=str(cache)),
        train=TrainConfig(**{**settings, **train}),
    )


def weights(model: SelfAblatingTransformer) -> dict[str, torch.Tensor]:
    """A copy of the parameters by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether all tensors are equal bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def records(out: Path, kind: str | None = None, *, timed: bool = True) -> list[dict[str, Any]]:
    """Records of `metrics.jsonl`, of one kind or all; without what depends on the clock if `timed` is False."""
    lines = (out / "metrics.jsonl").read_text().splitlines()
    found = [record for record in map(json.loads, lines) if kind in (None, record["kind"])]
    clock = () if timed else ("seconds", "tokens_per_s")
    return [{key: value for key, value in record.items() if key not in clock} for record in found]


def interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int, number: int = signal.SIGINT) -> None:
    """Sends this process a signal when the step begins."""
    rate = loop.learning_rate

    def asking(at: int, cfg: Any) -> float:
        if at == step:
            monkeypatch.setattr(loop, "learning_rate", rate)
            os.kill(os.getpid(), number)
        return rate(at, cfg)

    monkeypatch.setattr(loop, "learning_rate", asking)
