"""Tells the stories: who, where and what; an opening, beats, perhaps a second scene, a close.

What holds in every story (and is tested): the giver has the object; `he`, `she` and `it` can mean one thing only; an
object is `a ...` when first mentioned and `the ...` or `it` afterwards, except that one may be given straight away
("Lily and Tom went to the park. Tom gave the ball to Lily."); two characters who are held out never meet.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator
from hashlib import blake2b
from itertools import count

from sa_lens.data.stories.beats import Beats
from sa_lens.data.stories.story import Story
from sa_lens.data.stories.words import GLAD, NAMES, NEEDY, PLACES, PROUD, Character, character
from sa_lens.data.stories.words import held_out_pairs as default_held_out_pairs
from sa_lens.data.stories.writer import Scene

SHORTEST, LONGEST = 50, 120
"""Words of a story."""


def generate(n: int, seed: int = 0, *, held_out_pairs: Collection[frozenset[str]] | None = None) -> Iterator[Story]:
    """Yields n different stories; story i depends on the seed and the held-out pairs alone, not on n.

    Args:
        n: Number of stories.
        seed: Any integer.
        held_out_pairs: Pairs of names that never occur in one story; None: `held_out_pairs()`. Empty: all may meet.

    Raises:
        ValueError: n below 0, or a held-out pair that is not two names of `NAMES`, or no pair left.
    """
    if n < 0:
        raise ValueError(f"n={n} stories: must be 0 or more")
    friends = _friends(default_held_out_pairs() if held_out_pairs is None else held_out_pairs)
    return _generate(n, seed, friends)


def _generate(n: int, seed: int, friends: dict[str, tuple[str, ...]]) -> Iterator[Story]:
    told: set[bytes] = set()
    for i in range(n):
        for attempt in count():
            telling = _Telling(random.Random(f"{seed}/{i}/{attempt}"), friends)
            story = telling.tell()
            if not SHORTEST <= telling.n_words <= LONGEST:
                continue
            digest = blake2b(story.text.encode(), digest_size=16).digest()
            if digest not in told:
                told.add(digest)
                yield story
                break


def _friends(held_out: Collection[frozenset[str]]) -> dict[str, tuple[str, ...]]:
    """The names that may share a story with each name."""
    for pair in held_out:
        if len(pair) != 2 or not pair <= set(NAMES):
            raise ValueError(f"held-out pair {sorted(pair)} must be two different names of sa_lens.data.stories.NAMES")
    kept = set(held_out)
    friends = {a: tuple(b for b in NAMES if b != a and frozenset((a, b)) not in kept) for a in NAMES}
    friends = {name: others for name, others in friends.items() if others}
    if not friends:
        raise ValueError("held_out_pairs leaves no two names that may meet in a story: hold out fewer pairs")
    return friends


class _Telling(Beats):
    """A whole story: opening, gift, beats, perhaps a second scene with a third character, close."""

    def __init__(self, rng: random.Random, friends: dict[str, tuple[str, ...]]):
        super().__init__(rng)
        self.friends = friends

    def tell(self) -> Story:
        first = self.pick(tuple(self.friends))
        second = self.pick(self.friends[first])
        if NAMES[first] == NAMES[second] and self.chance(0.4):
            # more often a girl and a boy, so that pronouns are frequent
            second = self.pick(self.friends[first])
        both = set(self.friends[first]) & set(self.friends[second])
        thirds = [name for name in NAMES if name in both] if self.chance(0.25) else []
        x, y = character(first), character(second)
        self.scene = Scene(x, y, self.pick(PLACES))
        self.open()
        self.gift()
        # the close adds up to 22 words
        target = 40 + 22 * self.random()
        while self.n_words < (min(target, 44) if thirds else target):
            self.beat()
        if thirds and self.n_words <= 58:
            self.change_scene(character(self.pick(thirds)))
            self.gift()
        self.close()
        return Story(" ".join(self.texts), tuple(self.lines))

    def open(self) -> None:
        x, y, place = self.scene
        kind = self.random()
        if kind < 0.18:
            self.alone = True
            self.say("intro_one", x=x)
            if self.chance(0.35):
                self.say("intro_home", x=x, p=self.pick([p for p in PLACES if p.outdoors and p is not place]))
            elif self.chance(0.5):
                self.say("intro_likes", x=x)
            self.meet_alone() if self.chance(0.4) else self.befriend()
        elif kind < 0.28:
            self.alone = True
            self.meet_alone()
        elif kind < 0.45:
            self.say("intro_two", x=x, y=y)
            if self.chance(0.5):
                self.say("intro_two_like", x=x)
            self.go()
        else:
            if self.chance(0.3):
                self.say("weather")
                if place.outdoors and self.chance(0.2):
                    self.say("sky")
            self.go()
        if self.chance(0.3):
            self.remark()

    def befriend(self) -> None:
        x, y, _ = self.scene
        self.say("intro_friend", x=x, y=y)
        self.alone = False
        self.go()

    def meet_alone(self) -> None:
        """One character goes somewhere alone and meets the other."""
        x, y, place = self.scene
        self.say("go_alone", x=x, p=place)
        if self.chance(0.6):
            self.feel_why(x)
        if self.chance(0.25):
            self.say("place_is", p=place)
        self.say("meet", x=x, y=y, p=place)
        self.alone = False
        if self.chance(0.4):
            g = self.pick((x, y))
            self.say("hello", g=g, r=self.scene.other(g))

    def go(self) -> None:
        """Both go somewhere; they may take an object along, or one may give the other one in the same sentence."""
        x, y, place = self.scene
        weather = bool(self.told & {"weather", "sky"})
        kind = self.random()
        if kind < 0.08 and not weather:
            o = self.new_thing()
            self.say("carry", x=x, y=y, o=o, p=place)
            self.owned(o, None)
        elif kind < 0.2:
            g, o = self.pick((x, y)), self.new_thing()
            r = self.scene.other(g)
            self.say(self.pick(("give_when", "give_after")), x=x, y=y, p=place, g=g, r=r, o=o)
            self.owned(o, r, first=g)
            self.after_gift(o, g)
        elif weather:
            self.say("go_plain" if self.chance(0.65) else "at_plain", x=x, y=y, p=place)
        else:
            self.say("go" if self.chance(0.65) else "at", x=x, y=y, p=place)

    def change_scene(self, third: Character) -> None:
        """One of the two goes on with a third character, elsewhere and with other objects."""
        stays = self.pick(self.scene[:2])
        place = self.pick([p for p in PLACES if p is not self.scene.place])
        x, y = (stays, third) if self.chance(0.5) else (third, stays)
        self.things = []
        if self.chance(0.4):
            self.scene = Scene(stays, third, place)
            self.say("meet_new", x=stays, y=third, p=place)
        else:
            self.scene = Scene(x, y, place)
            self.say("next_day", x=x, y=y, p=place)

    def close(self) -> None:
        x, y, _ = self.scene
        if self.chance(0.6):
            self.say("go_home", x=x, y=y)
        ending = self.random()
        if ending < 0.25:
            self.say("best_friends", x=x, y=y)
        elif ending < 0.45:
            self.say("good_day")
        elif ending < 0.6:
            self.say("from_then", x=x)
        elif ending < 0.75:
            if self.things:
                o = self.pick(self.things)
                self.say("dream", x=self.owner(o), o=o)
            else:
                self.say("good_day")
        elif ending < 0.85:
            self.say("lesson", x=x)
        else:
            self.say("happy_end", x=x, f=self.pick(GLAD))

    def feel_why(self, one: Character) -> None:
        """Why a character who is alone feels so."""
        if self.chance(0.5):
            self.say("feel_place", x=one, p=self.scene.place, f=self.pick(GLAD))
        elif self.chance(0.7):
            o = self.new_thing()
            self.say("feel_has_new", x=one, o=o, f=self.pick(PROUD))
            self.owned(o, one)
        else:
            self.say("say_need", x=one, f=self.pick(NEEDY))
