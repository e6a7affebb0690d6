"""Unedited passes of pairs: logits at the end of each prompt, and what every source writes on both prompts.

`record` runs whole passes under hooks and works for every model. `passes_of_pairs` runs nodes one by one, with prompts
of all lengths together, for models whose nodes can be run like this.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sa_lens.circuits.graph import Graph, Node
from sa_lens.circuits.tasks.pairs import PromptPairs
from sa_lens.config import Ablation, Stream
from sa_lens.core.host import Host, device_of, in_stream, run_to_last
from sa_lens.core.last_position import (
    Lane,
    LastPass,
    Prompts,
    embed_prompts,
    run_to_position,
    why_not_by_nodes,
)
from sa_lens.core.nodes import NodeFunctions
from sa_lens.core.products import product

Outputs = dict[Lane, list[Float[Tensor, "row width"]]]
"""The output of each source by lane, in the order of the graph: `z` of a head, what the embedding and MLPs write."""


def record(
    model: Host, tokens: Int[Tensor, "pair pos"], names: Iterable[str]
) -> tuple[Float[Tensor, "pair d_vocab"], dict[str, Tensor]]:
    """Returns the logits at the end of an unedited pass of the current stream, and its activations by hook name."""
    activations: dict[str, Tensor] = {}

    def keep(x: Tensor, hook: Any) -> None:
        activations[hook.name] = x.detach()

    logits = run_to_last(model, tokens, [(name, keep) for name in names])
    return logits, activations


def last_logits(
    model: Host,
    pairs: PromptPairs,
    stream: Stream = "clean",
    prompt: Literal["clean", "corrupt"] = "clean",
    *,
    batch_size: int = 256,
) -> Float[Tensor, "pair d_vocab"]:
    """Returns the logits at the end of each prompt, without gradients.

    In the ablated stream the masks act at the last position.

    Args:
        prompt: the `clean` or the `corrupt` prompts.
        batch_size: number of prompts in one pass.
    """
    pairs.check_fits(model.cfg, batch_size)
    parts, rows = [], []
    with torch.no_grad(), in_stream(model, stream, position=-1):
        if pairs.uniform or why_not_by_nodes(model) is not None:
            for chosen, group in pairs.by_length(batch_size):
                tokens = group.clean if prompt == "clean" else group.corrupt
                parts.append(run_to_last(model, tokens.to(device_of(model))))
                rows.append(chosen)
    if not parts:
        functions = NodeFunctions(model, int(pairs.lengths.max()))
        for chosen, prompts in prompts_in_batches(model, pairs, prompt, batch_size):
            final = run_to_position(model, functions, prompts, ablated=stream == "ablated").final[stream]
            parts.append(functions.logits(final))
            rows.append(chosen)
    return torch.cat(parts)[torch.cat(rows).argsort().to(parts[0].device)]


def prompts_in_batches(
    model: Host, pairs: PromptPairs, prompt: Literal["clean", "corrupt"], batch_size: int
) -> Iterator[tuple[Int[Tensor, " pair"], Prompts]]:
    """Yields indices of pairs, ordered by length, and their clean or corrupt prompts."""
    for rows in pairs.lengths.argsort(stable=True).split(batch_size):
        groups = [group for _, group in pairs.subset(rows).by_length()]
        tokens = [group.clean if prompt == "clean" else group.corrupt for group in groups]
        yield rows, Prompts.of(*embed_prompts(model, [x.to(device_of(model)) for x in tokens]))


class PassesOfPairs(NamedTuple):
    """Unedited passes of a batch of pairs."""

    rows: Int[Tensor, " pair"]
    """Index of each pair among all pairs."""
    prompts: Prompts
    """The clean prompts."""
    first: Int[Tensor, " pair"]
    """First position at which absent and present edges may carry different values."""
    clean: LastPass
    """The pass of the clean prompts."""
    carried: Outputs
    """Values that absent edges carry."""

    @property
    def changing(self) -> Bool[Tensor, " row"]:
        """Whether absent edges may carry other values, for each row of the earlier lane."""
        return self.prompts.pos >= self.first[self.prompts.prompt]


def passes_of_pairs(
    model: Host, functions: NodeFunctions, pairs: PromptPairs, ablation: Ablation, stream: Stream, batch_size: int
) -> list[PassesOfPairs]:
    """Returns the passes of all pairs, ordered by length, in batches."""
    batches = []
    ablated = stream == "ablated"
    sides = (prompts_in_batches(model, pairs, side, batch_size) for side in ("clean", "corrupt"))
    for (rows, clean_prompts), (_, corrupt_prompts) in zip(*sides, strict=True):
        differ = _first_difference(pairs.subset(rows))
        corrupt = run_to_position(model, functions, corrupt_prompts, ablated=ablated)
        batches.append(
            PassesOfPairs(
                rows,
                clean_prompts,
                (differ if ablation == "resample" else torch.zeros_like(differ)).to(device_of(model)),
                run_to_position(model, functions, clean_prompts, ablated=ablated),
                outputs(corrupt_prompts, corrupt),
            )
        )
    if ablation == "resample":
        return batches
    keys = {lane: [_length_and_position(batch.prompts, lane) for batch in batches] for lane in batches[0].carried}
    carried = {
        lane: [
            torch.zeros_like(torch.cat(parts))
            if ablation == "zero"
            else _means(torch.cat(parts), torch.cat(keys[lane]))
            for parts in zip(*(batch.carried[lane] for batch in batches), strict=True)
        ]
        for lane in batches[0].carried
    }
    split = {
        lane: [x.split([len(key) for key in keys[lane]]) for x in by_source] for lane, by_source in carried.items()
    }
    return [
        batch._replace(carried={lane: [parts[i] for parts in by_source] for lane, by_source in split.items()})
        for i, batch in enumerate(batches)
    ]


def _first_difference(pairs: PromptPairs) -> Int[Tensor, " pair"]:
    """Returns the first position at which the two prompts of each pair differ."""
    padding = int(pairs.lengths.max()) - pairs.lengths
    return (pairs.clean != pairs.corrupt).float().argmax(1) - padding


def _length_and_position(prompts: Prompts, lane: Lane) -> Int[Tensor, "row 2"]:
    if lane == "earlier":
        return torch.stack([prompts.last[prompts.prompt], prompts.pos], 1)
    return torch.stack([prompts.last, prompts.last], 1)


def _means(x: Float[Tensor, "row width"], key: Int[Tensor, "row 2"]) -> Float[Tensor, "row width"]:
    """Returns, for each row, the mean over the rows with the same key."""
    _, group, counts = key.unique(dim=0, return_inverse=True, return_counts=True)
    sums = x.new_zeros(len(counts), x.shape[1]).index_add_(0, group, x)
    return (sums / counts[:, None])[group]


def outputs(prompts: Prompts, run: LastPass) -> Outputs:
    """Returns the output of each source in a pass; the earlier lane ends below the top layer."""
    by_source: Outputs = {}
    for lane, z in run.z.items():
        by_source[lane] = [prompts.rows(lane, prompts.embed)]
        for layer, heads in enumerate(z):
            by_source[lane] += list(heads.unbind(1))
            by_source[lane] += run.mlp_out[lane][layer : layer + 1]
    return by_source


def write_to_stream(graph: Graph, functions: NodeFunctions, source: int, out: Float[Tensor, "... width"]) -> Tensor:
    """Returns what a source writes to the residual stream, given its output."""
    node = graph.sources[source]
    return product(out, functions.W_O[node.layer][node.head]) if node.kind == "head" else out


def residual_streams(
    graph: Graph, by_source: Sequence[Float[Tensor, "... d_model"]], b_O: Sequence[Float[Tensor, " d_model"]]
) -> dict[int, Float[Tensor, "... d_model"]]:
    """Returns the residual stream after the first n sources, for every n at which a node reads it.

    Args:
        by_source: what each source writes; if only the first sources are given, the streams above them are left out.
        b_O: output bias of each attention layer, which belongs to no source.
    """
    streams: dict[int, Tensor] = {}
    total = torch.zeros_like(by_source[0])
    added = biased = 0
    for node in (*graph.sources[1:], Node("logits")):
        n = graph.sources_before(node)
        if n > len(by_source):
            break
        if n in streams:
            continue
        layers = graph.n_layers if node.kind == "logits" else node.layer
        layers += node.kind == "mlp" and not graph.parallel
        for x in (*by_source[added:n], *b_O[biased:layers]):
            total = total + x
        added, biased = n, max(biased, layers)
        streams[n] = total
    return streams


def streams_by_lane(
    graph: Graph, functions: NodeFunctions, by_lane: Outputs
) -> dict[Lane, dict[int, Float[Tensor, "row d_model"]]]:
    """Returns `residual_streams` of each lane of a pass, given the output of each source."""
    return {
        lane: residual_streams(
            graph,
            [write_to_stream(graph, functions, source, out) for source, out in enumerate(by_source)],
            functions.b_O,
        )
        for lane, by_source in by_lane.items()
    }
