"""Unembedding and cross-entropy in one, a chunk of rows at a time, with the gradients computed on the way forward.

The logits of a chunk are made, turned into their gradient and used up before the next chunk, so all logits never exist
at once. All streams share one gradient of the unembedding. Matrix products run in `dtype`; the exponentials, their sums
and the losses in float32 or wider.

Logits are in units of ln 2, because a CPU computes powers of two several times faster than `exp`. The exponentials are
never divided by their sum Z: with E = 2^(logits - largest), from which Z is subtracted at the target, the gradients are
(E @ W) / Z and E^T @ (x / Z), whose divisions are of narrow matrices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sa_lens.core.fused.operations import on_cpu
from sa_lens.core.host import at_least_float32

CHUNK_ELEMENTS = 1 << 26
"""Logits that a chunk may hold."""

CACHED_ELEMENTS = 1 << 19
"""Logits that are exponentiated at once on a CPU, and numbers of a gradient that are added at once."""

LN_2 = math.log(2)
LOG2_E = 1 / LN_2

LARGE = 2.0**60
"""Z and 1 / Z beyond which the largest logit is subtracted."""

IGNORED = -100
"""Target of positions that are left out, as in `torch.nn.functional.cross_entropy`."""


def linear_cross_entropy(
    streams: tuple[Float[Tensor, "row d_model"], ...],
    weight: Float[Tensor, "d_model d_vocab"],
    bias: Float[Tensor, " d_vocab"] | None,
    targets: Int[Tensor, " row"],
    coefficients: tuple[float, ...],
    dtype: torch.dtype,
) -> tuple[Float[Tensor, ""], ...]:
    """Mean cross-entropy of the logits `x @ weight + bias` of each stream, nats per row whose target is not -100.

    Differentiable once in the streams, `weight` and `bias`. The gradients of the weighted sum are ready when this
    returns; those of a single loss are computed when they are asked for.

    Args:
        targets: the same for all streams.
        coefficients: the factor of each stream's loss in the weighted sum.
        dtype: of the matrix products.

    Returns:
        The weighted sum of the losses, and the loss of each stream.
    """
    # inside the function grad mode is always off, so what is wanted has to be asked here
    wants = tuple(torch.is_grad_enabled() and t is not None and t.requires_grad for t in (weight, bias, *streams))
    return _LinearCrossEntropy.apply(weight, bias, targets, coefficients, dtype, wants, *streams)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        coefficients: tuple[float, ...],
        dtype: torch.dtype,
        wants: tuple[bool, ...],
        *streams: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.coefficients, ctx.options = coefficients, (dtype, wants)
        losses, ctx.gradients = _losses_and_gradients(streams, weight, bias, targets, coefficients, *ctx.options)
        ctx.save_for_backward(weight, bias, targets, *streams)
        separate = losses.unbind()
        ctx.mark_non_differentiable(*(loss for i, loss in enumerate(separate) if not (any(wants[:2]) or wants[2 + i])))
        return torch.stack([c * loss for c, loss in zip(coefficients, separate, strict=True)]).sum(), *separate

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad, *of_losses = grads
        # each is as large as what it belongs to, so it is given away; another backward pass computes it again
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None or grad is None or any(g is not None for g in of_losses):
            weight, bias, targets, *streams = ctx.saved_tensors
            zero = streams[0].new_zeros(())
            of_total, *each = (zero if g is None else g for g in grads)
            factors = [g + of_total * c for g, c in zip(each, ctx.coefficients, strict=True)]
            _, gradients = _losses_and_gradients(streams, weight, bias, targets, factors, *ctx.options)
        else:
            gradients = [None if g is None else g.mul_(grad) for g in gradients]
        of_weight, of_bias, *of_streams = gradients
        return of_weight, of_bias, None, None, None, None, *of_streams


def _losses_and_gradients(
    streams: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    coefficients: Sequence[float | Tensor],
    dtype: torch.dtype,
    wants: tuple[bool, ...],
) -> tuple[Tensor, list[Tensor | None]]:
    """Losses of the streams, and the gradients of their weighted sum: of the weight, the bias and each stream."""
    want_weight, want_bias, *want_streams = wants
    rows, n_words = len(targets), weight.shape[1]
    n_chunks = max(1, -(-rows * n_words // CHUNK_ELEMENTS))
    size = max(1, -(-rows // n_chunks))
    kept = targets != IGNORED
    share = kept.to(at_least_float32(streams[0]).dtype) / kept.sum()
    targets = targets.clamp(min=0)

    # laid out as the unembedding, which is transposed if it is tied; first, where the last step's was
    grad_weight = torch.empty_like(weight) if want_weight else None
    table = weight.to(dtype)
    bias = None if bias is None else at_least_float32(bias) * LOG2_E
    logits = weight.new_empty(size, n_words, dtype=dtype)
    losses = share.new_empty(len(streams), rows)
    sums = share.new_empty(size)
    grad_streams = [torch.empty_like(x) if want else None for x, want in zip(streams, want_streams, strict=True)]
    grad_bias = torch.zeros_like(bias) if want_bias and bias is not None else None

    # looking at Z waits for a GPU, so not there
    shifted = not on_cpu(logits)
    for i, (x, grad_x, coefficient) in enumerate(zip(streams, grad_streams, coefficients, strict=True)):
        inputs = (x * LOG2_E).to(dtype)
        wanted = grad_x is not None or want_weight or want_bias
        for start in range(0, rows, size):
            chunk = slice(start, min(start + size, rows))
            p, total = logits[: chunk.stop - start], sums[: chunk.stop - start]
            exponentials = p, bias, targets[chunk], total, losses[i, chunk]
            torch.mm(inputs[chunk], table, out=p)
            _exponentials_(*exponentials, shifted=shifted, wanted=wanted)
            if not shifted and not bool(((total > 1 / LARGE) & (total < LARGE)).all()):
                shifted = True
                torch.mm(inputs[chunk], table, out=p)
                _exponentials_(*exponentials, shifted=True, wanted=wanted)
            factor = (share[chunk] * coefficient / total)[:, None]
            if grad_x is not None:
                torch.mul(torch.mm(p, table.T), factor, out=grad_x[chunk])
            if grad_weight is not None:
                _add_product_(grad_weight, grad_bias, x[chunk] * factor, factor, p, first=i == start == 0)
            elif grad_bias is not None:
                grad_bias.add_(torch.mv(p.T, factor[:, 0].to(dtype)))
    return torch.mv(losses, share), [grad_weight, grad_bias, *grad_streams]


def _exponentials_(
    logits: Float[Tensor, "row d_vocab"],
    bias: Float[Tensor, " d_vocab"] | None,
    targets: Int[Tensor, " row"],
    sums: Float[Tensor, " row"],
    losses: Float[Tensor, " row"],
    *,
    shifted: bool,
    wanted: bool,
) -> None:
    """Computes Z and the loss of each row; turns the logits, if that is `wanted`, into its gradient times Z.

    In float16, whose range is too short for Z, the exponentials are divided by it, and `sums` are 1 in the end. On a
    CPU a few rows go through at a time, so that all steps but the first and the last find them in the cache.

    Args:
        shifted: whether the largest logit of each row is subtracted, without which Z may leave the range of numbers.
    """
    rows, n_words = logits.shape
    size = max(1, min(rows, CACHED_ELEMENTS // n_words)) if logits.device.type == "cpu" else rows
    wide_enough, short_range = logits.dtype == losses.dtype, logits.dtype == torch.float16
    buffer = logits if wide_enough else losses.new_empty(size, n_words)
    row, largest = torch.arange(rows, device=logits.device), torch.zeros_like(losses)
    at_target = logits[row, targets].to(losses.dtype)
    if bias is not None:
        at_target = at_target + bias[targets]
    for start in range(0, rows, size):
        here = slice(start, min(start + size, rows))
        p = logits[here] if wide_enough else buffer[: here.stop - start].copy_(logits[here])
        if bias is not None:
            p.add_(bias)
        if shifted:
            p.sub_(torch.amax(p, 1, out=largest[here])[:, None])
        torch.sum(p.exp2_(), 1, out=sums[here])
        if short_range:
            p.div_(sums[here, None])
        if wanted and not wide_enough:
            logits[here] = p
    at_target.sub_(largest)
    torch.sub(sums.log2(), at_target, out=losses).mul_(LN_2)
    at_target.exp2_()
    if short_range:
        at_target.div_(sums)
        sums.fill_(1)
    if wanted:
        logits[row, targets] = at_target.sub_(sums).to(logits.dtype)


def _add_product_(
    into: Float[Tensor, "d_model d_vocab"],
    bias: Float[Tensor, " d_vocab"] | None,
    x: Float[Tensor, "row d_model"],
    factor: Float[Tensor, "row 1"],
    p: Float[Tensor, "row d_vocab"],
    *,
    first: bool,
) -> None:
    """`into += x.T @ p`, which the first product fills, and `bias += factor.T @ p`.

    Products are in the precision of `p`, sums in that of `into` and `bias`.
    """
    if p.dtype == into.dtype:
        into.addmm_(x.to(p.dtype).T, p, beta=0 if first else 1)
        if bias is not None:
            bias.add_(torch.mv(p.T, factor[:, 0].to(p.dtype)))
        return
    d_model, n_words = into.shape
    # one more column takes a CPU far less time than a product of its own
    x = (x if bias is None else torch.cat([x, factor], 1)).to(p.dtype)
    size = max(1, CACHED_ELEMENTS // d_model) if on_cpu(p) else n_words
    partial = p.new_empty(x.shape[1], size)
    for start in range(0, n_words, size):
        words = slice(start, min(start + size, n_words))
        product = torch.mm(x.T, p[:, words], out=partial[:, : words.stop - start])
        of_weight = product[:d_model]
        # transposed alone, a part is added several times faster
        part = of_weight.T.contiguous().T if into.stride(0) == 1 else of_weight
        into[:, words] = part if first else into[:, words].add_(part)
        if bias is not None:
            bias[words].add_(product[d_model])
