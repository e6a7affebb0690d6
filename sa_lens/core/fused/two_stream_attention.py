"""Attention of the clean and the ablated stream over the clean keys, without ever holding all scores.

Query t of the clean stream sees the clean keys 0..t. Query t of the ablated stream sees the clean keys 0..t-1 and its
own, so its scores have the shape of the clean stream's with the own score on the diagonal: one causal softmax serves
both. All queries that share keys, those of both streams and of all heads of a group, are interleaved (axis `row`), so
that one matrix product serves them all. They go through in blocks of positions: a block needs the keys up to its last
position only, and no further back than the window, and its scores stay in the cache. The backward pass computes the
scores again, and the pattern by the logarithm of each row's sum, which the forward pass keeps.

Scores are in units of ln 2, because a CPU computes powers of two several times faster than a softmax, and rows are
divided by their sums after the product with the values.

Products whose result is as narrow as a head are written transposed, `[head, d_head, row or key]`: matrix libraries are
several times faster at wide results.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sa_lens.core.fused.operations import on_cpu

BLOCK = 64
"""Positions whose queries go through at once."""

BLOCK_ELEMENTS = 1 << 20
"""Scores that a block of queries may hold, over all its heads, so that they stay in the cache of a CPU."""

GPU_BLOCK, GPU_BLOCK_ELEMENTS = 256, 1 << 27
"""The same on a GPU, where every kernel that is launched takes time."""

LARGEST_EXPONENT = 60.0
"""Scores, in units of ln 2, up to which no row's largest one has to be subtracted."""

LN_2 = math.log(2)


class Rotary(NamedTuple):
    """The rotation of queries and keys by their positions: the pair (a, b) becomes (a cos - b sin, b cos + a sin)."""

    cos: Float[Tensor, "pos pair"]
    sin: Float[Tensor, "pos pair"]
    adjacent: bool
    """Whether pairs are neighbouring dimensions (GPT-J), or the first of each half (GPT-NeoX, Llama)."""

    def turn_(self, x: Float[Tensor, "any row pos d_head"], *, back: bool = False) -> None:
        """Turns the leading dimensions in place; `back`: the other way round, as gradients are."""
        cos, sin = self.cos.to(x.dtype), self.sin.to(x.dtype)
        n = cos.shape[-1]
        a, b = (x[..., : 2 * n : 2], x[..., 1 : 2 * n : 2]) if self.adjacent else (x[..., :n], x[..., n : 2 * n])
        sign, before = -1 if back else 1, a.clone()
        a.mul_(cos).addcmul_(b, sin, value=-sign)
        b.mul_(cos).addcmul_(before, sin, value=sign)


def stream_attention(
    q: Float[Tensor, "stream batch pos head d_head"],
    k: Float[Tensor, "batch pos kv_head d_head"],
    v: Float[Tensor, "batch pos kv_head d_head"],
    own_k: Float[Tensor, "batch pos kv_head d_head"] | None,
    own_v: Float[Tensor, "batch pos kv_head d_head"] | None,
    scale: float,
    *,
    window: int | None = None,
    rotary: Rotary | None = None,
) -> Float[Tensor, "stream batch pos head d_head"]:
    """`z` of the streams whose queries are given; with `own_k` and `own_v`, the last one is the ablated stream.

    Scores and softmax are float32 or wider; the products with the pattern are in the inputs' precision.

    Args:
        k: clean keys; each serves `head / kv_head` neighbouring heads.
        v: clean values.
        own_k: keys of the ablated stream; None: no ablated stream.
        own_v: values of the ablated stream.
        scale: what the scores are multiplied by.
        window: number of last positions that a query sees, its own included; None: all.
        rotary: of queries and keys; None: they stay as they are.
    """
    return _StreamAttention.apply(q, k, v, own_k, own_v, scale, window, rotary)


