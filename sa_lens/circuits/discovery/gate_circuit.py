"""The gate as a circuit: the units that a model itself keeps for a prompt, read as a ranking of edges.

For each prompt a gate names the units that stay. A head's score is the mean over prompts of its live channels / d_head
(of 1 or 0 where whole heads stay or go), an MLP's score that of its live neurons / d_mlp, at the metric position or at
all positions. The embedding and the logits, which have no gate, count 1. An edge's score is its source's score times
its destination's, so the three inputs of a head score alike. Soft masks count with their value.

A gate keeps k neurons of every layer for every token, so with hard gates every MLP scores k_mlp / d_mlp, whatever the
prompt: what differs are its neurons, which `MaskShares.table` lists. Where k_mlp / d_mlp is small, edges of MLPs come
last for that reason alone; `scale="relative"` takes the sizes of layers out.

Masks are those of the unedited clean prompt. No model pass under edits and no gradient is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sa_lens.circuits.experiment import Experiment, analysis
from sa_lens.circuits.graph import Circuit, Graph, Node
from sa_lens.circuits.running.recorded_passes import record
from sa_lens.circuits.tasks.pairs import PromptPairs
from sa_lens.config import check_choice, check_whole
from sa_lens.core.gate import top_k_mask
from sa_lens.core.host import Host, at_least_float32, device_of, gate_hook_names, in_stream
from sa_lens.core.unit import Unit

if TYPE_CHECKING:
    import pandas as pd

Variant = Literal["metric_position", "all_positions"]
"""Where masks are read: at the last token of each prompt, or as the mean over all its tokens, the first included."""

MasksFrom = Literal["gate", "shuffled_text", "random", "shuffled_units", "top_activation"]
"""Whose masks: the gates' own; those of the same prompts with their tokens, all but the first, in random order; k units
drawn at random for each token and layer; the gates' shares dealt to the units of each layer in random order; the k
units of each layer with the largest absolute value in the clean stream (heads: the largest norm of `z`)."""

Scale = Literal["share", "relative"]
"""Score of a head or MLP: the `share` of its units that stay, or that share `relative` to the mean share of all heads,
or of all MLPs, of its layer, so that 1 is what a node would have if the gate made no choice."""

_DRAWN = ("shuffled_text", "random", "shuffled_units")


@dataclass(frozen=True, eq=False)
class MaskShares:
    """How often the gates keep each unit, from `mask_shares`."""

    graph: Graph
    """The model's graph."""
    attn: Float[Tensor, "layer head d_head"]
    """Share of prompts (or tokens) at which each attention unit is kept, in float64; the last axis is 1 if units are
    heads."""
    mlp: Float[Tensor, "layer d_mlp"]
    """The same for neurons; there are no layers in an attention-only model."""
    scale: Scale = "share"
    """Scale of the scores; `attn` and `mlp` are shares in either case."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """Method, variant, masks_from, scale, task, number of prompts, seed."""

    @cached_property
    def heads(self) -> Float[Tensor, "layer head"]:
        """Scores of the heads."""
        return self._scale_shares(self.attn.mean(-1))

    @cached_property
    def mlps(self) -> Float[Tensor, " layer"]:
        """Scores of the MLPs."""
        return self._scale_shares(self.mlp.mean(-1, keepdim=True))[:, 0]

    def _scale_shares(self, share: Float[Tensor, "layer node"]) -> Float[Tensor, "layer node"]:
        return share if self.scale == "share" else share / share.mean(-1, keepdim=True)

    def score(self, node: Node) -> float:
        """Score of a node; 1 for the embedding and the logits."""
        match node.kind:
            case "head":
                return float(self.heads[node.layer, node.head])
            case "mlp":
                return float(self.mlps[node.layer])
        return 1.0

    def circuit(self) -> Circuit:
        """Returns a ranking of all edges; an edge's score is the product of the scores of its two nodes."""
        graph = self.graph
        sources = torch.tensor([self.score(node) for node in graph.sources], dtype=torch.float64)
        inputs = torch.tensor([self.score(to.node) for to in graph.inputs], dtype=torch.float64)
        scores = (inputs[:, None] * sources).masked_fill(~graph.exists, torch.nan)
        return Circuit(graph, graph.exists.clone(), scores, dict(self.about))

    def table(self) -> pd.DataFrame:
        """Returns one row per unit: unit (such as `L1.mlp.17`), layer, site (`attn` or `mlp`), stays, and the settings.

        Where units are whole heads, they have the names of heads, such as `a0.h1`.
        """
        import pandas as pd

        by_head = self.attn.shape[-1] == 1
        rows = []
        for site, shares in (("attn", self.attn.flatten(1)), ("mlp", self.mlp)):
            places = product(*map(range, shares.shape))
            for (layer, index), stays in zip(places, shares.flatten().tolist(), strict=True):
                head = by_head and site == "attn"
                unit = Node("head", layer, index) if head else Unit(layer, site, index)  # type: ignore[arg-type]
                rows.append({"unit": str(unit), "layer": layer, "site": site, "stays": stays})
        return pd.DataFrame(rows).assign(**self.about)

    def node_table(self) -> pd.DataFrame:
        """Returns one row per head or MLP: node, kind, layer, head, score, and the settings."""
        import pandas as pd

        nodes = self.graph.sources[1:]
        rows = [{**n._asdict(), "node": str(n), "score": self.score(n), **self.about} for n in nodes]
        return pd.DataFrame(rows, columns=["node", "kind", "layer", "head", "score", *self.about])


