"""Runs of a circuit under hooks: edges outside it carry activations of the corrupt prompt, zeros or means.

These whole passes define a run of a circuit; every fast path agrees with them. The input of every destination is that
of an ordinary pass plus, for each edge outside the circuit, (what the edge carries instead - what its source writes in
the same pass). So every node is computed once, from its own inputs.

In the ablated stream this is the pass of `model.ablated(position=-1)`. Frozen masks are those of the unedited clean
prompt. Live gates read the residual stream of a clean pass under the same edits (with the corrupt, zero or mean
activations of the clean stream); gates with scores `ablated` read that of the edited pass itself. A gate is not a
destination: it always reads its whole stream. Runs of the corrupt prompt have their own masks in either case.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sa_lens.circuits.experiment import Experiment, analysis
from sa_lens.circuits.graph import Circuit, Graph, Node, input_hooks, source_hooks
from sa_lens.circuits.running.recorded_passes import record
from sa_lens.circuits.tasks.pairs import PromptPairs
from sa_lens.config import Ablation, Stream
from sa_lens.core.host import Hook, Host, device_of, gate_hook_names, in_stream, run_to_last, weight
from sa_lens.core.nodes import split_inputs

Activations = dict[str, Tensor]
"""Activations of a pass by hook name."""


class Batch(NamedTuple):
    """Pairs of one length, with all that their passes need."""

    rows: Int[Tensor, " pair"]
    """Place of each pair among all."""
    pairs: PromptPairs
    clean: Int[Tensor, "pair pos"]
    """Clean prompts, on the model's device."""
    masks: Activations | None
    """Masks of the unedited clean prompts, if masks are frozen."""
    carried: list[Activations]
    """Activations that ablated edges carry, one row per prompt or one for all: those of the stream, and those of the
    clean pass if live gates read one."""


def batches(exp: Experiment, names: Iterable[str]) -> Iterator[Batch]:
    """Yields the pairs in batches of one length.

    Args:
        names: hook points at which `carried` is recorded.
    """
    model, device = exp.model, device_of(exp.model)
    names = list(names)
    for rows, group in exp.pairs.by_length():
        shared = _carried(exp, group.corrupt, names) if exp.ablation != "resample" else None
        for part in torch.arange(len(rows)).split(exp.batch_size):
            pairs = group.subset(part)
            clean, masks = pairs.clean.to(device), None
            if exp.masks == "frozen":
                with torch.no_grad(), in_stream(model, exp.stream, position=-1):
                    masks = record(model, clean, gate_hook_names(model))[1]
            carried = _carried(exp, pairs.corrupt, names) if shared is None else shared
            yield Batch(rows[part], pairs, clean, masks, carried)


def _carried(exp: Experiment, corrupt: Int[Tensor, "pair pos"], names: list[str]) -> list[Activations]:
    carried = []
    streams: tuple[Stream, ...] = (exp.stream, "clean") if exp.edits_clean_pass else (exp.stream,)
    for stream in streams:
        with torch.no_grad(), in_stream(exp.model, stream, position=-1):
            carried.append(_ablation_values(exp.model, corrupt, names, exp.ablation, exp.batch_size))
    return carried


def _ablation_values(
    model: Host, corrupt: Int[Tensor, "pair pos"], names: list[str], ablation: Ablation, batch_size: int
) -> Activations:
    """Returns the activations that ablated edges carry, in the current stream."""
    # for zeros one prompt shows the shapes
    parts = corrupt[:1].split(1) if ablation == "zero" else corrupt.split(batch_size)
    runs = [record(model, part.to(device_of(model)), names)[1] for part in parts]
    joined = {name: torch.cat([run[name] for run in runs]) for name in names}
    if ablation == "zero":
        return {name: torch.zeros_like(x) for name, x in joined.items()}
    return {name: x.mean(0, keepdim=True) for name, x in joined.items()} if ablation == "mean" else joined


