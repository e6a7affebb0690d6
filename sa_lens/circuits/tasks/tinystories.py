"""Prompts in the words of TinyStories, from templates.

A template is a format string with the slots {first} and {second} (the two names in order of mention), {subject} (the
one of them who acts), {other}, {place}, {object} (with its article: "a ball") and {noun} (without). A prompt never
begins with a name, so that names have a leading space like the answers.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence

from sa_lens.drafts import Draft

GIRLS = (
    *("Lily", "Lucy", "Anna", "Mia", "Sara", "Sarah", "Amy", "Jane", "Emma", "Sue", "Mary", "Molly", "Daisy", "Rose"),
    *("Jill", "Kate", "Jenny", "Ellie", "Bella", "Susan", "Grace", "Sally", "Emily", "Annie"),
)
BOYS = (
    *("Tom", "Tim", "Ben", "Max", "Sam", "Jack", "Bob", "Billy", "Jimmy", "Joe", "Mike", "Mark", "John", "Peter"),
    *("Fred", "Danny", "Alex", "Johnny", "Jim", "Leo", "Adam", "Pete", "Toby", "Harry"),
)
NAMES = GIRLS + BOYS
"""Common names of TinyStories; each is one token of GPT-2's tokenizer."""
PLACES = (
    *("park", "school", "beach", "farm", "zoo", "lake", "river", "garden", "forest", "house", "store", "shop"),
    *("library", "market", "hospital", "museum"),
)
OBJECTS = (
    *("ball", "book", "toy", "cake", "flower", "hat", "box", "car", "doll", "cookie", "stick", "card", "cup", "coat"),
    *("key", "leaf", "map", "ring", "drum", "bell", "rope", "shell", "ribbon", "boat"),
)

_TOGETHER = (
    "One day, {first} and {second} went to the {place}.",
    "Then, {first} and {second} played at the {place}.",
    "Once, {first} and {second} had a lot of fun at the {place}.",
)
TEMPLATES: dict[str, tuple[str, ...]] = {
    "ioi": (
        "One day, {first} and {second} went to the {place}. {subject} gave {object} to",
        "Then, {first} and {second} had a lot of fun at the {place}. {subject} gave {object} to",
        "When {first} and {second} got {object} at the {place}, {subject} decided to give it to",
        "After {first} and {second} went to the {place}, {subject} gave {object} to",
        "While {first} and {second} were at the {place}, {subject} showed {object} to",
        "Then, {first} and {second} had a long talk, and afterwards {subject} said to",
    ),
    "pronoun": (
        "One day, {subject} went to the {place}. {subject} was happy because",
        "One day, {subject} found {object} at the {place}. {subject} was so happy that",
        "Once upon a time, {subject} lived near the {place}. Every day,",
        "One day, {subject} had {object}. {subject} took it to the {place} and",
    ),
    "object": tuple(
        f"{start} {{subject}} {verb} {{object}} to {{other}}. {end} the"
        for start in _TOGETHER
        for verb in ("gave", "showed")
        for end in ("{other} was happy and took", "{other} said thank you for")
    ),
    "repeated": tuple(
        f"{start} {end}"
        for start in _TOGETHER
        for end in ("They were very happy. Then {subject} and", "In the evening, {subject} and")
    ),
}
"""Templates of each task."""

_NEEDED = {
    "ioi": {"first", "second", "subject"},
    "pronoun": {"subject"},
    "object": {"object"},
    "repeated": {"first", "second", "subject"},
}
_SLOTS = ("first", "second", "subject", "other", "place", "object", "noun")


def check_template(task: str, template: str) -> None:
    """Checks the slots of a template.

    Raises:
        ValueError: a slot is unknown or missing.
    """
    slots = set(re.findall(r"\{(.*?)\}", template))
    unknown, missing = sorted(slots - set(_SLOTS)), sorted(_NEEDED[task] - slots)
    if unknown or missing:
        problem = f"unknown slot {{{unknown[0]}}}" if unknown else f"no slot {{{missing[0]}}}"
        raise ValueError(f"template {template!r} of {task}: {problem}; slots are {', '.join(_SLOTS)}")


def drafts(
    task: str, seed: int, names: Sequence[str], templates: Sequence[str], tries: int, genders: Mapping[str, str]
) -> Iterator[Draft]:
    """Yields drafts of a task that use the templates in turn and both orders of the names equally often.

    The corrupt prompt has other names (in object recall another object), none of which is in the clean one.

    Args:
        genders: `girl` or `boy` for each name that the pronoun task may use.
    """
    rng = random.Random(f"{task}/{seed}")
    for i in range(tries):
        template = templates[i % len(templates)]
        swap = (i // len(templates)) % 2 == 1
        first, second, *fresh = rng.sample(list(names), 5)
        noun, wrong_noun = rng.sample(OBJECTS, 2)
        subject, other = (first, second) if swap or task == "repeated" else (second, first)
        place = rng.choice(PLACES)
        clean = _slots(first, second, subject, other, place, noun)
        if task == "object":
            corrupt = _slots(first, second, subject, other, place, wrong_noun)
            answer, wrong = noun, wrong_noun
        elif task == "pronoun":
            fresh[0] = rng.choice([name for name in genders if genders[name] != genders[subject]])
            corrupt = _slots(first, second, fresh[0], other, place, noun)
            answer, wrong = ("she", "he") if genders[subject] == "girl" else ("he", "she")
        else:
            corrupt = _slots(fresh[0], fresh[1], fresh[2], other, place, noun)
            answer, wrong = other, subject
        yield Draft(template.format(**clean), template.format(**corrupt), f" {answer}", f" {wrong}")


def _slots(first: str, second: str, subject: str, other: str, place: str, noun: str) -> dict[str, str]:
    article = "an" if noun[0] in "aeiou" else "a"
    people = {"first": first, "second": second, "subject": subject, "other": other}
    return {**people, "place": place, "object": f"{article} {noun}", "noun": noun}
