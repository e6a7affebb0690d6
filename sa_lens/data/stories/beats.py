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
            o = self.things[0]
            self.give(o, self.owner(o))
            return
        kind = self.random()
        if kind < 0.6:
            self.give_new(definite=kind < 0.1 and not self.holder)
        elif kind < 0.68 and len(self.holder) < 3:
            o, q = self.new_thing(), self.new_thing()
            self.say("have_each", x=x, y=y, o=o, q=q)
            self.owned(o, x)
            self.owned(q, y)
            o = self.pick((o, q))
            self.give(o, self.owner(o))
        else:
            g, o = self.have()
            if self.chance(0.2):
                self.say("use_" + o.kind, x=g, o=o)
            self.give(o, g)

    def have(self) -> tuple[Character, Thing]:
        """One of them has, finds or buys an object."""
        place = self.scene.place
        x, o = self.pick(self.scene[:2]), self.new_thing()
        kind = self.random()
        if kind < 0.3:
            self.say("find_new", x=x, o=o, s=self.pick(OUTDOOR_SPOTS if place.outdoors else INDOOR_SPOTS))
            if self.chance(0.4):
                self.say("pick_up", x=x, o=o)
        elif kind < 0.45 and self.unambiguous(x):
            self.say("feel_has_new", x=x, o=o, f=self.pick(PROUD))
        elif place.sells:
            self.say("buy", x=x, o=o)
        else:
            self.say("have", x=x, o=o)
        self.owned(o, x)
        return x, o

    def give_new(self, *, definite: bool = False) -> None:
        """One gives the other an object not mentioned before, as `a ball` or, definite, as `the ball`."""
        g, o = self.pick(self.scene[:2]), self.new_thing()
        r = self.scene.other(g)
        kind = self.random()
        if definite:
            pattern = "give"
        elif kind < 0.15 and o.kind != "food":
            pattern = "lend_new"
        else:
            pattern = "give_decide_new" if kind > 0.8 else "give_new"
        self.say(pattern, g=g, r=r, o=o)
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
        elif kind < 0.1 and self.recent(g):
            self.say("give_pronoun", g=g, r=r, o=o)
        elif kind < 0.2 and self.last_thing is o:
            self.say("give_it", g=g, r=r, o=o)
        elif kind < 0.28 and self.holder[o.noun] is g:
            self.say("want_give", g=g, r=r, o=o)
            self.say("give_it", g=g, r=r, o=o)
        elif kind < 0.34 and self.unambiguous(r):
            self.say("give_double", g=g, r=r, o=o)
        elif kind < 0.38 and o.kind != "food":
            self.say("lend", g=g, r=r, o=o)
        elif kind < 0.65:
            self.say("give", g=g, r=r, o=o)
        else:
            self.say(self.pick(("give_then", "give_adverb", "give_decide")), g=g, r=r, o=o)
        self.owned(o, r)
        self.after_gift(o, g)

    def give_back(self, o: Thing, g: Character) -> None:
        """The holder gives the object to the one who had it before."""
        r = self.scene.other(g)
        kind = self.random()
        pattern = "give_back" if kind < 0.5 else "give_then" if kind < 0.65 else "give_adverb" if kind < 0.8 else "give"
        if kind > 0.9 and self.last_thing is o:
            pattern = "give_it"
        self.say(pattern, g=g, r=r, o=o)
        self.owned(o, r)
        self.after_gift(o, g)

    def after_gift(self, o: Thing, g: Character) -> None:
        """The one who got the object (and has it) says thanks or uses it."""
        r = self.scene.other(g)
        kind = self.random()
        if kind < 0.2:
            self.say("thank", x=r, y=g)
        elif kind < 0.5:
            self.say("thank_for", x=r, y=g, o=o)
        elif kind < 0.62:
            self.say("thank_quote", x=r, y=g)
            if self.chance(0.5):
                self.say("reply", x=r, y=g)
        elif kind < 0.7:
            self.say("feel", x=r, f=self.pick(PROUD))
        elif kind < 0.78 and self.unambiguous(r):
            why = self.pick(("feel_has", "feel_likes"))
            self.say(why, x=r, o=o, f=self.pick(GLAD))
        elif kind < 0.84 and "say_like" not in self.told:
            self.say("say_like", x=r, o=o)
        elif kind < 0.95:
            self.say("use_" + o.kind, x=r, o=o)

    # beats

    def beat(self) -> None:
        """One more thing happens."""
        room = ROOMY - self.n_words
        o = self.pick(self.things) if self.things else None
        kind = self.random()
        if o is None:
            self.another_gift() if len(self.holder) < 3 and room > 25 else self.remark()
        elif kind < 0.25:
            self.ask_and_give(o)
        elif kind < 0.4 and room > 42:
            self.lose_and_find(o)
        elif kind < 0.5 and room > 42 and o.noun in BREAKABLE:
            self.break_and_mend(o)
        elif kind < 0.57:
            self.talk_about(o)
        elif kind < 0.62:
            self.use_together(o)
        elif kind < 0.78:
            self.give(o, self.owner(o))
        elif kind < 0.9 and len(self.holder) < 3 and room > 25:
            self.another_gift()
        else:
            self.remark()

    def another_gift(self) -> None:
        if self.chance(0.4):
            self.give_new()
        else:
            g, o = self.have()
            self.give(o, g)

    def ask_and_give(self, o: Thing) -> None:
        """The other asks for the object and gets it; each way of asking once in a story."""
        g = self.owner(o)
        r = self.scene.other(g)
        ways = [way for way in ("ask_for", "ask_quote", "say_want") if way not in self.told]
        if not self.unambiguous(r) and "say_want" in ways:
            ways.remove("say_want")
        if not ways or self.holder[o.noun] is None:
            self.remark()
            return
        way = self.pick(ways)
        self.say(way, x=r, y=g, o=o)
        if way == "ask_quote" and self.chance(0.5):
            self.say("answer_yes", x=r, y=g)
        if self.chance(0.25):
            self.say("give_so", g=g, r=r, o=o)
            self.owned(o, r)
            self.after_gift(o, g)
        else:
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
            self.say("take", y=y, o=o)
        self.holder[o.noun] = y
        self.give_back(o, y)

    def break_and_mend(self, o: Thing) -> None:
        x = self.owner(o)
        y = self.scene.other(x)
        self.say("breaks", o=o)
        if self.chance(0.5):
            self.say("feel", x=x, f=self.pick(SAD))
        self.say(self.pick(("give", "give_then")), g=x, r=y, o=o)
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
            self.say("share_food", x=x, o=o)
            self.things.remove(o)
        elif o.kind in ("ball", "toy") and "play_with" not in self.told:
            self.say("play_with", x=x, o=o)
        elif o.noun in SMALL and self.chance(0.6) and "bag" not in self.told:
            self.say("bag", x=x, o=o)
        else:
            self.say("use_" + o.kind, x=x, o=o)

    def remark(self) -> None:
        """A sentence that changes nothing: what they see, do or feel; no kind twice in a story."""
        x, y, place = self.scene
        one = self.pick((x, y))
        options = [
            "fun",
            "game",
            "walk",
            "glad_together",
            "smile",
            "like_place",
            "animal" if place.outdoors else "place_is",
        ]
        if self.unambiguous(one):
            options += ["feel_place", "say_need"]
        options = [pattern for pattern in options if pattern not in self.told]
        pattern = self.pick(options) if options else "smile"
        feeling = self.pick(NEEDY if pattern == "say_need" else GLAD)
        self.say(pattern, x=one, p=place, n=self.pick(ANIMALS), f=feeling)
