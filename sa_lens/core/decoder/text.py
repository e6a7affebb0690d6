"""Conversion of text to tokens and back."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.utilities import (
    get_input_with_manually_prepended_bos,
    get_tokenizer_with_bos,
    get_tokens_with_bos_removed,
)
from transformers import PreTrainedTokenizerBase

from sa_lens.core.decoder.hooked_transformer_config import HookedTransformerConfig


class Text:
    """The methods of `HookedTransformer` that use its tokenizer.

    Everywhere, `prepend_bos` says whether a begin-of-text token is put before a text (None: `cfg.default_prepend_bos`),
    and `padding_side` where texts of different lengths are padded (None: the tokenizer's own side).
    """

    cfg: HookedTransformerConfig
    tokenizer: Any
    W_U: Any

    def set_tokenizer(self, tokenizer: Any, default_padding_side: Literal["left", "right"] | None = None) -> None:
        """Gives the model a Hugging Face tokenizer, in the form that puts a begin-of-text token first.

        Special tokens that it lacks are filled in: end-of-text also serves as padding and begin-of-text.

        Raises:
            ValueError: this is no Hugging Face tokenizer, or the padding side is unknown.
        """
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise ValueError(f"the tokenizer is a {type(tokenizer).__name__}, but must be a Hugging Face one")
        if default_padding_side not in ("left", "right", None):
            raise ValueError(f"default_padding_side={default_padding_side!r} must be 'left', 'right' or None")
        self.tokenizer = get_tokenizer_with_bos(tokenizer)
        self.tokenizer.padding_side = default_padding_side or self.tokenizer.padding_side or "right"
        self.cfg.tokenizer_prepends_bos = len(self.tokenizer.encode("")) > 0
        if self.tokenizer.eos_token is None:
            self.tokenizer.eos_token = "<|endoftext|>"
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        if self.tokenizer.bos_token is None:
            self.tokenizer.bos_token = self.tokenizer.eos_token
        if self.cfg.d_vocab == -1:
            self.cfg.d_vocab = max(self.tokenizer.get_vocab().values()) + 1
        if self.cfg.d_vocab_out == -1:
            self.cfg.d_vocab_out = self.cfg.d_vocab

    def to_tokens(
        self,
        input: str | list[str],
        prepend_bos: bool | None = None,
        padding_side: Literal["left", "right"] | None = None,
        move_to_device: bool = True,
        truncate: bool = True,
    ) -> Int[Tensor, "batch pos"]:
        """Returns the tokens of one text or of several, padded to one length.

        Args:
            truncate: whether texts longer than `n_ctx` are cut.

        Raises:
            ValueError: the model has no tokenizer.
        """
        tokenizer, owns_bos = self._required_tokenizer(), self.cfg.tokenizer_prepends_bos
        bos = self.cfg.default_prepend_bos if prepend_bos is None else prepend_bos
        side = padding_side or tokenizer.padding_side
        if bos and not owns_bos:
            input = get_input_with_manually_prepended_bos(tokenizer.bos_token, input)
        length = self.cfg.n_ctx if truncate else None
        tokens = tokenizer(
            input, return_tensors="pt", padding=True, padding_side=side, truncation=truncate, max_length=length
        )["input_ids"]
        if owns_bos and not bos:
            tokens = get_tokens_with_bos_removed(tokenizer, tokens, padding_side=side)
        return tokens.to(self.cfg.device) if move_to_device else tokens

    def to_string(self, tokens: Any) -> str | list[str]:
        """Returns the text of tokens `[pos]`, or the texts of `[batch, pos]`.

        Raises:
            ValueError: the tokens have more than two axes, or the model has no tokenizer.
        """
        tokenizer, tokens = self._required_tokenizer(), torch.as_tensor(tokens)
        if tokens.ndim > 2:
            raise ValueError(f"tokens have shape {tuple(tokens.shape)}: give [pos] or [batch, pos]")
        decode = tokenizer.batch_decode if tokens.ndim == 2 else tokenizer.decode
        return decode(tokens, clean_up_tokenization_spaces=False)

    def to_str_tokens(
        self,
        input: str | list | Tensor | np.ndarray,
        prepend_bos: bool | None = None,
        padding_side: Literal["left", "right"] | None = None,
    ) -> list[str] | list[list[str]]:
        """Returns each token of a text, or of tokens `[pos]` or `[1, pos]`, as a text; for a list, a list of them."""
        if isinstance(input, list):
            return [self.to_str_tokens(entry, prepend_bos, padding_side) for entry in input]  # type: ignore[return-value]
        tokens = self.to_tokens(input, prepend_bos, padding_side) if isinstance(input, str) else torch.as_tensor(input)
        if tokens.ndim > 1 and tokens.numel() != tokens.shape[-1]:
            raise ValueError(
                f"tokens have shape {tuple(tokens.shape)}, but must be those of one text: give a list of them"
            )
        single = [[token] for token in tokens.flatten().tolist()]
        return self._required_tokenizer().batch_decode(single, clean_up_tokenization_spaces=False)

    def to_single_token(self, string: str) -> int:
        """Returns the token of a text that is a single token.

        Raises:
            ValueError: the text has several tokens.
        """
        tokens = self.to_tokens(string, prepend_bos=False)
        if tokens.numel() != 1:
            raise ValueError(f"{string!r} is {tokens.numel()} tokens, {self.to_str_tokens(tokens)}, but must be one")
        return int(tokens)

    def to_single_str_token(self, int_token: int) -> str:
        """Returns the text of a token."""
        return str(self.to_str_tokens(torch.tensor([int_token]))[0])

    def tokens_to_residual_directions(
        self, tokens: str | int | Int[Tensor, "*shape"]
    ) -> Float[Tensor, "*shape d_model"]:
        """Returns the unembedding vectors of tokens; their dot products with the residual stream are logits.

        A tensor with one token gives one vector `[d_model]`.
        """
        if isinstance(tokens, str):
            tokens = self.to_single_token(tokens)
        if isinstance(tokens, Tensor) and tokens.numel() > 1:
            return self.W_U.T[tokens]
        return self.W_U[:, int(tokens)]

    def _required_tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise ValueError("this model has no tokenizer: pass tokens, or call model.set_tokenizer(...)")
        return self.tokenizer
