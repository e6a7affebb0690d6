"""Prompts that end just before a word that the story decides, cut from the same sentence patterns as the stories.

A task is a list of recipes: sentence patterns in the order in which stories use them, and the word to cut before. A
clean and its corrupt prompt share template, place and length. The corrupt one has three other names (IOI, repeated
name), other names of the other gender (pronoun), or the same names and other objects (object recall).
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Collection, Sequence
from functools import cache
from typing import NamedTuple, get_args

from sa_lens.config import Patterns, Task
from sa_lens.data.stories.grammar import CHARACTERS, OBJECTS, draw, spelled
from sa_lens.data.stories.patterns import trees
from sa_lens.data.stories.words import GLAD, KIND_OF, NAMES, NEEDY, PLACES, Entity, Place, character, thing


class _Step(NamedTuple):
    """One sentence of a prompt: patterns to choose from, and the slot of the prompt that fills each variable."""

    patterns: str
    slots: dict[str, str]


def _step(patterns: str, **slots: str) -> _Step:
    return _Step(patterns, {"p": "place", "o": "object", "f": "feeling", **slots})


_EACH = {"x": "first", "y": "second"}
_TURN = {"g": "subject", "r": "other"}
_BACK = {"g": "other", "r": "subject"}
# the two come in
_TWO = _step("intro_two", **_EACH)
_GO = _step("go", **_EACH)
_STRANGE_GO = _step("held_out_meeting", **_EACH)
_ALONE = _step("go_alone", x="first")
_MEET = _step("meet", **_EACH)
# what changes nothing
_FUN = _step("fun place_is like_place", **_EACH)
_ONE = _step("smile like_place", x="other")
_TURNS = _step("greet", **_TURN)
_TURNS_BACK = _step("greet", **_BACK)
# one gives
_GIVE = _step("give give give give_new lend", **_EACH, **_TURN)
_GIVE_OLD = _step("give", **_EACH, **_TURN)
_MEET_AND_GIVE = _step("give_meeting", **_EACH, **_TURN)
_STRANGE_GIVE = _step("held_out_give", **_EACH, **_TURN)
_OTHER_HAS = _step("have", x="other", o="distractor")


class _Recipe(NamedTuple):
    name: str
    steps: tuple[_Step, ...]
    cut: str
    """Variable and form of the slot of the last sentence that the prompt ends before."""
    subject: tuple[str, ...] = ("first", "second")
    """Which of the two can be the subject."""


_WHY = _step("feel_place feel_has_new", x="subject", y="other")
_NEED = _step("say_need", x="subject", y="other", f="need")
_STRANGE_PRONOUN = _step("held_out_pronoun", x="subject", y="other")
_THANK = _step("thank_for", x="other", y="subject")
_USE = _step("use_thing use_toy feel_likes feel_has lose dream", x="other", y="subject")
_ASK = _step("ask_for", x="subject", y="other")
_AGAIN = _step("go_home best_friends good_day fun from_then", x="subject", y="other")
_NEXT = _step("next_day", x="subject", y="other")
_STRANGE_AGAIN = _step("held_out_again", x="subject", y="other")

_RECIPES: dict[Patterns, dict[Task, tuple[_Recipe, ...]]] = {
    "seen": {
        "ioi": (
            _Recipe("go-give", (_GO, _GIVE), "r.name"),
            _Recipe("go-filler-give", (_GO, _FUN, _GIVE), "r.name"),
            _Recipe("go-other-give", (_GO, _ONE, _GIVE), "r.name"),
            _Recipe("go-turn-give", (_GO, _TURNS_BACK, _GIVE), "r.name"),
            _Recipe("go-filler-other-give", (_GO, _FUN, _ONE, _GIVE), "r.name"),
            _Recipe("two-go-give", (_TWO, _GO, _GIVE), "r.name"),
            _Recipe("two-give", (_TWO, _GIVE), "r.name"),
            _Recipe("alone-meet-give", (_ALONE, _MEET, _GIVE), "r.name"),
            _Recipe("carry-give", (_step("carry", **_EACH), _GIVE_OLD), "r.name"),
            _Recipe("have-give", (_GO, _step("have", x="subject"), _GIVE_OLD), "r.name"),
            _Recipe("when-give", (_MEET_AND_GIVE,), "r.name"),
            _Recipe("go-turn", (_GO, _TURNS), "r.name"),
            _Recipe("go-show", (_GO, _step("show", **_TURN)), "r.name"),
        ),
        "pronoun": (
            _Recipe("alone-because", (_step("go_alone", x="subject"), _WHY), "x.he"),
            _Recipe("alone-said", (_step("go_alone", x="subject"), _NEED), "x.he"),
            _Recipe("go-because", (_GO, _WHY), "x.he"),
            _Recipe("go-said", (_GO, _NEED), "x.he"),
            _Recipe("go-filler-because", (_GO, _ONE, _WHY), "x.he"),
        ),
        "object": (
            _Recipe("give-thank", (_GO, _GIVE, _THANK), "o.the"),
            _Recipe("give-ask", (_GO, _GIVE, _ASK), "o.the"),
            _Recipe("give-use", (_GO, _GIVE, _USE), "o.the"),
            _Recipe("give-show", (_GO, _GIVE, _step("show", **_BACK)), "o.the"),
            _Recipe("give-filler-thank", (_GO, _GIVE, _ONE, _THANK), "o.the"),
            _Recipe("other-has-thank", (_GO, _OTHER_HAS, _GIVE, _THANK), "o.the"),
            _Recipe(
                "first-has-thank",
                (_GO, _step("have_each", **_EACH, q="distractor"), _GIVE_OLD, _THANK),
                "o.the",
                ("first",),
            ),
            _Recipe(
                "second-has-thank",
                (_GO, _step("have_each", **_EACH, o="distractor", q="object"), _GIVE_OLD, _THANK),
                "o.the",
                ("second",),
            ),
        ),
        "repeated": (
            _Recipe("two-go", (_TWO, _step("go", x="subject", y="other")), "y.name"),
            _Recipe("two-like-go", (_TWO, _FUN, _step("go", x="subject", y="other")), "y.name"),
            _Recipe("go-filler-home", (_GO, _FUN, _AGAIN), "y.name"),
            _Recipe("go-other-home", (_GO, _ONE, _AGAIN), "y.name"),
            _Recipe("alone-meet-home", (_ALONE, _MEET, _AGAIN), "y.name"),
            _Recipe("go-next", (_GO, _FUN, _NEXT), "y.name"),
        ),
    },
    "held-out": {
        "ioi": (
            _Recipe("new-go-give", (_STRANGE_GO, _GIVE), "r.name"),
            _Recipe("go-new-give", (_GO, _STRANGE_GIVE), "r.name"),
            _Recipe("new-go-new-give", (_STRANGE_GO, _STRANGE_GIVE), "r.name"),
        ),
        "pronoun": (
            _Recipe("alone-new-why", (_step("go_alone", x="subject"), _STRANGE_PRONOUN), "x.he"),
            _Recipe("go-new-why", (_GO, _STRANGE_PRONOUN), "x.he"),
            _Recipe("new-go-why", (_STRANGE_GO, _WHY), "x.he"),
        ),
        "object": (
            _Recipe("new-give-thank", (_GO, _STRANGE_GIVE, _THANK), "o.the"),
            _Recipe("give-new-use", (_GO, _GIVE, _step("held_out_object", **_TURN)), "o.the"),
        ),
        "repeated": (
            _Recipe("new-go-home", (_STRANGE_GO, _AGAIN), "y.name"),
            _Recipe("go-new-home", (_GO, _STRANGE_AGAIN), "y.name"),
            _Recipe("two-new-home", (_TWO, _STRANGE_AGAIN), "y.name"),
        ),
    },
}

TASKS: tuple[Task, ...] = get_args(Task)
"""Indirect object, gender of a pronoun, object recall, repeated name."""

TEMPLATES_PER_RECIPE, MOST_WORDS = 12, 40
"""Templates made of each recipe, and the words and marks of the longest: small models have short contexts."""
_WORD = re.compile(r"'s|[A-Za-z]+|[.,!?\"]")


class PromptTemplate(NamedTuple):
    """A prompt with slots for names, place, objects and feeling."""

    name: str
    """Recipe and number."""
    task: Task
    text: str
    """For `str.format` with entities; `fill` takes plain words. The answer is the next word."""
    subject: tuple[str, ...]
    """Which of `first` and `second` the subject can be; both: the other one is the answer of the IOI task."""

    @property
    def slots(self) -> tuple[str, ...]:
        """Names of the slots: first, second, subject, other (names), place, object, distractor, feeling, need."""
        return tuple(dict.fromkeys(re.findall(r"\{(\w+)", self.text)))

    @property
    def n_words(self) -> int:
        """Words and punctuation marks; the number of tokens where each of them is one token."""
        sample = {"place": PLACES[0].noun, "object": "ball", "distractor": "kite", "feeling": "happy", "need": "cold"}
        return len(_WORD.findall(self.fill(**{slot: sample.get(slot, "Tom") for slot in self.slots})))

    def fill(self, **words: str) -> str:
        """The prompt with these names, nouns and adjectives; words for slots it does not have are ignored.

        Raises:
            ValueError: a slot without a word, or a word that the stories do not have.
        """
        missing = [slot for slot in self.slots if slot not in words]
        if missing:
            raise ValueError(f"template {self.name!r} needs a word for {', '.join(missing)}")
        return self.text.format(**{slot: _entity(slot, words[slot]) for slot in self.slots})


class Prompt(NamedTuple):
    """A clean prompt and its corrupt one, with the next word of the clean one and a wrong one."""

    clean: str
    corrupt: str
    answer: str
    """With its leading space."""
    wrong: str
    """With its leading space: the other name, the other pronoun, another object."""
    template: str
    """Name of the template."""
    order: str
    """For IOI `ABBA` (the first of the pair receives) or `BABA`; otherwise empty."""


_PLACE_OF: dict[str, Place] = {place.noun: place for place in PLACES}
_FEELING_OF = {feeling.word: feeling for feeling in (*GLAD, *NEEDY)}


def _entity(slot: str, word: str) -> Entity:
    known: Collection[str]
    if slot == "place":
        known = _PLACE_OF
    elif slot in ("object", "distractor"):
        known = KIND_OF
    elif slot in ("feeling", "need"):
        known = _FEELING_OF
    else:
        known = NAMES
    if word not in known:
        raise ValueError(f"{slot}={word!r} is not a word of the stories; known: {', '.join(sorted(known))}")
    if slot == "place":
        return _PLACE_OF[word]
    if slot in ("object", "distractor"):
        return thing(word)
    return _FEELING_OF[word] if slot in ("feeling", "need") else character(word)


@cache
def prompt_templates(task: Task, patterns: Patterns = "seen") -> tuple[PromptTemplate, ...]:
    """The templates of a task, up to `TEMPLATES_PER_RECIPE` of each recipe, always the same ones.

    Args:
        task: One of `TASKS`.
        patterns: `seen`: of sentences that stories have; `held-out`: one sentence or more that no story has.

    Raises:
        ValueError: unknown task or patterns.
    """
    if task not in TASKS:
        raise ValueError(f"task={task!r} is not one of {', '.join(TASKS)}")
    if patterns not in _RECIPES:
        raise ValueError(f"patterns={patterns!r} must be {' or '.join(map(repr, _RECIPES))}")
    templates = []
    for recipe in _RECIPES[patterns][task]:
        rng = random.Random(recipe.name)
        texts: dict[str, None] = {}
        # most draws of some recipes are no prompt: the name to cut before is missing, or a pronoun gives it away
        for _ in range(200 * TEMPLATES_PER_RECIPE):
            text = _draw_text(task, recipe, rng)
            if text:
                texts[text] = None
            if len(texts) == TEMPLATES_PER_RECIPE:
                break
        templates += [PromptTemplate(f"{recipe.name}-{i}", task, text, recipe.subject) for i, text in enumerate(texts)]
    return tuple(templates)


class _Slot:
    """Stands for an entity that is not chosen yet: each form is a field of `str.format`."""

    def __init__(self, slot: str):
        self.slot = slot

    def __getattr__(self, form: str) -> str:
        return f"{{{self.slot}.{form}}}"


def _draw_text(task: Task, recipe: _Recipe, rng: random.Random) -> str:
    """The text of a template; empty if what was drawn is no prompt of the task."""
    sentences: list[str] = []
    mentioned: set[str] = set()
    definite = task == "ioi" and rng.random() < 0.3
    variable, form = recipe.cut.split(".")
    for index, (names, slots) in enumerate(recipe.steps):
        pattern = rng.choice(names.split())
        pieces = draw(rng.choice(trees(pattern)), rng.random)
        if index == len(recipe.steps) - 1:
            cuts = [i for i, piece in enumerate(pieces) if (piece.var, piece.text) == (variable, form)]
            if not cuts:
                return ""
            pieces = pieces[: cuts[0] if task == "pronoun" else cuts[-1]]
            people = [slots.get(piece.var) for piece in pieces if piece.var and piece.var in CHARACTERS]
            if task != "object" and people[-1:] != ["subject"]:
                return ""
            if task == "repeated" and pieces[-1].text not in ("and", "friend"):
                return ""
        for i, piece in enumerate(pieces):
            slot = slots.get(piece.var, "")
            if piece.var and not slot:
                return ""
            if piece.var and piece.var in CHARACTERS and piece.text != "name" and task != "object":
                return ""
            if piece.var and piece.var in OBJECTS and slot not in mentioned:
                mentioned.add(slot)
                if not (definite and pattern == "give"):
                    pieces[i] = piece._replace(text="a")
        sentences.append(spelled(pieces, {var: _Slot(slot) for var, slot in slots.items()}))
    text = " ".join(sentences) + (" the" if task == "object" else "")
    # the slots of one word, then those of an article and a noun: both of their names count
    if len(_WORD.findall(re.sub(r"\{\w+\.(?!the|a\b)\w+\}", "word", text))) > MOST_WORDS:
        return ""
    # what stands for `the ball` or `she` cannot be given a capital letter
    return "" if re.search(r'(^|[.!?] )"?\{\w+\.(?!name)', text) else text


def draw_prompts(
    task: Task,
    n: int,
    *,
    seed: int = 0,
    pairs: Collection[frozenset[str]] | None = None,
    patterns: Patterns = "seen",
    templates: Sequence[PromptTemplate] | None = None,
) -> list[Prompt]:
    """Draws n different prompts of a task, templates and orders equally often on average.

    Args:
        task: One of `TASKS`.
        n: Number of prompts.
        seed: Any integer.
        pairs: Pairs of names to use, for example `held_out_pairs()`; None: any two names.
        patterns: Sentences that stories have (`seen`), or at least one that none has (`held-out`).
        templates: Templates to use, for example those of one length; None: all of the task and these patterns.

    Raises:
        ValueError: unknown task, no template, a template of another task, or fewer than n different prompts.
    """
    templates = prompt_templates(task, patterns) if templates is None else templates
    if not templates or any(template.task != task for template in templates):
        raise ValueError(f"templates: give at least one, all of task {task!r} (see prompt_templates)")
    allowed = [frozenset(two) for two in itertools.combinations(NAMES, 2)] if pairs is None else list(pairs)
    # a set's order varies between processes
    names = sorted(tuple(sorted(pair)) for pair in allowed)
    if task == "pronoun":
        names = [pair for pair in names if NAMES[pair[0]] != NAMES[pair[1]]]
    if not names:
        raise ValueError("pairs: no pair of names to draw from" + (" (of different gender)" * (task == "pronoun")))
    rng = random.Random(f"{task}/{seed}")
    drawn: dict[str, Prompt] = {}
    drawn_again = 0
    while len(drawn) < n and drawn_again < 20 * len(drawn) + 100:
        prompt = _draw(rng, rng.choice(templates), rng.choice(names))
        drawn_again += prompt.clean in drawn
        drawn.setdefault(prompt.clean, prompt)
    if len(drawn) < n:
        raise ValueError(f"n={n} prompts: only {len(drawn)} different ones found; give more pairs or templates")
    return list(drawn.values())


def _draw(rng: random.Random, template: PromptTemplate, pair: tuple[str, ...]) -> Prompt:
    first, second = rng.sample(pair, 2)
    subject = first if rng.choice(template.subject) == "first" else second
    other = second if subject == first else first
    nouns = rng.sample(sorted(KIND_OF), 4)
    clean = {
        "first": first,
        "second": second,
        "subject": subject,
        "other": other,
        "place": rng.choice(PLACES).noun,
        "object": nouns[0],
        "distractor": nouns[1],
        "feeling": rng.choice(GLAD).word,
        "need": rng.choice(NEEDY).word,
    }
    corrupt = dict(clean)
    fresh = [name for name in NAMES if name not in pair]
    if template.task == "object":
        corrupt |= {"object": nouns[2], "distractor": nouns[3]}
        wrong = nouns[1] if "distractor" in template.slots else nouns[2]
        answer = nouns[0]
    elif template.task == "pronoun":
        girl = rng.choice([name for name in fresh if NAMES[name] == "girl"])
        boy = rng.choice([name for name in fresh if NAMES[name] == "boy"])
        swapped = {name: boy if NAMES[name] == "girl" else girl for name in pair}
        corrupt |= {slot: swapped[clean[slot]] for slot in ("first", "second", "subject", "other")}
        answer, wrong = character(subject).he, character(corrupt["subject"]).he
    else:
        corrupt |= dict(zip(("first", "second", "subject"), rng.sample(fresh, 3), strict=True))
        corrupt["other"] = corrupt["first" if other == first else "second"]
        answer, wrong = other, subject
    text = template.fill(**clean)
    in_order = sorted((first, second), key=lambda name: text.find(name))
    order = ("ABBA" if subject == in_order[1] else "BABA") if template.task == "ioi" else ""
    return Prompt(text, template.fill(**corrupt), f" {answer}", f" {wrong}", template.name, order)
