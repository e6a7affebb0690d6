"""Gates as functions of the residual stream at one position, for searches in which they choose thousands of times."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from sa_lens.core.gate import Gate, gate_mask
from sa_lens.core.host import Host, at_least_float32
from sa_lens.core.products import product


def why_not_local_gates(model: Host) -> str | None:
    """Returns why `LocalGates` would not be exact for this model, or None if it is exact."""
    gates = model.gates  # type: ignore[attr-defined]
    if gates.reads_global:
        return "live gates that read the end of the clean stream choose again in all layers"
    if gates.reads_ablated:
        return "live gates that read the ablated stream choose again from its own changes"
    return None


class LocalGates:
    """The gates of a model, each of which reads the clean residual stream that enters its layer.

    A gate is named by its layer and its kind: attention units (0) or neurons (1).
    """

    def __init__(self, model: Host) -> None:
        names = ("attn_gate", "mlp_gate")
        self._gates: list[list[Gate]] = [
            [gate for name in names if (gate := getattr(block, name, None)) is not None]
            for block in model.blocks  # type: ignore[attr-defined]
        ]

    def scores(self, layer: int, kind: int, local: Float[Tensor, "prompt d_model"]) -> Float[Tensor, "prompt unit"]:
        """Returns the scores of a gate from the residual stream that it reads."""
        return self._gates[layer][kind].project(local[:, None], None)[:, 0].flatten(1)

    def score_changes(
        self, layer: int, kind: int, change: Float[Tensor, "any prompt d_model"]
    ) -> Float[Tensor, "any prompt unit"]:
        """Returns how much scores change with the residual stream."""
        x = at_least_float32(change)
        for matrix in self._gates[layer][kind].affine_map("local")[0]:
            x = product(x, at_least_float32(matrix.detach()))
        return x

    def select(self, layer: int, kind: int, scores: Float[Tensor, "... unit"]) -> Float[Tensor, "... unit"]:
        """Returns the mask for scores."""
        gate = self._gates[layer][kind]
        return gate_mask(at_least_float32(scores), gate.k, gate.cfg).to(scores.dtype)

    def select_again(
        self,
        layer: int,
        kind: int,
        scores: Float[Tensor, "any prompt unit"],
        before: Float[Tensor, "prompt unit"],
    ) -> Float[Tensor, "any prompt unit"] | None:
        """Returns the masks for changed scores; None if all are as before."""
        if self._gates[layer][kind].cfg.kind != "hard":
            return self.select(layer, kind, scores)
        kept = before > 0
        lowest = scores.masked_fill(~kept, torch.inf).amin(-1)
        highest = scores.masked_fill(kept, -torch.inf).amax(-1)
        # equal scores and NaN, about which this says nothing, are selected again
        changed = ~(lowest > highest)
        if not changed.any():
            return None
        masks = before.expand_as(scores).clone()
        masks[changed] = self.select(layer, kind, scores[changed])
        return masks
