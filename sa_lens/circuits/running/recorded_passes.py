"""What circuits need of unedited passes: what every source writes on both prompts, masks, and the metric."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sa_lens.circuits.graph import Graph
from sa_lens.circuits.metrics import Metric, prompts_in_batches
from sa_lens.circuits.running.circuit_by_hooks import Ablation
from sa_lens.circuits.running.edge_removals import Recomputation
from sa_lens.circuits.running.removal_costs import Cost, KLCost, LogitsCost
from sa_lens.circuits.running.removal_state import Recorded
from sa_lens.circuits.tasks.pairs import PromptPairs
from sa_lens.config import Stream
from sa_lens.core.host import Host, device_of
from sa_lens.core.last_position import Lane, LastPass, Prompts, run_to_position
from sa_lens.core.nodes import NodeFunctions

Outputs = dict[Lane, list[Float[Tensor, "row width"]]]
"""What each source gives by lane, in the order of the graph: `z` of a head, what the embedding and MLPs write."""


class PassesOfPairs(NamedTuple):
    """Unedited passes of a batch of pairs."""

    rows: Int[Tensor, " pair"]
    """Place of each pair among all."""
    prompts: Prompts
    """The clean prompts."""
    first: Int[Tensor, " pair"]
    """First position at which an absent edge may carry something else than a present one."""
    clean: LastPass | None
    """The pass of the clean prompts, if it was asked for."""
    carried: Outputs
    """What absent edges carry."""


def passes_of_pairs(
    model: Host,
    functions: NodeFunctions,
    pairs: PromptPairs,
    ablation: Ablation,
    *,
    ablated: bool,
    clean: bool,
    batch_size: int,
) -> list[PassesOfPairs]:
    """Passes of all pairs, which are ordered by length and cut in batches.

    Args:
        ablated: also run the ablated lane.
        clean: also run the clean prompts.
    """
    found = []
    sides = (prompts_in_batches(model, pairs, side, batch_size) for side in ("clean", "corrupt"))
    for (rows, clean_prompts), (_, corrupt_prompts) in zip(*sides, strict=True):
        differ = _first_difference(pairs.subset(rows))
        corrupt = run_to_position(model, functions, corrupt_prompts, ablated=ablated)
        found.append(
            PassesOfPairs(
                rows,
                clean_prompts,
                (differ if ablation == "resample" else torch.zeros_like(differ)).to(device_of(model)),
                run_to_position(model, functions, clean_prompts, ablated=ablated) if clean else None,
                outputs(corrupt_prompts, corrupt),
            )
        )
    if ablation == "resample":
        return found
    keys = {lane: [_length_and_position(batch.prompts, lane) for batch in found] for lane in found[0].carried}
    carried = {
        lane: [
            torch.zeros_like(torch.cat(parts))
            if ablation == "zero"
            else _means(torch.cat(parts), torch.cat(keys[lane]))
            for parts in zip(*(batch.carried[lane] for batch in found), strict=True)
        ]
        for lane in found[0].carried
    }
    split = {
        lane: [x.split([len(key) for key in keys[lane]]) for x in by_source] for lane, by_source in carried.items()
    }
    return [
        batch._replace(carried={lane: [parts[i] for parts in by_source] for lane, by_source in split.items()})
        for i, batch in enumerate(found)
    ]


def _first_difference(pairs: PromptPairs) -> Int[Tensor, " pair"]:
    """First position at which the two prompts of each pair differ."""
    padding = int(pairs.lengths.max()) - pairs.lengths
    return (pairs.clean != pairs.corrupt).float().argmax(1) - padding


def _length_and_position(prompts: Prompts, lane: Lane) -> Int[Tensor, "row 2"]:
    if lane == "earlier":
        return torch.stack([prompts.last[prompts.prompt], prompts.pos], 1)
    return torch.stack([prompts.last, prompts.last], 1)


def _means(x: Float[Tensor, "row width"], key: Int[Tensor, "row 2"]) -> Float[Tensor, "row width"]:
    """Each row's mean over the rows with the same key."""
    _, group, counts = key.unique(dim=0, return_inverse=True, return_counts=True)
    sums = x.new_zeros(len(counts), x.shape[1]).index_add_(0, group, x)
    return (sums / counts[:, None])[group]


