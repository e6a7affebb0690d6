"""Linear maps that keep what their input was made of, and make it again in the backward pass.

A normalisation, an activation function and a mask take little time, so they are computed again. Kept until then, their
results and the converted weights of a large model take more memory than all that is kept here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sa_lens.config import GateConfig
from sa_lens.core import products
from sa_lens.core.fused.selection import last_masked, mask_and_edge, masked_backward


class MaskOf(NamedTuple):
    """What the mask on the units of a layer is computed from, as in `masked_units`."""

    scores: Float[Tensor, "row score"]
    k: int
    cfg: GateConfig


def linear(
    make: Callable[..., Float[Tensor, "stream batch pos in"]],
    inputs: Sequence[Tensor],
    weights: Sequence[Float[Tensor, "*head in out"]],
    bias: Float[Tensor, " out"] | None,
    dtype: torch.dtype,
    mask: MaskOf | None = None,
) -> tuple[Float[Tensor, "stream batch pos out"], ...]:
    """`x @ weight + bias` in `dtype`, where x is `make(*inputs)`, or `masked_units` of it; one for each of `matrices`.

    Args:
        make: a function of the inputs alone.
        weights: converted in the forward pass and once more in the backward pass.
    """
    return _Linear.apply(make, dtype, weights, bias, *(mask or (None, 0, None)), *weights, *inputs)


def matrices(weights: Sequence[Float[Tensor, "*head in out"]], dtype: torch.dtype) -> Iterator[Float[Tensor, "in out"]]:
    """The weights in another precision; a single one may have rows by head, several with columns by head become one.

    Each is converted when its turn comes, so that few take memory at once.
    """
    if len(weights) > 1 and weights[0].dim() > 2:
        yield torch.cat([weight.to(dtype) for weight in weights]).transpose(0, 1).flatten(1)
        return
    for weight in weights:
        yield weight.to(dtype).flatten(0, -2)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        make: Callable[..., Tensor],
        dtype: torch.dtype,
        weights: Sequence[Tensor],
        bias: Tensor | None,
        scores: Tensor | None,
        k: int,
        cfg: GateConfig,
        *weights_and_inputs: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.make, ctx.dtype, ctx.n_weights, ctx.k, ctx.cfg = make, dtype, len(weights), k, cfg
        x, edge = make(*weights_and_inputs[len(weights) :]).to(dtype), None
        if scores is not None:
            mask, edge = mask_and_edge(scores, k, cfg)
            x = last_masked(x.flatten(1, 2), mask).view_as(x)
        ctx.save_for_backward(scores, edge, *weights_and_inputs)
        return tuple(products.linear(x, matrix.T, bias) for matrix in matrices(weights, dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scores, edge, *saved = ctx.saved_tensors
        weights, inputs = saved[: ctx.n_weights], saved[ctx.n_weights :]
        wants_bias, wants_scores, _, _, *wants = ctx.needs_input_grad[3:]
        wants_weights, wants_inputs = wants[: ctx.n_weights], wants[ctx.n_weights :]
        # what stays takes its memory first, so that it does not end up behind what is freed
        of_weights = [torch.empty_like(weight) for weight in weights] if any(wants_weights) else []
        made_of = [x.detach().requires_grad_(wanted) for x, wanted in zip(inputs, wants_inputs, strict=True)]
        with torch.enable_grad():
            made = ctx.make(*made_of).to(ctx.dtype)
        rows, x, of_scores = [grad.flatten(0, -2) for grad in grads], made.detach(), None
        of_x = None
        if any(wants_inputs) or wants_scores:
            for grad, matrix in zip(rows, matrices(weights, ctx.dtype), strict=True):
                of_x = torch.mm(grad, matrix.T) if of_x is None else torch.addmm(of_x, grad, matrix.T)
            of_x = None if of_x is None else of_x.view_as(x)
        if scores is not None:
            values = x.flatten(1, 2)
            grad_masked, wanted = None if of_x is None else of_x.view_as(values), (any(wants_inputs), wants_scores)
            mask, of_values, of_scores = masked_backward(grad_masked, values, scores, edge, ctx.k, ctx.cfg, wanted)
            of_x = None if of_values is None else of_values.view_as(x)
            x = last_masked(values, mask) if of_weights else x
        if of_weights:
            whole = (torch.mm(x.flatten(0, -2).T, grad) for grad in rows)
            parts = whole if len(rows) == len(weights) else _by_head(next(whole), weights)
            for gradient, part in zip(of_weights, parts, strict=True):
                gradient.copy_(part.view_as(gradient))
        wants_nothing: list[Tensor | None] = [None] * len(weights)
        leaves = [x for x in made_of if x.requires_grad]
        of_inputs = iter(torch.autograd.grad(made, leaves, of_x) if leaves else ())
        return (
            *(None, None, None, rows[0].sum(0) if wants_bias else None, of_scores, None, None),
            *(of_weights or wants_nothing),
            *(next(of_inputs) if wants else None for wants in wants_inputs),
        )


def _by_head(
    matrix: Float[Tensor, "in out"], weights: Sequence[Float[Tensor, "*head in out"]]
) -> Sequence[Float[Tensor, "*head in out"]]:
    """Views of the parts of a matrix that `matrices` makes of the weights."""
    by_head = matrix.unflatten(1, (-1, weights[0].shape[-1])).transpose(0, 1)
    return by_head.split([len(weight) for weight in weights])
