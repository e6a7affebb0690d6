"""Coarse classes of tokens, for texts whose words carry no labels.

A token's class comes from the token alone: function words and the words of the generated stories by a small lexicon,
everything else by its spelling. That is no tagger, but the same for every model that reads the text.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from sa_lens.data.stories.words import KIND_OF, NAMES, PART_OF_SPEECH

SPELLINGS = ("word", "capitalized", "piece", "NUM", "PUNCT", "space", "special")
"""Classes by spelling: another word after a space, one with a capital, a part of a word, ..."""


class TokenClasses(NamedTuple):
    """A class for every token of a vocabulary."""

    names: tuple[str, ...]
    """Names of the classes."""
    of_token: Int[Tensor, " d_vocab"]
    """Index of each token's class."""


def word_classes(tokenizer: Any, d_vocab: int | None = None) -> TokenClasses:
    """The classes of a tokenizer's tokens.

    Args:
        tokenizer: a Hugging Face tokenizer.
        d_vocab: tokens of the model, if more than the tokenizer's; the rest are `special`.
    """
    size = max(len(tokenizer), d_vocab or 0)
    special = set(tokenizer.all_special_ids)
    lexicon = {word.lower(): tag for word, tag in PART_OF_SPEECH.items()}
    lexicon |= dict.fromkeys((noun.lower() for noun in KIND_OF), "NOUN")
    lexicon |= dict.fromkeys((name.lower() for name in NAMES), "PROPN")
    texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))], clean_up_tokenization_spaces=False)
    found = ["special" if i in special else _class_of(text, lexicon) for i, text in enumerate(texts)]
    found += ["special"] * (size - len(found))
    names = tuple(dict.fromkeys([*sorted(set(lexicon.values())), *SPELLINGS]))
    index = {name: i for i, name in enumerate(names)}
    return TokenClasses(names, torch.tensor([index[name] for name in found]))


def _class_of(text: str, lexicon: dict[str, str]) -> str:
    word = text.strip()
    if not word:
        return "space"
    if not any(letter.isalnum() for letter in word):
        return "PUNCT"
    if all(letter.isdigit() for letter in word):
        return "NUM"
    whole = text[0].isspace() or word[0].isupper()
    if whole and word.lower() in lexicon:
        return lexicon[word.lower()]
    return "capitalized" if word[0].isupper() else "word" if whole else "piece"
