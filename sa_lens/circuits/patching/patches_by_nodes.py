"""Patches of what the residual stream adds up: heads, outputs of attention and MLPs, and the stream itself.

Each changes the residual stream at one place by the difference of the two prompts. So a run starts above the layer of
the patch, and at its position: everything below and before is that of the unpatched prompt. Nothing runs for a pair
whose prompts still agree at the position.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from sa_lens.circuits.experiment import Experiment
from sa_lens.circuits.graph import Node
from sa_lens.circuits.running.recorded_passes import outputs, streams_by_lane
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
        self.differ = (base != source).float().argmax(1)
        """First position at which the two prompts of each pair differ."""
        self.logits = self.functions.logits(self.base.final[exp.stream])
        """Logits of the unpatched prompts."""

    def sums(self, patches: Sequence[Patch], bar: tqdm[Any]) -> Float[Tensor, " patch"]:
        """Returns the sum of the metric over the pairs after each patch."""
        pairs, length, width = self.prompts.embed.shape
        size = max(1, min(64, _BLOCK // (pairs * length * width)))
        sums: list[float] = []
        first = 0
        while first < len(patches):
            block = [p for p in patches[first : first + size] if p.layer == patches[first].layer]
            changed = torch.cat([self._changed_pairs(patch) for patch in block])
            logits = self.logits.repeat(len(block), 1)
            if changed.any():
                logits[changed] = self.functions.logits(self._finals(block))
            sums += [
                float(self.exp.metric(x, self.pairs, self.clean_logits).double().sum()) for x in logits.split(pairs)
            ]
            bar.update(len(block) * pairs)
            first += len(block)
        return torch.tensor(sums, dtype=torch.float64)

    def _changed_pairs(self, patch: Patch) -> Bool[Tensor, " pair"]:
        """Returns which pairs a patch can change: those whose prompts differ at its position or before."""
        return (
            torch.ones_like(self.differ, dtype=torch.bool) if patch.position is None else patch.position >= self.differ
        )

    def _finals(self, block: Sequence[Patch]) -> Float[Tensor, "changed d_model"]:
        """Returns the final residual stream after patches of one layer, of the pairs that each of them can change."""
        layer, top = block[0].layer, self.graph.n_layers
        start = layer + (self.what != "resid_pre")
        below = self.graph.sources_before(Node("head", start, 0) if start < top else Node("logits"))
        pairs = [self._changed_pairs(patch).nonzero()[:, 0] for patch in block]
        firsts = [self.differ if p.position is None else p.position for p in block]
        entering: dict[Lane, list[Tensor]] = {lane: [] for lane in self.lanes}
        for patch, chosen, first in zip(block, pairs, firsts, strict=True):
            runs = torch.zeros_like(self.differ, dtype=torch.bool)
            runs[chosen] = True
            for lane in self.lanes:
                # the earlier lane ends below the top layer
                x = self.streams[lane][min(below, max(self.streams[lane]))].clone()
                pair, pos = self.prompts.prompt, self.prompts.pos
                if lane != "earlier":
                    pair, pos = torch.arange(len(runs), device=runs.device), self.prompts.last
                changed = runs[pair] & ((pos >= first[pair]) if patch.position is None else (pos == first[pair]))
                change = self._change(patch, lane, changed)
                if change is not None:
                    x[changed] += change
                entering[lane].append(x[runs[pair] & (pos >= first[pair])])
        every, first = torch.cat(pairs), torch.cat([f[p] for f, p in zip(firsts, pairs, strict=True)])
        return run_edited(
            *(self.exp.model, self.functions),
            Prompts.of(self.prompts.embed[every], self.prompts.last[every], first),
            read_as_it_is,
            ablated=self.exp.stream == "ablated",
            before=self.base.keys_and_values,
            masks=None if self.exp.masks == "live" else self.base.masks,
            copies=every,
            start=start,
            entering={lane: torch.cat(parts) for lane, parts in entering.items()},
        ).final[self.exp.stream]

    def _change(self, patch: Patch, lane: Lane, rows: Bool[Tensor, " row"]) -> Float[Tensor, "changed d_model"] | None:
        """Returns how a patch changes the residual stream that enters the next run layer; None if it comes too late.

        Args:
            rows: positions at which the patch acts.
        """
        layer, what = patch.layer, self.what
        if "resid" in what:
            place = {"resid_pre": Node("head", layer, 0), "resid_mid": Node("mlp", layer)}.get(what)
            if place is None:
                place = Node("head", layer + 1, 0) if layer + 1 < self.graph.n_layers else Node("logits")
            n = self.graph.sources_before(place)
            if n not in self.streams[lane]:
                return None
            change = self.source_streams[lane][n][rows] - self.streams[lane][n][rows]
        else:
            own, other = (self._values(run, lane, layer) for run in (self.base, self.source))
            if own is None or other is None:
                return None
            change, W_O = other[rows] - own[rows], self.functions.W_O[layer]
            match what:
                case "heads":
                    change = product(change[:, patch.head], W_O[patch.head])
                case "attn_out":
                    change = product(change.flatten(1), W_O.flatten(0, 1))
        if what in ("resid_pre", "resid_post", "mlp_out") or self.graph.attn_only or self.graph.parallel:
            return change
        # the MLP of this layer reads the change
        read = self.streams[lane][self.graph.sources_before(Node("mlp", layer))][rows] + change
        mask = self.base.masks[layer][1] if lane == "ablated" else None
        out = self.functions.mlp(layer, read, None if mask is None else mask[rows])
        return change + out - self.base.mlp_out[lane][layer][rows]

    def _values(self, run: LastPass, lane: Lane, layer: int) -> Tensor | None:
        by_layer = run.mlp_out[lane] if self.what == "mlp_out" else run.z[lane]
        return by_layer[layer] if layer < len(by_layer) else None
