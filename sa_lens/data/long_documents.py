"""Splits long documents into pieces, so that the memory of encoding does not grow with their length.

A document is cut where both sides together give the same tokens as each side alone, as far as `CONTEXT` characters on
either side can tell: before a word that follows a space, or, for tokenizers that put a space before every text, between
the space and the word. This is exact for tokenizers that split text into words before they merge letters, as all
byte-level, WordPiece and Metaspace ones do, because no token reaches across such a place. It is checked but not proved
for tokenizers that merge across the whole text, and for long stretches without spaces, which are cut anywhere that
passes the same comparison. Where no place passes, a piece grows until one does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

PIECE = 65_536
"""Approximate number of characters of a piece."""

CONTEXT = 1_000
"""Number of characters that are compared on either side of a cut."""

TRIES = 64
"""Number of places of either kind that are tried for each piece."""


def split_document(text: str, encode: Callable[[str], Sequence[Any]]) -> Iterator[tuple[str, bool]]:
    """Splits a text into pieces whose tokens together are those of the text; says of each piece whether it is the last.

    Args:
        encode: function that returns the tokens of a text, without special tokens.
    """
    start, goal = 0, PIECE
    while len(text) - goal > PIECE // 2:
        cut = _find_cut(text, goal, encode)
        if cut is None:
            goal += PIECE
            continue
        end, begin = cut
        yield text[start:end], False
        start, goal = begin, begin + PIECE
    yield text[start:], True


def _find_cut(text: str, goal: int, encode: Callable[[str], Sequence[Any]]) -> tuple[int, int] | None:
    """Returns where a piece ends and the next begins, soon after `goal`; a space between both may belong to neither."""
    window = text[goal : goal + PIECE // 4]
    spaces = [i for i in range(1, len(window) - 1) if window[i] == " " and not window[i - 1].isspace()]
    spaces = [i for i in spaces if not window[i + 1].isspace()][:TRIES]
    for i in [*spaces, *range(1, min(len(window), TRIES + 1))]:
        end = goal + i
        left, right = text[end - CONTEXT : end], text[end : end + CONTEXT]
        whole, before = list(encode(left + right)), list(encode(left))
        if whole == before + list(encode(right)):
            return end, end
        if i in spaces and whole == before + list(encode(right[1:])):
            return end, end + 1
    return None
