"""Normalisation and activation functions of decoders, by the names that configurations give them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def _solu(x: Tensor) -> Tensor:
    return x * x.softmax(-1)


_gelu_tanh = partial(F.gelu, approximate="tanh")

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_new": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "solu": _solu,
    "solu_ln": _solu,
}
"""Activations by name. `solu_ln` is followed by a norm, which is part of the MLP."""


def normalise(
    x: Float[Tensor, "... length"],
    kind: str | None,
    eps: float,
    weight: Float[Tensor, " length"] | None = None,
    bias: Float[Tensor, " length"] | None = None,
) -> Float[Tensor, "... length"]:
    """LayerNorm (`LN`, `LNPre`) or RMSNorm (`RMS`, `RMSPre`) of the last axis; None: `x` itself."""
    if kind is None:
        return x
    if kind.startswith("LN"):
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    return F.rms_norm(x, x.shape[-1:], weight, eps)
