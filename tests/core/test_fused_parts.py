"""The fused path's kernels against slow, obvious twins."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sa_lens.config import GateConfig
from sa_lens.core.fused.cross_entropy import linear_cross_entropy
from sa_lens.core.fused.linear_map import MaskOf, linear
from sa_lens.core.fused.operations import embed_and_unembed, rms_norm, shifted_product
from sa_lens.core.fused.selection import edge_of, hard_mask, mask_of, masked_units
from sa_lens.core.fused.two_stream_attention import Rotary, stream_attention
from sa_lens.core.gate import gate_mask, top_k_mask


def random(*shape: int, seed: int = 0, grad: bool = True) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)
    return x.requires_grad_(grad)


def assert_same_gradients(found: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    assert torch.allclose(found, expected, rtol=1e-10, atol=1e-12)
    weights = random(*found.shape, seed=99, grad=False) if found.shape else torch.tensor(1.7, dtype=torch.float64)
    for a, b in zip(
        torch.autograd.grad((found * weights).sum(), inputs),
        torch.autograd.grad((expected * weights).sum(), inputs),
        strict=True,
    ):
        # a single key leaves no gradient of its score but for rounding
        assert float((a - b).norm()) <= (1e-8 * float(b.norm()) or 1e-14)


def turned(x: Tensor, rotary: Rotary | None) -> Tensor:
    """Queries or keys `[..., pos, head, d_head]` with each pair turned as a complex number."""
    if rotary is None:
        return x
    n = rotary.cos.shape[1]
    first, second = (slice(0, 2 * n, 2), slice(1, 2 * n, 2)) if rotary.adjacent else (slice(n), slice(n, 2 * n))
    pairs = torch.complex(x[..., first], x[..., second]) * torch.complex(rotary.cos, rotary.sin)[:, None]
    leading = torch.stack([pairs.real, pairs.imag], -1 if rotary.adjacent else -2).flatten(-2)
    return torch.cat([leading, x[..., 2 * n :]], -1)


def attention_with_all_scores(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    own_k: Tensor | None,
    own_v: Tensor | None,
    scale: float,
    *,
    window: int | None = None,
    rotary: Rotary | None = None,
) -> Tensor:
    """Each stream's full score matrix; the ablated one is over earlier clean keys and its own."""
    length = q.shape[2]
    each = [None if x is None else x.repeat_interleave(q.shape[3] // x.shape[2], 2) for x in (k, v, own_k, own_v)]
    k, v, own_k, own_v = turned(each[0], rotary), each[1], own_k if own_k is None else turned(each[2], rotary), each[3]
    q = turned(q, rotary)
    earlier = torch.ones(length, length, dtype=torch.bool).tril(-1)
    if window is not None:
        earlier = earlier.triu(1 - window)
    out = []
    for stream, queries in enumerate(q):
        ablated = own_k is not None and stream == len(q) - 1
        last_k, last_v = (own_k, own_v) if ablated else (k, v)
        scores = torch.einsum("bqhd,bkhd->bhqk", queries, k) * scale
        scores = scores.masked_fill(~earlier, float("-inf"))
        last = torch.einsum("bqhd,bqhd->bhq", queries, last_k)[..., None] * scale
        pattern = torch.cat([scores, last], -1).softmax(-1)
        z = torch.einsum("bhqk,bkhd->bqhd", pattern[..., :-1], v)
        out.append(z + pattern[..., -1].transpose(1, 2)[..., None] * last_v)
    return torch.stack(out)


def attention(
    q: Tensor, k: Tensor, v: Tensor, own_k: Tensor | None, own_v: Tensor | None, scale: float, **options: Any
) -> Tensor:
    """What is tested, with the arguments of `attention_with_all_scores`."""
    groups = k.shape[2]
    if own_k is None or own_v is None:
        return stream_attention(torch.cat([q, k[None], v[None]], 3), None, groups, scale, **options)
    if len(q) == 1:
        of_ablated, clean = torch.cat([q, own_k[None], own_v[None]], 3), torch.cat([k, v], 2)
        return stream_attention(of_ablated, clean, groups, scale, **options)
    both = torch.cat([q, torch.stack([k, own_k]), torch.stack([v, own_v])], 3)
    return stream_attention(both, None, groups, scale, **options)


@pytest.mark.parametrize("length", [1, 5, 64, 70, 130])
@pytest.mark.parametrize("streams", ["clean", "ablated", "both"])
def test_attention(streams: str, length: int) -> None:
    q = random(2 if streams == "both" else 1, 2, length, 3, 4)
    k, v = random(2, length, 3, 4, seed=1), random(2, length, 3, 4, seed=2)
    own = (None, None) if streams == "clean" else (random(2, length, 3, 4, seed=3), random(2, length, 3, 4, seed=4))
    inputs = [x for x in (q, k, v, *own) if x is not None]
    # the last one makes scores so large that the largest of each row is subtracted
    for scale in (1.0, 0.4, 6.0):
        assert_same_gradients(attention(q, k, v, *own, scale), attention_with_all_scores(q, k, v, *own, scale), inputs)


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("window", [None, 1, 3, 64, 100])
@pytest.mark.parametrize("streams", ["clean", "both"])
def test_attention_of_groups_within_a_window(streams: str, window: int | None, groups: int) -> None:
    length = 130
    q = random(1 if streams == "clean" else 2, 1, length, 6, 4)
    k, v, *own = (random(1, length, groups, 4, seed=i) for i in range(1, 5))
    own = [None, None] if streams == "clean" else own
    inputs = [x for x in (q, k, v, *own) if x is not None]
    found = attention(q, k, v, *own, 0.4, window=window)
    assert_same_gradients(found, attention_with_all_scores(q, k, v, *own, 0.4, window=window), inputs)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("pairs", [1, 3])
@pytest.mark.parametrize("adjacent", [True, False])
def test_attention_with_rotary_positions(adjacent: bool, pairs: int, groups: int) -> None:
    length = 70
    angles = random(length, pairs, seed=5, grad=False)
    rotary = Rotary(angles.cos(), angles.sin(), adjacent)
    q, (k, v, own_k, own_v) = random(2, 2, length, 3, 6), (random(2, length, groups, 6, seed=i) for i in range(1, 5))
    found = attention(q, k, v, own_k, own_v, 1.0, rotary=rotary)
    expected = attention_with_all_scores(q, k, v, own_k, own_v, 1.0, rotary=rotary)
    assert_same_gradients(found, expected, [q, k, v, own_k, own_v])


@pytest.mark.parametrize("rotary", [None, Rotary(torch.zeros(3, 2), torch.ones(3, 2), adjacent=False)])
def test_attention_leaves_what_it_is_given_as_it_is(rotary: Rotary | None) -> None:
    """One prompt and one head: whatever is reordered without a copy shares its memory."""
    given = qkv, clean = random(1, 1, 3, 3, 4), random(1, 3, 2, 4)
    grad = random(1, 1, 3, 1, 4, grad=False)
    kept = [x.detach().clone() for x in (*given, grad)]
    stream_attention(qkv, clean, 1, 1.0, rotary=rotary).backward(grad)
    assert all(torch.equal(x, before) for x, before in zip((*given, grad), kept, strict=True))


def test_attention_in_bfloat16_is_as_good_as_its_inputs() -> None:
    inputs = [
        x.detach().requires_grad_() for x in (random(2, 2, 40, 3, 4), *(random(2, 40, 3, 4, seed=i) for i in range(4)))
    ]
    expected = attention_with_all_scores(*inputs, 1.0)
    found = attention(*(x.bfloat16() for x in inputs), 1.0)
    assert found.dtype == torch.bfloat16
    grad = random(*expected.shape, seed=9, grad=False)
    gradients = (torch.autograd.grad(z, inputs, grad.to(z.dtype)) for z in (found, expected))
    pairs = [(found.detach(), expected.detach()), *zip(*gradients, strict=True)]
    for narrow, exact in pairs:
        assert float((narrow - exact).norm()) < 0.02 * float(exact.norm())


@pytest.mark.parametrize(
    ("surrogate", "kind", "k"), list(itertools.product(("sigmoid", "softmax"), ("hard", "soft"), (1, 3, 7, 8)))
)
def test_masked_units(surrogate: str, kind: str, k: int) -> None:
    cfg = GateConfig(surrogate=surrogate, kind=kind, temperature=0.6)
    values, scores = random(5, 8), random(5, 8, seed=1)
    expected = values * gate_mask(scores, k, cfg)
    found = masked_units(values[None], scores, k, cfg)[0]
    if k == 8:
        assert torch.equal(found, expected)
        gradient = torch.autograd.grad(found.sum(), scores)[0]
        assert not gradient.any()
    else:
        assert_same_gradients(found, expected, [values, scores])


def test_masked_units_by_head() -> None:
    cfg = GateConfig(attn_unit="head")
    values, scores = random(5, 12), random(5, 4, seed=1)
    expected = values * gate_mask(scores, 2, cfg).repeat_interleave(3, dim=-1)
    assert_same_gradients(masked_units(values[None], scores, 2, cfg)[0], expected, [values, scores])


def test_the_mask_acts_on_the_last_stream_alone() -> None:
    values, scores = random(2, 5, 8), random(5, 8, seed=1)
    expected = torch.stack([values[0], values[1] * gate_mask(scores, 3, GateConfig())])
    assert_same_gradients(masked_units(values, scores, 3, GateConfig()), expected, [values, scores])


def test_ties_go_to_the_lowest_unit_and_pass_no_gradient() -> None:
    scores = torch.tensor([[1.0, 2.0, 2.0, 2.0], [4.0, 3.0, 2.0, 1.0]], requires_grad=True)
    values = torch.ones(2, 4)
    masked = masked_units(values[None], scores, 2, GateConfig())[0]
    assert masked.tolist() == [[0, 1, 1, 0], [1, 1, 0, 0]]
    gradient = torch.autograd.grad((masked * torch.arange(4.0)).sum(), scores)[0]
    assert not gradient[0].any()
    assert gradient[1].any()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 6), st.booleans())
