"""The exact effect of each single edge: what attribution estimates, at a pass of the model above it for each edge.

An edge's score says how much worse the metric's mean over pairs gets when the edge alone carries what an ablated edge
does: metric(full graph) - metric(full graph without that edge), and the opposite for metrics that are worse when larger
(`kl`, `answer_rank`). `CircuitRunner` without the edge is the definition. Where `recompute.py` can recompute single
nodes, many edges go at once through the part of the model that they change.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import groupby

import torch
from tqdm.auto import tqdm

from sa_lens.circuits.graph import Circuit, Graph
from sa_lens.circuits.metrics import Metric, last_logits, metric_named
from sa_lens.circuits.running.circuit_by_hooks import Ablation, CircuitRunner, Gates, check_choices
from sa_lens.circuits.running.recorded_passes import recomputation
from sa_lens.circuits.running.removal_costs import sign_of
from sa_lens.circuits.running.removal_state import Row
from sa_lens.circuits.tasks.pairs import PromptPairs
from sa_lens.config import Stream
from sa_lens.core.host import Host
from sa_lens.core.last_position import why_not_by_nodes

log = logging.getLogger(__name__)

Effect = tuple[int, int, float]
"""(input, source, metric without that edge)."""


def exact_effects(
    model: Host,
    pairs: PromptPairs,
    metric: str | Metric = "logit_difference",
    *,
    ablation: Ablation = "resample",
    stream: Stream = "clean",
    gates: Gates | None = None,
    batch_size: int = 64,
    progress: bool = True,
) -> Circuit:
    """Every edge with how much worse the metric's mean gets when that edge alone is ablated; positive: it helps.

    Args:
        metric: a name of `METRICS`, `kl` (from the unedited clean prompt in the same stream, nats), or a function of
            the last position's logits and the pairs that gives a value a pair, better when larger. It needs no
            gradient.
        ablation: what an ablated edge carries; see `running.Ablation`.
        gates: in the ablated stream, `frozen` (default) or `live`; see `run_circuit`. Live gates need a pass of the
            whole model for every edge.
        batch_size: prompts run at once in passes of the whole model.
        progress: a progress bar, where it takes more than a few seconds.

    Returns:
        Every edge with its score; in `about`, `value` is the metric of the full graph and `shortcuts` is `on`, or says
        why each edge took a pass of the whole model.

    Raises:
        ValueError: an unknown choice, pairs that do not fit the model, a metric that is not finite.
    """
    gates_name = check_choices(model, pairs, ablation, stream, gates, batch_size)
    name = metric_named(metric, torch.empty(0))[0]
    graph = Graph.from_model(model)
    live = "live gates read the whole residual stream" if gates_name == "live" else None
    why_not = live or why_not_by_nodes(model)
    if why_not is not None:
        log.warning("exact effects by a pass of the whole model for each of %d edges: %s", len(graph), why_not)
    scores = torch.full(graph.exists.shape, torch.nan, dtype=torch.float64)
    with torch.inference_mode():
        if why_not is None:
            value, found = _by_blocks(model, graph, pairs, metric, ablation, stream, batch_size)
        else:
            runner = CircuitRunner(model, pairs, ablation, stream, gates, batch_size=batch_size)
            value, found = _by_passes(runner, metric)
        with tqdm(total=len(graph), desc="exact effects", unit=" edges", delay=3, disable=not progress) as bar:
            for to, source, without in found:
                scores[to, source] = sign_of(metric) * (without - value)
                bar.update()
    if not bool(scores[graph.exists].isfinite().all()):
        raise ValueError(f"metric={name!r} is not finite on these pairs: no effect can be given")
    about = {
        "method": "exact_effects",
        **{"task": pairs.task, "pairs": len(pairs), "metric": name},
        **{"ablation": ablation, "stream": stream, "gates": gates_name},
        **{"shortcuts": why_not or "on", "value": value},
    }
    # a copy: tensors made in inference mode could not be written to by others
    return Circuit(graph, graph.exists.clone(), scores.clone(), about)


def _by_passes(runner: CircuitRunner, metric: str | Metric) -> tuple[float, Iterator[Effect]]:
    """By the definition."""
    graph = runner.graph
    clean = last_logits(runner.model, runner.pairs, runner.stream) if metric == "kl" else None
    function = metric_named(metric, clean)[1]

    def mean(mask: torch.Tensor) -> float:
        return float(function(runner.run(mask).logits, runner.pairs).double().mean())

    def effects() -> Iterator[Effect]:
        for to, source in graph.exists.nonzero().tolist():
            mask = graph.exists.clone()
            mask[to, source] = False
            yield to, source, mean(mask)

    return mean(graph.exists), effects()


def _by_blocks(
    model: Host,
    graph: Graph,
    pairs: PromptPairs,
    metric: str | Metric,
    ablation: Ablation,
    stream: Stream,
    batch_size: int,
) -> tuple[float, Iterator[Effect]]:
    """The same, step by step and block by block: each row of a block is a removal from the full graph."""
    engine = recomputation(model, pairs, metric, ablation, stream, graph.exists, batch_size)
    sign = sign_of(metric)

    def effects() -> Iterator[Effect]:
        places = [tuple(place) for place in graph.exists.nonzero().tolist()[::-1]]
        for _, group in groupby(places, key=lambda place: graph.n_sources[place[0]]):
            step = list(group)
            engine.enter(sorted({graph.inputs[to].node for to, _ in step}, key=lambda node: node[1:]))
            for start in range(0, len(step), engine.largest_block):
                rows = [Row(to, source, stays_out=False) for to, source in step[start : start + engine.largest_block]]
                for row, cost in zip(rows, engine.try_removals(rows).costs, strict=True):
                    yield row.to, row.source, sign * cost

    return sign * engine.value(), effects()
