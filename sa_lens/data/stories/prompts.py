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
from typing import Literal, NamedTuple

from sa_lens.data.stories.patterns import sentences
from sa_lens.data.stories.words import GLAD, KIND_OF, NAMES, NEEDY, PLACES, Entity, Place, character, thing

Task = Literal["ioi", "pronoun", "object", "repeated"]

# x y g r p o q f are the variables of the patterns; the value names the slot of the prompt that fills it
_PAIR = {"x": "first", "y": "second", "p": "place", "o": "object"}
_GIVE = {"g": "subject", "r": "other", "o": "object"}
_Step = tuple[str, dict[str, str]]
_GO: tuple[_Step, ...] = (("go", _PAIR), ("at", _PAIR))
_FILLERS: tuple[_Step, ...] = tuple(
    (pattern, {"x": "first", "p": "place", "f": "feeling"}) for pattern in ("fun", "game", "walk", "glad_together")
)
_GIVE_NEW: tuple[_Step, ...] = (("give_new", _GIVE), ("give_decide_new", _GIVE), ("give", _GIVE))
_GIVE_OLD: tuple[_Step, ...] = (("give", _GIVE), ("give_adverb", _GIVE), ("give_then", _GIVE), ("give_decide", _GIVE))
_WHY = {"x": "subject", "p": "place", "o": "object", "f": "feeling"}
_NEED = {"x": "subject", "f": "need"}
_TWO: tuple[_Step, ...] = (("intro_two", _PAIR),)
_AGAIN = {**_PAIR, "x": "subject"}
_ASK = {"x": "subject", "y": "other", "o": "object"}
_THANKS: tuple[_Step, ...] = (("thank_for", {"x": "other", "y": "subject", "o": "object"}),)


class _Recipe(NamedTuple):
    name: str
    steps: tuple[tuple[_Step, ...], ...]
    """For each sentence in turn the patterns it may have."""
    cut: tuple[str, str]
    """Variable and form of the slot of the last sentence that the prompt ends before."""
    subject: tuple[str, ...] = ("first", "second")
    """Which of the two can be the subject."""


_ALONE: tuple[_Step, ...] = (("go_alone", {"x": "subject", "p": "place"}),)
_EACH = {"x": "first", "y": "second"}
_RECIPES: dict[Task, tuple[_Recipe, ...]] = {
    "ioi": (
        _Recipe("go-give", (_GO, _GIVE_NEW), ("r", "name")),
        _Recipe("go-filler-give", (_GO, _FILLERS, _GIVE_NEW), ("r", "name")),
        _Recipe("weather-go-give", ((("weather", {}),), (("go_plain", _PAIR),), _GIVE_NEW), ("r", "name")),
        _Recipe("two-go-give", (_TWO, _GO, _GIVE_NEW), ("r", "name")),
        _Recipe("carry-give", ((("carry", _PAIR),), _GIVE_OLD), ("r", "name")),
        _Recipe("when-give", ((("give_when", {**_PAIR, **_GIVE}), ("give_after", {**_PAIR, **_GIVE})),), ("r", "name")),
    ),
    "pronoun": (
        _Recipe("alone-because", (_ALONE, (("feel_place", _WHY), ("feel_has_new", _WHY))), ("x", "he")),
        _Recipe("alone-said", (_ALONE, (("say_need", _NEED),)), ("x", "he")),
        _Recipe("go-because", (_GO, (("feel_place", _WHY), ("feel_has_new", _WHY))), ("x", "he")),
        _Recipe("go-said", (_GO, (("say_need", _NEED),)), ("x", "he")),
    ),
    "object": (
        _Recipe("give-thank", (_GO, _GIVE_NEW[:2], _THANKS), ("o", "the")),
        _Recipe("give-ask", (_GO, _GIVE_NEW[:2], (("ask_for", _ASK),)), ("o", "the")),
        _Recipe("give-show", (_GO, _GIVE_NEW[:2], (("show", {**_GIVE, "g": "other", "r": "subject"}),)), ("o", "the")),
        _Recipe(
            "first-has-thank",
            (_GO, (("have_each", {**_EACH, "o": "object", "q": "distractor"}),), _GIVE_OLD, _THANKS),
            ("o", "the"),
            ("first",),
        ),
        _Recipe(
            "second-has-thank",
            (_GO, (("have_each", {**_EACH, "o": "distractor", "q": "object"}),), _GIVE_OLD, _THANKS),
            ("o", "the"),
            ("second",),
        ),
    ),
    "repeated": (
        _Recipe("two-go", (_TWO, (("go", _AGAIN), ("at", _AGAIN))), ("y", "name"), ("first",)),
        _Recipe("two-like-go", (_TWO, (("intro_two_like", _PAIR),), (("go", _AGAIN),)), ("y", "name"), ("first",)),
        _Recipe("go-filler-home", (_GO, _FILLERS, (("go_home", _AGAIN),)), ("y", "name"), ("first",)),
    ),
}

