"""A small model with gates, and its twin without."""

from __future__ import annotations

import pytest
import torch
from characters import VOCABULARY, Characters

import sa_lens as sa


@pytest.fixture(scope="session")
def model():
    cfg = sa.ModelConfig(n_layers=2, d_model=8, n_heads=2, d_mlp=16, n_ctx=16, d_vocab=VOCABULARY)
    model = sa.SelfAblatingTransformer(cfg, sa.GateConfig(k_attn=3, k_mlp=4), seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.requires_grad_(False)


@pytest.fixture(scope="session")
def plain_model():
    cfg = sa.ModelConfig(n_layers=2, d_model=8, n_heads=2, d_mlp=16, n_ctx=16, d_vocab=VOCABULARY)
    return sa.SelfAblatingTransformer(cfg, sa.GateConfig(scope="none"), seed=1).requires_grad_(False)


@pytest.fixture
def reader(model):
    """The model with a tokenizer."""
    model.tokenizer = Characters()
    yield model
    model.tokenizer = None
