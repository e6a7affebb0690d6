"""The gate: scores, the top-k mask, and the surrogate weights that give the mask its gradient.

This is the readable definition (paper, section 3; docs/method.md explains the mask and its gradient).
Which residual stream a gate reads, and where its mask acts, is decided in `streams.py`.

Axes: `unit` is one attention unit or one neuron of a layer, flattened to a single axis.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from sa_lens.config import GateConfig, Surrogate
from sa_lens.core.host import at_least_float32

EPS = 1e-12
"""Added to the surrogate's width T * D, as in the reference."""

LARGEST = 1e12
"""The surrogate clips scores to this size, so that infinite ones (a unit forced in or out) give no NaN."""


def belongs_to_gate(name: str) -> bool:
    """Returns whether a parameter or hook point belongs to a gate; `mlp.W_gate`, a weight of a gated MLP, does not."""
    return "_gate." in name


def top_k_mask(scores: Float[Tensor, "... unit"], k: int) -> Bool[Tensor, "... unit"]:
    """Returns True for the k largest scores of each row; among equal scores the lowest unit index wins.

    Exactly k entries of every row are True, whatever the ties.
    """
    kth = scores.topk(k, dim=-1).values[..., -1:]
    above = scores > kth
    tied = scores == kth
    free = k - above.sum(-1, keepdim=True)
    return above | (tied & (tied.cumsum(-1) <= free))


def with_nan_rows(mask: Float[Tensor, "... unit"], scores: Float[Tensor, "... unit"]) -> Float[Tensor, "... unit"]:
    """Returns the mask with NaN in every row that has a NaN score, which the comparisons of a top-k would hide."""
    return mask.masked_fill(scores.amax(-1, keepdim=True).isnan(), math.nan)


def surrogate_weights(
    scores: Float[Tensor, "... unit"],
    k: int,
    surrogate: Surrogate = "sigmoid",
    temperature: float = 1.0,
) -> Float[Tensor, "... unit"]:
    """Returns the surrogate: soft weights around the threshold between the k-th and the next score.

    With threshold g = (s_(k) + s_(k+1)) / 2 and width D = s_(k) - s_(k+1), both differentiated through:

        sigmoid:  w = k v / sum(v),  v = sigmoid((s - g) / (T D + eps))
        softmax:  w = softmax((s - g) / (T D + eps))

    A row with D = 0 gets the same value but passes no gradient. For k equal to the number of units the weights are
    ones and pass no gradient.

    Source: sigmoid, the reference's code; softmax, the paper (section 3).
    """
    if k == scores.shape[-1]:
        return with_nan_rows(torch.ones_like(scores), scores)
    scores = scores.clamp(-LARGEST, LARGEST)
    top = scores.topk(k + 1, dim=-1).values
    upper, lower = top[..., k - 1 : k], top[..., k : k + 1]
    width = upper - lower
    shifted = (scores - (upper + lower) / 2) / (temperature * width + EPS)
    if surrogate == "sigmoid":
        v = torch.sigmoid(shifted)
        weights = k * v / v.sum(-1, keepdim=True)
    else:
        weights = torch.softmax(shifted, dim=-1)
    return torch.where(width == 0, weights.detach(), weights)


def gate_mask(scores: Float[Tensor, "... unit"], k: int, cfg: GateConfig) -> Float[Tensor, "... unit"]:
    """Returns the mask of a gate: 0/1 with the surrogate's gradient (`hard`), or the surrogate weights (`soft`).

    `scores` must be float32 or wider. A row with a NaN score has a mask of NaN.
    """
    if cfg.kind == "soft":
        return surrogate_weights(scores, k, cfg.surrogate, cfg.temperature)
    hard = with_nan_rows(top_k_mask(scores, k).to(scores.dtype), scores)
    if not (torch.is_grad_enabled() and scores.requires_grad):
        return hard
    weights = surrogate_weights(scores, k, cfg.surrogate, cfg.temperature)
    return hard + (weights - weights.detach())


