"""Text generation with the decoder: one token at a time, from the logits at the last position."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache
from transformer_lens.utilities import get_attention_mask, sample_logits


@dataclass(frozen=True)
class Sampling:
    """How the next tokens are chosen: the options that `generate` and `generate_stream` share."""

    stop_at_eos: bool = True
    """Whether a prompt ends at an end-of-text token; it is then padded with it until all prompts have ended."""
    eos_token_id: int | Sequence[int] | None = None
    """The tokens that count as end of text; None: the tokenizer's."""
    do_sample: bool = True
    """Whether tokens are drawn; otherwise the likeliest is taken."""
    top_k: int | None = None
    """Draw from this many likeliest tokens; None: from all."""
    top_p: float | None = None
    """Draw from the likeliest tokens that together have this probability; None: from all."""
    temperature: float = 1.0
    """Divisor of the logits before drawing."""
    freq_penalty: float = 0.0
    """Number subtracted from a token's logit for each time that the token has occurred."""
    use_past_kv_cache: bool = True
    """Whether keys and values are kept from step to step."""
    verbose: bool = True
    """Whether progress is shown."""

    def next_tokens(
        self, logits: Float[Tensor, "batch d_vocab"], tokens: Int[Tensor, "batch pos"]
    ) -> Int[Tensor, " batch"]:
        """Chooses the token that follows each prompt."""
        if not self.do_sample:
            return logits.argmax(-1)
        return sample_logits(
            logits,
            top_k=self.top_k,
            top_p=self.top_p,
            temperature=self.temperature,
            freq_penalty=self.freq_penalty,
            tokens=tokens,
        )


class Generation:
    """The methods of `HookedTransformer` that generate text."""

    cfg: Any
    tokenizer: Any
    forward: Any
    to_tokens: Any

    @torch.inference_mode()
    def generate(
        self,
        input: str | list[str] | Int[Tensor, "batch pos"] = "",
        max_new_tokens: int = 10,
        *,
        prepend_bos: bool | None = None,
        padding_side: Literal["left", "right"] | None = None,
        return_type: Literal["input", "str", "tokens"] = "input",
        output_logits: bool = False,
        **sampling: Any,
    ) -> Any:
        """Continues prompts token by token.

        Args:
            input: text, texts (padded on the left), or tokens.
            max_new_tokens: tokens to add at most.
            prepend_bos: whether a begin-of-text token is put before a text; None: `cfg.default_prepend_bos`.
            padding_side: side on which one text is padded; several texts are always padded on the left.
            return_type: `str`, `tokens`, or as the input is.
            output_logits: whether to return the logits of every step too.
            sampling: see `Sampling`.

        Returns:
            Prompts and continuations, as text or tokens; with `output_logits` a `GenerateDecoderOnlyOutput` of
            transformers with `sequences` and `logits`.

        Raises:
            ValueError: `stop_at_eos` is set but there is no end-of-text token, or `return_type` is unknown.
        """
        if return_type not in ("input", "str", "tokens"):
            raise ValueError(f"return_type={return_type!r} must be 'input', 'str' or 'tokens'")
        as_text = return_type == "str" or (return_type == "input" and not isinstance(input, Tensor))
        side = "left" if isinstance(input, list) and len(input) > 1 else padding_side
        tokens = input if isinstance(input, Tensor) else self.to_tokens(input, prepend_bos, side)
        tokens, logits = tokens.to(self.cfg.device), []
        for new, step_logits in self._steps(tokens, max_new_tokens, prepend_bos, side, Sampling(**sampling)):
            tokens = torch.cat([tokens, new], dim=1)
            if output_logits:
                logits.append(step_logits)
        if output_logits:
            from transformers.generation.utils import GenerateDecoderOnlyOutput

            return GenerateDecoderOnlyOutput(sequences=tokens, logits=tuple(logits))  # type: ignore[arg-type]
        if not as_text:
            return tokens
        texts = [self.tokenizer.decode(row, skip_special_tokens=True) for row in tokens]
        return texts[0] if len(texts) == 1 else texts

    @torch.inference_mode()
    def generate_stream(
        self,
        input: str | Int[Tensor, "batch pos"] = "",
        max_new_tokens: int = 10,
        max_tokens_per_yield: int = 25,
        *,
        prepend_bos: bool | None = None,
        padding_side: Literal["left", "right"] | None = None,
        **sampling: Any,
    ) -> Iterator[Int[Tensor, "batch part"]]:
        """Continues prompts and yields the new tokens in parts; the first part also holds the prompt.

        Args:
            max_tokens_per_yield: a part is given as soon as it has this many tokens.

        The other arguments are those of `generate`.
        """
        tokens = input if isinstance(input, Tensor) else self.to_tokens(input, prepend_bos, padding_side)
        part = tokens.to(self.cfg.device)
        for new, _ in self._steps(part, max_new_tokens, prepend_bos, padding_side, Sampling(**sampling)):
            part = torch.cat([part, new], dim=1)
            if part.shape[1] >= max_tokens_per_yield:
                yield part
                part = part[:, :0]
        if part.shape[1]:
            yield part

    def _steps(
        self,
        tokens: Int[Tensor, "batch pos"],
        max_new_tokens: int,
        prepend_bos: bool | None,
        padding_side: Literal["left", "right"] | None,
        sampling: Sampling,
    ) -> Iterator[tuple[Int[Tensor, "batch 1"], Float[Tensor, "batch d_vocab"]]]:
        """Yields the tokens of each step and the logits from which they were chosen, until all prompts have ended."""
        ends, filling = self._end_tokens(sampling.eos_token_id) if sampling.stop_at_eos else ([], 0)
        ended = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        mask = torch.ones_like(tokens)
        if self.tokenizer is not None:
            bos = self.cfg.default_prepend_bos if prepend_bos is None else prepend_bos
            mask = get_attention_mask(self.tokenizer, tokens, bos, padding_side=padding_side)
        cache = None
        if sampling.use_past_kv_cache:
            cache = TransformerLensKeyValueCache.init_cache(self.cfg, self.cfg.device, len(tokens))
        first = 0
        for _ in tqdm(range(max_new_tokens), disable=not sampling.verbose):
            logits = self.forward(tokens[:, first:], attention_mask=mask[:, first:], past_kv_cache=cache)[:, -1]
            new = sampling.next_tokens(logits, tokens)
            if ends:
                new = new.masked_fill(ended, filling)
                ended |= torch.isin(new, torch.tensor(ends, device=new.device))
            first = tokens.shape[1] if cache is not None else 0
            tokens = torch.cat([tokens, new[:, None]], dim=1)
            mask = torch.cat([mask, torch.ones_like(new)[:, None]], dim=1)
            yield new[:, None], logits
            if ends and bool(ended.all()):
                return

    def _end_tokens(self, given: int | Sequence[int] | None) -> tuple[list[int], int]:
        """Returns the tokens that end a text, and the token that pads ended texts.

        Raises:
            ValueError: no end-of-text token is given, and the tokenizer has none.
        """
        own = getattr(self.tokenizer, "eos_token_id", None)
        given = own if given is None else given
        if given is None:
            raise ValueError("stop_at_eos=True needs an end-of-text token: pass eos_token_id or stop_at_eos=False")
        if isinstance(given, int):
            return [given], given
        return list(given), given[0] if own is None else own
