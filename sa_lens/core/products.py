"""Matrix products without gradients, by the faster of PyTorch's libraries.

On x86 processors PyTorch multiplies float32 matrices with MKL, which leaves half of the rate of an AMD processor with
AVX-512 unused. oneDNN, which PyTorch also contains, does not. Both round in the same way, and sum in another order.
"""

from __future__ import annotations

import platform

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

_ONE_DNN = (
    getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if torch.backends.mkldnn.is_available() and platform.machine().lower() in ("x86_64", "amd64")
    else None
)


_FAST_BFLOAT16 = _ONE_DNN is not None and getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()


def linear(
    x: Float[Tensor, "... in"], W: Float[Tensor, "out in"], b: Float[Tensor, " out"] | None = None
) -> Float[Tensor, "... out"]:
    """Returns `x W^T + b`, like `torch.nn.functional.linear`.

    float32 on an x86 processor goes through oneDNN where no gradients are recorded, and so does bfloat16 if the
    processor has instructions for it.
    """
    fits = x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and _FAST_BFLOAT16)
    if _ONE_DNN is None or not fits or x.device.type != "cpu" or torch.is_grad_enabled() or not len(x):
        return F.linear(x, W, b)
    return _ONE_DNN(x, W, b, "none", [], "")


def product(x: Float[Tensor, "... in"], W: Float[Tensor, "in out"]) -> Float[Tensor, "... out"]:
    """Returns `x W`, computed as in `linear`."""
    return linear(x, W.T)


def faster_dtype(x: Tensor) -> torch.dtype | None:
    """Returns bfloat16 if its products are faster than those of `x` on this processor, else None."""
    return torch.bfloat16 if _FAST_BFLOAT16 and x.dtype == torch.float32 and x.device.type == "cpu" else None


def packed(W: Float[Tensor, "out in"], dtype: torch.dtype) -> Tensor:
    """Returns a matrix in another type for `linear`, in bfloat16 in the layout that oneDNN multiplies fastest."""
    rounded = W.to(dtype)
    fits = _FAST_BFLOAT16 and dtype == torch.bfloat16
    return torch.ops.mkldnn._reorder_linear_weight(rounded, 4096) if fits else rounded
