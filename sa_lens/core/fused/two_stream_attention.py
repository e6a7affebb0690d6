"""Attention of the clean and the ablated stream over the clean keys, without ever holding all scores.

Query t of the clean stream sees the clean keys 0..t. Query t of the ablated stream sees the clean keys 0..t-1 and its
own key, which has one score per query and is added to sums and results apart. All queries that share keys, those of
both streams and of all heads of a group, are interleaved (axis `row`), so that one matrix product serves them all. They
go through in blocks of positions: a block needs the keys up to its last position only, and no further back than the
window, and its scores stay in the cache.

Scores are in units of ln 2, because a CPU computes powers of two several times faster than a softmax, and rows are
divided by their sums after the product with the values. The backward pass computes the scores again, the pattern P by
the logarithm of each row's sum, and the gradient of the scores as P (dP - D), where D is the mean of dP that P weighs:
the product of `z` and its gradient. D is subtracted within the product that gives dP, before anything is rounded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sa_lens.core.fused.operations import on_cpu

BLOCK = 64
"""Positions whose queries go through at once; half as many where these have `MANY_ROWS` or more."""

MANY_ROWS = 512
"""Fewer positions make more blocks, but fewer of their scores are of keys that a query does not see."""

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

    def turned(
        self,
        x: Float[Tensor, "*any pos head d_head"],
        factors: Float[Tensor, "head d_head"],
        *,
        back: bool = False,
    ) -> Float[Tensor, "*any pos head d_head"]:
        """The leading dimensions of each head turned, all of them times its factor.

        Args:
            factors: equal in all dimensions of a head.
            back: the other way round, as gradients are turned.
        """
        n, sign = self.cos.shape[-1], -1 if back else 1
        a, b = (slice(0, 2 * n, 2), slice(1, 2 * n, 2)) if self.adjacent else (slice(n), slice(n, 2 * n))
        cos, sin = (table.to(x.dtype)[:, None] * factors[:, :1] for table in (self.cos, self.sin))
        table = factors.expand(x.shape[-3:]).clone()
        table[..., a] = table[..., b] = cos
        out = x * table
        out[..., a].addcmul_(x[..., b], sin, value=-sign)
        out[..., b].addcmul_(x[..., a], sin, value=sign)
        return out


def stream_attention(
    qkv: Float[Tensor, "stream batch pos head_and_2_kv_head d_head"],
    clean: Float[Tensor, "batch pos 2_kv_head d_head"] | None,
    groups: int,
    scale: float,
    *,
    window: int | None = None,
    rotary: Rotary | None = None,
) -> Float[Tensor, "stream batch pos head d_head"]:
    """`z` of the clean stream, of both, or of the ablated stream alone, whose clean keys and values are then given.

    Scores and softmax are float32 or wider. The products with the pattern, and the backward pass from the logarithm of
    the pattern on, are in the inputs' precision.

    Args:
        qkv: queries of all heads, then keys and values, each of which serves `head / kv_head` neighbouring heads; the
            clean stream comes first.
        clean: clean keys and values, if the clean stream is not in `qkv`.
        groups: number of heads of keys.
        scale: what the scores are multiplied by.
        window: number of last positions that a query sees, its own included; None: all.
        rotary: of queries and keys; None: they stay as they are.
    """
    return _StreamAttention.apply(qkv, clean, groups, scale, window, rotary)


class _Options(NamedTuple):
    groups: int
    scale: float
    window: int | None
    rotary: Rotary | None


class _Inputs(NamedTuple):
    """By head of keys, contiguous; values as they came, and queries and keys likewise or in float32 or wider."""

    q: Float[Tensor, "batch_head pos row d_head"]
    """Turned, and scaled so that scores are in units of ln 2; rows are (stream, head of the group)."""
    k: Float[Tensor, "batch_head pos d_head"]
    v: Float[Tensor, "batch_head pos d_head"]
    own_k: Float[Tensor, "batch_head pos 1 d_head"] | None
    """Keys of the ablated stream."""
    own_v: Float[Tensor, "batch_head pos 1 d_head"] | None
    own_scores: Float[Tensor, "batch_head pos own_row"] | None
    """Scores of the ablated stream's queries, which are the last rows, and own keys."""
    window: int

    def own(self, rows: Float[Tensor, "batch_head pos row *d_head"]) -> Float[Tensor, "batch_head pos own_row *d_head"]:
        """The rows of the ablated stream; a view."""
        assert self.own_scores is not None
        return rows[:, :, -self.own_scores.shape[-1] :]


