"""Text from both streams of a model, side by side."""

from __future__ import annotations

import shutil
import textwrap
from dataclasses import dataclass
from itertools import zip_longest

import torch

from sa_lens.core import SelfAblatingTransformer
from sa_lens.core.host import in_stream, streams_of


@dataclass(frozen=True)
class Sample:
    """One continuation of a prompt by each stream, drawn with the same seed."""

    prompt: str
    """The text that both continue; may be empty."""
    clean: str
    """Text of the clean stream, prompt included."""
    ablated: str | None
    """Text of the ablated stream, prompt included; None without gates."""

    def side_by_side(self, width: int | None = None) -> str:
        """Returns the texts in two columns, or in one without gates.

        Args:
            width: characters per line; None: the terminal's.
        """
        width = width if width is not None else min(120, shutil.get_terminal_size((100, 24)).columns)
        if self.ablated is None:
            return "\n".join(["clean stream", "-" * width, *_wrap(self.clean, width)])
        column = (width - 3) // 2
        rows = zip_longest(_wrap(self.clean, column), _wrap(self.ablated, column), fillvalue="")
        head = [f"{'clean stream':<{column}} | ablated stream", f"{'-' * column}-+-{'-' * column}"]
        return "\n".join(head + [f"{left:<{column}} | {right}".rstrip() for left, right in rows])


def sample(
    model: SelfAblatingTransformer,
    prompt: str = "",
    *,
    max_new_tokens: int = 60,
    temperature: float = 0.8,
    top_k: int | None = None,
    seed: int = 0,
) -> Sample:
    """Continues a prompt, begin-of-text token first, in both streams until the end of the text.

    The global random state is left as it was.

    Args:
        prompt: text to continue; empty: a text from its beginning.
        max_new_tokens: the largest number of tokens to draw.
        temperature: 0: always the most likely token.
        top_k: draw from this many most likely tokens; None: from all.
        seed: seed of the draws, the same for both streams.

    Raises:
        ValueError: a model without tokenizer, a prompt that leaves no room, or an option out of range.
    """
    if model.tokenizer is None:
        raise ValueError("this model has no tokenizer, so it cannot read or write text")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
    if temperature < 0:
        raise ValueError(f"temperature={temperature} must be 0 (likeliest token) or more")
    if top_k is not None and not 1 <= top_k <= model.cfg.d_vocab:
        raise ValueError(f"top_k={top_k} must be from 1 to the {model.cfg.d_vocab} tokens of the vocabulary")
    tokens = model.to_tokens(prompt, prepend_bos=True)
    room = model.cfg.n_ctx - tokens.shape[1]
    if room < 1:
        raise ValueError(
            f"the prompt has {tokens.shape[1]} tokens with the begin-of-text token, but the model reads "
            f"{model.cfg.n_ctx} at most: shorten it"
        )
    texts: dict[str, str] = {}
    for stream in streams_of(model):
        # TransformerLens draws from the global generator
        with torch.random.fork_rng(), in_stream(model, stream):
            torch.manual_seed(seed)
            drawn = model.generate(
                tokens,
                max_new_tokens=min(max_new_tokens, room),
                do_sample=temperature > 0,
                temperature=temperature if temperature > 0 else 1.0,
                top_k=top_k,
                # padded on the right, a lone begin-of-text token would pass for padding and be masked
                padding_side="left",
                prepend_bos=True,
                verbose=False,
            )
        texts[stream] = str(model.tokenizer.decode(drawn[0, 1:], skip_special_tokens=True))
    return Sample(prompt, texts["clean"], texts.get("ablated"))


def _wrap(text: str, width: int) -> list[str]:
    # an untrained model writes control characters, which would move the columns
    text = "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)
    return [piece for line in text.split("\n") for piece in (textwrap.wrap(line, width) or [""])] or ["(nothing)"]
