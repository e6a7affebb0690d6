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
from sa_lens.data.stories.words import NAMES, NEEDY, PLACES, PROUD, Character, character
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
        thirds = [name for name in NAMES if name in both] if self.chance(0.15) else []
        x, y = character(first), character(second)
        self.scene = Scene(x, y, self.pick(PLACES))
        self.open()
        for _ in range(self.pick((0, 0, 0, 0, 1, 1, 1, 2, 2, 3))):
            self.remark()
        self.gift()
        # the close adds up to 22 words
        target = 40 + 22 * self.random()
        while self.n_words < (min(target, 44) if thirds else target):
            self.beat()
        if thirds and self.n_words <= 64:
            self.change_scene(character(self.pick(thirds)))
            if self.chance(0.3):
                self.remark()
            self.gift()
        self.close()
        return Story(" ".join(self.texts), tuple(self.lines))

    def open(self) -> None:
        """Introduces the two: one after the other, or both at once, before or as they come to a place."""
        x, y, place = self.scene
        elsewhere = self.pick([p for p in PLACES if p.outdoors and p is not place])
        kind = self.random()
        if kind < 0.3:
            self.alone = True
            friends = self.chance(0.4)
            if friends or kind < 0.15:
                self.say("intro_home" if self.chance(0.2) else "intro_one", x=x, p=elsewhere)
                if self.chance(0.2):
                    self.say("intro_likes", x=x)
            if not friends:
                self.meet_alone()
            else:
                self.say("intro_friend", x=x, y=y)
                self.alone = False
                self.go()
        elif kind < 0.45:
            self.say("intro_two", p=elsewhere)
            if self.chance(0.3):
                self.say("intro_two_like")
            self.go()
        else:
            if self.chance(0.12):
                self.say("weather")
            self.go()

    def meet_alone(self) -> None:
        """One character goes somewhere alone and meets the other."""
        x, y, _ = self.scene
        self.say("go_alone", x=x)
        if self.chance(0.4):
            self.feel_why(x)
        if self.chance(0.15):
            self.say("place_is")
        self.say("meet", x=x, y=y)
        self.alone = False

    def go(self) -> None:
        """Both come to the place; they may take an object along, or one may give the other one in the same sentence."""
        kind = self.random()
        if kind < 0.1:
            o = self.new_thing()
            self.say("carry", o=o)
            self.owned(o, None)
        elif kind < 0.25:
            (g, r), o = self.either_order(), self.new_thing()
            self.say("give_meeting", g=g, r=r, o=o)
            self.owned(o, r, first=g)
            self.after_gift(o, g)
        else:
            self.say("go")

    def change_scene(self, third: Character) -> None:
        """One of the two goes on with a third character, elsewhere and with other objects."""
        stays = self.pick(self.scene[:2])
        place = self.pick([p for p in PLACES if p is not self.scene.place])
        self.things = []
        self.scene = Scene(stays, third, place)
        if self.chance(0.4):
            self.say("meet_new", x=stays, y=third)
        else:
            self.say("next_day")

    def close(self) -> None:
        if self.chance(0.3):
            self.say("go_home")
        ending = self.random()
        if ending < 0.2:
            self.say("best_friends")
        elif ending < 0.4:
            self.say("good_day")
        elif ending < 0.5:
            self.say("from_then")
        elif ending < 0.75:
            if self.things and self.chance(0.6):
                o = self.pick(self.things)
                self.say("dream", x=self.owner(o), o=o)
            else:
                self.say("sleep")
        elif ending < 0.85:
            self.say("lesson")
        else:
            self.say("happy_end")

    def feel_why(self, one: Character) -> None:
        """Why a character who is alone feels so."""
        if self.chance(0.5):
            self.say("feel_place", x=one)
        elif self.chance(0.7):
            o = self.new_thing()
            self.say("feel_has_new", x=one, o=o, f=self.pick(PROUD))
            self.owned(o, one)
        else:
            self.say("say_need", x=one, f=self.pick(NEEDY))
