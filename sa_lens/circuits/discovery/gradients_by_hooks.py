"""Passes with gradients: what sources write, the inputs in which edges end, and products of the two over all edges."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sa_lens.circuits.graph import PORTS, Graph, Input, Node
from sa_lens.circuits.metrics import Metric, metric_named
from sa_lens.circuits.running.circuit_by_hooks import Ablation, Written, instead, record_masks
from sa_lens.circuits.tasks.pairs import PromptPairs
from sa_lens.config import Stream
from sa_lens.core.host import Hook, Host, at_least_float32, device_of, gate_hook_names, in_stream, run_to_last, weight


class Batch(NamedTuple):
    """Pairs of one length with what their passes need."""

    pairs: PromptPairs
    clean: Int[Tensor, "pair pos"]
    """Clean prompts, on the model's device."""
    corrupt: Int[Tensor, "pair pos"]
    """Corrupt prompts, likewise."""
    group: Int[Tensor, "any pos"]
    """The corrupt prompts over which `mean` is taken: all of this length."""
    masks: dict[str, Tensor] | None
    """Masks of the unedited clean prompts, for frozen gates."""

    def over(self, ablation: Ablation) -> Int[Tensor, "any pos"]:
        """Corrupt prompts that tell what is carried under an ablation."""
        return self.group if ablation == "mean" else self.corrupt


def batches(model: Host, pairs: PromptPairs, stream: Stream, gates: str, batch_size: int) -> Iterator[Batch]:
    """The pairs in batches of one length."""
    device = device_of(model)
    names = gate_hook_names(model) if gates == "frozen" else []
    for _, group in pairs.by_length():
        every = group.corrupt.to(device)
        for rows in torch.arange(len(group)).split(batch_size):
            part = group.subset(rows)
            clean, masks = part.clean.to(device), None
            if names:
                with torch.no_grad(), in_stream(model, stream, position=-1):
                    masks = record_masks(model, clean, names)
            yield Batch(part, clean, part.corrupt.to(device), every, masks)


class EdgePass:
    """Hooks that keep what each source writes in one pass, and the inputs in which edges end.

    Args:
        embed: what the embedding is set to; None: the prompt's own.
    """

    def __init__(self, graph: Graph, embed: Float[Tensor, "pair pos d_model"] | None = None) -> None:
        self.graph, self.embed = graph, embed
        self.inputs: dict[str, Tensor] = {}
        self._written: dict[str, Tensor] = {}

    def hooks(self) -> list[Hook]:
        layers = range(self.graph.n_layers)
        first = "blocks.0.hook_resid_pre"
        sources = [f"blocks.{layer}.attn.hook_z" for layer in layers]
        sources += [] if self.graph.attn_only else [f"blocks.{layer}.hook_mlp_out" for layer in layers]
        return [
            (first, self._start),
            *((name, self._wrote) for name in sources),
            *((name, self._read) for name, _ in _ends(self.graph)),
        ]

    @property
    def written(self) -> Written:
        """What the sources wrote, without gradients."""
        found = list(self._written.values())
        z = [x for x in found[1:] if x.ndim == 4]
        return Written(found[0], z, [x for x in found[1:] if x.ndim == 3])

    def _start(self, x: Float[Tensor, "pair pos d_model"], hook: Any) -> Tensor:
        x = (x if self.embed is None else self.embed.expand_as(x)).detach()
        self._written[hook.name] = x
        return x.clone().requires_grad_() if torch.is_grad_enabled() else x

    def _wrote(self, x: Tensor, hook: Any) -> None:
        self._written[hook.name] = x.detach()

    def _read(self, x: Tensor, hook: Any) -> None:
        self.inputs[hook.name] = x


def _ends(graph: Graph) -> list[tuple[str, list[int]]]:
    """Hook points in which edges end, each with the inputs of the graph that it holds."""
    ends = []
    for layer in range(graph.n_layers):
        for port in PORTS:
            heads = [graph.input_index[Input(Node("head", layer, h), port)] for h in range(graph.n_heads)]
            ends.append((f"blocks.{layer}.hook_{port}_input", heads))
        if not graph.attn_only:
            ends.append((f"blocks.{layer}.hook_mlp_in", [graph.input_index[Input(Node("mlp", layer))]]))
    return [*ends, (f"blocks.{graph.n_layers - 1}.hook_resid_post", [graph.input_index[Input(Node("logits"))]])]