@analysis
def mask_shares(
    exp: Experiment,
    *,
    variant: Variant = "metric_position",
    masks_from: MasksFrom = "gate",
    scale: Scale = "share",
) -> MaskShares:
    """Counts how often the gates keep each unit on the clean prompts.

    The experiment's stream, masks and ablation have no effect.

    Args:
        variant: where masks are read; see `Variant`.
        masks_from: the gates' own masks, or those of a control; see `MasksFrom`.
        scale: scale of the nodes' scores; see `Scale`.

    Raises:
        ValueError: the model has no gates, or a choice is unknown.
    """
    check_choice("variant", variant, Variant)
    check_choice("masks_from", masks_from, MasksFrom)
    check_choice("scale", scale, Scale)
    model, pairs = exp.model, exp.pairs
    with in_stream(model, "ablated", position=-1):
        pass
    generator = torch.Generator().manual_seed(exp.seed)
    read = {"random": _random_masks, "top_activation": _largest_units}.get(masks_from, _gate_masks)
    totals: dict[str, Tensor] = {}
    with torch.no_grad():
        for tokens in _prompts(pairs, exp.light_batch_size, generator if masks_from == "shuffled_text" else None):
            for name, mask in read(model, tokens.to(device_of(model)), generator).items():
                chosen = mask[:, -1] if variant == "metric_position" else mask.double().mean(1)
                totals[name] = totals.get(name, 0) + chosen.double().sum(0).cpu()
    attn, mlp = (
        [total / len(pairs) for name, total in totals.items() if kind in name] for kind in ("attn_gate", "mlp_gate")
    )
    about: dict[str, Any] = {"method": "gate", "variant": variant, "masks_from": masks_from, "scale": scale}
    about |= {"task": pairs.task, "n": len(pairs)} | ({"seed": exp.seed} if masks_from in _DRAWN else {})
    neurons = torch.stack(mlp) if mlp else torch.empty(0, 1, dtype=torch.float64)
    shares = MaskShares(exp.graph, torch.stack(attn), neurons, scale, about)
    return _shuffle_units(shares, generator) if masks_from == "shuffled_units" else shares


@analysis
def gate_circuit(
    exp: Experiment,
    *,
    variant: Variant = "metric_position",
    masks_from: MasksFrom = "gate",
    scale: Scale = "share",
) -> Circuit:
    """Ranks every edge by how many units of its two nodes the gates keep on the clean prompts.

    Arguments and errors as in `mask_shares`. Many edges have equal scores; of these, `keep` takes the first in
    the graph's order.
    """
    return mask_shares(exp, variant=variant, masks_from=masks_from, scale=scale).circuit()


