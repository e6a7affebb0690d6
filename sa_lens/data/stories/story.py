"""A story, its words, and the labels that every word carries."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from sa_lens.data.stories.grammar import Piece, spell
from sa_lens.data.stories.words import Animal, Character, Entity, Place, Spot, Thing


class Word(NamedTuple):
    """A word or punctuation mark of a story, with its labels (values: `LABELS`)."""

    text: str
    """As it stands in the story: `story.text[start:end] == text`."""
    start: int
    """Offset of its first character in the story."""
    end: int
    """Offset after its last character."""
    sentence: int
    """Index of its sentence in the story."""
    pattern: str
    """Sentence pattern."""
    role: str
    """Part played by what it names; `action` for verbs, `property` for an object's adjective, otherwise `none`."""
    referent: str
    """What it names: `character-i`, `object-i` and `place-i` count in order of first mention, `group` is the pair."""
    pos: str
    """Universal part of speech."""


class Line(NamedTuple):
    """A sentence of a story with what fills its slots."""

    pattern: str
    pieces: tuple[Piece, ...]
    entities: dict[str, Entity]


@dataclass(frozen=True)
class Story:
    """A generated story. Two stories with the same text are equal."""

    text: str
    """The story: one paragraph, sentences separated by single spaces."""
    lines: tuple[Line, ...] = field(compare=False, repr=False)
    """How it was made, sentence by sentence."""

    @cached_property
    def words(self) -> tuple[Word, ...]:
        """Every word and punctuation mark with its labels; what lies between them is single spaces."""
        return tuple(_label(self))

    @cached_property
    def characters(self) -> tuple[str, ...]:
        """Names, in order of first mention; `character-i` is the i-th."""
        return tuple(self._mentioned(Character))

    @cached_property
    def objects(self) -> tuple[str, ...]:
        """Nouns of the objects, in order of first mention."""
        return tuple(self._mentioned(Thing))

    @cached_property
    def places(self) -> tuple[str, ...]:
        """Nouns of the places, in order of first mention."""
        return tuple(self._mentioned(Place))

    def _mentioned(self, kind: type) -> dict[str, None]:
        found: dict[str, None] = {}
        for line in self.lines:
            for piece in line.pieces:
                if piece.var and isinstance(line.entities[piece.var], kind):
                    found[line.entities[piece.var][0]] = None
        return found


def _label(story: Story) -> Iterator[Word]:
    referents = {
        **{name: f"character-{i}" for i, name in enumerate(story.characters)},
        **{noun: f"object-{i}" for i, noun in enumerate(story.objects)},
    }
    # a place may share its noun with no object, but is counted apart
    places = {noun: f"place-{i}" for i, noun in enumerate(story.places)}
    offset = 0
    for index, line in enumerate(story.lines):
        offset += index > 0
        for piece, text, space in spell(line.pieces, line.entities):
            offset += space
            if piece.var:
                labelled = _slot_words(piece, text, line.entities[piece.var], referents, places)
            else:
                labelled = iter([(text, piece.role, "group" if piece.role == "group" else "none", piece.pos)])
            for word, role, referent, pos in labelled:
                yield Word(word, offset, offset + len(word), index, line.pattern, role, referent, pos)
                offset += len(word) + 1
            offset -= 1


def _slot_words(
    piece: Piece, text: str, entity: Entity, referents: dict[str, str], places: dict[str, str]
) -> Iterator[tuple[str, str, str, str]]:
    """Text, role, referent and part of speech of each word in a slot."""
    if isinstance(entity, Character):
        pos = {"name": "PROPN", "girl": "NOUN"}.get(piece.text, "PRON")
        yield text, piece.role, referents[entity.name], pos
    elif isinstance(entity, Thing | Place | Spot):
        referent = (
            referents[entity.noun]
            if isinstance(entity, Thing)
            else places[entity.noun]
            if isinstance(entity, Place)
            else "spot"
        )
        words = text.split(" ")
        for word in words[:-1]:
            article = re.fullmatch("an?|the", word, re.IGNORECASE) is not None
            yield (word, "none", "none", "DET") if article else (word, "property", referent, "ADJ")
        if piece.text in ("at", "under"):
            yield words[-1], "none", "none", "ADP"
        else:
            yield words[-1], piece.role, referent, "PRON" if piece.text == "it" else "NOUN"
    elif isinstance(entity, Animal):
        yield entity.noun, piece.role, "animal", "NOUN"
    else:
        yield entity.word, piece.role, "none", "ADJ"
