"""Writes a story sentence by sentence and keeps track: who has what, and what a pronoun would mean."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

from sa_lens.data.stories.patterns import sentences
from sa_lens.data.stories.story import Line
from sa_lens.data.stories.words import ADJECTIVES, KIND_OF, Character, Entity, Place, Thing, thing

_T = TypeVar("_T")
_NOUNS = tuple(KIND_OF)


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
        self.sentences = sentences()
        self.lines: list[Line] = []
        self.texts: list[str] = []
        self.n_words = 0
        self.holder: dict[str, Character | None] = {}
        """Who has each object of the story, by noun; None: both of them."""
        self.first_owner: dict[str, Character | None] = {}
        self.last_thing: Entity | None = None
        self.last_named: tuple[Entity, ...] = ()
        self.told: set[str] = set()
        self.nouns: set[str] = set()
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
        return self.alone or self.scene.other(one).girl != one.girl

    def recent(self, one: Entity | None) -> bool:
        """Whether `he` or `she` would be understood as this character here: named just before, the only such one."""
        return isinstance(one, Character) and one in self.last_named and self.unambiguous(one)

    # writing

    def say(self, pattern: str, **entities: Entity) -> None:
        """Writes a sentence of the pattern, with a pronoun where the pattern offers one and it is unambiguous."""
        plain, he, it, both = self.sentences[pattern]
        options = plain
        if he or it:
            subject = entities.get("x") or entities.get("y")
            may_he = bool(he) and self.recent(subject) and self.chance(0.75)
            may_it = bool(it) and entities["o"] is self.last_thing and self.chance(0.5)
            options = (both if may_it else he) if may_he else it if may_it else plain
        sentence = self.pick(options or plain)
        text = sentence.format.format_map(entities)
        self.lines.append(Line(sentence, entities))
        self.texts.append(text)
        self.n_words += text.count(" ") + 1
        self.told.add(sentence.pattern)
        self.last_named = tuple([entities[var] for var in sentence.named])
        self.last_thing = entities[sentence.last_thing] if sentence.last_thing else None

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
