"""The exact effect of each single edge, which attribution methods estimate; each edge costs part of a pass.

An edge's score says how much worse the mean metric over pairs gets when this edge alone is ablated: metric(full graph)
- metric(full graph without the edge), with the opposite sign for metrics that are worse when larger (`kl`,
`answer_rank`). The definition is a run of `CircuitRunner` without the edge. Where nodes can be run one by one, many
edges into one layer run together, from this layer and from the first position at which both prompts differ.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import groupby
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from sa_lens.circuits.experiment import Experiment, analysis
from sa_lens.circuits.graph import PORTS, Circuit, Edge, Node
from sa_lens.circuits.running.many_circuits import CircuitLogits
from sa_lens.circuits.running.recorded_passes import (
    PassesOfPairs,
    outputs,
    streams_by_lane,
    write_to_stream,
)
from sa_lens.circuits.running.removal_costs import cost_of
from sa_lens.core.last_position import Lane, Prompts, run_edited

log = logging.getLogger(__name__)

Place = tuple[int, int]
"""(input, source) of an edge."""

_BLOCK = 2**20
"""Largest number of entries in the residual stream of all runs that go together."""


@analysis
def exact_effects(exp: Experiment, edges: Iterable[Edge | str] | None = None, *, progress: bool = True) -> Circuit:
    """Ranks edges by how much worse the mean metric gets when each is ablated alone; edges that help score above 0.

    The metric needs no gradient.

    Args:
        edges: edges to measure, such as `ranking.keep(500)`; None: all, which takes hours in a large model.
        progress: show a progress bar if it takes more than a few seconds.

    Returns:
        A circuit of these edges with their scores; the scores of all others are NaN. In its `about`, `value` is the
        metric of the full graph, and `shortcuts` is `on` or says why each edge needed a pass of its own.

    Raises:
        ValueError: the graph has no such edge, `edges` is empty, or the metric is not finite.
    """
    graph, why_not, sign = exp.graph, _why_not_together(exp), exp.metric.sign
    chosen = graph.exists if edges is None else Circuit.of(graph, edges).mask
    places: list[Place] = [(to, source) for to, source in chosen.nonzero().tolist()]
    if not places:
        raise ValueError("edges is empty: give at least one edge, or None for all")
    if why_not is not None:
        log.log(exp.level_of_slow_runs, "exact effects by a run for each of %d edges: %s", len(places), why_not)
    scores = torch.full(graph.exists.shape, torch.nan, dtype=torch.float64)
    scores[chosen] = 0.0
    value = 0.0
    with (
        torch.inference_mode(),
        tqdm(total=len(places), desc="exact effects", unit=" edges", delay=3, disable=not progress) as bar,
    ):
        for share, whole, effects in _by_passes(exp, places) if why_not is not None else _by_nodes(exp, places):
            value += share * sign * whole
            for (to, source), without in effects:
                scores[to, source] += share * (without - whole)
                bar.update(1 if share == 1 else share)
    if not bool(scores[chosen].isfinite().all()):
        raise ValueError(f"metric={exp.metric.name!r} is not finite on these pairs: no effect can be given")
    about = {"method": "exact", **exp.about, "shortcuts": why_not or "on", "value": value}
    # copies: tensors made in inference mode could not be written to by others
    return Circuit(graph, chosen.clone(), scores.clone(), about)


def _why_not_together(exp: Experiment) -> str | None:
    """Returns why each edge needs a run of its own, or None if many can run together."""
    if exp.masks == "live" and exp.model.gates.reads_global:  # type: ignore[attr-defined]
        return "live gates that read the end of the clean stream choose again in all layers"
    return exp.why_not_by_nodes


Effects = Iterator[tuple[Place, float]]
"""Places of edges and the metric without them; larger is worse."""


def _by_passes(exp: Experiment, places: list[Place]) -> Iterator[tuple[float, float, Effects]]:
    """Runs the model once per edge, as in the definition; yields a share of the pairs, the metric and the effects."""
    graph, circuits = exp.graph, CircuitLogits(exp)

    def effects() -> Effects:
        for place in places:
            mask = graph.exists.clone()
            mask[place] = False
            yield place, exp.metric.sign * circuits.value(mask)

    yield 1.0, exp.metric.sign * circuits.value(graph.exists), effects()


def _by_nodes(exp: Experiment, places: list[Place]) -> Iterator[tuple[float, float, Effects]]:
    """Yields the same as `_by_passes`, for each batch of pairs."""
    for batch in exp.passes:
        runs = _Runs(exp, batch)
        yield len(batch.rows) / len(exp.pairs), runs.value, runs.effects(places)


class _Runs:
    """Runs of one batch of pairs, each without one edge."""

    def __init__(self, exp: Experiment, batch: PassesOfPairs) -> None:
        self.exp, self.batch, self.graph, self.functions = exp, batch, exp.graph, exp.nodes
        self.prompts = Prompts.of(batch.prompts.embed, batch.prompts.last, batch.first)
        self.wrote = {
            lane: [x[batch.changing] if lane == "earlier" else x for x in by_source]
            for lane, by_source in outputs(batch.prompts, batch.clean).items()
        }
        self.streams = streams_by_lane(self.graph, self.functions, self.wrote)
        final = self.functions.normalise(batch.clean.final[exp.stream])
        cost = cost_of(exp.metric, self.functions, exp.pairs.subset(batch.rows), final)
        self.cost: Callable[[Tensor], Tensor] = lambda x: cost(self.functions.normalise(x))
        self.value = float(cost(final[None])[0])
        """The metric of the full graph; larger is worse."""

    def effects(self, places: list[Place]) -> Effects:
        """Yields the metric without each edge."""
        rows = len(self.prompts.prompt) + len(self.prompts.last)
        size = max(1, min(64, _BLOCK // (rows * self.functions.cfg.d_model)))
        for _, group in groupby(places, key=lambda place: self.graph.inputs[place[0]].node[:2]):
            step = list(group)
            for first in range(0, len(step), size):
                block = step[first : first + size]
                yield from zip(block, self.cost(self._finals(block)).tolist(), strict=True)

    def _finals(self, block: list[Place]) -> Float[Tensor, "edge pair d_model"]:
        """Returns the final residual stream without each of some edges into the heads or the MLP of one layer."""
        n, clean, node, top = len(block), self.batch.clean, self.graph.inputs[block[0][0]].node, self.graph.n_layers
        start = top if node.kind == "logits" else node.layer
        below = self.graph.sources_before(Node("logits") if start == top else Node("head", start, 0))
        embed, last, first = self.prompts.embed, self.prompts.last, self.batch.first
        run = run_edited(
            *(self.exp.model, self.functions),
            Prompts.of(embed.repeat(n, 1, 1), last.repeat(n), first.repeat(n)),
            partial(self._read, block),
            ablated=self.exp.stream == "ablated",
            before=clean.keys_and_values,
            masks=None if self.exp.masks == "live" else clean.masks,
            copies=torch.arange(len(last), device=last.device).repeat(n),
            start=start,
            # the earlier lane ends below the top layer
            entering={lane: x[min(below, max(x))].repeat(n, 1) for lane, x in self.streams.items()},
        )
        return run.final[self.exp.stream].unflatten(0, (n, -1))

    def _read(
        self, block: list[Place], lane: Lane, layer: int, kind: Literal["heads", "mlp", "logits"], x: Tensor
    ) -> Tensor:
        """Returns inputs in which each run lacks one edge."""
        to = self.graph.inputs[block[0][0]].node
        if kind != {"head": "heads", "mlp": "mlp", "logits": "logits"}[to.kind] or (
            kind != "logits" and layer != to.layer
        ):
            return x
        if lane == "clean" and not (self.exp.stream == "clean" or self.exp.edits_clean_pass):
            return x
        n = len(block)
        # queries, keys and values of each head have an input of their own
        own = x.expand(len(PORTS), self.graph.n_heads, *x.shape).clone() if kind == "heads" else x.clone()
        runs = own.unflatten(-2, (n, -1))
        for i, (place, source) in enumerate(block):
            at = self.graph.inputs[place]
            of_input = runs[PORTS.index(at.port), at.node.head] if kind == "heads" else runs
            change = self.batch.carried[lane][source]
            change = (change[self.batch.changing] if lane == "earlier" else change) - self.wrote[lane][source]
            of_input[i] += write_to_stream(self.graph, self.functions, source, change)
        return own
