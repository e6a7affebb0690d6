"""Unembedding and cross-entropy in one, a chunk of rows at a time, with the gradients computed on the way forward.

The logits of a chunk are made, turned into their gradient and used up before the next chunk, so all logits never exist
at once. Matrix products run in `dtype`; the softmax, its statistics and the loss in float32 or wider.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sa_lens.core.host import at_least_float32

CHUNK_ELEMENTS = 1 << 25
"""Logits that a chunk may hold."""

CACHED_ELEMENTS = 1 << 20
"""Logits that go through the softmax at once on a CPU, so that they stay in its cache."""

GPU_CHUNK_ELEMENTS = 1 << 26
"""Logits that a chunk holds and that go through the softmax at once on a GPU, where many small steps cost more."""

IGNORED = -100
"""Target of positions that are left out, as in `torch.nn.functional.cross_entropy`."""


@torch.no_grad()
def word_table(weight: Float[Tensor, "d_model d_vocab"], dtype: torch.dtype) -> Float[Tensor, "d_vocab d_model"]:
    """The unembedding as the products read it; it lies as the embedding does where the two are tied."""
    return weight.T.to(dtype).contiguous() if weight.stride(0) == 1 else weight.to(dtype).contiguous().T


def linear_cross_entropy(
    x: Float[Tensor, "row d_model"],
    weight: Float[Tensor, "d_model d_vocab"],
    bias: Float[Tensor, " d_vocab"] | None,
    targets: Int[Tensor, " row"],
    table: Float[Tensor, "d_vocab d_model"],
) -> Float[Tensor, ""]:
    """Mean cross-entropy of the logits `x @ weight + bias`, nats per row whose target is not -100.

    Differentiable once in `x`, `weight` and `bias`.

    Args:
        table: `word_table` of the weight, whose type is that of the products; several calls may share it.
    """
    # inside the function grad mode is always off, so what is wanted has to be asked here
    wants = tuple(torch.is_grad_enabled() and t is not None and t.requires_grad for t in (x, weight, bias))
    return _LinearCrossEntropy.apply(x, weight, bias, targets, table, wants)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        table: Tensor,
        wants: tuple[bool, bool, bool],
    ) -> Tensor:
        loss, *gradients = _loss_and_gradients(x, weight, bias, targets, table, wants)
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        scaled = [None if g is None else g * grad.to(g.dtype) for g in ctx.saved_tensors]
        return (*scaled, None, None, None)


def _loss_and_gradients(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    table: Tensor,
    wants: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    want_x, want_weight, want_bias = wants
    rows, n_words = x.shape[0], weight.shape[1]
    elements = CHUNK_ELEMENTS if x.device.type == "cpu" else GPU_CHUNK_ELEMENTS
    size = max(1, min(rows, elements // n_words))
    kept = targets != IGNORED
    share = kept.to(at_least_float32(x).dtype) / kept.sum()
    targets = targets.clamp(min=0)

    dtype = table.dtype
    inputs = x.to(dtype)
    logits = x.new_empty(size, n_words, dtype=dtype)
    losses = torch.empty_like(share)
    grad_x = torch.empty_like(x) if want_x else None
    grad_table = torch.empty_like(table, dtype=weight.dtype) if want_weight else None
    partial = torch.empty_like(table) if want_weight and dtype != weight.dtype else None
    grad_bias = torch.zeros_like(bias) if want_bias and bias is not None else None

    for start in range(0, rows, size):
        chunk = slice(start, min(start + size, rows))
        p = logits[: chunk.stop - start]
        torch.mm(inputs[chunk], table.T, out=p)
        if bias is not None:
            p.add_(bias.to(dtype))
        _softmax_minus_target_(p, targets[chunk], losses[chunk])
        if grad_x is not None:
            torch.mul(torch.mm(p, table), share[chunk, None], out=grad_x[chunk])
        if grad_table is not None:
            _add_product_(grad_table, p, (x[chunk] * share[chunk, None]).to(dtype), partial, first=start == 0)
        if grad_bias is not None:
            grad_bias.add_(torch.mv(p.T, share[chunk].to(dtype)))
    loss = torch.dot(losses, share)
    if grad_table is None:
        return loss, grad_x, None, grad_bias
    return loss, grad_x, grad_table.T, grad_bias


def _softmax_minus_target_(
    logits: Float[Tensor, "row d_vocab"], targets: Int[Tensor, " row"], losses: Float[Tensor, " row"]
) -> None:
    """Turns the logits, in place, into the gradient of each row's cross-entropy, which goes to `losses`.

    On a CPU a few rows at a time, so that all steps but the first and the last find them in the cache.
    """
    rows, n_words = logits.shape
    size = max(1, min(rows, CACHED_ELEMENTS // n_words)) if logits.device.type == "cpu" else rows
    wide_enough = logits.dtype == losses.dtype
    buffer = logits if wide_enough else losses.new_empty(size, n_words)
    each = torch.arange(size, device=logits.device)
    for start in range(0, rows, size):
        here = slice(start, min(start + size, rows))
        n = here.stop - start
        row, target = each[:n], targets[here]
        p = logits[here] if wide_enough else buffer[:n].copy_(logits[here])
        at_target, largest = p[row, target], p.amax(1)
        torch.softmax(p, 1, out=p)
        torch.sub(largest - p.amax(1).log(), at_target, out=losses[here])
        p[row, target] -= 1
        if not wide_enough:
            logits[here] = p


def _add_product_(
    into: Float[Tensor, "d_vocab d_model"],
    p: Float[Tensor, "row d_vocab"],
    x: Float[Tensor, "row d_model"],
    partial: Float[Tensor, "d_vocab d_model"] | None,
    *,
    first: bool,
) -> None:
    """`into += p.T @ x`, the product in the precision of `p`, the sum in that of `into`; the first one fills it."""
    if partial is None:
        into.addmm_(p.T, x, beta=0 if first else 1)
    elif first:
        into.copy_(torch.mm(p.T, x, out=partial))
    else:
        into.add_(torch.mm(p.T, x, out=partial))
