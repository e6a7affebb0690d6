"""How much work a search of `edge_removals` still has before it, if one knew which edges it will keep.

An edge is tried if its receiver has a path of kept edges to the logits. A try computes the metric, the receiver and
some of the live nodes above it.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby

from jaxtyping import Bool
from torch import Tensor

from sa_lens.circuits.graph import Graph, Node

REACHED = 0.6
"""Share of the work of all live nodes above that a try needs (measured on SmolLM2-135M)."""


def expected_work(
    graph: Graph,
    kept: Bool[Tensor, "input source"],
    visited: Bool[Tensor, "input source"],
    work: Callable[[Node, bool], float],
    metric: float,
) -> float:
    """Returns the work of all tries to come.

    Args:
        kept: edges that are kept, or that are likely to be kept once they are visited.
        visited: edges that are decided.
        work: work of a node in a try, at all positions or at the metric position.
        metric: work of the metric in a try.
    """
    undecided = (graph.exists & ~visited).sum(1).tolist()
    readers: list[list[int]] = [[] for _ in graph.sources]
    for to, source in kept.nonzero().tolist():
        readers[source].append(to)
    everywhere: dict[Node, bool] = {}
    """For each live node, whether it has an effect at all positions."""
    total = above = 0.0
    nodes = (Node("logits"), *reversed(graph.sources[1:]))
    for _, step in groupby(nodes, key=graph.sources_before):
        here = 0.0
        for node in step:
            inputs = [] if node.kind == "logits" else [graph.inputs[to] for to in readers[graph.source_index[node]]]
            live = [to for to in inputs if to.node in everywhere]
            if node.kind != "logits" and not live:
                continue
            everywhere[node] = any(everywhere[to.node] or to.port in ("k", "v") for to in live)
            own = work(node, everywhere[node])
            total += sum(undecided[to] for to in graph.inputs_of[node]) * (metric + own + REACHED * above)
            here += own
        above += here
    return total
