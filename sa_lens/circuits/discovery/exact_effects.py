"""The exact effect of each single edge, which attribution methods estimate; each edge costs part of a pass.

An edge's score says how much worse the mean metric over pairs gets when this edge alone is ablated: metric(full graph)
- metric(full graph without the edge), with the opposite sign for metrics that are worse when larger (`kl`,
`answer_rank`). The definition is a run of `CircuitRunner` without the edge. Where `edge_removals` can recompute single
nodes, the part of the model that many edges change is run for all of them at once.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import groupby

import torch
from tqdm.auto import tqdm

from sa_lens.circuits.experiment import Experiment, analysis
from sa_lens.circuits.graph import Circuit
from sa_lens.circuits.running.edge_removals import Recomputation
from sa_lens.circuits.running.many_circuits import CircuitLogits
from sa_lens.circuits.running.removal_state import Row

log = logging.getLogger(__name__)

Effect = tuple[int, int, float]
"""(input, source, metric without that edge)."""


@analysis
def exact_effects(exp: Experiment, *, progress: bool = True) -> Circuit:
    """Ranks all edges by how much worse the mean metric gets when each is ablated alone; edges that help score above 0.

    The metric needs no gradient. With live masks every edge is removed in a run of its own.

    Args:
        progress: show a progress bar if it takes more than a few seconds.

    Returns:
        A circuit of all edges with their scores. In its `about`, `value` is the metric of the full graph, and
        `shortcuts` is `on` or says why each edge needed a pass of its own.

    Raises:
        ValueError: the metric is not finite.
    """
    graph, why_not = exp.graph, exp.why_not_in_part
    if why_not is not None:
        log.log(exp.level_of_slow_runs, "exact effects by a run for each of %d edges: %s", len(graph), why_not)
    scores = torch.full(graph.exists.shape, torch.nan, dtype=torch.float64)
    with torch.inference_mode():
        value, effects = _by_blocks(exp) if why_not is None else _by_passes(exp)
        with tqdm(total=len(graph), desc="exact effects", unit=" edges", delay=3, disable=not progress) as bar:
            for to, source, without in effects:
                scores[to, source] = exp.metric.sign * (without - value)
                bar.update()
    if not bool(scores[graph.exists].isfinite().all()):
        raise ValueError(f"metric={exp.metric.name!r} is not finite on these pairs: no effect can be given")
    about = {"method": "exact", **exp.about, "shortcuts": why_not or "on", "value": value}
    # a copy: tensors made in inference mode could not be written to by others
    return Circuit(graph, graph.exists.clone(), scores.clone(), about)


def _by_passes(exp: Experiment) -> tuple[float, Iterator[Effect]]:
    """Runs the model once per edge, as in the definition."""
    graph, circuits = exp.graph, CircuitLogits(exp)

    def effects() -> Iterator[Effect]:
        for to, source in graph.exists.nonzero().tolist():
            mask = graph.exists.clone()
            mask[to, source] = False
            yield to, source, circuits.value(mask)

    return circuits.value(graph.exists), effects()


def _by_blocks(exp: Experiment) -> tuple[float, Iterator[Effect]]:
    """Returns the same as `_by_passes`, for blocks of edges; each row is a removal from the full graph."""
    graph, sign = exp.graph, exp.metric.sign
    engine = Recomputation(exp, graph.exists)

    def effects() -> Iterator[Effect]:
        places = [tuple(place) for place in graph.exists.nonzero().tolist()[::-1]]
        for _, group in groupby(places, key=lambda place: graph.n_sources[place[0]]):
            step = list(group)
            engine.enter(step)
            for start in range(0, len(step), engine.largest_block):
                rows = [Row(to, source, stays_out=False) for to, source in step[start : start + engine.largest_block]]
                for row, cost in zip(rows, engine.try_removals(rows).costs, strict=True):
                    yield row.to, row.source, sign * cost

    return sign * engine.value(), effects()
