"""Scores of all edges from passes with gradients, node by node; they equal those of `gradients_by_hooks`.

Prompts of all lengths run together, and only from the first position on at which an absent edge may carry something
else; for models whose nodes can be run one by one (`last_position.why_not_by_nodes`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from sa_lens.circuits.experiment import Experiment
from sa_lens.circuits.graph import PORTS, Graph, Node
from sa_lens.circuits.running.recorded_passes import PassesOfPairs, outputs, write_to_stream
from sa_lens.core.last_position import Lane, Prompts, run_edited
from sa_lens.core.nodes import NodeFunctions

Reader = tuple[Lane, int, Literal["heads", "mlp", "logits"]]
"""Lane, layer and kind of the nodes that read."""


def scores_by_nodes(
    exp: Experiment, points: Sequence[float], done: Callable[[int], object]
) -> tuple[Float[Tensor, "input source"], float]:
    """Returns each edge's difference times the derivative at its input, and the metric, as sums over pairs and points.

    The points lie on the line from the ablated to the clean embedding.

    Args:
        done: called with the number of passes that have just been done.
    """
    graph, functions = exp.graph, exp.nodes
    scores, value = torch.zeros(graph.exists.shape, dtype=torch.float64), 0.0
    for batch in exp.passes:
        pairs, clean = exp.pairs.subset(batch.rows), batch.clean
        clean_logits = functions.logits(clean.final[exp.stream])
        value += float(exp.metric(clean_logits, pairs, clean_logits).double().sum())
        prompts = Prompts.of(batch.prompts.embed, batch.prompts.last, batch.first)
        end = prompts.embed
        start = end.clone()
        start[batch.prompts.prompt, batch.prompts.pos] = batch.carried["earlier"][0]
        start[torch.arange(len(pairs), device=end.device), prompts.last] = batch.carried[exp.stream][0]
        gradients: dict[Reader, Tensor] = {}
        for point in points:
            inputs = _Inputs(graph.n_heads)
            with torch.enable_grad():
                final = run_edited(
                    *(exp.model, functions),
                    prompts._replace(embed=(start + point * (end - start)).requires_grad_()),
                    inputs,
                    ablated=exp.stream == "ablated",
                    before=clean.keys_and_values,
                    masks=clean.masks if exp.masks == "frozen" else None,
                ).final[exp.stream]
                logits = functions.logits(final)
                total = exp.metric(logits, pairs, clean_logits).sum()
                by_input = torch.autograd.grad(total, list(inputs.of.values()), materialize_grads=True)
            for reader, gradient in zip(inputs.of, by_input, strict=True):
                gradients[reader] = gradients[reader] + gradient if reader in gradients else gradient
            done(len(pairs))
        sent = _differences(graph, functions, batch)
        for reader, gradient in gradients.items():
            scores += _products(graph, reader, sent[reader[0]], gradient)
    return scores, value


class _Inputs:
    """Records the inputs of a pass at which edges end."""

    def __init__(self, n_heads: int) -> None:
        self.n_heads = n_heads
        self.of: dict[Reader, Tensor] = {}

    def __call__(self, lane: Lane, layer: int, kind: Literal["heads", "mlp", "logits"], x: Tensor) -> Tensor:
        own = x.expand(len(PORTS), self.n_heads, *x.shape) if kind == "heads" else x.view_as(x)
        self.of[lane, layer, kind] = own
        return own


def _differences(
    graph: Graph, functions: NodeFunctions, batch: PassesOfPairs
) -> dict[Lane, Float[Tensor, "source row d_model"]]:
    """Returns what ablated edges carry minus what the sources wrote, at the positions that are run."""
    wrote = outputs(batch.prompts, batch.clean)
    differences = {}
    for lane, carried in batch.carried.items():
        parts = [x - y for x, y in zip(carried, wrote[lane], strict=True)]
        if lane == "earlier":
            parts = [x[batch.changing] for x in parts]
        differences[lane] = torch.stack(
            [write_to_stream(graph, functions, source, x) for source, x in enumerate(parts)]
        )
    return differences


def _products(
    graph: Graph, reader: Reader, sent: Float[Tensor, "source row d_model"], gradient: Tensor
) -> Float[Tensor, "input source"]:
    """Returns differences times the gradient at the inputs of these nodes, summed over rows and d_model."""
    _, layer, kind = reader
    if kind == "heads":
        heads = [graph.inputs_of[Node("head", layer, head)] for head in range(graph.n_heads)]
        inputs = [of_head[port] for port in range(len(PORTS)) for of_head in heads]
    else:
        inputs = graph.inputs_of[Node("logits") if kind == "logits" else Node("mlp", layer)]
    n = graph.n_sources[inputs[0]]
    scores = torch.zeros(graph.exists.shape, dtype=torch.float64)
    scores[inputs, :n] = (gradient.reshape(len(inputs), -1) @ sent[:n].flatten(1).T).double().cpu()
    return scores
