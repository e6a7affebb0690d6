"""Patches of what the residual stream adds up: heads, outputs of attention and MLPs, and the stream itself.

Each changes the residual stream at one place by the difference of the two prompts. So a run starts at the layer of the
patch, and at its position: everything below and before is that of the unpatched prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from sa_lens.circuits.experiment import Experiment
from sa_lens.circuits.graph import Node
from sa_lens.circuits.running.recorded_passes import outputs, repeat_keys, repeat_masks, streams_by_lane
from sa_lens.circuits.tasks.pairs import PromptPairs
from sa_lens.core.last_position import (
    Lane,
    LastPass,
    Prompts,
    embed_prompts,
    read_as_it_is,
    run_edited,
    run_to_position,
)
from sa_lens.core.products import product

KINDS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "heads")
"""Kinds that are patched like this."""

_BLOCK = 2**20
"""Largest number of entries in the residual stream of all runs that go together."""


class Patch(NamedTuple):
    """One patch."""

    layer: int
    head: int | None
    """Head, if the kind is `heads`."""
    position: Int[Tensor, " pair"] | None
    """Position in each prompt; None: all positions."""


def why_not_patched_by_nodes(exp: Experiment, what: str) -> str | None:
    """Returns why patches of a kind need passes of the whole model, or None if they do not."""
    if what not in KINDS:
        return f"patches of {what} do more than add to the residual stream"
    if exp.masks == "live" and exp.model.gates.reads_global:  # type: ignore[attr-defined]
        return "live gates that read the end of the clean stream choose again in all layers"
    return exp.why_not_by_nodes


class PatchedRuns:
    """Patched runs of pairs of one length.

    Args:
        base: prompts that run.
        source: prompts of which values are put in.
    """

    def __init__(
        self,
        exp: Experiment,
        what: str,
        pairs: PromptPairs,
        base: Int[Tensor, "pair pos"],
        source: Int[Tensor, "pair pos"],
        clean_logits: Float[Tensor, "pair d_vocab"],
    ) -> None:
        self.exp, self.what, self.pairs, self.clean_logits = exp, what, pairs, clean_logits
        self.graph, self.functions = exp.graph, exp.nodes
        self.prompts = Prompts.of(*embed_prompts(exp.model, [base]))
        ablated = exp.stream == "ablated"
        self.base = run_to_position(exp.model, self.functions, self.prompts, ablated=ablated)
        other = Prompts.of(*embed_prompts(exp.model, [source]))
        self.source = run_to_position(exp.model, self.functions, other, ablated=ablated)
        self.streams = streams_by_lane(self.graph, self.functions, outputs(self.prompts, self.base))
        self.source_streams = (
            streams_by_lane(self.graph, self.functions, outputs(other, self.source)) if "resid" in what else {}
        )
        self.lanes: tuple[Lane, ...] = ("earlier", "clean", "ablated") if ablated else ("earlier", "clean")

    def sums(self, patches: Sequence[Patch], bar: tqdm[Any]) -> Float[Tensor, " patch"]:
        """Returns the sum of the metric over the pairs after each patch."""
        pairs, length, width = self.prompts.embed.shape
        size = max(1, min(64, _BLOCK // (pairs * length * width)))
        sums: list[float] = []
        first = 0
        while first < len(patches):
            block = [p for p in patches[first : first + size] if p.layer == patches[first].layer]
            logits = self.functions.logits(self._finals(block)).split(pairs)
            sums += [float(self.exp.metric(x, self.pairs, self.clean_logits).double().sum()) for x in logits]
            bar.update(len(block) * pairs)
            first += len(block)
        return torch.tensor(sums, dtype=torch.float64)

    def _finals(self, block: Sequence[Patch]) -> Float[Tensor, "patch_pair d_model"]:
        """Returns the final residual stream after each of some patches of one layer."""
        n, layer, last, top = len(block), block[0].layer, self.prompts.last, self.graph.n_layers
        start = layer + (self.what in ("resid_post", "mlp_out"))
        below = self.graph.sources_before(Node("head", start, 0) if start < top else Node("logits"))
        firsts = [torch.zeros_like(last) if p.position is None else p.position for p in block]
        entering: dict[Lane, list[Tensor]] = {lane: [] for lane in self.lanes}
        changes: dict[Lane, list[Tensor]] = {lane: [] for lane in self.lanes}
        for patch, first in zip(block, firsts, strict=True):
            for lane in self.lanes:
                # the earlier lane ends below the top layer
                x = self.streams[lane][min(below, max(self.streams[lane]))]
                change = self._change(patch, lane)
                change = torch.zeros_like(x) if change is None else change
                pair, pos = self.prompts.prompt, self.prompts.pos
                place = pos - first[pair] if lane == "earlier" else last - first
                if patch.position is not None:
                    change = change * (place == 0)[:, None]
                entering[lane].append(x[place >= 0])
                changes[lane].append(change[place >= 0])
        into = {lane: torch.cat(parts) for lane, parts in entering.items()}
        change_of = {lane: torch.cat(parts) for lane, parts in changes.items()}
        in_the_middle = start == layer and self.what != "resid_pre"
        if not in_the_middle:
            into = {lane: x + change_of[lane] for lane, x in into.items()}
        return run_edited(
            *(self.exp.model, self.functions),
            Prompts.of(self.prompts.embed.repeat(n, 1, 1), last.repeat(n), torch.cat(firsts)),
            read_as_it_is,
            ablated=self.exp.stream == "ablated",
            before=repeat_keys(self.base.keys_and_values, n),
            masks=None if self.exp.masks == "live" else repeat_masks(self.base.masks, n),
            start=start,
            entering=into,
            added=change_of if in_the_middle else None,
        ).final[self.exp.stream]

    def _change(self, patch: Patch, lane: Lane) -> Float[Tensor, "row d_model"] | None:
        """Returns the other prompt's value minus the own one, in the residual stream; None where it comes too late."""
        layer = patch.layer
        if "resid" in self.what:
            place = {"resid_pre": Node("head", layer, 0), "resid_mid": Node("mlp", layer)}.get(self.what)
            if place is None:
                place = Node("head", layer + 1, 0) if layer + 1 < self.graph.n_layers else Node("logits")
            n = self.graph.sources_before(place)
            return self.source_streams[lane][n] - self.streams[lane][n] if n in self.streams[lane] else None

        def values(run: LastPass) -> Tensor | None:
            by_layer = run.mlp_out[lane] if self.what == "mlp_out" else run.z[lane]
            return by_layer[layer] if layer < len(by_layer) else None

        own, other = values(self.base), values(self.source)
        if own is None or other is None:
            return None
        W_O = self.functions.W_O[layer]
        match self.what:
            case "heads":
                return product(other[:, patch.head] - own[:, patch.head], W_O[patch.head])
            case "attn_out":
                return product((other - own).flatten(1), W_O.flatten(0, 1))
        return other - own
