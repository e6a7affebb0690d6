"""`Draft`: a pair of prompts as text, and whether a tokenizer can make a pair for circuits of it.

Nothing heavy is imported here, so that the command line can refuse a prompt before it loads a model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple


class Draft(NamedTuple):
    """A pair of prompts as text, before it is checked with a tokenizer."""

    clean: str
    corrupt: str
    answer: str
    """Right next word after the clean prompt, with its leading space."""
    wrong_answer: str
    """Word with which the right one is compared."""
    marks: tuple[tuple[str, str | None, int], ...] = ()
    """Named positions as (name, word, index): the mention with this index of the word in the clean prompt, or, if word
    is None, the token with this index among those in which the two prompts differ."""

    @property
    def name(self) -> str:
        """What tables and titles call the pair, such as `Lily or Tom`."""
        return f"{self.answer.strip()} or {self.wrong_answer.strip()}"


class DraftTokens(NamedTuple):
    """The tokens of a usable draft, without a begin-of-text token."""

    clean: list[int]
    corrupt: list[int]
    answer: int
    wrong_answer: int


class Unusable(NamedTuple):
    """Why a draft is not usable."""

    reason: str
    example: str
    """What does not fit, in this draft."""


@dataclass(frozen=True)
class DraftEncoder:
    """Turns drafts into tokens with a tokenizer."""

    encode: Callable[[str], list[int]]
    """The tokens of a text, without special tokens."""
    decode: Callable[[int], str]
    """The text of a token."""
    unknown: int | None = None
    """The token that stands for what the tokenizer does not know, which is no answer."""

    def tokens(self, draft: Draft) -> DraftTokens | Unusable:
        """The tokens of the draft if both prompts have one length, differ, and both answers are single tokens."""
        clean, corrupt = self.encode(draft.clean), self.encode(draft.corrupt)
        if len(clean) != len(corrupt):
            lengths = f"{draft.clean!r} ({len(clean)}) and {draft.corrupt!r} ({len(corrupt)})"
            return Unusable("clean and corrupt differ in length", lengths)
        if clean == corrupt:
            return Unusable("clean and corrupt are the same", repr(draft.clean))
        answers = []
        for name, word in (("answer", draft.answer), ("wrong answer", draft.wrong_answer)):
            token = self._next_token(draft.clean, clean, word)
            if token is None:
                return Unusable(f"{name} is not one token", self._pieces(draft.clean, clean, word))
            answers.append(token)
        if answers[0] == answers[1]:
            return Unusable("answer and wrong answer are the same", repr(draft.answer))
        return DraftTokens(clean, corrupt, *answers)

    def _next_token(self, prompt: str, prompt_tokens: list[int], word: str) -> int | None:
        """The single token that `word` is after the prompt; None if it is more, or unknown."""
        tokens = self.encode(prompt + word)
        return None if tokens[:-1] != prompt_tokens or tokens[-1] == self.unknown else tokens[-1]

    def _pieces(self, prompt: str, prompt_tokens: list[int], word: str) -> str:
        """The word and its tokens; and the same word with a space before it, if that is a single token."""
        pieces = " + ".join(repr(self.decode(token)) for token in self.encode(word))
        spaced = f" {word}"
        single = not word.startswith(" ") and self._next_token(prompt, prompt_tokens, spaced) is not None
        return f"{word!r} ({pieces})" + (f"; perhaps you meant {spaced!r}, with its space" if single else "")
