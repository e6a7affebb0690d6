"""Scores, and the top-k mask on the values of a gate's units with the closed-form gradient of its surrogate.

The readable definition is `gate.gate_mask`. Here one autograd function masks the values and, on the way back, computes
the gradient of the scores from the scores and the k-th and next of them alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sa_lens.config import GateConfig
from sa_lens.core import products
from sa_lens.core.fused.operations import on_cpu
from sa_lens.core.gate import EPS, top_k_mask, with_nan_rows


def scores_of(
    x: Float[Tensor, "row d_model"],
    matrices: Sequence[Float[Tensor, "width out"]],
    bias: Float[Tensor, " score"],
    dtype: torch.dtype,
) -> Float[Tensor, "row score"]:
    """`x @ matrices + bias` in the inputs' own precision, its gradients by matrix products in `dtype`."""
    *narrowing, last = matrices
    for matrix in narrowing:
        x = _Scores.apply(x, matrix, None, dtype)
    return _Scores.apply(x, last, bias, dtype)


class _Scores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        ctx.dtype = dtype
        ctx.save_for_backward(x, weight)
        if on_cpu(x):
            return products.linear(x, weight.T, bias)
        return torch.mm(x, weight) if bias is None else torch.addmm(bias, x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias, _ = ctx.needs_input_grad
        # what stays takes its memory first, so that it does not end up behind what is freed
        grad_weight = torch.empty_like(weight) if wants_weight else None
        narrow = grad.to(ctx.dtype)
        grad_x = torch.mm(narrow, weight.T.to(ctx.dtype)).to(x.dtype) if wants_x else None
        if grad_weight is not None:
            grad_weight.copy_(torch.mm(x.T.to(ctx.dtype), narrow))
        return grad_x, grad_weight, grad.sum(0) if wants_bias else None, None


def masked_units(
    values: Float[Tensor, "stream row unit"], scores: Float[Tensor, "row score"], k: int, cfg: GateConfig
) -> Float[Tensor, "stream row unit"]:
    """The values, those of the last stream times `gate_mask(scores, k, cfg)`.

    Args:
        values: units, in the precision of the matrix products; the ablated stream comes last.
        scores: float32 or wider; each acts on `unit / score` neighbouring units.
    """
    return _MaskedUnits.apply(values, scores, k, cfg)


class _MaskedUnits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, scores: Tensor, k: int, cfg: GateConfig) -> Tensor:
        ctx.k, ctx.cfg = k, cfg
        mask, edge = mask_and_edge(scores, k, cfg)
        ctx.save_for_backward(values, scores, edge)
        return last_masked(values, mask)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        wants_values, wants_scores, *_ = ctx.needs_input_grad
        values, scores, edge = ctx.saved_tensors
        wanted = wants_values, wants_scores
        _, grad_values, grad_scores = masked_backward(grads[0], values, scores, edge, ctx.k, ctx.cfg, wanted)
        return grad_values, grad_scores, None, None


