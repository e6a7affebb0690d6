"""Which sentences the patterns of the generated stories can make: a second reading of the templates, from text."""

from __future__ import annotations

import re
from collections.abc import Iterator

from sa_lens.data.stories import HELD_OUT_PATTERNS, NAMES, PATTERNS
from sa_lens.data.stories.grammar import OBJECTS, OPENING, Choice, Node, Piece
from sa_lens.data.stories.patterns import trees
from sa_lens.data.stories.words import (
    ADJECTIVES,
    ANIMALS,
    GLAD,
    INDOOR_SPOTS,
    KIND_OF,
    NEEDY,
    OUTDOOR_SPOTS,
    PLACES,
    PROUD,
    SAD,
)

_SPOTS = (*INDOOR_SPOTS, *OUTDOOR_SPOTS)
_WORDS: dict[str, set[str]] = {
    **{"name": {name.lower() for name in NAMES}, "he": {"he", "she"}, "him": {"him", "her"}, "his": {"his", "her"}},
    **{"girl": {"girl", "boy"}, "I": {"i"}, "you": {"you"}, "it": {"it"}},
    "word": {feeling.word for feeling in (*GLAD, *NEEDY, *PROUD, *SAD)},
    "noun": {animal.noun for animal in ANIMALS},
    "at": {place.at for place in PLACES},
    "under": {spot.under for spot in _SPOTS},
}
_NOUNS = {
    **{var: set(KIND_OF) for var in OBJECTS},
    "p": {place.noun for place in PLACES},
    "s": {spot.noun for spot in _SPOTS},
}
_ADJECTIVES = {adjective for kind in ADJECTIVES.values() for adjective in kind}


def tellable(sentence: str, *, held_out: bool = False, begins: bool = False) -> bool:
    """Whether a pattern makes this sentence.

    Args:
        held_out: ask of the held-out patterns, not of those of the stories.
        begins: the text may be the beginning of a sentence.
    """
    words = re.findall(r"'s|\w+|[.,!?\"]", sentence.lower())
    known: _Known = {}
    for pattern in HELD_OUT_PATTERNS if held_out else PATTERNS:
        for tree in trees(pattern):
            reached = {0}
            ends = _ends(tree, words, {0}, reached, known)
            if len(words) in (reached if begins else ends):
                return True
    return False


_Known = dict[tuple[int, frozenset[int]], tuple[set[int], set[int]]]


def _ends(node: Node, words: list[str], starts: set[int], reached: set[int], known: _Known) -> set[int]:
    """Where a reading of the node can end that begins at one of the starts; notes all places reached on the way."""
    for item in node:
        if isinstance(item, Choice):
            key = (id(item), frozenset(starts))
            if key not in known:
                inside: set[int] = set()
                ends = {end for option in item.options for end in _ends(option, words, starts, inside, known)}
                known[key] = (ends, inside)
            starts, inside = known[key]
            reached |= inside
        else:
            starts = {end for start in starts for end in _after(item, words, start)}
        reached |= starts
        if not starts:
            break
    return starts


def _after(piece: Piece, words: list[str], start: int) -> Iterator[int]:
    word, rest = words[start : start + 1], words[start + 1 : start + 3]
    if not piece.var:
        if word == ['"' if piece.text == OPENING else piece.text.lower()]:
            yield start + 1
    elif piece.text == "the":
        if word == ["the"] or (word in (["a"], ["an"]) and piece.var in OBJECTS):
            if rest[:1] and rest[0] in _NOUNS[piece.var]:
                yield start + 2
            if word != ["the"] and rest[1:] and rest[0] in _ADJECTIVES and rest[1] in _NOUNS[piece.var]:
                yield start + 3
    elif word and word[0] in _WORDS[piece.text]:
        yield start + 1


def split(text: str) -> list[str]:
    """The sentences of a text; a quotation and who says it are one."""
    return re.split(r'(?<=[.!?]) (?=[A-Z"])|(?<=[.!?]") (?=[A-Z"])', text)
