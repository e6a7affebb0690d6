"""A hand-made transformer whose circuit is known, and pairs for it.

Every position holds a one-hot token in the first half of the residual stream. Heads attend evenly and write
`scale * (mean one-hot)` into the second half, which alone the unembedding reads. So the only edges that carry anything
are `embed->head.v` and `head->logits` of heads with a scale, and each such head adds `scale / (sum of scales)` to f.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from micro import config, token_pairs

from sa_lens.circuits.graph import Circuit, Graph
from sa_lens.circuits.tasks.pairs import PromptPairs
from sa_lens.core import HookedTransformer

N_TOKENS = 4


def known_model(scales: Mapping[tuple[int, int], float]) -> HookedTransformer:
    """Two layers of two heads without MLPs: 29 edges.

    Args:
        scales: by (layer, head); others write nothing.
    """
    cfg = config(
        n_heads=2, d_model=2 * N_TOKENS, d_head=N_TOKENS, d_vocab=N_TOKENS, attn_only=True, normalization_type=None
    )
    model = HookedTransformer(cfg)
    one = torch.eye(N_TOKENS)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.W_E[:, :N_TOKENS] = one
        model.W_U[N_TOKENS:] = one
        for (layer, head), scale in scales.items():
            model.blocks[layer].attn.W_V[head, :N_TOKENS] = one
            model.blocks[layer].attn.W_O[head, :, N_TOKENS:] = scale * one
    return model


def known_pairs() -> PromptPairs:
    """Clean prompts hold token 1 one to four times and corrupt ones token 2 as often; 1 is right and 2 is wrong."""
    pairs = token_pairs(n=4, d_vocab=N_TOKENS)
    clean = torch.zeros_like(pairs.clean)
    for row in range(4):
        clean[row, 1 : row + 2] = 1
    return replace(
        pairs, clean=clean, corrupt=2 * clean, answers=torch.full((4,), 1), wrong_answers=torch.full((4,), 2)
    )


def path(layer: int, head: int) -> tuple[str, str]:
    """The two edges that a head works through."""
    return f"embed->a{layer}.h{head}.v", f"a{layer}.h{head}->logits"


def ranking(graph: Graph, first: Mapping[str, float]) -> Circuit:
    """Scores of some edges, and distinct ones below 0.1 of all others, later edges smaller."""
    scores = torch.full(graph.exists.shape, torch.nan, dtype=torch.float64)
    scores[graph.exists] = torch.linspace(0.09, 0.01, len(graph), dtype=torch.float64)
    for edge, score in first.items():
        scores[graph.place(edge)] = score
    return Circuit(graph, graph.exists.clone(), scores)


def random_ranking(graph: Graph, seed: int = 0) -> Circuit:
    """Scores on both sides of zero."""
    scores = torch.randn(graph.exists.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Circuit(graph, graph.exists.clone(), scores.masked_fill(~graph.exists, torch.nan))
