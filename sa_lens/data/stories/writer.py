"""Writes a story sentence by sentence and keeps track: who has what, and what a pronoun would mean."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

from sa_lens.data.stories.grammar import OBJECTS, Piece, draw, spelled
from sa_lens.data.stories.patterns import trees
from sa_lens.data.stories.story import Line
from sa_lens.data.stories.words import ADJECTIVES, GLAD, KIND_OF, Character, Entity, Place, Thing, thing

_T = TypeVar("_T")
_NOUNS = tuple(KIND_OF)
_INTRODUCTIONS = frozenset(("meet", "intro_friend"))
"""Patterns that may name the second character while the first is alone."""
_TRIES = 1000


class Scene(NamedTuple):
    """Two characters in one place."""

    x: Character
    y: Character
    place: Place

    def other(self, one: Character) -> Character:
        return self.y if one is self.x else self.x


class Writer:
    """One story in the making: its sentences so far, who has what, and which pronouns would be understood."""

    scene: Scene
    """Who is where; set by the teller before the first sentence and at each change of scene."""

    def __init__(self, rng: random.Random):
        self.random = rng.random
        self.lines: list[Line] = []
        self.texts: list[str] = []
        self.n_words = 0
        self.holder: dict[str, Character | None] = {}
        """Who has each object of the story, by noun; None: both of them."""
        self.first_owner: dict[str, Character | None] = {}
        self.last_thing: Entity | None = None
        """What a following `it` would mean; None where it might mean something else."""
        self.last_named: frozenset[Entity] = frozenset()
        """The characters of the last sentence."""
        self.told: set[str] = set()
        self.nouns: set[str] = set()
        """Objects of the story, mentioned or about to be."""
        self.mentioned: set[str] = set()
        self.things: list[Thing] = []
        """Objects at hand in this scene; one eaten is taken out."""
        self.alone = False
        """Only the first character has appeared."""

    # choosing

    def pick(self, options: Sequence[_T]) -> _T:
        return options[int(self.random() * len(options))]

    def chance(self, p: float) -> bool:
        return self.random() < p

    def unambiguous(self, one: Character) -> bool:
        """Whether `he` or `she` can mean this character alone."""
        return self.scene.other(one).girl != one.girl

    def recent(self, one: Character) -> bool:
        """Whether `he` or `she` at the start of a sentence can mean this character alone."""
        return one in self.last_named and self.unambiguous(one)

    def either_order(self) -> tuple[Character, Character]:
        """The two of the scene, in either order."""
        x, y, _ = self.scene
        return (x, y) if self.chance(0.5) else (y, x)

    # writing

    def say(self, pattern: str, *, definite: bool = False, **given: Any) -> None:
        """Writes a sentence of the pattern in which every pronoun can mean one thing only.

        Args:
            pattern: name of the pattern.
            definite: an object not mentioned before is `the ball`, not `a ball`.
            given: what the variables stand for; by default x and y are the two of the scene, mostly in the order in
                which they came into the story, p is its place, and f a glad feeling.
        """
        x = given.get("x") or (self.scene.other(given["y"]) if "y" in given else self.scene[:2][self.chance(0.3)])
        entities: dict[str, Entity] = {
            "x": x,
            "y": self.scene.other(x),
            "p": self.scene.place,
            "f": self.pick(GLAD),
            **given,
        }
        for _ in range(_TRIES):
            pieces = draw(self.pick(trees(pattern)), self.random)
            if self._understood(pattern, pieces, entities):
                break
        else:
            raise RuntimeError(f"no sentence of pattern {pattern!r} fits after: {' '.join(self.texts)}")
        if not definite:
            self._put_articles(pieces, entities)
        text = spelled(pieces, entities)
        self.lines.append(Line(pattern, tuple(pieces), entities))
        self.texts.append(text)
        self.n_words += text.count(" ") + 1
        self.told.add(pattern)
        self.mentioned.update(entities[piece.var][0] for piece in pieces if piece.var and piece.var in OBJECTS)

    def _understood(self, pattern: str, pieces: list[Piece], entities: dict[str, Entity]) -> bool:
        """Whether pronouns mean one thing only and nobody comes in unintroduced; if so, notes what is mentioned."""
        named: set[Entity] = set()
        last_thing = self.last_thing
        for piece in pieces:
            if not piece.var:
                if piece.role == "group" and self.alone:
                    return False
                last_thing = None if piece.pos == "NOUN" else last_thing
                continue
            entity = entities[piece.var]
            if isinstance(entity, Character):
                if self.alone and entity is not self.scene.x and pattern not in _INTRODUCTIONS:
                    return False
                if piece.text in ("he", "him", "his"):
                    only = {entity} == (named or (self.last_named if self.alone else None))
                    if not only and not (entity in named | self.last_named and self.unambiguous(entity)):
                        return False
                last_thing = None if piece.text == "girl" else last_thing
                named.add(entity)
            elif piece.text == "it":
                if last_thing is not entity:
                    return False
            elif piece.text == "the" or piece.var == "n":
                last_thing = entity if piece.var in (*OBJECTS, "n") else None
        self.last_named, self.last_thing = frozenset(named), last_thing
        return True

    def _put_articles(self, pieces: list[Piece], entities: dict[str, Entity]) -> None:
        """Makes the first mention of an object `a ...`."""
        for var in OBJECTS:
            if var in entities and entities[var][0] not in self.mentioned:
                first = next((i for i, piece in enumerate(pieces) if piece.var == var), None)
                if first is not None:
                    pieces[first] = pieces[first]._replace(text="a")

    # objects

    def new_thing(self) -> Thing:
        """An object that the story has not had yet, at hand in this scene."""
        noun = self.pick(_NOUNS)
        while noun in self.nouns:
            noun = self.pick(_NOUNS)
        self.nouns.add(noun)
        o = thing(noun, self.pick(ADJECTIVES[KIND_OF[noun]]) if self.chance(0.25) else "")
        self.things.append(o)
        return o

    def owned(self, o: Thing, by: Character | None, first: Character | None = None) -> None:
        """Records who has the object; the first owner (default: the same) may get it `back` later."""
        self.holder[o.noun] = by
        self.first_owner.setdefault(o.noun, first or by)

    def owner(self, o: Thing) -> Character:
        """Who has the object; both of them: either."""
        return self.holder[o.noun] or self.pick(self.scene[:2])
