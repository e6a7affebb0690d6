"""Scores of all edges from passes of the whole model with gradients, under hooks; for any model with hook points."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sa_lens.circuits.experiment import Experiment
from sa_lens.circuits.graph import Graph, input_hooks, source_hooks
from sa_lens.circuits.running.circuit_by_hooks import Activations, Batch, batches
from sa_lens.core.host import Hook, Host, at_least_float32, run_to_last, weight
from sa_lens.core.nodes import split_inputs


def scores_by_hooks(
    exp: Experiment, points: Sequence[float], rules: Sequence[Hook], done: Callable[[int], object]
) -> tuple[Float[Tensor, "input source"], float]:
    """Returns what `gradients_by_nodes.scores_by_nodes` returns, for any model with hook points.

    Args:
        rules: further hooks of the passes.
    """
    graph = exp.graph
    scores, value = torch.zeros(graph.exists.shape, dtype=torch.float64), 0.0
    with split_inputs(exp.model):
        for batch in batches(exp, source_hooks(graph)):
            n = len(batch.pairs)
            clean_logits = clean = None
            if points != [1.0]:
                with torch.no_grad():
                    clean_logits, clean = _run(exp, batch)
            gradients: list[Tensor] = []
            copies = max(1, exp.batch_size // n)
            for first in range(0, len(points), copies):
                together = points[first : first + copies]
                embed = None
                if clean is not None:
                    start, end = batch.carried[0][_EMBED], clean[0].written[_EMBED]
                    embed = torch.cat([start + point * (end - start) for point in together])
                with torch.enable_grad():
                    logits, passes = _run(exp, batch, rules, embed)
                    if clean_logits is None or clean is None:
                        clean_logits, clean = logits.detach(), passes
                    inputs = [x for run in passes for x in run.inputs.values()]
                    values = [exp.metric(part, batch.pairs, clean_logits).sum() for part in logits.split(n)]
                    by_input = torch.autograd.grad(torch.stack(values).sum(), inputs, materialize_grads=True)
                # their sum, so that the products, which cost as much as a pass, are taken once
                sums = [at_least_float32(x).unflatten(0, (len(together), n)).sum(0) for x in by_input]
                gradients = [a + b for a, b in zip(gradients, sums, strict=True)] if gradients else sums
                done(n * len(together))
            assert clean_logits is not None
            assert clean is not None
            value += float(exp.metric(clean_logits, batch.pairs, clean_logits).double().sum())
            by_name = iter(gradients)
            for run, carried in zip(clean, batch.carried, strict=True):
                sent = _differences(exp.model, graph, carried, run.written)
                scores += _products(graph, sent, {name: next(by_name) for name in run.inputs})
    return scores, value


_EMBED = "blocks.0.hook_resid_pre"


class _EdgePass:
    """Hooks that record what each source writes in one pass, and the inputs at which edges end.

    Args:
        embed: what the embedding is set to; None: the prompt's own.
    """

    def __init__(self, graph: Graph, embed: Float[Tensor, "pair pos d_model"] | None) -> None:
        self.graph, self.embed = graph, embed
        self.inputs: dict[str, Tensor] = {}
        self.written: Activations = {}

    def hooks(self) -> list[Hook]:
        return [
            *((name, self._wrote) for name in source_hooks(self.graph)),
            *((name, self._read) for name in input_hooks(self.graph)),
        ]

    def _wrote(self, x: Tensor, hook: Any) -> Tensor | None:
        if hook.name == _EMBED and self.embed is not None:
            x = self.embed
        self.written[hook.name] = x.detach()
        if hook.name != _EMBED:
            return None
        return x.detach().clone().requires_grad_() if torch.is_grad_enabled() else x

    def _read(self, x: Tensor, hook: Any) -> None:
        self.inputs[hook.name] = x


def _run(
    exp: Experiment, batch: Batch, rules: Sequence[Hook] = (), embed: Tensor | None = None
) -> tuple[Float[Tensor, "pair d_vocab"], list[_EdgePass]]:
    """Returns the logits of a pass, and the records of the pass and of the clean pass that live gates read, if any.

    Args:
        rules: further hooks of the pass itself.
        embed: what the embedding is set to, for all prompts once or several times over; None: the prompt's own.
    """
    times = 1 if embed is None else len(embed) // len(batch.clean)
    masks = batch.masks
    if masks is not None:
        masks = {name: torch.cat([mask] * times) for name, mask in masks.items()}
    passes = [_EdgePass(exp.graph, embed) for _ in batch.carried]
    in_clean_pass = [hook for record in passes[1:] for hook in record.hooks()]
    with exp.in_edited_pass(masks, in_clean_pass):
        logits = run_to_last(exp.model, batch.clean.repeat(times, 1), [*rules, *passes[0].hooks()])
    return logits, passes


def _differences(
    model: Host, graph: Graph, carried: Activations, written: Activations
) -> Float[Tensor, "source pair pos d_model"]:
    """Returns what ablated edges carry minus what the sources wrote."""
    parts = []
    for name in source_hooks(graph):
        change = at_least_float32(carried[name]) - at_least_float32(written[name])
        if change.ndim == 4:
            W_O = at_least_float32(weight(model, name.replace("hook_z", "W_O")).detach())
            parts.append(change.permute(2, 0, 1, 3) @ W_O[:, None])
        else:
            parts.append(change[None])
    return torch.cat(parts)


def _products(
    graph: Graph, sent: Float[Tensor, "source pair pos d_model"], gradients: dict[str, Tensor]
) -> Float[Tensor, "input source"]:
    """Returns each edge's difference times the gradient at its input, summed over pairs, positions and d_model."""
    scores = torch.zeros(graph.exists.shape, dtype=torch.float64)
    flat = sent.flatten(1)
    for name, inputs in input_hooks(graph).items():
        g = at_least_float32(gradients[name])
        by_input = g.permute(2, 0, 1, 3).flatten(1) if g.ndim == 4 else g.flatten()[None]
        n = graph.n_sources[inputs[0]]
        scores[inputs, :n] = (by_input @ flat[:n].T).double().cpu()
    return scores
