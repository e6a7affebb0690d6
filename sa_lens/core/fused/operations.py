"""Tied embeddings, RMSNorm and gated neurons whose gradients take less memory or time than PyTorch's."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def on_cpu(x: Tensor) -> bool:
    """Whether numbers can be read without waiting for a GPU, and handed to NumPy."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def embed_and_unembed(
    weight: Float[Tensor, "d_vocab d_model"], tokens: Int[Tensor, "batch pos"]
) -> tuple[Float[Tensor, "batch pos d_model"], Float[Tensor, "d_model d_vocab"]]:
    """The embeddings of the tokens, and the tied unembedding, whose gradient the one of the embeddings is added to.

    The unembedding may be used only where its gradient belongs to nothing else, because that gradient is changed. For
    `on_cpu` alone: the order in which a GPU adds rows to a tensor varies.
    """
    return _EmbedAndUnembed.apply(weight, tokens)


class _EmbedAndUnembed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(tokens)
        return F.embedding(tokens, weight), weight.T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        of_embedded, of_unembedding = grads
        (tokens,) = ctx.saved_tensors
        return of_unembedding.T.index_add_(0, tokens.flatten(), of_embedded.flatten(0, 1)), None


def rms_norm(
    x: Float[Tensor, "... length"], weight: Float[Tensor, " length"] | None, eps: float
) -> Float[Tensor, "... length"]:
    """`torch.nn.functional.rms_norm` of the last axis, which keeps nothing but its input for the backward pass."""
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        mean = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        factor = mean.add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, factor)
        normalised = x * factor
        return normalised if weight is None else normalised.mul_(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (grad,) = grads
        x, weight, factor = ctx.saved_tensors
        normalised = x * factor
        of_weight = (grad * normalised).flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, of_weight, None
        grad = grad.clone() if weight is None else grad * weight
        along = (grad * normalised).sum(-1, keepdim=True).div_(-x.shape[-1])
        return grad.addcmul_(normalised, along).mul_(factor), of_weight, None


def shifted_product(
    shift: Float[Tensor, " length"], a: Float[Tensor, "... length"], b: Float[Tensor, "... length"]
) -> Float[Tensor, "... length"]:
    """`torch.addcmul(shift, a, b)`, whose own gradients multiply by a factor of 1."""
    return _ShiftedProduct.apply(shift, a, b)


class _ShiftedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shift: Tensor, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return torch.addcmul(shift, a, b)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        a, b = ctx.saved_tensors
        wants_shift, wants_a, wants_b = ctx.needs_input_grad
        of_shift = grad.flatten(0, -2).sum(0) if wants_shift else None
        return of_shift, grad * b if wants_a else None, grad * a if wants_b else None