def test_the_kth_and_the_next_score(seed: int, k: int, with_ties: bool) -> None:
    scores = torch.randn(4, 256, generator=torch.Generator().manual_seed(seed))
    if with_ties:
        scores = (scores * 2).round()
    assert torch.equal(edge_of(scores, k), scores.topk(k + 1, dim=-1).values[:, k - 1 :])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 7), st.booleans())
def test_hard_mask(seed: int, k: int, with_ties: bool) -> None:
    scores = torch.randn(4, 8, generator=torch.Generator().manual_seed(seed))
    if with_ties:
        scores = scores.round()
    assert torch.equal(hard_mask(scores, edge_of(scores, k), k), top_k_mask(scores, k))


def test_tied_embedding() -> None:
    """A token that occurs twice and one that does not occur at all."""
    table, tokens = random(9, 4), torch.tensor([[0, 3, 3], [8, 1, 0]])
    embedded, unembedding = embed_and_unembed(table, tokens)
    found = (embedded @ unembedding).square()
    assert_same_gradients(found, (table[tokens] @ table.T).square(), [table])


@pytest.mark.parametrize("with_weight", [True, False])
def test_rms_norm(with_weight: bool) -> None:
    x, weight = random(3, 5, 8), random(8) if with_weight else None
    inputs = [x] if weight is None else [x, weight]
    for eps in (1e-5, 0.5):
        assert_same_gradients(rms_norm(x, weight, eps), F.rms_norm(x, (8,), weight, eps), inputs)


