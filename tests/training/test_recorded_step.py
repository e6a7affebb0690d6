"""Which training steps are recorded as a CUDA graph; `tests/test_cuda.py` tests that they train the same model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sa_lens.config import GateConfig, ModelConfig, TrainConfig
from sa_lens.core import SelfAblatingTransformer, TwoStreamLoss
from sa_lens.training.recorded_step import records_steps

GPU = torch.device("cuda")


def loss(path: Any = "auto") -> TwoStreamLoss:
    shape = ModelConfig(n_layers=1, d_model=8, n_heads=2, n_ctx=4, d_vocab=11)
    return TwoStreamLoss(SelfAblatingTransformer(shape, GateConfig(k_attn=2, k_mlp=2), device="cpu"), path=path)


def test_the_fused_path_on_one_gpu_is_recorded() -> None:
    assert records_steps(TrainConfig(), loss(), GPU, 1, 1)


@pytest.mark.parametrize(
    ("settings", "path", "device", "processes", "parts"),
    [
        ({"cuda_graph": False}, "auto", GPU, 1, 1),
        ({"compile": True}, "auto", GPU, 1, 1),
        ({"checkpoint_activations": True}, "auto", GPU, 1, 1),
        ({}, "hooked", GPU, 1, 1),
        ({}, "auto", torch.device("cpu"), 1, 1),
        ({}, "auto", GPU, 2, 1),
        ({}, "auto", GPU, 1, 2),
    ],
    ids=str,
)
def test_others_are_not(settings: dict[str, Any], path: str, device: torch.device, processes: int, parts: int) -> None:
    assert not records_steps(TrainConfig(**settings), loss(path), device, processes, parts)
