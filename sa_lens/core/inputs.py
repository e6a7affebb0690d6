"""Conversion of text and tokens into the input of a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor
from transformer_lens.utilities import LocallyOverridenDefaults, get_attention_mask

from sa_lens.core.base import HookedTransformer


def is_recorded() -> bool:
    """Returns whether torch is recording a program, in which nothing may depend on the values of tensors."""
    capturing = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
    return capturing or torch.jit.is_tracing() or torch.compiler.is_compiling()


def check_tokens(tokens: Int[Tensor, "*shape"], d_vocab: int) -> None:
    """Checks that every token is in the vocabulary; torch would count negative tokens from its end.

    Raises:
        ValueError: a token below 0 or beyond the vocabulary. A program that torch records is not checked.
    """
    if is_recorded():
        return
    strange = tokens[(tokens < 0) | (tokens >= d_vocab)]
    if len(strange):
        raise ValueError(f"token {int(strange[0])} is not in the vocabulary: tokens are from 0 to {d_vocab - 1}")


def padding_mask(lengths: Sequence[int], length: int, left: bool) -> Int[Tensor, "batch pos"]:
    """Returns 1 for the tokens of prompts of these lengths and 0 for their padding to one length."""
    place = torch.arange(length)
    size = torch.tensor(lengths)[:, None]
    return (place >= length - size if left else place < size).long()


def tokens_and_padding(
    model: HookedTransformer,
    input: str | list[str] | Int[Tensor, "batch pos"],
    attention_mask: Int[Tensor, "batch pos"] | None = None,
    prepend_bos: bool | None = None,
    padding_side: Literal["left", "right"] | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Returns tokens on the model's device, their attention mask, and the mask that a pass needs; see `run_streams`.

    The last is None where padding is on the right, since no token attends to later positions.
    """
    given = {"prepend_bos": prepend_bos, "padding_side": padding_side}
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    side = padding_side or (None if model.tokenizer is None else model.tokenizer.padding_side)
    texts = None if isinstance(input, Tensor) else [input] if isinstance(input, str) else input
    if not isinstance(input, Tensor):
        input = model.to_tokens(input, **options)
    tokens = input[None] if input.ndim == 1 else input
    check_tokens(tokens, len(model.embed.W_E))
    tokens = tokens.to(model.embed.W_E.device, torch.long)
    if attention_mask is not None:
        return tokens, attention_mask, attention_mask
    if texts is not None:
        lengths = [model.to_tokens(text, **options).shape[1] for text in texts]
        attention_mask = padding_mask(lengths, tokens.shape[1], side == "left").to(tokens.device)
        return tokens, attention_mask, attention_mask if side == "left" else None
    if side == "left" and model.tokenizer is not None:
        bos = model.cfg.default_prepend_bos if prepend_bos is None else prepend_bos
        with LocallyOverridenDefaults(model, padding_side=side):
            attention_mask = get_attention_mask(model.tokenizer, tokens, bos)
    return tokens, attention_mask, attention_mask