def test_shifted_product() -> None:
    shift, a, b = random(8), random(3, 5, 8), random(3, 5, 8, seed=1)
    assert_same_gradients(shifted_product(shift, a, b), shift + a * b, [shift, a, b])


@pytest.mark.parametrize("kind", ["hard", "soft"])
@pytest.mark.parametrize("by_head", [True, False])
@pytest.mark.parametrize("k", [None, 2, 6])
def test_linear_map_whose_input_is_made_again(k: int | None, by_head: bool, kind: str) -> None:
    a, b, bias = random(2, 3, 4, 6), random(2, 3, 4, 6, seed=1), random(8)
    if by_head:
        weights = [random(3, 6, 2), random(1, 6, 2)]
        # columns are by head
        whole = torch.cat([*weights[0], *weights[1]], 1)
    else:
        weights = [random(6, 5), random(6, 3)]
        whole = torch.cat(weights, 1)
    cfg, scores = GateConfig(kind=kind), random(12, 6, seed=2)
    mask = None if k is None else MaskOf(scores, k, cfg)
    # a mask of ones has no gradient
    inputs = [a, b, scores] if k == 2 else [a, b]

    def x() -> Tensor:
        units = torch.tanh(a) * b
        return units if k is None else torch.stack([units[0], units[1] * gate_mask(scores, k, cfg).view(3, 4, 6)])

    bias = bias if by_head else None
    found = torch.cat(linear(lambda a, b: torch.tanh(a) * b, [a, b], weights, bias, torch.float64, mask), -1)
    assert_same_gradients(found, x() @ whole + (0 if bias is None else bias), [*inputs, *weights, *([bias] * by_head)])
    # nothing is computed for what is frozen
    frozen = [weight.detach() for weight in weights]
    found = torch.cat(linear(lambda a, b: torch.tanh(a) * b, [a, b.detach()], frozen, None, torch.float64, mask), -1)
    assert_same_gradients(found, x() @ whole.detach(), [a])


