"""Tells the stories: chooses who, where and what, keeps track of who has which object, and writes sentence by sentence.

What holds in every story (and is tested): the giver has the object; `he`, `she` and `it` can mean one thing only; an object
is `a ...` when first mentioned and `the ...` or `it` afterwards, except that a story may open with one given straight away
("Tom gave the ball to Lily."); two characters who are held out never meet.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator
from hashlib import blake2b
from itertools import count
from typing import NamedTuple, TypeVar

from sa_lens.data.stories.patterns import Sentence, sentences
from sa_lens.data.stories.story import Line, Story
from sa_lens.data.stories.words import (
    ADJECTIVES,
    ANIMALS,
    BREAKABLE,
    GLAD,
    INDOOR_SPOTS,
    KIND_OF,
    NAMES,
    NEEDY,
    OUTDOOR_SPOTS,
    PLACES,
    SAD,
    Character,
    Entity,
    Place,
    Thing,
    character,
    thing,
)
from sa_lens.data.stories.words import held_out_pairs as default_held_out_pairs

_T = TypeVar("_T")
_NOUNS = tuple(KIND_OF)
# a story goes on until it has about this many words; closing it takes at most 25 more
_SHORTEST, _LONGEST = 48, 88
_TOO_LONG = 95


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
            story = _Telling(random.Random(f"{seed}/{i}/{attempt}"), friends).tell()
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


class _Scene(NamedTuple):
    """Two characters in one place."""

    x: Character
    y: Character
    place: Place

    def other(self, one: Character) -> Character:
        return self.y if one is self.x else self.x


class _Telling:
    """One story in the making. Beats are methods that write a few sentences and keep the world consistent."""

    def __init__(self, rng: random.Random, friends: dict[str, tuple[str, ...]]):
        self.random = rng.random
        self.friends = friends
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
        self.things: list[Thing] = []
        """Objects at hand in this scene; one eaten is taken out."""
        self.solo: Character | None = None

    # choosing

    def pick(self, options: Collection[_T]) -> _T:
        return options[int(self.random() * len(options))]  # type: ignore[index]

    def chance(self, p: float) -> bool:
        return self.random() < p

    def unambiguous(self, one: Character) -> bool:
        """Whether `he` or `she` can mean this character alone."""
        return self.solo is not None or self.scene.other(one).girl != one.girl

    # writing

    def say(self, pattern: str, **entities: Entity) -> None:
        """Writes a sentence of the pattern, with a pronoun where the pattern offers one and it is unambiguous."""
        plain, he, it, both = self.sentences[pattern]
        subject = entities.get("x") or entities.get("y")
        may_he = (he or both) and subject in self.last_named and self.unambiguous(subject) and self.chance(0.6)  # type: ignore[arg-type]
        may_it = (it or both) and entities["o"] is self.last_thing and self.chance(0.5)
        options = (both if may_it else he) if may_he else it if may_it else plain
        self.write(self.pick(options or plain), entities)

    def write(self, sentence: Sentence, entities: dict[str, Entity]) -> None:
        text = sentence.format.format_map(entities)
        self.lines.append(Line(sentence, entities))
        self.texts.append(text)
        self.n_words += text.count(" ") + 1
        self.told.add(sentence.pattern)
        self.last_named = tuple([entities[var] for var in sentence.named])
        self.last_thing = entities[sentence.last_thing] if sentence.last_thing else None

    # the whole story

    def tell(self) -> Story:
        names = self.friends
        first = self.pick(tuple(names))
        second = self.pick(names[first])
        thirds = [name for name in names[first] if name in names[second]] if self.chance(0.3) else []
        x, y = character(first), character(second)
        self.scene = _Scene(x, y, self.pick(PLACES))
        self.open()
        self.gift()
        target = _SHORTEST + self.random() * (_LONGEST - _SHORTEST)
        while self.n_words < (min(target, 60) if thirds else target):
            self.beat()
        if thirds and self.n_words <= 66:
            self.change_scene(character(self.pick(thirds)))
            self.gift()
        self.close()
        return Story(" ".join(self.texts), tuple(self.lines))

    def open(self) -> None:
        x, y, place = self.scene
        kind = self.random()
        if kind < 0.18:
            self.solo = x
            self.say("intro_one", x=x)
            if self.chance(0.35):
                self.say("intro_home", x=x, p=self.pick([p for p in PLACES if p.outdoors and p is not place]))
            elif self.chance(0.5):
                self.say("intro_likes", x=x)
            self.meet_alone() if self.chance(0.4) else self.befriend()
        elif kind < 0.28:
            self.solo = x
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
        if self.chance(0.45):
            self.remark()

    def befriend(self) -> None:
        x, y, _ = self.scene
        self.say("intro_friend", x=x, y=y)
        self.solo = None
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
        self.solo = None

    def go(self) -> None:
        x, y, place = self.scene
        if self.texts and self.chance(0.35):
            self.say(self.pick(("go_later", "go_plain", "at_plain")), x=x, y=y, p=place)
        elif self.chance(0.12):
            o = self.new_thing()
            self.say("carry", x=x, y=y, o=o, p=place)
            self.holder[o.noun] = self.first_owner[o.noun] = None
        elif self.chance(0.16):
            g = self.pick((x, y))
            o = self.new_thing()
            self.say(self.pick(("give_when", "give_after")), x=x, y=y, p=place, g=g, r=self.scene.other(g), o=o)
            self.owned(o, self.scene.other(g), first=g)
        else:
            self.say("go" if self.chance(0.65) else "at", x=x, y=y, p=place)

    def change_scene(self, third: Character) -> None:
        """One of the two goes on with a third character, elsewhere and with other objects."""
        stays = self.pick(self.scene[:2])
        place = self.pick([p for p in PLACES if p is not self.scene.place])
        x, y = (stays, third) if self.chance(0.5) else (third, stays)
        self.things = []
        if self.chance(0.4):
            self.scene = _Scene(stays, third, place)
            self.say("meet_new", x=stays, y=third, p=place)
        else:
            self.scene = _Scene(x, y, place)
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
            o = self.pick(self.things or [None])
            if o is None:
                self.say("good_day")
            else:
                self.say("dream", x=self.holder[o.noun] or x, o=o)
        elif ending < 0.85:
            self.say("lesson", x=x)
        else:
            self.say("happy_end", x=x, f=self.pick(GLAD))

    # objects

    def new_thing(self) -> Thing:
        used = self.holder
        nouns = [noun for noun in (self.pick(_NOUNS), self.pick(_NOUNS), self.pick(_NOUNS)) if noun not in used]
        noun = nouns[0] if nouns else next(noun for noun in _NOUNS if noun not in used)
        o = thing(noun, self.pick(ADJECTIVES[KIND_OF[noun]]) if self.chance(0.4) else "")
        self.things.append(o)
        return o

    def owned(self, o: Thing, by: Character | None, first: Character | None = None) -> None:
        self.holder[o.noun] = by
        self.first_owner.setdefault(o.noun, first or by)

    def gift(self) -> None:
        """An object comes into the scene and one gives it to the other."""
        x, y, place = self.scene
        ready = [o for o in self.things if o.noun in self.holder]
        if ready:
            o = ready[0]
            g = self.holder[o.noun] or self.pick((x, y))
            if self.holder[o.noun] is None or self.chance(0.3):
                self.give(o, g)
            else:
                self.after_gift(o, self.scene.other(g))
            return
        g = self.pick((x, y))
        r = self.scene.other(g)
        o = self.new_thing()
        kind = self.random()
        if kind < 0.3:
            self.say("give_new", g=g, r=r, o=o)
            self.owned(o, r, first=g)
            self.after_gift(o, g)
            return
        if kind < 0.38:
            self.say("give_decide_new", g=g, r=r, o=o)
            self.owned(o, r, first=g)
            self.after_gift(o, g)
            return
        if kind < 0.48:
            self.holder[o.noun] = g
            self.say("give", g=g, r=r, o=o)
            self.owned(o, r, first=g)
            self.after_gift(o, g)
            return
        if kind < 0.58 and len(self.holder) < 3:
            q = self.new_thing()
            self.say("have_each", x=x, y=y, o=o, q=q)
            self.owned(o, x)
            self.owned(q, y)
            o = self.pick((o, q))
            g = self.holder[o.noun] or g
        elif kind < 0.7:
            spots = OUTDOOR_SPOTS if place.outdoors else INDOOR_SPOTS
            self.say("find_new", x=g, o=o, s=self.pick(spots))
            self.owned(o, g)
            if self.chance(0.4):
                self.say("pick_up", x=g, o=o)
        elif kind < 0.75 and self.unambiguous(g):
            self.say("feel_has_new", x=g, o=o, f=self.pick(GLAD))
            self.owned(o, g)
        elif place.sells:
            self.say("buy", x=g, o=o)
            self.owned(o, g)
        else:
            self.say("have", x=g, o=o)
            self.owned(o, g)
        if self.chance(0.2):
            self.say("use_" + o.kind, x=self.pick(self.scene[:2]) if o.kind != "clothing" else g, o=o)
        self.give(o, g)

    def give(self, o: Thing, g: Character) -> None:
        """The holder gives the object to the other."""
        r = self.scene.other(g)
        kind = self.random()
        if self.first_owner[o.noun] is r and self.holder[o.noun] is not None and kind < 0.5:
            self.say("give_back", g=g, r=r, o=o)
        elif o.kind == "ball" and kind < 0.6:
            self.say("throw", g=g, r=r, o=o)
        elif kind < 0.1 and g in self.last_named and self.unambiguous(g):
            self.say("give_pronoun", g=g, r=r, o=o)
        elif kind < 0.2 and self.last_thing is o:
            self.say("give_it", g=g, r=r, o=o)
        elif kind < 0.28 and self.holder[o.noun] is g:
            self.say("want_give", g=g, r=r, o=o)
            self.say("give_it", g=g, r=r, o=o)
        elif kind < 0.34 and self.unambiguous(r):
            self.say("give_double", g=g, r=r, o=o)
        elif kind < 0.6:
            self.say("give", g=g, r=r, o=o)
        else:
            self.say(self.pick(("give", "give_then", "give_adverb", "give_decide")), g=g, r=r, o=o)
        self.owned(o, r)
        self.after_gift(o, g)

    def after_gift(self, o: Thing, g: Character) -> None:
        """The one who got the object (and has it) says thanks or uses it."""
        r = self.scene.other(g)
        kind = self.random()
        if kind < 0.15:
            self.say("thank", x=r, y=g)
        elif kind < 0.4:
            self.say("thank_for", x=r, y=g, o=o)
        elif kind < 0.55:
            self.say("thank_quote", x=r, y=g)
            if self.chance(0.5):
                self.say("reply", x=r, y=g)
        elif kind < 0.65:
            self.say("feel", x=r, f=self.pick(GLAD))
        elif kind < 0.72 and self.unambiguous(r):
            why = self.pick(("feel_has", "feel_likes"))
            self.say(why, x=r, o=o, f=self.pick(GLAD))
        elif kind < 0.8:
            self.say("say_like", x=r, o=o)
        elif kind < 0.95:
            self.say("use_" + o.kind, x=r, o=o)

    # beats

    def beat(self) -> None:
        room = _TOO_LONG - self.n_words
        o = self.pick(self.things) if self.things else None
        kind = self.random()
        if o is None:
            self.gift() if len(self.holder) < 3 and room > 25 else self.remark()
        elif self.holder[o.noun] is None:
            self.give(o, self.pick(self.scene[:2]))
        elif kind < 0.2:
            self.ask_and_give(o)
        elif kind < 0.38 and room > 42:
            self.lose_and_find(o)
        elif kind < 0.48 and room > 42 and o.noun in BREAKABLE:
            self.break_and_mend(o)
        elif kind < 0.58:
            self.talk_about(o)
        elif kind < 0.66:
            self.use_together(o)
        elif kind < 0.74:
            self.give(o, self.owner(o))
        elif kind < 0.84 and len(self.holder) < 3 and room > 25:
            self.another_gift()
        else:
            self.remark()

    def owner(self, o: Thing) -> Character:
        holder = self.holder[o.noun]
        assert holder is not None
        return holder

    def another_gift(self) -> None:
        g = self.pick(self.scene[:2])
        r = self.scene.other(g)
        o = self.new_thing()
        if self.chance(0.4):
            self.say("give_new", g=g, r=r, o=o)
            self.owned(o, r, first=g)
            self.after_gift(o, g)
        else:
            self.say("have", x=g, o=o)
            self.owned(o, g)
            self.give(o, g)

    def ask_and_give(self, o: Thing) -> None:
        g = self.owner(o)
        r = self.scene.other(g)
        kind = self.random()
        if kind < 0.4:
            self.say("ask_for", x=r, y=g, o=o)
        elif kind < 0.75 or not self.unambiguous(r):
            self.say("ask_quote", x=r, o=o)
            if self.chance(0.5):
                self.say("answer_yes", x=r, y=g)
        else:
            self.say("say_want", x=r, o=o)
        self.give(o, g)

    def lose_and_find(self, o: Thing) -> None:
        x = self.owner(o)
        y = self.scene.other(x)
        spot = self.pick(OUTDOOR_SPOTS if self.scene.place.outdoors else INDOOR_SPOTS)
        self.say("lose", x=x, o=o)
        first = self.random()
        if first < 0.3:
            self.say("not_find", x=x, o=o)
        elif first < 0.5 and self.unambiguous(x):
            self.say("feel_lost", x=x, o=o, f=self.pick(SAD))
        elif first < 0.8:
            self.say("feel", x=x, f=self.pick(SAD))
        second = self.random()
        if second < 0.25:
            self.say("ask_where", x=x, y=y, o=o)
            self.say("tell_lost", x=x, y=y, o=o)
        elif second < 0.45:
            self.say("tell_lost", x=x, y=y, o=o)
        elif second < 0.6:
            self.say("look_for", x=x, o=o)
        if self.chance(0.35):
            self.say("offer_help", x=x, y=y)
        if self.chance(0.75):
            self.say("find", x=x, y=y, o=o, s=spot)
        else:
            self.say("tell_found", x=x, y=y, o=o, s=spot)
            self.write(self.sentences["take"][0][1], {"y": y, "o": o})
        self.holder[o.noun] = y
        self.give(o, y)

    def break_and_mend(self, o: Thing) -> None:
        x = self.owner(o)
        y = self.scene.other(x)
        self.say("breaks", o=o)
        if self.chance(0.5):
            self.say("feel", x=x, f=self.pick(SAD))
        self.say(self.pick(("give", "give_then")), g=x, r=y, o=o)
        self.holder[o.noun] = y
        self.say("mend", y=y, o=o)
        self.say("give_back" if self.chance(0.5) else "give", g=y, r=x, o=o)
        self.holder[o.noun] = x
        if self.chance(0.5):
            self.after_gift(o, y)

    def talk_about(self, o: Thing) -> None:
        x = self.owner(o)
        y = self.scene.other(x)
        kind = self.random()
        if kind < 0.35:
            self.say("ask_like", x=x, y=y, o=o)
            self.say("answer_like", x=x, y=y, o=o)
        elif kind < 0.6:
            g = self.pick((x, y))
            self.say("say_to", g=g, r=self.scene.other(g), o=o)
        elif o.kind == "reading":
            self.say("read_to", g=x, r=y, o=o)
        else:
            self.say("show", g=x, r=y, o=o)

    def use_together(self, o: Thing) -> None:
        x = self.owner(o)
        if o.kind == "food":
            self.say("share_food", x=x, o=o)
            self.things.remove(o)
        elif o.kind in ("ball", "toy") and "play_with" not in self.told:
            self.say("play_with", x=x, o=o)
        elif o.kind in ("thing", "reading") and self.chance(0.3) and "bag" not in self.told:
            self.say("bag", x=x, o=o)
        else:
            self.say("use_" + o.kind, x=x, o=o)

    def remark(self) -> None:
        """A sentence that changes nothing: what they see, do or feel; no kind twice in a story."""
        x, y, place = self.scene
        one = self.pick((x, y))
        options = ["animal", "fun", "game", "walk", "glad_together", "smile", "hello", "like_place", "feel_place"]
        options = [pattern for pattern in options if pattern not in self.told]
        pattern = self.pick(options) if options else "smile"
        if pattern == "animal" and not place.outdoors:
            pattern = "place_is"
        if pattern in ("feel_place", "like_place") and self.chance(0.5):
            pattern = "say_need"
        if pattern in ("feel_place", "say_need") and not self.unambiguous(one):
            pattern = "like_place"
        feeling = self.pick(NEEDY if pattern == "say_need" else GLAD)
        self.say(
            pattern,
            **{"x": one, "g": one, "r": self.scene.other(one), "p": place, "n": self.pick(ANIMALS), "f": feeling},
        )

    def feel_why(self, one: Character) -> None:
        """Why a character who is alone feels so."""
        if self.chance(0.5):
            self.say("feel_place", x=one, p=self.scene.place, f=self.pick(GLAD))
        elif self.chance(0.7):
            o = self.new_thing()
            self.say("feel_has_new", x=one, o=o, f=self.pick(GLAD))
            self.owned(o, one)
        else:
            self.say("say_need", x=one, f=self.pick(NEEDY))
