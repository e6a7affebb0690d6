"""Attention of the clean and the ablated stream over the clean keys, without ever holding all scores.

Query t of the clean stream sees the clean keys 0..t. Query t of the ablated stream sees the clean keys 0..t-1 and its
own, so its scores have the shape of the clean stream's with the own score on the diagonal: one causal softmax serves
both. The streams' queries are interleaved, so that one matrix product serves both too, and go through in blocks of
queries: a block needs the keys up to its last position only, and its scores stay in the cache. The backward
pass computes the scores again.

Products whose result is as narrow as a head are written transposed, `[head, d_head, row or key]`: matrix libraries are
several times faster at wide results.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

BLOCK = 64
"""Positions whose queries go through at once."""

BLOCK_ELEMENTS = 1 << 19
"""Scores that a block of queries may hold, over all its heads."""


def stream_attention(
    q: Float[Tensor, "stream batch pos head d_head"],
    k: Float[Tensor, "batch pos head d_head"],
    v: Float[Tensor, "batch pos head d_head"],
    own_k: Float[Tensor, "batch pos head d_head"] | None,
    own_v: Float[Tensor, "batch pos head d_head"] | None,
    scale: float,
) -> Float[Tensor, "stream batch pos head d_head"]:
    """`z` of the streams whose queries are given; with `own_k` and `own_v`, the last one is the ablated stream.

    Scores and softmax are float32 or wider; the products with the pattern are in the inputs' precision.

    Args:
        k: clean keys.
        v: clean values.
        own_k: keys of the ablated stream; None: no ablated stream.
        own_v: values of the ablated stream.
        scale: what the scores are multiplied by.
    """
    return _StreamAttention.apply(q, k, v, own_k, own_v, scale)


class _Inputs(NamedTuple):
    """Queries, keys and values by head, contiguous, in float32 or wider."""

    q: Float[Tensor, "batch_head pos stream d_head"]
    """Scaled."""
    k: Float[Tensor, "batch_head d_head pos"]
    v: Float[Tensor, "batch_head d_head pos"]
    own_k: Float[Tensor, "batch_head d_head pos"] | None
    own_v: Float[Tensor, "batch_head d_head pos"] | None


class _Block(NamedTuple):
    """Which heads and which queries."""

    heads: slice
    queries: slice


class _StreamAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, own_k: Tensor | None, own_v: Tensor | None, scale: float
    ) -> Tensor:
        ctx.scale = scale
        ctx.save_for_backward(q, k, v, own_k, own_v)
        x = _by_head(q, k, v, own_k, own_v, scale)
        streams = q.shape[0]
        narrow_v = x.v.to(q.dtype)
        z = x.q.new_empty(x.q.shape[0], x.q.shape[3], x.q.shape[1], streams)
        narrowed = _Narrowed(x, q.dtype)
        for block, pattern in _patterns(x):
            heads, queries = block
            part = torch.bmm(narrow_v[heads, :, : queries.stop], narrowed(pattern).transpose(1, 2))
            part = z[heads, :, queries].copy_(part.view(part.shape[0], part.shape[1], -1, streams))
            if x.own_v is not None:
                own = _own_entries(pattern, streams)[:, None]
                part[..., -1].addcmul_(own, x.own_v[heads, :, queries] - x.v[heads, :, queries])
        return _by_stream(z, q)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, own_k, own_v = ctx.saved_tensors
        dtype, streams = q.dtype, q.shape[0]
        x = _by_head(q, k, v, own_k, own_v, ctx.scale)
        grad = _rows(grads[0], x.q.dtype)
        narrow_k, narrow_q, narrow_grad = x.k.to(dtype), x.q.to(dtype), grad.to(dtype)
        grad_q = x.q.new_empty(x.q.shape[0], x.q.shape[3], x.q.shape[1], streams)
        grad_k, grad_v = torch.zeros_like(x.k), torch.zeros_like(x.v)
        own_grads = None if x.own_k is None else (torch.empty_like(x.k), torch.empty_like(x.v))
        narrowed, buffer = _Narrowed(x, dtype), x.q.new_empty(_block_elements(x))
        for block, pattern in _patterns(x):
            heads, queries = block
            seen = queries.stop
            grad_pattern = buffer[: pattern.numel()].view_as(pattern)
            torch.bmm(grad[heads, queries].flatten(1, 2), x.v[heads, :, :seen], out=grad_pattern)
            if x.own_v is not None:
                grad_own = grad[heads, queries, -1].transpose(1, 2)
                _own_entries(grad_pattern, streams).copy_((grad_own * x.own_v[heads, :, queries]).sum(1))
            grad_scores = _softmax_backward_(grad_pattern, pattern)
            own_scores = None
            if own_grads is not None:
                own_entries, own_scores = _own_entries(pattern, streams), _own_entries(grad_scores, streams)
                torch.mul(own_entries[:, None], grad_own, out=own_grads[1][heads, :, queries])
                own_entries.zero_()
                own_entries, own_scores = own_scores, own_scores.clone()[:, None]
                own_entries.zero_()
                own_q = x.q[heads, queries, -1].transpose(1, 2)
                torch.mul(own_scores, own_q, out=own_grads[0][heads, :, queries])
            narrow_scores = narrowed(grad_scores)
            part = torch.bmm(narrow_k[heads, :, :seen], narrow_scores.transpose(1, 2))
            part = grad_q[heads, :, queries].copy_(part.view(part.shape[0], part.shape[1], -1, streams))
            if own_scores is not None and x.own_k is not None:
                part[..., -1].addcmul_(own_scores, x.own_k[heads, :, queries])
            grad_k[heads, :, :seen] += torch.bmm(narrow_q[heads, queries].flatten(1, 2).transpose(1, 2), narrow_scores)
            by_column = narrow_grad[heads, queries].flatten(1, 2).transpose(1, 2)
            grad_v[heads, :, :seen] += torch.bmm(by_column, narrowed(pattern))

        def back(x: Tensor) -> Tensor:
            return x.unflatten(0, (q.shape[1], -1)).permute(0, 3, 1, 2).to(dtype)

        own = (None, None) if own_grads is None else tuple(back(x) for x in own_grads)
        return _by_stream(grad_q.mul_(ctx.scale), q), back(grad_k), back(grad_v), *own, None


class _Narrowed:
    """Blocks in the precision of the products; each overwrites the one before."""

    def __init__(self, x: _Inputs, dtype: torch.dtype) -> None:
        self.buffer = None if dtype == x.q.dtype else x.q.new_empty(_block_elements(x), dtype=dtype)

    def __call__(self, block: Tensor) -> Tensor:
        return block if self.buffer is None else self.buffer[: block.numel()].view_as(block).copy_(block)


def _softmax_backward_(grad: Tensor, pattern: Tensor) -> Tensor:
    """Gradient of the scores, over the gradient of the pattern."""
    return torch.ops.aten._softmax_backward_data.out(grad, pattern, -1, pattern.dtype, grad_input=grad)


def _rows(
    x: Float[Tensor, "stream batch pos head d_head"], dtype: torch.dtype
) -> Float[Tensor, "batch_head pos stream d_head"]:
    return x.permute(1, 3, 2, 0, 4).to(dtype, memory_format=torch.contiguous_format).flatten(0, 1)


def _by_stream(
    x: Float[Tensor, "batch_head d_head pos stream"], like: Float[Tensor, "stream batch pos head d_head"]
) -> Float[Tensor, "stream batch pos head d_head"]:
    out = torch.empty_like(like, memory_format=torch.contiguous_format)
    return out.copy_(x.unflatten(0, (like.shape[1], -1)).permute(4, 0, 3, 1, 2))


def _by_head(q: Tensor, k: Tensor, v: Tensor, own_k: Tensor | None, own_v: Tensor | None, scale: float) -> _Inputs:
    dtype = q.dtype if q.dtype == torch.float64 else torch.float32
    columns = [
        None if x is None else x.permute(0, 2, 3, 1).to(dtype, memory_format=torch.contiguous_format).flatten(0, 1)
        for x in (k, v, own_k, own_v)
    ]
    rows = _rows(q, dtype)
    return _Inputs(rows * scale if scale != 1 else rows, *columns)  # type: ignore[arg-type]


def _block_shape(x: _Inputs) -> tuple[int, int]:
    """Positions and heads of a block."""
    n_heads, length, streams, _ = x.q.shape
    size = min(BLOCK, length)
    return size, max(1, min(n_heads, BLOCK_ELEMENTS // (size * streams * length)))


def _block_elements(x: _Inputs) -> int:
    """Scores of the largest block."""
    size, group = _block_shape(x)
    return group * size * x.q.shape[2] * x.q.shape[1]


def _patterns(x: _Inputs) -> Iterator[tuple[_Block, Float[Tensor, "batch_head row key"]]]:
    """The attention pattern of each block; it is overwritten by the next."""
    n_heads, length, streams, _ = x.q.shape
    size, group = _block_shape(x)
    future = x.q.new_full((size, size), float("-inf")).triu_(1)[:, None]
    buffer = x.q.new_empty(_block_elements(x))
    for first_head in range(0, n_heads, group):
        heads = slice(first_head, min(first_head + group, n_heads))
        for start in range(0, length, size):
            queries = slice(start, min(start + size, length))
            n, seen = queries.stop - start, queries.stop
            q = x.q[heads, queries].flatten(1, 2)
            shape = (q.shape[0], n * streams, seen)
            scores = buffer[: shape[0] * shape[1] * shape[2]].view(shape)
            torch.bmm(q, x.k[heads, :, :seen], out=scores)
            scores.view(shape[0], n, streams, seen)[..., start:].add_(future[:n, :, :n])
            if x.own_k is not None:
                own = (x.q[heads, queries, -1].transpose(1, 2) * x.own_k[heads, :, queries]).sum(1)
                _own_entries(scores, streams).copy_(own)
            yield _Block(heads, queries), torch.softmax(scores, -1, out=scores)


def _own_entries(block: Float[Tensor, "batch_head row key"], streams: int) -> Float[Tensor, "batch_head pos"]:
    """Entries of the ablated stream, the last one, whose key is the query's own position; a view."""
    by_position = block.view(block.shape[0], -1, streams, block.shape[-1])
    n = by_position.shape[1]
    return by_position[:, :, -1, block.shape[-1] - n :].diagonal(dim1=1, dim2=2)
