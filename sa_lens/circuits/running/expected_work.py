"""How much work a search of `edge_removals` still has before it, if one knew which edges it will keep.

An edge is tried if its receiver has a path of kept edges to the logits, or if live gates read what it changes. A try
computes the metric, the receiver and some of the live nodes above it.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby

from jaxtyping import Bool
from torch import Tensor

from sa_lens.circuits.graph import Graph, Node

REACHED = 0.6
"""Share of the work of all live nodes above that a try needs (measured on SmolLM2-135M)."""

REACHED_BY_MASKS = 0.15
"""The same share for a node that only has an effect through masks of live gates (measured on SmolLM2-135M)."""


def work_of_tries(
    graph: Graph,
    kept: Bool[Tensor, "input source"],
    work: Callable[[Node, bool], float],
    metric: float,
    *,
    live_gates: bool = False,
) -> dict[Node, float]:
    """Returns the work of a try of an edge into each node that has such tries.

    Args:
        kept: edges that are kept, or that are likely to be kept once they are visited.
        work: work of a node in a try, at all positions or at the metric position.
        metric: work of the metric in a try.
        live_gates: whether edges into nodes without a path of kept edges are tried too, because gates read these nodes.
    """
    readers: list[list[int]] = [[] for _ in graph.sources]
    for to, source in kept.nonzero().tolist():
        readers[source].append(to)
    everywhere: dict[Node, bool] = {}
    """For each node with a path, whether it has an effect at all positions."""
    tries: dict[Node, float] = {}
    above = 0.0
    nodes = (Node("logits"), *reversed(graph.sources[1:]))
    for _, step in groupby(nodes, key=graph.sources_before):
        here = 0.0
        for node in step:
            inputs = [] if node.kind == "logits" else [graph.inputs[to] for to in readers[graph.source_index[node]]]
            live = [to for to in inputs if to.node in everywhere]
            if node.kind == "logits" or live:
                everywhere[node] = any(everywhere[to.node] or to.port in ("k", "v") for to in live)
                own = work(node, everywhere[node])
                tries[node] = metric + own + REACHED * above
                here += own
            elif live_gates:
                tries[node] = metric + work(node, False) + REACHED_BY_MASKS * above
        above += here
    return tries


def expected_work(
    graph: Graph,
    kept: Bool[Tensor, "input source"],
    visited: Bool[Tensor, "input source"],
    work: Callable[[Node, bool], float],
    metric: float,
    *,
    live_gates: bool = False,
) -> float:
    """Returns the work of all tries to come.

    Args:
        kept: edges that are kept, or that are likely to be kept once they are visited.
        visited: edges that are decided.
        work: as in `work_of_tries`, like all that follows.
    """
    undecided = (graph.exists & ~visited).sum(1).tolist()
    tries = work_of_tries(graph, kept, work, metric, live_gates=live_gates)
    return sum(tried * sum(undecided[to] for to in graph.inputs_of[node]) for node, tried in tries.items())
