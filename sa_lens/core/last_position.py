"""Passes of prompts of several lengths up to the last position of each, in both streams, without hooks.

They give what hooks would read of `model` and of `model.ablated(position=-1)`, for models whose nodes can be run one by
one. All prompts run together, padded on the right. Nothing is computed on the padding, and in the top layer nothing but
the last position. A pass has three lanes: `earlier` holds the positions before the last one, which both streams share;
`clean` and `ablated` are the last position in each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sa_lens.core.fused.eligible_models import has_user_hooks
from sa_lens.core.host import Host, in_stream
from sa_lens.core.nodes import NodeFunctions, gate_masks, why_not_single_nodes
from sa_lens.core.products import product

Lane = Literal["earlier", "clean", "ablated"]
"""Positions before the last one; the last one in the clean stream; the last one in the ablated stream."""

LayerMasks = tuple[Tensor | None, Tensor | None]
"""Masks of a layer's attention units `[prompt, head, width]` and neurons `[prompt, d_mlp]` at the last position."""

KeysAndValues = tuple[Tensor, Tensor]
"""Keys and values `[head, prompt, pos, d_head]` of a layer."""

Reads = Callable[[Lane, int, Literal["heads", "mlp", "logits"], Tensor], Tensor]
"""Called with the input of a layer's heads, of its MLP, or of the logits (their layer is the number of layers), and
gives what is read in its place: for heads one input for each port and head, `[port head row d_model]`."""


def why_not_by_nodes(model: Host) -> str | None:
    """Returns why a pass by nodes would differ from a pass of the model, or None if both are the same."""
    if has_user_hooks(model):  # type: ignore[arg-type]
        return "hooks are attached to this model, which only a pass of the whole model runs"
    return why_not_single_nodes(model)


class Prompts(NamedTuple):
    """Prompts of several lengths as they enter the first layer, padded on the right."""

    embed: Float[Tensor, "prompt pos d_model"]
    """Embedding plus position."""
    last: Int[Tensor, " prompt"]
    """Last position of each."""
    prompt: Int[Tensor, " row"]
    """Prompt of each row of the earlier lane."""
    pos: Int[Tensor, " row"]
    """Position of each row of the earlier lane."""

    @classmethod
    def of(cls, embed: Tensor, last: Tensor, first: Tensor | None = None) -> Prompts:
        """Returns the prompts with the earlier positions from `first` on; None starts at the beginning."""
        places = torch.arange(embed.shape[1], device=embed.device)
        before = places < last[:, None]
        if first is not None:
            before &= places >= first[:, None]
        return cls(embed, last, *before.nonzero(as_tuple=True))

    def rows(self, lane: Lane, x: Float[Tensor, "... prompt pos width"]) -> Float[Tensor, "... row width"]:
        """Returns the rows of a lane."""
        if lane == "earlier":
            return x[..., self.prompt, self.pos, :]
        return x[..., torch.arange(len(self.last), device=x.device), self.last, :]


def embed_prompts(model: Host, tokens: Sequence[Int[Tensor, "prompt pos"]]) -> tuple[Tensor, Tensor]:
    """Returns the embeddings (with positions) of groups of prompts, padded on the right, and their last positions."""
    longest = max(group.shape[1] for group in tokens)
    parts, last = [], []
    with torch.no_grad(), in_stream(model, "clean"):
        for group in tokens:
            x = model(group, stop_at_layer=0)
            parts.append(torch.cat([x, x.new_zeros(len(x), longest - x.shape[1], x.shape[2])], 1))
            last.append(torch.full((len(x),), group.shape[1] - 1, device=x.device))
    return torch.cat(parts), torch.cat(last)