class EdgeHooks:
    """Makes the hooks under which one pass runs a circuit.

    Args:
        outside: True for the edges outside the circuit.
        carried: activations that these edges carry.
    """

    def __init__(self, model: Host, graph: Graph, outside: Bool[Tensor, "input source"], carried: Activations) -> None:
        self.graph, self.carried = graph, carried
        embed = carried["blocks.0.hook_resid_pre"]
        self.outside = outside.to(device_of(model), embed.dtype)
        self.W_O = [weight(model, f"blocks.{layer}.attn.W_O") for layer in range(graph.n_layers)]
        self.change: Tensor | None = None
        """(carried - written in this pass) of the sources so far, `[source, pair, pos, d_model]`."""

    def hooks(self) -> list[Hook]:
        """Returns the hooks as pairs of name and function."""
        edits = {name: self._edit(inputs) for name, inputs in input_hooks(self.graph).items()}
        return [*((name, self._wrote) for name in source_hooks(self.graph)), *edits.items()]

    def _wrote(self, x: Tensor, hook: Any) -> None:
        if hook.name == "blocks.0.hook_resid_pre":
            self.change = x.new_zeros(len(self.graph.sources), *x.shape)
            self.change[0] = self.carried[hook.name] - x
            return
        assert self.change is not None
        layer, change = hook.layer(), self.carried[hook.name] - x
        if x.ndim == 4:
            first = self.graph.source_index[Node("head", layer, 0)]
            self.change[first : first + x.shape[2]] = change.permute(2, 0, 1, 3) @ self.W_O[layer][:, None]
        else:
            self.change[self.graph.source_index[Node("mlp", layer)]] = change

    def _edit(self, inputs: list[int]) -> Callable[..., Tensor]:
        n = self.graph.n_sources[inputs[0]]

        def edit(x: Tensor, hook: Any) -> Tensor:
            assert self.change is not None
            if x.ndim == 4:
                return x + torch.einsum("hs,spqd->pqhd", self.outside[inputs, :n], self.change[:n])
            return x + torch.einsum("s,spqd->pqd", self.outside[inputs[0], :n], self.change[:n])

        return edit


class CircuitRunner:
    """Runs many circuits of an experiment; the activations that ablated edges carry are computed once."""

    def __init__(self, exp: Experiment) -> None:
        self.exp, self.graph = exp, exp.graph
        with torch.no_grad(), split_inputs(exp.model):
            self._batches = list(batches(exp, source_hooks(self.graph)))

    def __call__(self, mask: Bool[Tensor, "input source"]) -> Float[Tensor, "pair d_vocab"]:
        """Returns the logits at the end of each clean prompt, for the circuit with these edges."""
        outside = self.graph.exists & ~mask
        logits, rows = [], []
        with torch.no_grad(), split_inputs(self.exp.model):
            for batch in self._batches:
                edits = EdgeHooks(self.exp.model, self.graph, outside, batch.carried[0]).hooks()
                with self._stream(batch, outside):
                    logits.append(run_to_last(self.exp.model, batch.clean, edits))
                rows.append(batch.rows)
        return torch.cat(logits)[torch.cat(rows).argsort().to(logits[0].device)]

    def _stream(self, batch: Batch, outside: Tensor) -> AbstractContextManager[Any]:
        in_clean_pass = [
            hook
            for carried in batch.carried[1:]
            for hook in EdgeHooks(self.exp.model, self.graph, outside, carried).hooks()
        ]
        return self.exp.in_edited_pass(batch.masks, in_clean_pass)


@analysis
def run_circuit(exp: Experiment, circuit: Circuit) -> Float[Tensor, "pair d_vocab"]:
    """Runs a circuit: returns the logits at the end of the clean prompts when only its edges carry them.

    The full circuit gives the logits of the unedited clean prompts; with `resample` the empty circuit gives those of
    the corrupt prompts. There are no gradients, and the model's settings stay as they were.

    Raises:
        ValueError: the circuit belongs to another graph.
    """
    circuit.check_fits(exp.graph)
    return CircuitRunner(exp)(circuit.mask)