@pytest.mark.parametrize("rows", [(2, 3), (6,)])
def test_linear_map_of_rows_by_head(rows: tuple[int, ...]) -> None:
    x, weight = random(2, 3, 4, 6), random(*rows, 5)
    (found,) = linear(lambda x: x, [x], [weight], None, torch.float64)
    assert_same_gradients(found, x @ weight.reshape(6, 5), [x, weight])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
def test_linear_cross_entropy(tied: bool, with_bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from sa_lens.core.fused import cross_entropy

    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", 19 * 4)
    monkeypatch.setattr(cross_entropy, "CACHED_ELEMENTS", 19 * 3)
    x, table = random(10, 6), random(19, 6) if tied else random(6, 19)
    bias = random(19) if with_bias else None
    targets = torch.randint(0, 19, (10,), generator=torch.Generator().manual_seed(0))
    targets[2] = -100
    weight = table.T if tied else table
    y = random(10, 6, seed=1)
    inputs = [t for t in (x, y, table, bias) if t is not None]

    def losses(x: Tensor, y: Tensor, bias: Tensor | None = bias) -> tuple[tuple[Tensor, ...], Tensor]:
        found = linear_cross_entropy((x, y), weight, bias, targets, (0.7, 1.3), torch.float64)
        logits = [z @ weight + (0 if bias is None else bias) for z in (x, y)]
        return found, torch.stack([F.cross_entropy(z, targets) for z in logits])

    coefficients = torch.tensor([0.7, 1.3], dtype=torch.float64)
    (total, *_), expected = losses(x, y)
    assert_same_gradients(total, expected @ coefficients, inputs)
    (_, *each), expected = losses(x, y)
    assert_same_gradients(torch.stack(each), expected, inputs)
    (total, _, second), expected = losses(x, y)
    assert_same_gradients(total + second**2, expected @ coefficients + expected[1] ** 2, inputs)

    weight = weight.detach()
    (total, first, second), expected = losses(x.detach(), y, None)
    assert not first.requires_grad
    assert_same_gradients(total + second, expected @ coefficients + expected[1], [y])


def test_linear_cross_entropy_of_far_apart_logits() -> None:
    """A target whose probability is below the smallest float still has a finite, exact loss."""
    x, weight = torch.tensor([[1.0]]), torch.tensor([[0.0, 300.0]])
    loss, _ = linear_cross_entropy((x,), weight, None, torch.tensor([0]), (1.0,), torch.float32)
    assert float(loss) == pytest.approx(300.0, rel=2e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_linear_cross_entropy_of_logits_whose_exponentials_overflow(dtype: torch.dtype) -> None:
    """Rows of small, of huge and of hugely negative logits, in one chunk and in several."""
    x, table = random(6, 4).detach().to(dtype), random(9, 4).detach().to(dtype)
    x[2] *= 1e4
    bias = torch.tensor([0.0] * 3 + [-2000.0] * 6, dtype=dtype)
    targets = torch.arange(6)
    x.requires_grad_()
    for shift in (0.0, -3000.0):
        found, _ = linear_cross_entropy((x,), table.T, bias + shift, targets, (1.0,), dtype)
        expected = F.cross_entropy(x @ table.T + bias + shift, targets)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(torch.autograd.grad(found, x), torch.autograd.grad(expected, x))


@pytest.mark.parametrize(("dtype", "n_words"), [(torch.bfloat16, 500), (torch.float16, 70_000)])
def test_linear_cross_entropy_in_16_bits(dtype: torch.dtype, n_words: int) -> None:
    """The sum of 70,000 exponentials is beyond the range of float16."""
    x, table = random(64, 32).detach().float(), random(n_words, 32).detach().float() / 4
    targets = torch.randint(0, 500, (64,), generator=torch.Generator().manual_seed(0))
    x.requires_grad_()
    table.requires_grad_()
    expected = F.cross_entropy(x @ table.T, targets)
    found, _ = linear_cross_entropy((x,), table.T, None, targets, (1.0,), dtype)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected.item(), rel=2e-3)
    for a, b in zip(torch.autograd.grad(found, [x, table]), torch.autograd.grad(expected, [x, table]), strict=True):
        assert a.dtype == torch.float32
        assert float((a - b).norm()) < 1e-2 * float(b.norm())


@pytest.mark.parametrize("kind", ["hard", "soft"])
@pytest.mark.parametrize(("width", "k"), [(12, 1), (12, 5), (12, 12), (256, 3)])
def test_nan_scores_give_a_mask_of_nan_in_their_rows_alone(kind: str, width: int, k: int) -> None:
    cfg = GateConfig(kind=kind)  # type: ignore[arg-type]
    scores = torch.randn(6, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = torch.randn(2, 6, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    untouched = gate_mask(scores, k, cfg)
    scores[1, 0] = scores[3] = float("nan")
    lost = torch.tensor([False, True, False, True, False, False])
    readable, fused = gate_mask(scores, k, cfg), mask_of(scores, k, cfg).double()
    masked = masked_units(values, scores, k, cfg)
    for mask in (readable, fused, masked[1] / values[1]):
        assert mask[lost].isnan().all()
        torch.testing.assert_close(mask[~lost], untouched[~lost])
    assert torch.equal(masked[0], values[0])
    if k == width:
        return
    expected, actual = scores.clone().requires_grad_(), scores.clone().requires_grad_()
    (values[1] * gate_mask(expected, k, cfg)).square().sum().backward()
    masked_units(values, actual, k, cfg).square().sum().backward()
    assert expected.grad is not None
    assert actual.grad is not None
    torch.testing.assert_close(actual.grad[~lost], expected.grad[~lost])


def test_the_gradient_that_comes_in_is_left_as_it_is():
    """Other consumers may hold the same tensor, and a gradient of `sum` is expanded from one number."""
    generator = torch.Generator().manual_seed(0)
    values, scores = (torch.randn(1, 5, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    values.requires_grad_()
    scores = scores[0].clone().requires_grad_()
    masked = masked_units(values, scores, 3, GateConfig(k_attn=3, k_mlp=3))
    incoming = torch.randn(masked.shape, generator=generator, dtype=torch.float64)
    kept = incoming.clone()
    masked.backward(incoming)
    assert torch.equal(incoming, kept)
    masked_units(values, scores, 3, GateConfig(k_attn=3, k_mlp=3)).sum().backward()