def masked_backward(
    grad: Float[Tensor, "stream row unit"] | None,
    values: Float[Tensor, "stream row unit"],
    scores: Float[Tensor, "row score"],
    edge: Float[Tensor, "row 2"] | None,
    k: int,
    cfg: GateConfig,
    wanted: tuple[bool, bool],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The mask, and the gradients of the values and of the scores, over that of the masked values.

    Args:
        grad: may be None where nothing is wanted.
        wanted: whether the gradient of the values, and that of the scores, is computed.
    """
    if edge is None:
        mask, _ = mask_and_edge(scores, k, cfg)
        return mask, grad if wanted[0] else None, torch.zeros_like(scores)
    mask, grad_scores = _mask(scores, edge, k, cfg), None
    if grad is not None and wanted[1]:
        grad_mask = grad[-1].to(scores.dtype) * values[-1].to(scores.dtype)
        if grad_mask.shape != scores.shape:
            grad_mask = grad_mask.unflatten(-1, (scores.shape[-1], -1)).sum(-1)
        grad_scores = surrogate_backward(grad_mask, scores, edge, k, cfg)
    return mask, last_masked(grad, mask) if grad is not None and wanted[0] else None, grad_scores


def mask_and_edge(
    scores: Float[Tensor, "row score"], k: int, cfg: GateConfig
) -> tuple[Tensor, Float[Tensor, "row 2"] | None]:
    """The mask, and the k-th and the next score of each row, which do not exist if every unit is kept."""
    if k == scores.shape[-1]:
        return with_nan_rows(torch.ones_like(scores), scores), None
    edge = edge_of(scores, k)
    return _mask(scores, edge, k, cfg), edge


def mask_of(scores: Float[Tensor, "row score"], k: int, cfg: GateConfig) -> Tensor:
    """What `gate_mask(scores, k, cfg)` gives, without gradients; it may be Boolean where the gate is hard."""
    return mask_and_edge(scores, k, cfg)[0]


def edge_of(scores: Float[Tensor, "row score"], k: int) -> Float[Tensor, "row 2"]:
    """The k-th and the next score of each row; NaN for a row that has a NaN, which sorts first."""
    if on_cpu(scores):
        # sorting whole rows with NumPy takes a tenth of the time of `topk`
        rising = torch.from_numpy(np.sort(scores.detach().numpy(), axis=-1))
        first, edge = rising[:, -1:], torch.stack([rising[:, -k], rising[:, -k - 1]], -1)
    else:
        top = scores.topk(k + 1, dim=-1).values
        first, edge = top[:, :1], top[:, k - 1 :]
    return torch.where(first.isnan(), first, edge)


def _edge_index(scores: Float[Tensor, "row score"], edge: Float[Tensor, "row 2"]) -> Int[Tensor, "row 2"]:
    """Where the k-th and the next score of each row are; the lowest index of equal ones."""
    columns = edge.split(1, dim=-1)
    if on_cpu(scores):
        # NumPy compares several times faster
        index = [(scores.detach().numpy() == column.numpy()).argmax(-1) for column in columns]
        return torch.from_numpy(np.stack(index, -1))
    return torch.cat([(scores == column).to(torch.uint8).argmax(-1, keepdim=True) for column in columns], -1)


def last_masked(values: Tensor, mask: Tensor) -> Tensor:
    """Values of all streams, the last one's times a mask that has an entry for each unit or for each head."""
    out = torch.empty_like(values, memory_format=torch.contiguous_format)
    out[:-1] = values[:-1]
    # a CPU converts bytes several times faster than Booleans
    mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    per_mask = (mask.shape[-1], -1)
    torch.mul(values[-1].unflatten(-1, per_mask), mask.to(values.dtype)[..., None], out=out[-1].unflatten(-1, per_mask))
    return out


def _mask(scores: Tensor, edge: Tensor, k: int, cfg: GateConfig) -> Tensor:
    if cfg.kind == "soft":
        shifted, _ = _shift(scores, edge, cfg)
        if cfg.surrogate == "softmax":
            return torch.softmax(shifted, dim=-1)
        v = shifted.sigmoid_()
        return v.mul_(k / v.sum(-1, keepdim=True))
    mask, lost = hard_mask(scores, edge, k), edge[:, :1].isnan()
    # looking for NaN waits for a GPU, so not there
    if on_cpu(scores) and not bool(lost.any()):
        return mask
    return mask.to(scores.dtype).masked_fill_(lost, math.nan)


def hard_mask(scores: Float[Tensor, "row score"], edge: Float[Tensor, "row 2"], k: int) -> Bool[Tensor, "row score"]:
    """True for the k largest scores; among equal ones the lowest index wins.

    Args:
        edge: the k-th and the next score of each row.
    """
    # where the k-th score is larger than the next, comparing is enough; looking for ties waits for a GPU, so not there
    if on_cpu(scores) and bool((edge[:, 0] > edge[:, 1]).all()):
        # NumPy compares faster
        return torch.from_numpy(scores.detach().numpy() >= edge[:, :1].numpy())
    return top_k_mask(scores, k)


def _shift(scores: Tensor, edge: Tensor, cfg: GateConfig) -> tuple[Tensor, Tensor]:
    """(s - g) / (T D + eps), and T D + eps."""
    upper, lower = edge[:, :1], edge[:, 1:]
    width = cfg.temperature * (upper - lower) + EPS
    return (scores - (upper + lower) / 2).div_(width), width


def surrogate_backward(
    grad_weights: Float[Tensor, "row score"],
    scores: Float[Tensor, "row score"],
    edge: Float[Tensor, "row 2"],
    k: int,
    cfg: GateConfig,
) -> Float[Tensor, "row score"]:
    """Gradient of the scores, given that of the surrogate weights.

    With u = (s - g) / (T D + eps) and du its gradient: ds = du / (T D + eps), the threshold g gets the negative sum of
    it, the width D gets -T sum(ds u), and both pass to the k-th and the next score.
    """
    shifted, width = _shift(scores, edge, cfg)
    # equal k-th and next scores: the surrogate has no width there and passes nothing
    factor = (edge[:, :1] != edge[:, 1:]) / width
    if cfg.surrogate == "sigmoid":
        v = torch.sigmoid(shifted)
        total = v.sum(-1, keepdim=True)
        centred = grad_weights - (grad_weights * v).sum(-1, keepdim=True) / total
        grad_scores = torch.ops.aten.sigmoid_backward(centred, v).mul_(factor * k / total)
    else:
        weights = torch.softmax(shifted, dim=-1)
        grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype).mul_(factor)
    grad_width = -cfg.temperature * (grad_scores * shifted).sum(-1, keepdim=True)
    half_threshold = -grad_scores.sum(-1, keepdim=True) / 2
    to_edge = torch.cat([half_threshold + grad_width, half_threshold - grad_width], dim=-1)
    return grad_scores.scatter_add_(-1, _edge_index(scores, edge), to_edge)