class LastPass(NamedTuple):
    """Results of a pass up to the last positions, layer by layer. The earlier lane has no top layer."""

    z: dict[Lane, list[Float[Tensor, "row head d_head"]]]
    """Attention units, after the masks in the ablated lane."""
    post: dict[Lane, list[Float[Tensor, "row d_mlp"]]]
    """Neurons, after the masks in the ablated lane; those of the earlier lane are not kept."""
    mlp_out: dict[Lane, list[Float[Tensor, "row d_model"]]]
    """Outputs of the MLPs."""
    final: dict[Lane, Float[Tensor, "prompt d_model"]]
    """Residual stream above the top layer."""
    masks: list[LayerMasks]
    """Masks by layer; none without an ablated lane."""
    keys_and_values: list[KeysAndValues]
    """Keys and values of the earlier lane, by layer."""


@torch.no_grad()
def run_to_position(
    model: Host, functions: NodeFunctions, prompts: Prompts, *, ablated: bool, layers: int | None = None
) -> LastPass:
    """Runs prompts up to their last positions.

    Args:
        functions: the nodes of the model, for at least as many positions as the prompts have.
        prompts: with all earlier positions.
        ablated: whether to run the ablated lane too.
        layers: number of layers to run; None: all. Gates that read the end of the clean stream need all.
    """
    run = _Run(model, functions, prompts, functions.cfg.n_layers if layers is None else layers)
    run.run_clean()
    if ablated:
        run.run_ablated()
    return run.result


def run_edited(
    model: Host,
    functions: NodeFunctions,
    prompts: Prompts,
    reads: Reads,
    *,
    ablated: bool,
    before: Sequence[KeysAndValues],
    masks: Sequence[LayerMasks] | None = None,
    copies: Int[Tensor, " prompt"] | None = None,
    start: int = 0,
    entering: Mapping[Lane, Tensor] | None = None,
) -> LastPass:
    """Runs prompts with edited inputs, of which some earlier positions are known; gradients follow the caller's mode.

    Args:
        prompts: with those earlier positions that are to be run.
        before: keys and values of the others.
        masks: masks of the ablated lane; None takes those of the gates, with the gradients of their surrogates.
        copies: prompt of `before` and `masks` that each prompt is a copy of; None: they are the same.
        start: first layer to run. Gates that read the end of an edited clean stream need 0.
        entering: residual stream that enters this layer, by lane; None: the embedding.
    """
    run = _Run(model, functions, prompts, functions.cfg.n_layers, reads, before, copies, start, entering)
    run.run_clean()
    if ablated:
        run.run_ablated(masks)
    return run.result


def read_as_it_is(lane: Lane, layer: int, kind: Literal["heads", "mlp", "logits"], x: Tensor) -> Tensor:
    """Returns the input that a node gets; see `Reads`."""
    return x


