"""Small models and pairs of random tokens for the tests of circuits."""

from __future__ import annotations

from typing import Any

import torch

import sa_lens as sa
from sa_lens.circuits.tasks.pairs import PromptPairs
from sa_lens.core import HookedTransformer, HookedTransformerConfig


def config(**changes: Any) -> HookedTransformerConfig:
    settings: dict[str, Any] = {
        "n_layers": 2,
        "d_model": 24,
        "n_heads": 4,
        "d_head": 6,
        "d_mlp": 32,
        "n_ctx": 16,
        "d_vocab": 61,
        "act_fn": "gelu_new",
        "normalization_type": "LN",
        "device": "cpu",
        "seed": 3,
        "initializer_range": 0.5,
    }
    return HookedTransformerConfig(**{**settings, **changes})


def noisy(model: HookedTransformer, seed: int = 5, size: float = 0.2) -> HookedTransformer:
    """The model with noise on every weight, so that no bias is zero and no LayerNorm is the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return model


def plain(**changes: Any) -> HookedTransformer:
    return noisy(HookedTransformer(config(**changes)))


def gated(scope: str = "local", k: int = 5, **changes: Any) -> sa.SelfAblatingTransformer:
    """A small gated model; `scope="ablated"`: local gates that read the ablated stream."""
    own = scope == "ablated"
    gates = sa.GateConfig("local" if own else scope, k, k, scores="ablated" if own else "learned")  # type: ignore[arg-type]
    return noisy(sa.SelfAblatingTransformer(config(**changes), gates))  # type: ignore[return-value]


def token_pairs(
    n: int = 6, lengths: tuple[int, ...] = (7,), d_vocab: int = 61, seed: int = 11, differ: int = 3
) -> PromptPairs:
    """Random prompts that begin with token 0; the corrupt ones have `differ` other tokens in the middle."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    clean = torch.randint(1, d_vocab, (n, longest), generator=generator)
    corrupt = clean.clone()
    each = torch.tensor([lengths[i % len(lengths)] for i in range(n)])
    for row, length in enumerate(each.tolist()):
        start = longest - length
        at = start + 1 + torch.randperm(length - 2, generator=generator)[:differ]
        corrupt[row, at] = torch.randint(1, d_vocab, (len(at),), generator=generator)
        clean[row, : start + 1] = corrupt[row, : start + 1] = 0
    answers = torch.randint(1, d_vocab, (n,), generator=generator)
    return PromptPairs.from_tokens(clean, corrupt, answers, (answers + 1) % d_vocab, lengths=each, task="random tokens")