TASKS: tuple[Task, ...] = ("ioi", "pronoun", "object", "repeated")
"""Indirect object, gender of a pronoun, object recall, repeated name."""

TEMPLATES_PER_RECIPE = 12
_WORD = re.compile(r"[A-Za-z]+|[.,!?\"]")


class PromptTemplate(NamedTuple):
    """A prompt with slots for names, place, objects and feeling."""

    name: str
    """Recipe and number; the same in every version of the grammar's random choices."""
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
def prompt_templates(task: Task) -> tuple[PromptTemplate, ...]:
    """The templates of a task, up to `TEMPLATES_PER_RECIPE` of each recipe, always the same ones.

    Raises:
        ValueError: unknown task.
    """
    if task not in _RECIPES:
        raise ValueError(f"task={task!r} is not one of {', '.join(TASKS)}")
    templates = []
    for recipe in _RECIPES[task]:
        rng = random.Random(recipe.name)
        texts: dict[str, None] = {}
        # 8 draws a template: enough to meet every text of a recipe that has fewer
        for _ in range(8 * TEMPLATES_PER_RECIPE):
            texts[_draw_text(recipe, rng)] = None
        kept = list(texts)[:TEMPLATES_PER_RECIPE]
        templates += [PromptTemplate(f"{recipe.name}-{i}", task, text, recipe.subject) for i, text in enumerate(kept)]
    return tuple(templates)


def _draw_text(recipe: _Recipe, rng: random.Random) -> str:
    text = ""
    for index, options in enumerate(recipe.steps):
        pattern, slots = rng.choice(options)
        variable, form = recipe.cut
        choices = sentences()[pattern][0]
        last = index == len(recipe.steps) - 1
        if last:
            choices = tuple(s for s in choices if any((p.var, p.text) == recipe.cut for p in s.pieces))
        for piece in rng.choice(choices).pieces:
            if last and (piece.var, piece.text) == (variable, form):
                return text + "the" if form == "the" else text.rstrip()
            if piece.role == "group" or not piece.var:
                text += piece.text
            else:
                text += f"{{{slots[piece.var]}.{piece.text}}}"
        text += " "
    raise AssertionError(f"recipe {recipe.name!r} has no {recipe.cut} in its last sentence")


def draw_prompts(
    task: Task,
    n: int,
    *,
    seed: int = 0,
    pairs: Collection[frozenset[str]] | None = None,
    templates: Sequence[PromptTemplate] | None = None,
) -> list[Prompt]:
    """Draws n different prompts of a task, templates and orders equally often on average.

    Args:
        task: One of `TASKS`.
        n: Number of prompts.
        seed: Any integer.
        pairs: Pairs of names to use, for example `held_out_pairs()`; None: any two names.
        templates: Templates to use, for example those of one length; None: all of the task.

    Raises:
        ValueError: unknown task, no template, a template of another task, or fewer than n different prompts.
    """
    templates = prompt_templates(task) if templates is None else templates
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
    for _ in range(20 * n + 100):
        if len(drawn) == n:
            break
        prompt = _draw(rng, rng.choice(templates), rng.choice(names))
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
        answer, wrong = other, subject
    order = ("ABBA" if subject == second else "BABA") if template.task == "ioi" else ""
    return Prompt(template.fill(**clean), template.fill(**corrupt), f" {answer}", f" {wrong}", template.name, order)