class _StreamAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        clean: Tensor | None,
        groups: int,
        scale: float,
        window: int | None,
        rotary: Rotary | None,
    ) -> Tensor:
        ctx.options = _Options(groups, scale, window, rotary)
        # what stays takes its memory first, so that it does not end up behind what is freed
        n_streams, n_batch, length, n_heads, d_head = *qkv.shape[:3], qkv.shape[3] - 2 * groups, qkv.shape[4]
        out = qkv.new_empty(n_streams, n_batch, length, n_heads, d_head)
        kept_q = qkv.new_empty(n_batch * groups, length, n_streams * n_heads // groups, d_head)
        kept = [kept_q, *(kept_q.new_empty(n_batch * groups, length, d_head) for _ in range(4))]
        x = _by_head(qkv, clean, ctx.options)
        z, totals = torch.empty_like(x.q), x.q.new_empty(x.q.shape[:3])
        largest = torch.empty_like(totals) if _must_shift(x) else None
        for heads, queries, keys, scores in _scores(x, x.q, x.k):
            if largest is not None:
                shift = largest[heads, queries].copy_(scores.amax(-1).view_as(largest[heads, queries]))
                if x.own_scores is not None:
                    own = x.own(shift)
                    own.copy_(torch.maximum(own, x.own_scores[heads, queries]))
                scores.sub_(shift.flatten(1)[..., None])
            total = scores.exp2_().sum(-1)
            totals[heads, queries] = total.view_as(totals[heads, queries])
            part = _product(scores.to(qkv.dtype), x.v[heads, keys])
            z[heads, queries] = part.view_as(z[heads, queries])
        if x.own_scores is not None and x.own_v is not None:
            own = torch.exp2(x.own_scores if largest is None else x.own_scores - x.own(largest))
            x.own(totals).add_(own)
            x.own(z).addcmul_(own[..., None], x.own_v.to(z.dtype))
        z.div_(totals[..., None])
        norms = totals.log2_() if largest is None else totals.log2_().add_(largest)
        _by_stream(z.to(qkv.dtype), out)
        saved = [None if t is None else keep.view_as(t).copy_(t) for keep, t in zip(kept, x[:5], strict=True)]
        ctx.save_for_backward(*saved, x.own_scores, norms, out)
        ctx.has_clean = clean is None
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, own_k, own_v, own_scores, norms, z = ctx.saved_tensors
        groups, scale, window, rotary = ctx.options
        x = _Inputs(q, k, v, own_k, own_v, own_scores, window or z.shape[2])
        dtype, wide, n_batch = z.dtype, norms.dtype, z.shape[1]
        grad = _by_row(grads[0], groups)
        mean = _by_row((grads[0] * z).sum(-1, dtype=wide, keepdim=True), groups)
        grad_and_mean, values_and_ones = _with_rest(grad, -mean), F.pad(x.v, (0, 2), value=1)
        queries, keys = _with_rest(x.q, -norms[..., None]), F.pad(x.k, (0, 2), value=1)
        grad_q = torch.empty_like(x.q, dtype=wide)
        wants_clean = ctx.has_clean or ctx.needs_input_grad[1]
        grad_k, grad_v = (torch.zeros_like(x.k, dtype=wide) if wants_clean else None for _ in range(2))
        buffer = z.new_empty(_block_elements(x))
        for heads, here, seen, exponents in _scores(x, queries, keys):
            pattern = exponents.exp2_()
            grad_scores = buffer[: pattern.numel()].view_as(pattern)
            grad_pattern = grad_and_mean[heads, here].flatten(1, 2), values_and_ones[heads, seen].transpose(1, 2)
            torch.bmm(*grad_pattern, out=grad_scores).mul_(pattern)
            part = _product(grad_scores, x.k[heads, seen])
            grad_q[heads, here] = part.view_as(grad_q[heads, here])
            if grad_k is not None and grad_v is not None:
                transposed = grad_scores.transpose(1, 2), pattern.transpose(1, 2)
                grad_k[heads, seen] += _product(transposed[0], x.q[heads, here].flatten(1, 2))
                grad_v[heads, seen] += _product(transposed[1], grad[heads, here].flatten(1, 2))
        of_keys_and_values = [] if grad_k is None or grad_v is None else [(grad_k, grad_v)]
        if x.own_scores is not None and x.own_k is not None and x.own_v is not None:
            own_pattern = torch.exp2(x.own_scores - x.own(norms))
            own_grad, own_q = x.own(grad).to(wide), x.own(x.q).to(wide)
            own_grad_scores = (own_grad * x.own_v.to(wide)).sum(-1)
            own_grad_scores.sub_(x.own(mean)[..., 0]).mul_(own_pattern)
            x.own(grad_q).addcmul_(own_grad_scores[..., None], x.own_k.to(wide))
            own_grad_k = (own_grad_scores[..., None] * own_q).sum(2)
            of_keys_and_values.append((own_grad_k, own_grad.mul_(own_pattern[..., None]).sum(2)))

        def gradient(n_streams: int, n_queries: int, of_keys_and_values: list[tuple[Tensor, Tensor]]) -> Tensor:
            """Of queries, keys and values of some streams, or of keys and values alone."""
            n = n_queries + groups
            out = z.new_empty(n_streams, *z.shape[1:3], n + groups, z.shape[4])
            straight = torch.empty_like(out[..., :n, :], dtype=wide, memory_format=torch.contiguous_format)
            if n_queries:
                _by_stream(grad_q, straight[..., :n_queries, :])
            for i, (of_keys, of_values) in enumerate(of_keys_and_values):
                straight[i, ..., n_queries:, :] = of_keys.unflatten(0, (n_batch, -1)).transpose(1, 2)
                out[i, ..., n:, :] = of_values.to(dtype).unflatten(0, (n_batch, -1)).transpose(1, 2)
            out[..., :n, :] = _turned(straight, n_queries, scale, LN_2, rotary, back=True)
            return out

        of_clean = None
        if not ctx.has_clean:
            *earlier, of_own = of_keys_and_values
            of_clean = gradient(1, 0, earlier)[0] if earlier else None
            of_keys_and_values = [of_own]
        return gradient(len(z), z.shape[3], of_keys_and_values), of_clean, None, None, None, None


def _product(
    a: Float[Tensor, "batch_head left inner"], b: Float[Tensor, "batch_head inner d_head"]
) -> Float[Tensor, "batch_head left d_head"]:
    """`a @ b`, whose result is as narrow as a head."""
    if a.dtype in (torch.bfloat16, torch.float16) or not on_cpu(a):
        return torch.bmm(a, b)
    # MKL is several times faster at wide results
    return torch.bmm(b.transpose(1, 2), a.transpose(1, 2)).transpose(1, 2)


def _with_rest(rows: Float[Tensor, "*any length"], x: Float[Tensor, "*any 1"]) -> Float[Tensor, "*any length_and_2"]:
    """The rows and a wider number in their precision: in two parts, whose sum is nearly exact."""
    rounded = x.to(rows.dtype)
    return torch.cat([rows, rounded, (x - rounded).to(rows.dtype)], -1)


def _by_row(
    x: Float[Tensor, "stream batch pos head d_head"], groups: int
) -> Float[Tensor, "batch_head pos row d_head"]:
    """A copy, by heads of keys."""
    by_head = x.unflatten(3, (groups, -1)).permute(1, 3, 2, 0, 4, 5)
    return by_head.clone(memory_format=torch.contiguous_format).flatten(3, 4).flatten(0, 1)


def _by_group(x: Float[Tensor, "batch pos kv_head d_head"]) -> Float[Tensor, "batch_head pos d_head"]:
    """A copy, by heads of keys."""
    return x.transpose(1, 2).clone(memory_format=torch.contiguous_format).flatten(0, 1)


def _by_stream(
    x: Float[Tensor, "batch_head pos row d_head"], out: Float[Tensor, "stream batch pos head d_head"]
) -> Float[Tensor, "stream batch pos head d_head"]:
    """Copies rows to the streams and heads that they belong to."""
    n_streams, n_batch = out.shape[:2]
    by_group = x.unflatten(2, (n_streams, -1)).unflatten(0, (n_batch, -1)).permute(3, 0, 2, 1, 4, 5)
    out.unflatten(3, by_group.shape[3:5]).copy_(by_group)
    return out


def _turned(
    x: Float[Tensor, "*any pos head d_head"],
    n_queries: int,
    of_queries: float,
    of_keys: float,
    rotary: Rotary | None,
    *,
    back: bool = False,
) -> Float[Tensor, "*any pos head d_head"]:
    """Heads of queries and keys times their factors, and turned."""
    # for every dimension, because a CPU multiplies long rows several times faster
    factors = x.new_full(x.shape[-2:], of_keys)
    factors[:n_queries] = of_queries
    return x * factors if rotary is None else rotary.turned(x, factors, back=back)


def _by_head(qkv: Tensor, clean: Tensor | None, options: _Options) -> _Inputs:
    groups, scale, window, rotary = options
    dtype = qkv.dtype if qkv.dtype == torch.float64 else torch.float32
    n = qkv.shape[3] - 2 * groups

    def turned(x: Tensor, n_queries: int) -> Tensor:
        # before anything is reordered, because a CPU converts several times faster what lies side by side
        return _turned(x[..., : n_queries + groups, :].to(dtype), n_queries, scale / LN_2, 1, rotary)

    wide = turned(qkv, n)
    rows = _by_row(wide[..., :n, :], groups)
    k, v = (
        (wide[0, ..., n:, :], qkv[0, ..., -groups:, :]) if clean is None else (turned(clean, 0), clean[..., groups:, :])
    )
    own_k = own_v = own_scores = None
    if len(qkv) == 2 or clean is not None:
        own_k, own_v = (_by_group(x)[:, :, None] for x in (wide[-1, ..., n:, :], qkv[-1, ..., -groups:, :]))
        own_scores = (rows[:, :, -(n // groups) :] * own_k).sum(-1)
    return _Inputs(rows, _by_group(k), _by_group(v), own_k, own_v, own_scores, window or qkv.shape[2])


def _block_shape(x: _Inputs) -> tuple[int, int, int]:
    """Heads, positions and keys of the largest block."""
    n_heads, length, rows, _ = x.q.shape
    on_cpu = x.q.device.type == "cpu"
    block = BLOCK // 2 if BLOCK * rows >= MANY_ROWS else BLOCK
    size, elements = (block, BLOCK_ELEMENTS) if on_cpu else (GPU_BLOCK, GPU_BLOCK_ELEMENTS)
    size = min(size, length)
    width = min(length, size + x.window - 1)
    return max(1, min(n_heads, elements // (size * rows * width))), size, width


def _block_elements(x: _Inputs) -> int:
    """Scores of the largest block."""
    return math.prod(_block_shape(x)) * x.q.shape[2]


def _scores(
    x: _Inputs, q: Float[Tensor, "batch_head pos row length"], k: Float[Tensor, "batch_head pos length"]
) -> Iterator[tuple[slice, slice, slice, Float[Tensor, "batch_head query_row key"]]]:
    """Products of rows and clean keys in blocks, -inf where a row does not see the key; overwritten by the next.

    Yields:
        Heads of keys, positions of queries, the keys that these see, and the products.
    """
    n_heads, length, rows, _ = q.shape
    group, size, _ = _block_shape(x)
    unseen = q.new_full((size, size), float("-inf")).triu_(1).repeat_interleave(rows, 0)
    if x.own_scores is not None:
        own = unseen.view(size, rows, size)[:, -x.own_scores.shape[-1] :]
        own.diagonal(dim1=0, dim2=2).fill_(float("-inf"))
    buffer = q.new_empty(_block_elements(x))
    for first_head in range(0, n_heads, group):
        heads = slice(first_head, min(first_head + group, n_heads))
        for start in range(0, length, size):
            queries = slice(start, min(start + size, length))
            keys = slice(max(0, start - x.window + 1), queries.stop)
            n, of_queries = queries.stop - start, q[heads, queries].flatten(1, 2)
            shape = (*of_queries.shape[:2], keys.stop - keys.start)
            scores = buffer[: math.prod(shape)].view(shape)
            torch.bmm(of_queries, k[heads, keys].transpose(1, 2), out=scores)
            scores[..., -n:].add_(unseen[: n * rows, :n])
            if x.window < queries.stop:
                past = scores.new_full((n, shape[2]), float("-inf")).tril_(start - keys.start - x.window)
                scores.add_(past.repeat_interleave(rows, 0))
            yield heads, queries, keys, scores


def _must_shift(x: _Inputs) -> bool:
    """Whether powers of two of the scores might be too large or too small, by the lengths of queries and keys."""
    # reading a number waits for a GPU, so not there
    if not on_cpu(x.q):
        return True
    lengths = [torch.linalg.vector_norm(x, dim=-1).amax() for x in (x.q, x.k, x.own_k) if x is not None]
    return not bool(lengths[0] * torch.stack(lengths[1:]).amax() < LARGEST_EXPONENT)