def outputs(prompts: Prompts, found: LastPass) -> Outputs:
    """What each source gives in a pass; the earlier lane ends below the top layer."""
    by_source: Outputs = {}
    for lane, z in found.z.items():
        by_source[lane] = [prompts.rows(lane, prompts.embed)]
        for layer, heads in enumerate(z):
            by_source[lane] += list(heads.unbind(1))
            by_source[lane] += found.mlp_out[lane][layer : layer + 1]
    return by_source


def written(graph: Graph, functions: NodeFunctions, source: int, out: Float[Tensor, "... width"]) -> Tensor:
    """What a source writes into the residual stream, given its output."""
    node = graph.sources[source]
    return out @ functions.W_O[node.layer][node.head] if node.kind == "head" else out


def recomputation(
    model: Host,
    pairs: PromptPairs,
    metric: str | Metric,
    ablation: Ablation,
    stream: Stream,
    present: Bool[Tensor, "input source"],
    batch_size: int,
) -> Recomputation:
    """The part of the model above the edges that a search visits, at its top."""
    graph = Graph.from_model(model)
    functions = NodeFunctions(model, int(pairs.lengths.max()))
    order, recorded = record(model, graph, functions, pairs, ablation, stream, batch_size)
    engine = Recomputation(graph, functions, recorded, lambda final: final[:, 0, 0], present)
    clean = functions.normalise(engine.final_clean())
    cost: Cost
    if metric == "kl":
        cost = KLCost(functions.W_U, functions.b_U, clean)
    else:
        cost = LogitsCost(metric, functions.W_U, functions.b_U, pairs.subset(order))
    engine.cost = cost
    return engine


def record(
    model: Host,
    graph: Graph,
    functions: NodeFunctions,
    pairs: PromptPairs,
    ablation: Ablation,
    stream: Stream,
    batch_size: int,
) -> tuple[Tensor, Recorded]:
    """What all sources write on both prompts, pairs ordered by length; and that order."""
    gated = stream == "ablated"
    batches = passes_of_pairs(*(model, functions, pairs, ablation), ablated=gated, clean=True, batch_size=batch_size)

    def by_source(batch: PassesOfPairs, by_lane: Outputs) -> Float[Tensor, "source pair pos d_model"]:
        prompts = batch.prompts
        x = prompts.embed.new_zeros(len(graph.sources), len(prompts.last), functions.length, prompts.embed.shape[-1])
        for source, out in enumerate(by_lane["earlier"]):
            x[source, prompts.prompt, prompts.pos] = written(graph, functions, source, out)
        for source, out in enumerate(by_lane[stream]):
            x[source, torch.arange(len(out), device=out.device), prompts.last] = written(graph, functions, source, out)
        return x

    def by_layer(kind: int) -> Tensor | None:
        layers = [
            torch.cat([batch.clean.masks[layer][kind] for batch in batches])  # type: ignore[union-attr, misc]
            for layer in range(graph.n_layers)
        ]
        return torch.stack(layers)

    every = torch.cat([batch.rows for batch in batches])
    return every, Recorded(
        torch.cat([by_source(batch, outputs(batch.prompts, batch.clean)) for batch in batches], 1),  # type: ignore[arg-type]
        torch.cat([by_source(batch, batch.carried) for batch in batches], 1),
        torch.stack(functions.b_O),
        pairs.lengths[every].to(device_of(model)) - 1,
        by_layer(0) if gated else None,
        by_layer(1) if gated and not graph.attn_only else None,
    )