class EdgePasses:
    """The passes of one batch in the chosen stream; with live gates each has the clean pass that they read.

    Args:
        before: the batch before, whose means and zeros are taken over where they are the same.
    """

    def __init__(
        self,
        model: Host,
        graph: Graph,
        batch: Batch,
        ablation: Ablation,
        stream: Stream,
        gates: str,
        batch_size: int,
        before: EdgePasses | None = None,
    ) -> None:
        self.model, self.graph, self.batch, self.stream = model, graph, batch, stream
        self.carried: list[Written] = []
        """What ablated edges carry: in the stream and, with live gates, in the clean pass."""
        if before is not None and ablation != "resample" and before.batch.group is batch.group:
            self.carried = before.carried
            return
        streams: list[Stream] = [stream, "clean"] if gates == "live" else [stream]
        for one in streams:
            with torch.no_grad(), in_stream(model, one, position=-1):
                self.carried.append(instead(model, batch.over(ablation), ablation, batch_size))

    def run(
        self, hooks: Sequence[Hook] = (), embed: Tensor | None = None
    ) -> tuple[Float[Tensor, "pair d_vocab"], list[EdgePass]]:
        """Logits of a pass, and the records: of the pass itself, then with live gates of the clean pass.

        Args:
            hooks: further hooks of the pass itself.
            embed: what the embedding is set to, for all prompts once or several times over; None: the prompt's own.
        """
        times = 1 if embed is None else len(embed) // len(self.batch.clean)
        masks = self.batch.masks
        if masks is not None:
            masks = {name: torch.cat([mask] * times) for name, mask in masks.items()}
        records = [EdgePass(self.graph, embed) for _ in self.carried]
        in_clean_pass = [hook for record in records[1:] for hook in record.hooks()]
        with in_stream(self.model, self.stream, position=-1, masks=masks, clean_hooks=in_clean_pass):
            logits = run_to_last(self.model, self.batch.clean.repeat(times, 1), [*hooks, *records[0].hooks()])
        return logits, records

    def differences(self, records: Sequence[EdgePass]) -> list[Float[Tensor, "source pair pos d_model"]]:
        """What ablated edges carry minus what the sources wrote, for each record."""
        return [_sent(self.model, carried, one.written) for carried, one in zip(self.carried, records, strict=True)]


def _sent(model: Host, carried: Written, written: Written) -> Float[Tensor, "source pair pos d_model"]:
    carried, written = carried.map(at_least_float32), written.map(at_least_float32)
    parts = [(carried.embed - written.embed)[None]]
    for layer, z in enumerate(written.z):
        by_head = (carried.z[layer] - z).permute(2, 0, 1, 3)
        parts.append(by_head @ at_least_float32(weight(model, f"blocks.{layer}.attn.W_O").detach())[:, None])
        if written.mlp_out:
            parts.append((carried.mlp_out[layer] - written.mlp_out[layer])[None])
    return torch.cat(parts)


def products(
    graph: Graph, sent: Float[Tensor, "source pair pos d_model"], gradients: dict[str, Tensor]
) -> Float[Tensor, "input source"]:
    """Each edge's difference times the gradient at its input, summed over pairs, positions and the residual stream."""
    scores = torch.zeros(graph.exists.shape, dtype=torch.float64)
    flat = sent.flatten(1)
    for name, inputs in _ends(graph):
        g = at_least_float32(gradients[name])
        by_input = g.permute(2, 0, 1, 3).flatten(1) if g.ndim == 4 else g.flatten()[None]
        n = graph.n_sources[inputs[0]]
        scores[inputs, :n] = (by_input @ flat[:n].T).double().cpu()
    return scores


def check_differentiable(metric: str | Metric, pairs: PromptPairs, d_vocab: int) -> str:
    """The name of a metric that has a gradient.

    Raises:
        ValueError: another one.
    """
    logits = torch.linspace(-1, 1, d_vocab)[None].requires_grad_()
    name, function = metric_named(metric, torch.zeros(1, d_vocab))
    with torch.enable_grad():
        values = function(logits, pairs.subset([0]))
    if not values.requires_grad:
        raise ValueError(
            f"metric={name!r} has no gradient, being constant but for jumps: use 'logit_difference' or "
            "'answer_log_probability', or exact_effects, which takes any metric"
        )
    return name


def needs_gradient_at_clean(method: str, metric: str | Metric) -> None:
    """Checks that the metric is not the one whose gradient is 0 at the clean prompt.

    Raises:
        ValueError: it is.
    """
    if metric == "kl":
        raise ValueError(
            f"metric='kl' has no gradient at the clean prompt, where it is 0 and smallest, so {method} would give 0 "
            "everywhere: use 'logit_difference', eap_ig, which also goes elsewhere, or exact_effects"
        )