class Gate(nn.Module):
    """Decides, token by token, which k units of one layer stay in the ablated stream.

    Parameters `W_local`, `b_local` read the residual stream that enters the layer, of the clean stream or (scores
    `ablated`) of the ablated one; `W_global`, `b_global` read the final LayerNorm's output of a clean pass. Which of
    them exist follows from the scope. With a rank, `A_local`, `B_local` (and `A_global`, `B_global`), whose product is
    the matrix, take the place of W.

    Hook points, in the order in which they fire in an ablated pass: `hook_in` (the values before the mask),
    `hook_scores`, `hook_mask`. Shapes: `[batch, pos, head, d_head]` for channels of attention, `[batch, pos, head, 1]`
    for scores and mask of whole heads, `[batch, pos, d_mlp]` for neurons.
    """

    W_local: nn.Parameter
    A_local: nn.Parameter
    B_local: nn.Parameter
    b_local: nn.Parameter
    W_global: nn.Parameter
    A_global: nn.Parameter
    B_global: nn.Parameter
    b_global: nn.Parameter

    def __init__(
        self,
        cfg: GateConfig,
        k: int,
        d_model: int,
        unit_shape: tuple[int, ...],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.cfg = cfg
        self.k = k
        self.d_model = d_model
        self.unit_shape = unit_shape
        self.n_units = math.prod(unit_shape)
        shapes: dict[str, tuple[int, ...]] = {"W": (d_model, self.n_units), "b": (self.n_units,)}
        if cfg.rank is not None:
            shapes = {"A": (d_model, cfg.rank), "B": (cfg.rank, self.n_units), "b": (self.n_units,)}
        for source, present in (("local", cfg.reads_local), ("global", cfg.reads_global)):
            for name, shape in shapes.items() if present else ():
                empty = torch.empty(shape, dtype=dtype, device=device)
                setattr(self, f"{name}_{source}", nn.Parameter(empty, requires_grad=cfg.learned))
        self.hook_in = HookPoint()
        self.hook_scores = HookPoint()
        self.hook_mask = HookPoint()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draws every weight and bias uniformly from +-1/sqrt(d_model), as the reference does.

        None is zero, except the weights of `random-static` scores, which consist of biases alone. Of a low-rank gate, B
        is drawn from +-sqrt(3/rank), so that scores have the same variance as those of a full matrix.
        """
        for name, parameter in sorted(self.named_parameters()):
            bound = math.sqrt(3 / len(parameter)) if name.startswith("B") else 1 / math.sqrt(self.d_model)
            fresh = torch.rand(parameter.shape, generator=generator, dtype=torch.float32)
            parameter.copy_((2 * fresh - 1) * bound)
            if self.cfg.scores == "random-static" and name.startswith("W"):
                parameter.zero_()

    def affine_map(self, source: Literal["local", "global"]) -> tuple[tuple[Tensor, ...], Tensor]:
        """Returns the matrices, to be multiplied by in turn, and the bias of the map from what the gate reads."""
        names = ("W",) if self.cfg.rank is None else ("A", "B")
        return tuple(self.get_parameter(f"{name}_{source}") for name in names), self.get_parameter(f"b_{source}")

    def project(
        self, local: Float[Tensor, "batch pos d_model"] | None, final: Float[Tensor, "batch pos d_model"] | None
    ) -> Float[Tensor, "batch pos ..."]:
        """Returns the scores before the top-k, in the shape of the units and in float32 or wider, even under autocast.

        Args:
            local: residual stream entering the layer, of the stream that the gate reads; needed if the scope is local
                or both.
            final: final LayerNorm's output of the clean pass; needed if the scope is global or both.
        """
        read = []
        with torch.autocast(next(self.parameters()).device.type, enabled=False):
            if self.cfg.reads_local:
                assert local is not None
                read.append(_affine(local, *self.affine_map("local")))
            if self.cfg.reads_global:
                assert final is not None
                read.append(_affine(final, *self.affine_map("global")))
        scores = read[0] if len(read) == 1 else read[0] + read[1]
        return scores.unflatten(-1, self.unit_shape)

    def select(self, scores: Float[Tensor, "batch pos ..."]) -> Float[Tensor, "batch pos ..."]:
        """Returns the mask for scores in the shape of the units."""
        flat = at_least_float32(scores).flatten(2)
        return gate_mask(flat, self.k, self.cfg).unflatten(-1, self.unit_shape)

    def forward(
        self,
        x: Float[Tensor, "batch pos ..."],
        scores: Float[Tensor, "batch pos ..."] | None,
        mask: Float[Tensor, "batch pos ..."] | None = None,
        where: Bool[Tensor, "batch pos"] | None = None,
    ) -> Float[Tensor, "batch pos ..."]:
        """Multiplies the units `x` by their mask; the gate's hooks fire.

        Args:
            x: values of the units.
            scores: scores of the units; unused, and `hook_scores` silent, if a mask is given.
            mask: a given mask.
            where: positions at which the mask acts; None: all.
        """
        x = self.hook_in(x)
        if mask is None:
            assert scores is not None
            mask = self.select(self.hook_scores(scores))
        else:
            # a hook that writes into its value must not change what the caller gave
            mask = mask.clone()
        masked = x * self.hook_mask(mask.to(x.dtype))
        if where is None:
            return masked
        return torch.where(where.reshape(*where.shape, *[1] * (x.ndim - 2)), masked, x)


def _affine(
    x: Float[Tensor, "batch pos d_model"], matrices: Sequence[Tensor], bias: Float[Tensor, " unit"]
) -> Float[Tensor, "batch pos unit"]:
    x = at_least_float32(x)
    for matrix in matrices:
        x = x @ at_least_float32(matrix)
    return x + at_least_float32(bias)
