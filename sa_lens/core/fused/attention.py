"""Attention of the clean and the ablated stream over the clean keys, without ever holding all scores.

Query t of the clean stream sees the clean keys 0..t. Query t of the ablated stream sees the clean keys 0..t-1 and its
own, so its scores are those of the clean stream's shape with the own score on the diagonal. Both streams' queries are
interleaved, so that one matrix product serves both, and go through in blocks of queries: a block needs the keys up to
its last position only, and its scores stay in the cache. The way back computes the scores again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

BLOCK = 64
"""Positions whose queries go through at once."""

BLOCK_ELEMENTS = 1 << 21
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

    Args:
        k: clean keys.
        v: clean values.
        own_k: keys of the ablated stream; None: no ablated stream.
        own_v: values of the ablated stream.
        scale: what the scores are multiplied by.
    """
    return _StreamAttention.apply(q, k, v, own_k, own_v, scale)


class _StreamAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, own_k: Tensor | None, own_v: Tensor | None, scale: float
    ) -> Tensor:
        ctx.scale, ctx.dtype = scale, q.dtype
        ctx.save_for_backward(q, k, v, own_k, own_v)
        rows, keys, values, own_keys, own_values = _by_head(q, k, v, own_k, own_v)
        z = torch.empty_like(rows)
        for heads, queries, pattern in _patterns(rows, keys, own_keys, scale):
            seen = pattern.shape[-1]
            block = torch.bmm(pattern, values[heads, :seen])
            if own_values is not None:
                own = _own_entries(pattern, rows.shape[2])[..., None]
                here = slice(queries.start, queries.stop)
                block.view(-1, seen - queries.start, rows.shape[2], rows.shape[3])[:, :, -1].add_(
                    own * (own_values[heads, here] - values[heads, here])
                )
            z[heads, queries] = block.view_as(z[heads, queries])
        return _by_stream(z, q)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, own_k, own_v = ctx.saved_tensors
        rows, keys, values, own_keys, own_values = _by_head(q, k, v, own_k, own_v)
        grad = _rows(grads[0], rows.dtype)
        grad_rows = torch.empty_like(rows)
        grad_keys, grad_values = torch.zeros_like(keys), torch.zeros_like(values)
        grad_own_keys = torch.empty_like(own_keys) if own_keys is not None else None
        grad_own_values = torch.empty_like(own_values) if own_values is not None else None
        streams, d_head = rows.shape[2:]
        for heads, queries, pattern in _patterns(rows, keys, own_keys, ctx.scale):
            seen, here = pattern.shape[-1], slice(queries.start, queries.stop)
            grad_block = grad[heads, queries].flatten(1, 2)
            q_block = rows[heads, queries].flatten(1, 2)
            grad_pattern = torch.bmm(grad_block, values[heads, :seen].transpose(1, 2))
            if own_values is not None:
                grad_own = grad[heads, queries, -1]
                _own_entries(grad_pattern, streams).copy_((grad_own * own_values[heads, here]).sum(-1))
            grad_scores = torch._softmax_backward_data(grad_pattern, pattern, -1, pattern.dtype).mul_(ctx.scale)
            own_scores = None
            if own_keys is not None and grad_own_keys is not None and grad_own_values is not None:
                own_entries = _own_entries(pattern, streams)
                grad_own_values[heads, here] = own_entries[..., None] * grad_own
                own_entries.zero_()
                own_entries = _own_entries(grad_scores, streams)
                own_scores = own_entries.clone()[..., None]
                own_entries.zero_()
                grad_own_keys[heads, here] = own_scores * rows[heads, queries, -1]
            block = torch.bmm(grad_scores, keys[heads, :seen]).view(-1, seen - queries.start, streams, d_head)
            if own_scores is not None:
                block[:, :, -1].add_(own_scores * own_keys[heads, here])
            grad_rows[heads, queries] = block
            grad_keys[heads, :seen] += torch.bmm(grad_scores.transpose(1, 2), q_block)
            grad_values[heads, :seen] += torch.bmm(pattern.transpose(1, 2), grad_block)
        batch = q.shape[1]

        def back(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.unflatten(0, (batch, -1)).transpose(1, 2).to(ctx.dtype)

        return (
            _by_stream(grad_rows, q),
            back(grad_keys),
            back(grad_values),
            back(grad_own_keys),
            back(grad_own_values),
            None,
        )


def _rows(
    x: Float[Tensor, "stream batch pos head d_head"], dtype: torch.dtype
) -> Float[Tensor, "batch_head pos stream d_head"]:
    return x.permute(1, 3, 2, 0, 4).to(dtype).contiguous().flatten(0, 1)


def _by_stream(
    rows: Float[Tensor, "batch_head pos stream d_head"], like: Float[Tensor, "stream batch pos head d_head"]
) -> Float[Tensor, "stream batch pos head d_head"]:
    out = torch.empty_like(like, memory_format=torch.contiguous_format)
    return out.copy_(rows.unflatten(0, (like.shape[1], -1)).permute(3, 0, 2, 1, 4))


def _by_head(q: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """Queries as rows, the others as `batch_head pos d_head`, all contiguous and in float32 or wider."""
    dtype = q.dtype if q.dtype == torch.float64 else torch.float32
    moved = [None if x is None else x.transpose(1, 2).to(dtype).contiguous().flatten(0, 1) for x in others]
    return _rows(q, dtype), *moved


def _patterns(
    rows: Float[Tensor, "batch_head pos stream d_head"],
    keys: Float[Tensor, "batch_head pos d_head"],
    own_keys: Float[Tensor, "batch_head pos d_head"] | None,
    scale: float,
) -> Iterator[tuple[slice, slice, Float[Tensor, "batch_head row key"]]]:
    """(heads, positions, attention pattern of their queries) of each block; each pattern is overwritten by the next."""
    n_heads, length, streams, _ = rows.shape
    size = min(BLOCK, length)
    group = max(1, min(n_heads, BLOCK_ELEMENTS // (size * streams * length)))
    future = torch.ones(size, size, dtype=torch.bool, device=rows.device).triu(1)
    buffer = rows.new_empty(group * size * streams * length)
    for first_head in range(0, n_heads, group):
        heads = slice(first_head, min(first_head + group, n_heads))
        for start in range(0, length, size):
            queries = slice(start, min(start + size, length))
            n, seen = queries.stop - start, queries.stop
            q = rows[heads, queries].flatten(1, 2)
            shape = (q.shape[0], n * streams, seen)
            scores = buffer[: shape[0] * shape[1] * shape[2]].view(shape)
            torch.bmm(q, keys[heads, :seen].transpose(1, 2), out=scores)
            if scale != 1:
                scores.mul_(scale)
            by_position = scores.view(shape[0], n, streams, seen)
            by_position[..., start:].masked_fill_(future[:n, None, :n], float("-inf"))
            if own_keys is not None:
                own = (rows[heads, queries, -1] * own_keys[heads, queries]).sum(-1)
                _own_entries(scores, streams).copy_(own.mul_(scale))
            yield heads, queries, torch.softmax(scores, -1, out=scores)


def _own_entries(block: Float[Tensor, "batch_head row key"], streams: int) -> Float[Tensor, "batch_head pos"]:
    """Entries of the ablated stream, the last one, whose key is the query's own position; a view."""
    by_position = block.view(block.shape[0], -1, streams, block.shape[-1])
    n = by_position.shape[1]
    return by_position[:, :, -1, block.shape[-1] - n :].diagonal(dim1=1, dim2=2)
