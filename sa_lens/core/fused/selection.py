"""The top-k mask on the values of a gate's units, with the closed-form gradient of its surrogate.

The readable definition is `gate.gate_mask`. Here one autograd function masks the values and, on the way back, computes
the gradient of the scores from the scores and the k-th and next of them alone.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sa_lens.config import GateConfig
from sa_lens.core.gate import EPS, top_k_mask

GROUP = 8
"""Scores a group in the two-stage top-k."""


def masked_units(
    values: Float[Tensor, "row unit"], scores: Float[Tensor, "row score"], k: int, cfg: GateConfig
) -> Float[Tensor, "row unit"]:
    """`values * gate_mask(scores, k, cfg)`, each score acting on `unit / score` neighbouring units.

    Args:
        values: units of the ablated stream, in the precision of the matrix products.
        scores: float32 or wider.
    """
    return _MaskedUnits.apply(values, scores, k, cfg)


class _MaskedUnits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, scores: Tensor, k: int, cfg: GateConfig) -> Tensor:
        ctx.k, ctx.cfg = k, cfg
        if k == scores.shape[-1]:
            ctx.save_for_backward(values, scores)
            return values.clone()
        top, index = largest(scores, k + 1)
        edge, edge_index = top[:, k - 1 :].contiguous(), index[:, k - 1 :].contiguous()
        ctx.save_for_backward(values, scores, edge, edge_index)
        return _scaled(values, _mask(scores, edge, k, cfg))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (grad,) = grads
        k, cfg = ctx.k, ctx.cfg
        values, scores, *rest = ctx.saved_tensors
        if not rest:
            return grad, torch.zeros_like(scores), None, None
        edge, edge_index = rest
        grad_values = _scaled(grad, _mask(scores, edge, k, cfg)) if ctx.needs_input_grad[0] else None
        grad_scores = None
        if ctx.needs_input_grad[1]:
            grad_mask = grad.to(scores.dtype) * values
            if grad_mask.shape != scores.shape:
                grad_mask = grad_mask.unflatten(-1, (scores.shape[-1], -1)).sum(-1)
            grad_scores = surrogate_backward(grad_mask, scores, edge, edge_index, k, cfg)
        return grad_values, grad_scores, None, None


def _scaled(values: Tensor, mask: Tensor) -> Tensor:
    """Values times a mask that has an entry for each unit or for each head."""
    if values.shape == mask.shape:
        return values * mask.to(values.dtype)
    return (values.unflatten(-1, (mask.shape[-1], -1)) * mask.to(values.dtype)[..., None]).flatten(-2)


def _mask(scores: Tensor, edge: Tensor, k: int, cfg: GateConfig) -> Tensor:
    if cfg.kind == "soft":
        return _soft(scores, edge, k, cfg)[0]
    return hard_mask(scores, edge, k)


def largest(
    scores: Float[Tensor, "row score"], count: int
) -> tuple[Float[Tensor, "row count"], Int[Tensor, "row count"]]:
    """The `count` largest scores of each row in falling order, and where they are.

    On a CPU, where a top-k costs as much as the row is long, long rows go in two stages: the groups with the largest
    maxima hold all that can be among the largest.
    """
    rows, width = scores.shape
    groups = width // GROUP
    if scores.device.type != "cpu" or width % GROUP or groups < 4 * count:
        top = scores.topk(count, dim=-1)
        return top.values, top.indices
    grouped = scores.view(rows, groups, GROUP)
    chosen = grouped.amax(-1).topk(count, dim=-1, sorted=False).indices
    candidates = grouped.gather(1, chosen[..., None].expand(-1, -1, GROUP)).flatten(1)
    top = candidates.topk(count, dim=-1)
    group, place = top.indices // GROUP, top.indices % GROUP
    return top.values, chosen.gather(1, group) * GROUP + place


def hard_mask(scores: Float[Tensor, "row score"], edge: Float[Tensor, "row 2"], k: int) -> Bool[Tensor, "row score"]:
    """True for the k largest scores; among equal ones the lowest index wins.

    Args:
        edge: the k-th and the next score of each row.
    """
    # where the k-th score is larger than the next, comparing is enough; looking for ties waits for a GPU, so not there
    if scores.device.type == "cpu" and not torch.compiler.is_compiling() and bool((edge[:, 0] > edge[:, 1]).all()):
        return scores >= edge[:, :1]
    return top_k_mask(scores, k)


def _soft(scores: Tensor, edge: Tensor, k: int, cfg: GateConfig) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Surrogate weights, (s - g) / (T D + eps), sigmoid of it (or the weights), and T D + eps."""
    upper, lower = edge[:, :1], edge[:, 1:]
    width = cfg.temperature * (upper - lower) + EPS
    shifted = (scores - (upper + lower) / 2) / width
    if cfg.surrogate == "softmax":
        weights = torch.softmax(shifted, dim=-1)
        return weights, shifted, weights, width
    v = torch.sigmoid(shifted)
    return v * (k / v.sum(-1, keepdim=True)), shifted, v, width


def surrogate_backward(
    grad_weights: Float[Tensor, "row score"],
    scores: Float[Tensor, "row score"],
    edge: Float[Tensor, "row 2"],
    edge_index: Int[Tensor, "row 2"],
    k: int,
    cfg: GateConfig,
) -> Float[Tensor, "row score"]:
    """Gradient of the scores, given that of the surrogate weights.

    With u = (s - g) / (T D + eps) and du its gradient: ds = du / (T D + eps), the threshold g gets the negative sum of
    it, the width D gets -T sum(du u) / (T D + eps), and both pass to the k-th and the next score.
    """
    weights, shifted, v, width = _soft(scores, edge, k, cfg)
    centred = grad_weights - (grad_weights * weights).sum(-1, keepdim=True) / (k if cfg.surrogate == "sigmoid" else 1)
    grad_shifted = centred.mul_(weights)
    if cfg.surrogate == "sigmoid":
        grad_shifted.mul_(1 - v)
    grad_scores = grad_shifted / width
    grad_width = -cfg.temperature * (grad_scores * shifted).sum(-1, keepdim=True)
    half_threshold = -grad_scores.sum(-1, keepdim=True) / 2
    to_edge = torch.cat([half_threshold + grad_width, half_threshold - grad_width], dim=-1)
    grad_scores.scatter_add_(-1, edge_index, to_edge)
    # equal k-th and next scores: the surrogate has no width there and passes nothing
    return grad_scores.masked_fill_(edge[:, :1] == edge[:, 1:], 0)
