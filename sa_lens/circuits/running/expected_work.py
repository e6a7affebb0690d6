"""How much work a search of `edge_removals` still has before it, from what it has decided so far.

An edge is tried if its receiver has a path of kept edges to the logits. Receivers that are not visited yet have one for
certain if a visited receiver keeps an edge from them. Otherwise the probability follows from the receivers between:
each is live with its own probability, and then keeps a first edge from a source of this kind (the embedding, a head, an
MLP) as often as the receivers visited so far did. The work of a try is that of the metric, of the receiver and of a
share of the live nodes above it.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from typing import NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor

from sa_lens.circuits.graph import Graph, Node

_FEW = 200
"""Number of tries before which the shares of kept edges are not trusted."""
_KEPT = 0.005
"""Share of kept edges that is expected before anything is known."""


class Outlook(NamedTuple):
    """What is expected of a receiver."""

    live: float
    """Probability that its edges are tried."""
    everywhere: float
    """Probability that it is live at all positions."""


def expected_outlook(
    graph: Graph, kept: Bool[Tensor, "input source"], visited: Bool[Tensor, "input source"]
) -> dict[Node, Outlook]:
    """Returns what is expected of every receiver, in the reverse order of computation.

    Args:
        kept: visited edges that are kept.
        visited: edges that are decided.
    """
    outlook: dict[Node, Outlook] = {}
    share, unknown = _shares_kept(graph, kept, visited), _undecided(graph, visited)
    kept_from: list[list[int]] = [[] for _ in graph.inputs]
    for to, source in kept.nonzero().tolist():
        kept_from[to].append(source)
    certain, certain_everywhere = set[int](), set[int]()
    hits = hits_everywhere = 0.0
    """Expected number of live inputs above that are not visited, and of those that act at all positions."""
    waiting: list[Node] = []
    for node in (Node("logits"), *reversed(graph.sources[1:])):
        source = graph.source_index.get(node, len(graph.sources))
        for receiver in [w for w in waiting if graph.sources_before(w) > source]:
            waiting.remove(receiver)
            live, everywhere = outlook[receiver]
            for i, to in enumerate(graph.inputs_of[receiver]):
                all_positions = live if receiver.kind == "head" and i > 0 else everywhere
                part = unknown[to] / graph.n_sources[to]
                hits += part * live
                hits_everywhere += part * all_positions
                certain.update(kept_from[to])
                if all_positions > 0.5:
                    certain_everywhere.update(kept_from[to])
        waiting.append(node)
        if node.kind == "logits":
            outlook[node] = Outlook(1.0, 0.0)
            continue
        none = 1 - share[node.kind]
        live = 1.0 if source in certain else 1 - none**hits
        everywhere = 1.0 if source in certain_everywhere else 1 - none**hits_everywhere
        outlook[node] = Outlook(live, min(live, everywhere))
    return outlook


def _undecided(graph: Graph, visited: Bool[Tensor, "input source"]) -> list[int]:
    """Returns the number of edges into each input that are not visited."""
    return [n - done for n, done in zip(graph.n_sources, (visited & graph.exists).sum(1).tolist(), strict=True)]


def _shares_kept(
    graph: Graph, kept: Bool[Tensor, "input source"], visited: Bool[Tensor, "input source"]
) -> dict[str, float]:
    """Returns the share of tried edges that are kept, by kind of their source.

    Only edges count from sources of which no edge was kept before: kept edges come from few sources. Edges into the
    logits do not count, of which more are kept.
    """
    # edges into a node were tried if an edge from it was kept
    spoken = kept.any(0).tolist()
    live = [to.node.kind != "logits" and spoken[graph.source_index[to.node]] for to in graph.inputs]
    kept_here_or_above = kept.flip(0).cumsum(0).flip(0)
    new = visited & graph.exists & torch.tensor(live)[:, None] & (kept_here_or_above - kept.long() == 0)
    shares = {}
    for kind in ("embed", "head", "mlp"):
        of_kind = new & torch.tensor([source.kind == kind for source in graph.sources])
        shares[kind] = (float((kept & of_kind).sum()) + _FEW * _KEPT) / (float(of_kind.sum()) + _FEW)
    return shares


def expected_work(
    graph: Graph,
    kept: Bool[Tensor, "input source"],
    visited: Bool[Tensor, "input source"],
    work: Callable[[Node, bool], float],
    metric: float,
    reached: float,
) -> float:
    """Returns the work of all tries that are expected.

    Args:
        work: work of a node (at all positions or not) in a try.
        metric: work of the metric in a try.
        reached: share of the work of the live nodes above that a try needs.
    """
    total = above = 0.0
    undecided = _undecided(graph, visited)
    outlook = expected_outlook(graph, kept, visited)
    for _, step in groupby(outlook, key=graph.sources_before):
        here = 0.0
        for node in step:
            live, everywhere = outlook[node]
            own = everywhere * work(node, True) + (live - everywhere) * work(node, False)
            total += sum(undecided[to] for to in graph.inputs_of[node]) * (live * (metric + reached * above) + own)
            here += own
        above += here
    return total