class _Inputs(NamedTuple):
    """Queries, keys and values by head, contiguous, in float32 or wider."""

    q: Float[Tensor, "batch_head pos row d_head"]
    """Turned, and scaled so that scores are in units of ln 2; rows are (stream, head of the group)."""
    k: Float[Tensor, "batch_head d_head pos"]
    v: Float[Tensor, "batch_head d_head pos"]
    own_k: Float[Tensor, "batch_head d_head pos"] | None
    own_v: Float[Tensor, "batch_head d_head pos"] | None
    own_rows: int
    """Number of rows of the ablated stream, the last ones."""
    window: int


class _Block(NamedTuple):
    """Heads of keys, positions of queries, and the keys that these see."""

    heads: slice
    queries: slice
    keys: slice


class _StreamAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        own_k: Tensor | None,
        own_v: Tensor | None,
        scale: float,
        window: int | None,
        rotary: Rotary | None,
    ) -> Tensor:
        ctx.options = scale, window, rotary
        x = _by_head(q, k, v, own_k, own_v, *ctx.options)
        narrow_v = x.v.to(q.dtype)
        z, totals = _columns_of_rows(x), x.q.new_empty(x.q.shape[:3])
        largest = torch.empty_like(totals) if _must_shift(x) else None
        narrowed = _Narrowed(x, q.dtype)
        for block, scores in _scores(x):
            heads, queries, keys = block
            if largest is not None:
                shift = scores.amax(-1)
                scores.sub_(shift[..., None])
                largest[heads, queries] = shift.view_as(largest[heads, queries])
            total = scores.exp2_().sum(-1)
            totals[heads, queries] = total.view_as(totals[heads, queries])
            part = torch.bmm(narrow_v[heads, :, keys], narrowed(scores).transpose(1, 2))
            z[heads, :, queries] = part.view_as(z[heads, :, queries])
        z.div_(totals[:, None])
        norms = totals.log2_() if largest is None else totals.log2_().add_(largest)
        own = _own_scores(x)
        if own is not None and x.own_v is not None:
            z[..., -x.own_rows :].addcmul_(_own_pattern(own, norms)[:, None], (x.own_v - x.v)[..., None])
        ctx.save_for_backward(q, k, v, own_k, own_v, norms)
        return _by_stream(z, q)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, own_k, own_v, norms = ctx.saved_tensors
        _, _, rotary = ctx.options
        dtype = q.dtype
        x = _by_head(q, k, v, own_k, own_v, *ctx.options)
        grad = _rows(grads[0], k.shape[2], x.q.dtype)
        queries_of_keys = x.q * LN_2
        narrow_k, narrow_q, narrow_grad = x.k.to(dtype), queries_of_keys.to(dtype), grad.to(dtype)
        grad_q = _columns_of_rows(x)
        wants_clean = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        grad_k, grad_v = (torch.zeros_like(x.k), torch.zeros_like(x.v)) if wants_clean else (None, None)
        own_scores, own_grad = _own_scores(x), _own_rows(grad, x)
        own_grad_pattern = own_grad_scores = own_grad_k = own_grad_v = None
        if x.own_v is not None:
            own_grad_pattern = (own_grad * x.own_v[..., None]).sum(1)
            own_grad_scores = torch.empty_like(own_grad_pattern)
        narrowed, buffer = _Narrowed(x, dtype), x.q.new_empty(_block_elements(x))
        for block, scores in _scores(x):
            heads, queries, keys = block
            pattern = scores.sub_(norms[heads, queries].flatten(1, 2)[..., None]).exp2_()
            grad_pattern = buffer[: pattern.numel()].view_as(pattern)
            torch.bmm(grad[heads, queries].flatten(1, 2), x.v[heads, :, keys], out=grad_pattern)
            if own_grad_pattern is not None:
                _own_entries(grad_pattern, x).copy_(own_grad_pattern[heads, queries])
            grad_scores = _softmax_backward_(grad_pattern, pattern)
            if own_grad_scores is not None:
                own_entries = _own_entries(grad_scores, x)
                own_grad_scores[heads, queries] = own_entries
                own_entries.zero_()
                _own_entries(pattern, x).zero_()
            narrow_scores = narrowed(grad_scores)
            part = torch.bmm(narrow_k[heads, :, keys], narrow_scores.transpose(1, 2))
            grad_q[heads, :, queries] = part.view_as(grad_q[heads, :, queries])
            if grad_k is not None and grad_v is not None:
                by_column = narrow_q[heads, queries].flatten(1, 2).transpose(1, 2)
                grad_k[heads, :, keys] += torch.bmm(by_column, narrow_scores)
                by_column = narrow_grad[heads, queries].flatten(1, 2).transpose(1, 2)
                grad_v[heads, :, keys] += torch.bmm(by_column, narrowed(pattern))
        if own_grad_scores is not None and own_scores is not None and x.own_k is not None:
            grad_q[..., -x.own_rows :].addcmul_(own_grad_scores[:, None], x.own_k[..., None])
            own_grad_k = (own_grad_scores[:, None] * _own_rows(queries_of_keys, x)).sum(-1)
            own_grad_v = (_own_pattern(own_scores, norms)[:, None] * own_grad).sum(-1)

        def back(x: Tensor | None, *, turned: bool = False) -> Tensor | None:
            if x is None:
                return None
            if turned and rotary is not None:
                rotary.turn_(x.transpose(1, 2), back=True)
            return x.unflatten(0, (q.shape[1], -1)).permute(0, 3, 1, 2).to(dtype)

        if rotary is not None:
            rotary.turn_(grad_q.permute(0, 3, 2, 1), back=True)
        to_keys_and_values = back(grad_k, turned=True), back(grad_v), back(own_grad_k, turned=True), back(own_grad_v)
        return _by_stream(grad_q.mul_(ctx.options[0]), q), *to_keys_and_values, None, None, None


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
    x: Float[Tensor, "stream batch pos head d_head"], groups: int, dtype: torch.dtype
) -> Float[Tensor, "batch_head pos row d_head"]:
    """A copy, by heads of keys."""
    by_head = x.unflatten(3, (groups, -1)).permute(1, 3, 2, 0, 4, 5)
    # in two passes, because a CPU converts several times faster what lies side by side
    return by_head.clone(memory_format=torch.contiguous_format).to(dtype).flatten(3, 4).flatten(0, 1)


