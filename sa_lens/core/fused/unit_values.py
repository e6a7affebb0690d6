"""Values of all units in both streams, masks and losses, without hooks and without gradients.

The same layers as in training, but the masks are kept, and for `fused_units` every layer's `z` and `post` after the
mask. This is for evaluation and for analyses that read all units of many tokens; use hooks to edit values or to read
anything else.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sa_lens.config import LossConfig, Stream
from sa_lens.core.fused.eligible_models import has_user_hooks, why_not_fused
from sa_lens.core.fused.passes import Passes, StreamLosses, losses_of
from sa_lens.core.fused.selection import mask_of
from sa_lens.core.gated import GatedTransformer

Masks = dict[tuple[int, str], Float[Tensor, "batch pos score"]]
"""Masks by (layer, `attn` or `mlp`)."""


class UnitValues(NamedTuple):
    """What `fused_units` read; keys are (layer, `attn` or `mlp`)."""

    clean: dict[tuple[int, str], Float[Tensor, "batch pos unit"]]
    """Values in the clean stream."""
    ablated: dict[tuple[int, str], Float[Tensor, "batch pos unit"]]
    """Values in the ablated stream, after the mask; empty if only the clean one was run."""
    masks: Masks
    """Masks, an entry for each unit or for each head."""


def reads_fused(model: Any) -> bool:
    """Whether `fused_units` gives what hooks would give: a model that the fused path runs, and no hook of the user."""
    return isinstance(model, GatedTransformer) and why_not_fused(model) is None and not has_user_hooks(model)


@torch.no_grad()
def fused_units(model: GatedTransformer, tokens: Int[Tensor, "batch pos"], stream: Stream = "ablated") -> UnitValues:
    """Values of all units; with `stream="ablated"` of both streams, otherwise of the clean one.

    Raises:
        ValueError: more tokens than the context holds.
    """
    if tokens.shape[1] > model.cfg.n_ctx:
        raise ValueError(f"tokens have {tokens.shape[1]} positions, more than the model's n_ctx={model.cfg.n_ctx}")
    reader = _Reader(model)
    embedded = reader.embed(tokens)
    if stream == "clean":
        reader.clean(embedded)
    elif model.gates.reads_global:
        reader.one_after_the_other(embedded)
    else:
        reader.together(embedded)
    return reader.values


@torch.no_grad()
def fused_losses_and_masks(
    model: GatedTransformer, tokens: Int[Tensor, "batch pos"], targets: Int[Tensor, "batch pos"] | None = None
) -> tuple[StreamLosses, Masks]:
    """Losses of both streams of a gated model in its own precision, and the masks that they were computed with.

    Args:
        targets: the token to predict at each position; None: the next token, T - 1 predictions.

    Raises:
        ValueError: more tokens than the context holds.
    """
    reader = _Reader(model, keep_units=False)
    return losses_of(reader, LossConfig(), tokens, targets, clean_alone=False), reader.values.masks


class _Reader(Passes):
    """Passes that keep the masks of every layer, and its units if asked to."""

    def __init__(self, model: GatedTransformer, *, keep_units: bool = True) -> None:
        super().__init__(model, model.W_E.dtype, recompute=False)
        # a model that trains without biases may have been given some
        self.qkv_bias = True
        self.keep_units = keep_units
        self.layer_of = {id(block): layer for layer, block in enumerate(model.blocks)}
        self.values = UnitValues({}, {}, {})

    def mask_units(
        self, block: Any, kind: Literal["attn", "mlp"], units: Tensor, local: Tensor | None, final: Tensor | None
    ) -> Float[Tensor, "stream batch pos unit"]:
        place = self.layer_of[id(block)], kind
        if self.keep_units and (local is None or len(units) == 2):
            self.values.clean[place] = units[0]
        if local is not None:
            gate = getattr(block, f"{kind}_gate")
            mask = mask_of(self.scores(gate, local, final), gate.k, gate.cfg).to(units.dtype)
            mask = mask.unflatten(0, units.shape[1:3])
            # nothing else uses `units`, so the last stream can be masked in place
            units[-1].unflatten(-1, (mask.shape[-1], -1)).mul_(mask[..., None])
            self.values.masks[place] = mask
            if self.keep_units:
                self.values.ablated[place] = units[-1]
        return units