class _Run:
    def __init__(
        self,
        model: Host,
        functions: NodeFunctions,
        prompts: Prompts,
        layers: int,
        reads: Reads | None = None,
        before: Sequence[KeysAndValues] | None = None,
        copies: Int[Tensor, " prompt"] | None = None,
        start: int = 0,
        entering: Mapping[Lane, Tensor] | None = None,
    ) -> None:
        self.model, self.functions, self.prompts, self.layers = model, functions, prompts, layers
        self.reads = reads if reads is not None else read_as_it_is
        self.before, self.start, self.entering = before, start, entering
        self.copies: Any = slice(None) if copies is None else copies
        self.result = LastPass({}, {}, {}, {}, [], [])
        self.resid_pre: list[Tensor] = []
        """Clean residual stream that enters each layer that runs, at the last position."""

    def run_clean(self) -> None:
        earlier = self._begin("earlier")
        last = self._begin("clean")
        for layer in range(self.start, self.layers):
            self.resid_pre.append(last)
            top = layer == self.layers - 1
            # no query of the top layer looks back from an earlier position
            *q, k, v = self.functions.project_all(
                layer, self.reads("earlier", layer, "heads", earlier), 1 if top else 0
            )
            k = self.functions.rotate(layer, 1, k, self.prompts.pos)
            known = (None, None) if self.before is None else self.before[layer]
            k, v = (self._pad(x, old) for x, old in zip((k, v), known, strict=True))
            self.result.keys_and_values.append((k, v))
            if not top:
                padded = self._pad(self.functions.rotate(layer, 0, q[0], self.prompts.pos))
                z = self.functions.attend(layer, padded, k, v)[:, self.prompts.prompt, self.prompts.pos]
                earlier = self._rest("earlier", layer, earlier, z.transpose(0, 1), (None, None))
            last = self._at_last("clean", layer, last, (None, None))
        self.result.final["clean"] = self.reads("clean", self.layers, "logits", last)

    def run_ablated(self, given: Sequence[LayerMasks] | None = None) -> None:
        x = self._begin("ablated")
        gates = self.model.gates  # type: ignore[attr-defined]
        for layer in range(self.start, self.layers):
            end = self.result.final["clean"] if gates.reads_global else None
            local = x if gates.reads_ablated else self.resid_pre[layer - self.start]
            masks = gate_masks(self.model, layer, local, end) if given is None else self._copied(given[layer])
            self.result.masks.append(masks)
            x = self._at_last("ablated", layer, x, masks)
        self.result.final["ablated"] = self.reads("ablated", self.layers, "logits", x)

    def _copied(self, masks: LayerMasks) -> LayerMasks:
        attn, mlp = (None if mask is None else mask[self.copies] for mask in masks)
        return attn, mlp

    def _begin(self, lane: Lane) -> Tensor:
        for parts in (self.result.z, self.result.post, self.result.mlp_out):
            parts[lane] = []
        return self.prompts.rows(lane, self.prompts.embed) if self.entering is None else self.entering[lane]

    def _pad(
        self, x: Float[Tensor, "head row d_head"], known: Float[Tensor, "head any pos d_head"] | None = None
    ) -> Float[Tensor, "head prompt pos d_head"]:
        """Returns queries, keys or values at all positions, with those that are known where no row is given."""
        if known is None:
            padded = x.new_zeros(len(x), len(self.prompts.last), self.functions.length, x.shape[-1])
        else:
            padded = known[:, self.copies].clone()
        padded[:, self.prompts.prompt, self.prompts.pos] = x
        return padded

    def _at_last(self, lane: Lane, layer: int, x: Float[Tensor, "prompt d_model"], masks: LayerMasks) -> Tensor:
        """Computes a layer at the last position, whose query attends to the earlier lane and to itself."""
        last = self.prompts.last
        own = self.functions.project_all(layer, self.reads(lane, layer, "heads", x))
        q, own_k = (self.functions.rotate(layer, port, own[port][:, :, None], last[:, None]) for port in (0, 1))
        k, v = (known.clone() for known in self.result.keys_and_values[layer - self.start])
        every = torch.arange(len(last), device=last.device)
        k[:, every, last], v[:, every, last] = own_k[:, :, 0], own[2]
        z = self.functions.attend(layer, q, k, v, last)[:, :, 0].transpose(0, 1)
        return self._rest(lane, layer, x, z, masks)

    def _rest(
        self, lane: Lane, layer: int, x: Tensor, z: Float[Tensor, "row head d_head"], masks: LayerMasks
    ) -> Tensor:
        """Computes the rest of a layer from its attention units."""
        cfg = self.functions.cfg
        z = z if masks[0] is None else z * masks[0]
        self.result.z[lane].append(z)
        after = x + product(z.flatten(1), self.functions.W_O[layer].flatten(0, 1)) + self.functions.b_O[layer]
        if cfg.attn_only:
            return after
        read = self.reads(lane, layer, "mlp", x if cfg.parallel_attn_mlp else after)
        post = self.functions.neurons(layer, read)
        post = post if masks[1] is None else post * masks[1]
        if lane != "earlier":
            self.result.post[lane].append(post)
        self.result.mlp_out[lane].append(self.functions.mlp_output(layer, post))
        return after + self.result.mlp_out[lane][-1]