def _columns_of_rows(x: _Inputs) -> Float[Tensor, "batch_head d_head pos row"]:
    """Memory for a result that is shaped as the queries."""
    heads, length, rows, d_head = x.q.shape
    return x.q.new_empty(heads, d_head, length, rows)


def _by_stream(
    x: Float[Tensor, "batch_head d_head pos row"], like: Float[Tensor, "stream batch pos head d_head"]
) -> Float[Tensor, "stream batch pos head d_head"]:
    out = torch.empty_like(like, memory_format=torch.contiguous_format)
    by_position = x.to(like.dtype).permute(0, 2, 3, 1).contiguous()
    by_group = by_position.unflatten(2, (like.shape[0], -1)).unflatten(0, (like.shape[1], -1)).permute(3, 0, 2, 1, 4, 5)
    out.view(by_group.shape).copy_(by_group)
    return out


def _by_head(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    own_k: Tensor | None,
    own_v: Tensor | None,
    scale: float,
    window: int | None,
    rotary: Rotary | None,
) -> _Inputs:
    dtype = q.dtype if q.dtype == torch.float64 else torch.float32

    def columns(x: Tensor | None, *, turned: bool = False) -> Any:
        if x is None:
            return None
        by_head = x.permute(0, 2, 3, 1).to(dtype, copy=True, memory_format=torch.contiguous_format).flatten(0, 1)
        if turned and rotary is not None:
            rotary.turn_(by_head.transpose(1, 2))
        return by_head

    rows = _rows(q, k.shape[2], dtype).mul_(scale / LN_2)
    if rotary is not None:
        rotary.turn_(rows.transpose(1, 2))
    keys_and_values = columns(k, turned=True), columns(v), columns(own_k, turned=True), columns(own_v)
    return _Inputs(rows, *keys_and_values, q.shape[3] // k.shape[2], q.shape[2] if window is None else window)


def _block_shape(x: _Inputs) -> tuple[int, int, int]:
    """Heads, positions and keys of the largest block."""
    n_heads, length, rows, _ = x.q.shape
    on_cpu = x.q.device.type == "cpu"
    size, elements = (BLOCK, BLOCK_ELEMENTS) if on_cpu else (GPU_BLOCK, GPU_BLOCK_ELEMENTS)
    size = min(size, length)
    width = min(length, size + x.window - 1)
    return max(1, min(n_heads, elements // (size * rows * width))), size, width


def _block_elements(x: _Inputs) -> int:
    """Scores of the largest block."""
    return math.prod(_block_shape(x)) * x.q.shape[2]


def _scores(x: _Inputs) -> Iterator[tuple[_Block, Float[Tensor, "batch_head query_row key"]]]:
    """The scores of each block, in units of ln 2; they are overwritten by the next."""
    n_heads, length, rows, _ = x.q.shape
    group, size, _ = _block_shape(x)
    unseen = x.q.new_full((size, size), float("-inf")).triu_(1).repeat_interleave(rows, 0)
    buffer = x.q.new_empty(_block_elements(x))
    own = _own_scores(x)
    for first_head in range(0, n_heads, group):
        heads = slice(first_head, min(first_head + group, n_heads))
        for start in range(0, length, size):
            queries = slice(start, min(start + size, length))
            keys = slice(max(0, start - x.window + 1), queries.stop)
            block, n = _Block(heads, queries, keys), queries.stop - start
            q = x.q[heads, queries].flatten(1, 2)
            shape = (q.shape[0], n * rows, keys.stop - keys.start)
            scores = buffer[: math.prod(shape)].view(shape)
            torch.bmm(q, x.k[heads, :, keys], out=scores)
            scores[..., -n:].add_(unseen[: n * rows, :n])
            if x.window < queries.stop:
                past = scores.new_full((n, shape[2]), float("-inf")).tril_(start - keys.start - x.window)
                scores.add_(past.repeat_interleave(rows, 0))
            if own is not None:
                _own_entries(scores, x).copy_(own[heads, queries])
            yield block, scores


def _must_shift(x: _Inputs) -> bool:
    """Whether powers of two of the scores might be too large or too small, by the lengths of queries and keys."""
    # reading a number waits for a GPU, so not there
    if not on_cpu(x.q):
        return True
    keys = torch.stack([keys.square().sum(1).amax() for keys in (x.k, x.own_k) if keys is not None]).amax()
    return not bool(x.q.square().sum(-1).amax() * keys < LARGEST_EXPONENT**2)


def _own_rows(
    rows: Float[Tensor, "batch_head pos row d_head"], x: _Inputs
) -> Float[Tensor, "batch_head d_head pos own_row"]:
    """Rows of the ablated stream; a view."""
    return rows[:, :, -x.own_rows :].permute(0, 3, 1, 2)


def _own_scores(x: _Inputs) -> Float[Tensor, "batch_head pos own_row"] | None:
    """Scores of the ablated stream's queries and own keys."""
    return None if x.own_k is None else (_own_rows(x.q, x) * x.own_k[..., None]).sum(1)


def _own_pattern(own_scores: Tensor, norms: Tensor) -> Float[Tensor, "batch_head pos own_row"]:
    """The part of the pattern that belongs to own keys."""
    return torch.exp2(own_scores - norms[..., -own_scores.shape[-1] :])


def _own_entries(
    block: Float[Tensor, "batch_head query_row key"], x: _Inputs
) -> Float[Tensor, "batch_head pos own_row"]:
    """Entries of the ablated stream whose key is the query's own position; a view."""
    by_position = block.view(block.shape[0], -1, x.q.shape[2], block.shape[2])
    own = by_position[:, :, -x.own_rows :, -by_position.shape[1] :]
    return own.diagonal(dim1=1, dim2=3).transpose(1, 2)