@analysis
def gate_rankings(
    exp: Experiment,
    *,
    variant: Variant = "metric_position",
    scale: Scale = "share",
    other: PromptPairs | None = None,
    draws: int = 3,
) -> dict[str, Circuit]:
    """Returns the gates' ranking and rankings of controls by name, for `faithfulness` and `agreement_table`.

    Names: `gate`; `other prompts` (masks of the other pairs, or without any `shuffled text`); `top activation`;
    `random 0`, `shuffled units 0`, ... for each draw.

    Args:
        other: pairs of another task.
        draws: number of draws of each random ranking, with the experiment's seed, seed + 1, ...

    Raises:
        ValueError: draws is below 1, and what `mask_shares` raises.
    """
    check_whole("draws", draws, 1)

    def ranking(masks_from: MasksFrom, draw: int = 0, pairs: PromptPairs = exp.pairs) -> Circuit:
        drawn = exp.replace(pairs=pairs, seed=exp.seed + draw)
        return gate_circuit(drawn, variant=variant, scale=scale, masks_from=masks_from)

    rankings = {"gate": ranking("gate")}
    if other is not None:
        rankings["other prompts"] = ranking("gate", pairs=other)
    else:
        rankings["shuffled text"] = ranking("shuffled_text")
    rankings["top activation"] = ranking("top_activation")
    for draw in range(draws):
        rankings[f"random {draw}"] = ranking("random", draw)
        rankings[f"shuffled units {draw}"] = ranking("shuffled_units", draw)
    return rankings


def _prompts(
    pairs: PromptPairs, batch_size: int, shuffle: torch.Generator | None
) -> Iterator[Int[Tensor, "batch pos"]]:
    """Yields batches of clean prompts, each of one length."""
    for _, group in pairs.by_length():
        tokens = group.clean
        if shuffle is not None:
            order = torch.rand(tokens[:, 1:].shape, generator=shuffle).argsort(1)
            tokens = torch.cat([tokens[:, :1], tokens[:, 1:].gather(1, order)], 1)
        yield from tokens.split(batch_size)


def _gate_masks(model: Host, tokens: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Returns the gates' own masks at all positions, by hook name."""
    with in_stream(model, "ablated"):
        return record(model, tokens, gate_hook_names(model))[1]


def _k_of(model: Host, name: str) -> int:
    """Returns how many units the gate of a hook name keeps."""
    gates = model.gates  # type: ignore[attr-defined]
    return int(gates.k_attn if "attn_gate" in name else gates.k_mlp)


def _random_masks(model: Host, tokens: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Draws as many units as the gates keep, for each token and layer; the batches have no effect on the draws."""
    shapes = {name: mask.shape[1:] for name, mask in _gate_masks(model, tokens[:1], generator).items()}
    drawn = [{name: torch.rand(shape, generator=generator) for name, shape in shapes.items()} for _ in tokens]
    stacked = {name: torch.stack([prompt[name] for prompt in drawn]) for name in shapes}
    return {name: top_k_mask(x.flatten(2), _k_of(model, name)).reshape(x.shape) for name, x in stacked.items()}


def _largest_units(model: Host, tokens: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Takes as many units as the gates keep: those with the largest absolute values in the clean stream."""
    by_head = model.gates.attn_unit == "head"  # type: ignore[attr-defined]
    values_of = {
        name: name.replace("attn_gate.hook_mask", "attn.hook_z").replace("mlp_gate.hook_mask", "mlp.hook_post")
        for name in gate_hook_names(model)
    }
    with in_stream(model, "clean"):
        values = record(model, tokens, values_of.values())[1]
    masks = {}
    for name, point in values_of.items():
        size = at_least_float32(values[point]).abs()
        if by_head and "attn_gate" in name:
            size = size.norm(dim=-1, keepdim=True)
        masks[name] = top_k_mask(size.flatten(2), _k_of(model, name)).reshape(size.shape)
    return masks


def _shuffle_units(shares: MaskShares, generator: torch.Generator) -> MaskShares:
    """Returns the shares of each layer, assigned to its units in random order."""

    def shuffle(x: Tensor) -> Tensor:
        flat = x.flatten(1)
        order = torch.rand(flat.shape, generator=generator).argsort(1)
        return flat.gather(1, order).reshape(x.shape)

    return replace(shares, attn=shuffle(shares.attn), mlp=shuffle(shares.mlp) if len(shares.mlp) else shares.mlp)
