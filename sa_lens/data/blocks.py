"""A text as blocks of equal length, read a slice at a time."""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from sa_lens.data.tokens import TokenFile

Text = TokenFile | str | Path | Int[Tensor, "block pos"]
"""A token file, its path, or token blocks."""


class TextBlocks:
    """Blocks of a text that a model reads, each from its first token on.

    Args:
        text: a token file, its path, or blocks of tokens.
        n_ctx: tokens per block of a token file; blocks given as a tensor must not be longer.
        n_tokens: tokens to read at most, from the beginning; None: all. At least one block is read.
        d_vocab: vocabulary of the model; None: any tokens.

    Raises:
        FileNotFoundError: no such token file.
        ValueError: no whole block, blocks longer than the context, or tokens outside the vocabulary.
    """

    def __init__(self, text: Text, n_ctx: int, *, n_tokens: int | None = None, d_vocab: int | None = None) -> None:
        if isinstance(text, str | Path):
            text = TokenFile.open(text)
        if isinstance(text, TokenFile):
            if text.n_tokens < n_ctx:
                raise ValueError(
                    f"token file {text.path} has {text.n_tokens:,} tokens, fewer than one block of n_ctx={n_ctx:,}; "
                    "give a longer text"
                )
            if d_vocab is not None:
                text.check_vocabulary(d_vocab)
            count, self.length = text.n_tokens // n_ctx, n_ctx
        else:
            _check_tensor(text, n_ctx, d_vocab)
            count, self.length = text.shape
        self.text = text
        self.count = _limited(count, self.length, n_tokens)

    def __len__(self) -> int:
        return self.count

    @property
    def n_tokens(self) -> int:
        """Tokens in all blocks."""
        return self.count * self.length

    def first(self, n_tokens: int | None) -> TextBlocks:
        """Returns the first blocks, of at most `n_tokens` tokens but at least one block; None: all."""
        blocks = copy.copy(self)
        blocks.count = _limited(self.count, self.length, n_tokens)
        return blocks

    def rows(self, start: int, stop: int) -> Int[Tensor, "block pos"]:
        """Returns blocks `start` to `stop - 1`, on the CPU (on its own device if the text is a tensor)."""
        stop = min(stop, self.count)
        if isinstance(self.text, TokenFile):
            flat = self.text.tokens[start * self.length : stop * self.length].astype("int64")
            return torch.from_numpy(flat).view(-1, self.length)
        return self.text[start:stop].long()

    def pick(self, indices: Any) -> Int[Tensor, "block pos"]:
        """Returns the blocks at these indices."""
        if isinstance(self.text, TokenFile):
            return torch.cat([self.rows(int(index), int(index) + 1) for index in indices])
        return self.text[torch.as_tensor(indices, device=self.text.device)].long()

    @property
    def fingerprint(self) -> str:
        """Hash of the text, with the length of a block."""
        if isinstance(self.text, TokenFile):
            return f"{self.text.fingerprint}/{self.length}"
        values = self.text.cpu().long().contiguous().numpy()
        return f"{hashlib.sha256(values.tobytes()).hexdigest()}/{self.length}"


def _limited(count: int, length: int, n_tokens: int | None) -> int:
    if n_tokens is None:
        return count
    if n_tokens < 1:
        raise ValueError(f"n_tokens={n_tokens} must be at least 1, or None for the whole text")
    return min(count, max(1, n_tokens // length))


def _check_tensor(tokens: Any, n_ctx: int, d_vocab: int | None) -> None:
    if not isinstance(tokens, Tensor) or tokens.ndim != 2 or tokens.is_floating_point() or tokens.is_complex():
        given = f"{tokens.dtype} {list(tokens.shape)}" if isinstance(tokens, Tensor) else type(tokens).__name__
        raise ValueError(f"the text is {given}, but must be a TokenFile or integers [block, pos]")
    if not tokens.numel():
        raise ValueError(f"the given text is empty: its shape is {list(tokens.shape)}")
    if tokens.shape[1] > n_ctx:
        raise ValueError(f"blocks of {tokens.shape[1]} tokens are longer than n_ctx={n_ctx}: cut the text shorter")
    if int(tokens.min()) < 0 or (d_vocab is not None and int(tokens.max()) >= d_vocab):
        raise ValueError(
            f"tokens from {int(tokens.min())} to {int(tokens.max())} are outside the model's vocabulary of {d_vocab}"
        )
