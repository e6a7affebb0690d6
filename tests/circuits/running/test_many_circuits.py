"""Circuits by versions of nodes give what whole passes under hooks give, whatever the model, stream and ablation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from micro import gated, plain, token_pairs

from sa_lens.circuits.experiment import Experiment
from sa_lens.circuits.running.circuit_by_hooks import CircuitRunner
from sa_lens.circuits.running.many_circuits import CircuitLogits

DOUBLE: dict[str, Any] = {"dtype": torch.float64}
MODELS: dict[str, dict[str, Any]] = {
    "layernorm": {},
    "folded": {"normalization_type": "LNPre"},
    "attention only": {"attn_only": True},
    "parallel": {"parallel_attn_mlp": True},
    "rotary": {"positional_embedding_type": "rotary", "rotary_dim": 6, "normalization_type": "RMS"},
    "grouped": {"n_key_value_heads": 2},
    "gated mlp": {"gated_mlp": True},
    "three layers": {"n_layers": 3, "n_heads": 2},
}


def circuits(runner: CircuitRunner) -> list[torch.Tensor]:
    """The empty and the full one, nested ones, and others at random."""
    exists = runner.graph.exists
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(exists.shape, generator=generator)
    nested = [exists & (scores < share) for share in (0.1, 0.3, 0.5, 0.7, 0.9)]
    others = [exists & (torch.rand(exists.shape, generator=generator) < share) for share in (0.2, 0.6)]
    no_embedding = exists.clone()
    no_embedding[:, 0] = False
    return [exists & False, exists, no_embedding, *nested, *others]


def assert_same(model: Any, ablation: Any, stream: Any, masks: Any, batch_size: int = 64) -> None:
    pairs = token_pairs(n=7, lengths=(5, 7, 8))
    exp = Experiment(model, pairs, stream=stream, ablation=ablation, masks=masks, batch_size=batch_size)
    runner, fast = CircuitRunner(exp), CircuitLogits(exp)
    assert fast._run is None
    asked = circuits(runner)
    whole = [runner(mask) for mask in asked]
    for logits, expected in zip(fast(asked), whole, strict=True):
        assert (logits - expected).abs().max() < 1e-9
    # again, one by one and from what is held
    for mask, expected in zip(asked[::-1], whole[::-1], strict=True):
        assert (fast([mask])[0] - expected).abs().max() < 1e-9


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("ablation", ["resample", "zero", "mean"])
def test_equals_whole_passes_in_the_clean_stream(name: str, ablation: str) -> None:
    assert_same(plain(**DOUBLE, **MODELS[name]), ablation, "clean", None)


@pytest.mark.parametrize("scope", ["local", "global", "both", "ablated"])
@pytest.mark.parametrize("masks", ["frozen", "live"])
@pytest.mark.parametrize("ablation", ["resample", "zero", "mean"])
def test_equals_whole_passes_in_the_ablated_stream(scope: str, masks: str, ablation: str) -> None:
    assert_same(gated(scope, **DOUBLE), ablation, "ablated", masks, batch_size=3)
