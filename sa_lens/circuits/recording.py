"""What a search for circuits needs of whole passes: activations of both prompts, masks, and the metric."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from sa_lens.circuits.costs import Cost, KLCost, LogitsCost
from sa_lens.circuits.graph import Graph
from sa_lens.circuits.live import Recorded
from sa_lens.circuits.metrics import Metric
from sa_lens.circuits.pairs import PromptPairs
from sa_lens.circuits.recompute import Recomputation
from sa_lens.circuits.running import Ablation, Written, instead, record_masks, record_written
from sa_lens.config import Stream
from sa_lens.core.host import Host, device_of, gate_hook_names, in_stream, weight
from sa_lens.core.nodes import NodeFunctions, split_inputs


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
    order, recorded = record(model, graph, pairs, ablation, stream, batch_size)
    functions = NodeFunctions(model, recorded.written.shape[2])
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
    model: Host, graph: Graph, pairs: PromptPairs, ablation: Ablation, stream: Stream, batch_size: int
) -> tuple[Tensor, Recorded]:
    """Activations of all sources on both prompts, pairs ordered by length; and that order."""
    device = device_of(model)
    names = gate_hook_names(model) if stream == "ablated" else []
    longest = int(pairs.lengths.max())
    order, written, carried, masks = [], [], [], []
    with split_inputs(model), in_stream(model, stream, position=-1):
        for rows, group in pairs.by_length():
            clean = group.clean.to(device)
            order.append(rows)
            for part in clean.split(batch_size):
                written.append(_by_source(model, record_written(model, part), longest))
                masks.append({name: m[:, -1] for name, m in record_masks(model, part, names).items()})
            given = _by_source(model, instead(model, group.corrupt.to(device), ablation, batch_size), longest)
            carried.append(given.expand(-1, len(rows), -1, -1))
    joined = {name: torch.cat([m[name] for m in masks]) for name in names}
    attn, mlp = ([joined[name] for name in names if kind in name] for kind in ("attn_gate", "mlp_gate"))
    every = torch.cat(order)
    return every, Recorded(
        torch.cat(written, 1),
        torch.cat(carried, 1),
        torch.stack([weight(model, f"blocks.{layer}.attn.b_O").detach() for layer in range(graph.n_layers)]),
        pairs.lengths[every].to(device) - 1,
        torch.stack(attn) if attn else None,
        torch.stack(mlp) if mlp else None,
    )


def _by_source(model: Host, found: Written, length: int) -> Float[Tensor, "source pair pos d_model"]:
    """What each source writes, padded on the right to `length` positions."""
    parts = [found.embed[None]]
    for layer, z in enumerate(found.z):
        parts.append(z.permute(2, 0, 1, 3) @ weight(model, f"blocks.{layer}.attn.W_O")[:, None])
        if found.mlp_out:
            parts.append(found.mlp_out[layer][None])
    joined = torch.cat(parts)
    return F.pad(joined, (0, 0, 0, length - joined.shape[2]))
