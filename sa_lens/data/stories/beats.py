"""The beats of a story: a gift, a loss and a find, something mended, talk; each keeps the world consistent."""

from __future__ import annotations

from sa_lens.data.stories.words import (
    ANIMALS,
    BREAKABLE,
    GLAD,
    INDOOR_SPOTS,
    NEEDY,
    OUTDOOR_SPOTS,
    PROUD,
    SAD,
    SMALL,
    Character,
    Thing,
)
from sa_lens.data.stories.writer import Writer

ROOMY = 95
"""A long beat is begun only where a story of so many words has room for it."""


class Beats(Writer):
    """A story whose two characters of the scene can do things with objects."""

    # giving

    def gift(self) -> None:
        """An object comes into the scene, or is there, and one gives it to the other."""
        x, y, _ = self.scene
        if self.things:
            o = self.pick(self.things)
            self.give(o, self.owner(o))
        elif self.chance(0.1) and len(self.nouns) < 3:
            o, q = self.new_thing(), self.new_thing()
            self.say("have_each", x=x, y=y, o=o, q=q)
            self.owned(o, x)
            self.owned(q, y)
            o = self.pick((o, q))
            self.give(o, self.owner(o))
        else:
            self.another_gift()

    def have(self) -> tuple[Character, Thing]:
        """One of them has, finds or buys an object."""
        place = self.scene.place
        x, o = self.pick(self.scene[:2]), self.new_thing()
        y = self.scene.other(x)
        kind, spots = self.random(), OUTDOOR_SPOTS if place.outdoors else INDOOR_SPOTS
        if kind < 0.08:
            self.say("lies", o=o, s=self.pick(spots))
            self.say("take", y=x, o=o)
        elif kind < 0.3:
            self.say("find_new", x=x, o=o, s=self.pick(spots))
            if self.chance(0.3):
                self.say("pick_up", x=x, o=o)
        elif kind < 0.45:
            self.say("feel_has_new", x=x, y=y, o=o, f=self.pick(PROUD))
        elif place.sells:
            self.say("buy", x=x, o=o)
        else:
            self.say("have", x=x, o=o)
        self.owned(o, x)
        return x, o

    def another_gift(self) -> None:
        """One gives the other an object that is new to the story, or first has it and then gives it."""
        kind = self.random()
        if kind < 0.6:
            self.give_new()
            return
        g, o = self.have()
        if kind < 0.65:
            self.say("use_" + o.kind, x=g, o=o)
        if self.chance(0.6):
            self.aside(self.scene.other(g))
        self.give(o, g)

    def give_new(self) -> None:
        """One gives the other an object not mentioned before, as `a ball` or, now and then, as `the ball`."""
        g, o = self.pick(self.scene[:2]), self.new_thing()
        r = self.scene.other(g)
        kind = self.random()
        if kind < 0.15:
            self.say("give", g=g, r=r, o=o, definite=True)
        elif kind < 0.25 and o.kind != "food":
            self.say("lend", g=g, r=r, o=o)
        else:
            self.say("give" if kind < 0.7 else "give_new", g=g, r=r, o=o)
        self.owned(o, r, first=g)
        self.after_gift(o, g)

    def give(self, o: Thing, g: Character) -> None:
        """The holder gives the object to the other."""
        r = self.scene.other(g)
        kind = self.random()
        if self.first_owner[o.noun] is r and kind < 0.5:
            self.say("give_back", g=g, r=r, o=o)
        elif o.kind == "ball" and kind < 0.6:
            self.say("throw", g=g, r=r, o=o)
        elif kind < 0.08 and self.recent(g):
            self.say("give_pronoun", g=g, r=r, o=o)
        elif kind < 0.2 and self.last_thing is o:
            self.say("give_it", g=g, r=r, o=o)
        elif kind < 0.28 and self.holder[o.noun] is g:
            self.say("want_give", g=g, r=r, o=o)
            self.say("give_it", g=g, r=r, o=o)
        elif kind < 0.32:
            self.say("give_double", g=g, r=r, o=o)
        elif kind < 0.4 and o.kind != "food":
            self.say("sell" if self.scene.place.sells and self.chance(0.5) else "lend", g=g, r=r, o=o)
        else:
            self.say("give", g=g, r=r, o=o)
        self.owned(o, r)
        self.after_gift(o, g)

    def give_back(self, o: Thing, g: Character) -> None:
        """The holder gives the object to the one who had it before."""
        r = self.scene.other(g)
        self.say("give_back" if self.chance(0.5) else "give", g=g, r=r, o=o)
        self.owned(o, r)
        self.after_gift(o, g)

    def after_gift(self, o: Thing, g: Character) -> None:
        """The one who got the object (and has it) says thanks or uses it."""
        r = self.scene.other(g)
        kind = self.random()
        if kind < 0.25:
            self.say("thank", x=r, y=g)
        elif kind < 0.5:
            self.say("thank_for", x=r, y=g, o=o)
        elif kind < 0.56:
            self.say("thank_quote", x=r, y=g)
            if self.chance(0.3):
                self.say("reply", x=r, y=g)
        elif kind < 0.62:
            self.say(self.pick(("feel_has", "feel_likes")), x=r, y=g, o=o)
        elif kind < 0.67:
            self.say("feel", x=r, f=self.pick(PROUD))
        elif kind < 0.7 and "say_like" not in self.told:
            self.say("say_like", x=r, o=o)
        elif kind < 0.8:
            self.say("use_" + o.kind, x=r, o=o)

    # beats

    def beat(self) -> None:
        """One more thing happens."""
        room = ROOMY - self.n_words
        o = self.pick(self.things) if self.things else None
        kind = self.random()
        if o is None:
            self.another_gift() if len(self.nouns) < 3 and room > 25 else self.remark()
        elif kind < 0.25:
            self.ask_and_give(o)
        elif kind < 0.3 and room > 42:
            self.lose_and_find(o)
        elif kind < 0.33 and room > 42 and o.noun in BREAKABLE:
            self.break_and_mend(o)
        elif kind < 0.38:
            self.talk_about(o)
        elif kind < 0.42:
            self.use_together(o)
        elif kind < 0.76:
            self.give(o, self.owner(o))
        elif kind < 0.9 and len(self.nouns) < 3 and room > 25:
            self.another_gift()
        else:
            self.remark()

    def ask_and_give(self, o: Thing) -> None:
        """The other asks for the object and gets it; each way of asking once in a story."""
        g = self.owner(o)
        r = self.scene.other(g)
        ways = [way for way in ("ask_for", "ask_quote", "say_want") if way not in self.told]
        if not ways or self.holder[o.noun] is None:
            self.remark()
            return
        way = self.pick(ways)
        self.say(way, x=r, y=g, o=o)
        if way == "ask_quote" and self.chance(0.5):
            self.say("answer_yes", x=r, y=g)
        self.give(o, g)

    def lose_and_find(self, o: Thing) -> None:
        x = self.owner(o)
        y = self.scene.other(x)
        spot = self.pick(OUTDOOR_SPOTS if self.scene.place.outdoors else INDOOR_SPOTS)
        self.say("lose", x=x, o=o)
        first = self.random()
        if first < 0.3:
            self.say("not_find", x=x, o=o)
        elif first < 0.5:
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
            self.say("look_for", o=o)
        if self.chance(0.35):
            self.say("offer_help", x=x, y=y)
        if self.chance(0.75):
            self.say("find", x=x, y=y, o=o, s=spot)
        else:
            self.say("tell_found", x=x, y=y, o=o, s=spot)
            self.say("take", y=y, o=o)
        self.holder[o.noun] = y
        self.give_back(o, y)

    def break_and_mend(self, o: Thing) -> None:
        x = self.owner(o)
        y = self.scene.other(x)
        self.say("breaks", o=o)
        if self.chance(0.5):
            self.say("feel", x=x, f=self.pick(SAD))
        self.say("give", g=x, r=y, o=o)
        self.holder[o.noun] = y
        self.say("mend", y=y, o=o)
        self.give_back(o, y)

    def talk_about(self, o: Thing) -> None:
        """They talk about the object, or one shows it or reads it to the other; each once in a story."""
        x = self.owner(o)
        y = self.scene.other(x)
        kind = self.random()
        if kind < 0.3 and not self.told & {"ask_like", "say_like"}:
            self.say("ask_like", x=x, y=y, o=o)
            self.say("answer_like", x=x, y=y, o=o)
        elif kind < 0.6 and not self.told & {"say_to", "say_like"}:
            g = self.pick((x, y))
            self.say("say_to", g=g, r=self.scene.other(g), o=o)
        elif o.kind == "reading" and "read_to" not in self.told:
            self.say("read_to", g=x, r=y, o=o)
        elif "show" not in self.told:
            self.say("show", g=x, r=y, o=o)
        else:
            self.remark()

    def use_together(self, o: Thing) -> None:
        x = self.owner(o)
        if o.kind == "food":
            self.say("share_food", o=o)
            self.things.remove(o)
        elif self.chance(0.3) and "share" not in self.told:
            self.say("share", g=x, r=self.scene.other(x), o=o)
        elif o.kind in ("ball", "toy") and "play_with" not in self.told:
            self.say("play_with", o=o)
        elif o.noun in SMALL and self.chance(0.6) and "bag" not in self.told:
            self.say("bag", x=x, o=o)
        else:
            self.say("use_" + o.kind, x=x, o=o)

    def remark(self) -> None:
        """A sentence that changes nothing: what they see, do or feel, or one turns to the other; no kind twice."""
        place = self.scene.place
        options = ["fun", "place_is", "smile", "like_place", "feel_place", "say_need", "ask_play", "call", "treat"]
        options += ["animal"] * place.outdoors
        options = [pattern for pattern in options if pattern not in self.told]
        kind = self.random()
        if kind < 0.1 and len(self.nouns) < 3:
            # nobody takes this one
            o = self.new_thing()
            self.things.remove(o)
            self.say("lies", o=o, s=self.pick(OUTDOOR_SPOTS if place.outdoors else INDOOR_SPOTS))
        elif kind < 0.65 or not options:
            self.turn()
        else:
            self.observe(self.pick(options))

    def observe(self, pattern: str) -> None:
        """A sentence of one of the patterns of `remark`."""
        g, r = self.either_order()
        feelings = NEEDY if pattern == "say_need" or (pattern == "smile" and self.chance(0.4)) else GLAD
        self.say(pattern, x=g, y=r, g=g, r=r, n=self.pick(ANIMALS), f=self.pick(feelings))

    def aside(self, one: Character) -> None:
        """A sentence about this one, who has been named less often than the other."""
        pattern = self.pick(("greet", "smile", "smile", "feel_place", "say_need", "like_place"))
        other = self.scene.other(one)
        feeling = self.pick(NEEDY if pattern == "say_need" else GLAD)
        self.say(pattern, x=one, y=other, g=one, r=other, f=feeling)

    def turn(self) -> None:
        """One of the two does something to or with the other."""
        g, r = self.either_order()
        self.say("greet", g=g, r=r)
