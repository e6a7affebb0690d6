"""Products agree with float64, whichever library computes them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sa_lens.core import products
from sa_lens.core.products import faster_dtype, linear, packed, product


def near(found: Tensor, x: Tensor, W: Tensor, b: Tensor | float = 0.0) -> bool:
    return torch.allclose(found.double(), x.double() @ W.double() + b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rows", [(5,), (2, 3), (2, 1, 3), (0,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_without_gradients(rows: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, W, b = torch.randn(*rows, 7, dtype=dtype), torch.randn(7, 4, dtype=dtype), torch.randn(4, dtype=dtype)
    with torch.inference_mode():
        assert near(linear(x, W.T, b), x, W, b)
        assert near(linear(x, W.T.contiguous()), x, W)
        assert near(product(x, W), x, W)
        # rows and columns that do not lie side by side in memory
        assert near(product(x.flip(-1).flip(-1), W.T.contiguous().T), x, W)
        wide = torch.randn(*rows, 9, dtype=dtype)
        assert near(product(wide[..., 1:8], W), wide[..., 1:8], W)
    assert linear(x, W.T).shape == (*rows, 4)


@pytest.mark.parametrize("fast", [True, False])
def test_products_of_rounded_numbers(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_FAST_BFLOAT16", fast and products._FAST_BFLOAT16)
    torch.manual_seed(0)
    x, W = torch.randn(2, 3, 7).bfloat16(), torch.randn(4, 7).bfloat16()
    with torch.inference_mode():
        y = linear(x, packed(W.float(), torch.bfloat16))
    exact = x.double() @ W.double().T
    assert (y.double() - exact).abs().max() <= 2**-8 * exact.abs().max()
    assert torch.equal(packed(W.double(), torch.float64), W.double())


def test_only_float32_has_a_faster_type() -> None:
    assert faster_dtype(torch.zeros(1)) in (torch.bfloat16, None)
    assert faster_dtype(torch.zeros(1, dtype=torch.float64)) is None
    assert faster_dtype(torch.zeros(1, dtype=torch.bfloat16)) is None


def test_gradients_flow_where_they_are_recorded() -> None:
    x, W = torch.randn(3, 7), torch.randn(7, 4, requires_grad=True)
    product(x, W).sum().backward()
    assert W.grad is not None
    assert torch.allclose(W.grad, x.sum(0)[:, None].expand(7, 4))


def test_without_the_faster_library_the_usual_one_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_ONE_DNN", None)
    x, W = torch.randn(3, 7), torch.randn(7, 4)
    with torch.no_grad():
        assert torch.equal(product(x, W), torch.nn.functional.linear(x, W.T))
