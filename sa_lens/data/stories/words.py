"""The words of the generated stories: names, objects, places, feelings, and the part of speech of everything else.

Entities are NamedTuples whose fields are the surface forms that a sentence pattern may ask for (`{x.he}`, `{o.a}`), so
a pattern is filled by `str.format` alone. No plural objects: `it` always agrees.
"""

from __future__ import annotations

import itertools
import random
from functools import cache
from typing import Literal, NamedTuple

Gender = Literal["girl", "boy"]

_GIRLS = "Lily Anna Mia Lucy Emma Sarah Zoe Amy Kate Nina Ella Molly Jane Lisa Maria Mary Sophie Alice Julia Nora"
_BOYS = "Tom Ben Sam Tim Leo Dan Joe Fred Peter Paul Adam David Oscar Henry Simon Max Felix Jack Oliver John"

NAMES: dict[str, Gender] = {**dict.fromkeys(_GIRLS.split(), "girl"), **dict.fromkeys(_BOYS.split(), "boy")}
"""Every name with its gender. None of them is also a common word, and each is one word, so prompts stay aligned."""


class Character(NamedTuple):
    """A named character and the words that can stand for it."""

    name: str
    girl: Gender
    he: str
    him: str
    his: str
    I: str = "I"  # noqa: E741
    you: str = "you"


class Thing(NamedTuple):
    """An object; `a` is its first mention (with the adjective, if it has one), `the` every later one."""

    noun: str
    kind: str
    a: str
    the: str
    it: str = "it"


class Place(NamedTuple):
    """A place with its preposition (`at the beach`)."""

    noun: str
    at: str
    outdoors: bool
    sells: bool
    the: str


class Spot(NamedTuple):
    """Where in a place something can lie (`under the bench`)."""

    noun: str
    under: str
    the: str


class Animal(NamedTuple):
    """An animal that walks by; never a character."""

    noun: str


class Feeling(NamedTuple):
    """An adjective of feeling."""

    word: str


Entity = Character | Thing | Place | Spot | Animal | Feeling


@cache
def character(name: str) -> Character:
    """The character of that name."""
    if NAMES[name] == "girl":
        return Character(name, "girl", "she", "her", "her")
    return Character(name, "boy", "he", "him", "his")


OBJECTS: dict[str, tuple[str, ...]] = {
    "ball": ("ball", "balloon", "stick", "plane", "basketball"),
    "toy": (
        "kite",
        "doll",
        "drum",
        "truck",
        "robot",
        "boat",
        "train",
        "puzzle",
        "car",
        "wagon",
        "whistle",
        "toy",
        "bike",
    ),
    "food": (
        "apple",
        "cake",
        "cookie",
        "orange",
        "banana",
        "sandwich",
        "pear",
        "muffin",
        "pie",
        "peach",
        "drink",
        "snack",
    ),
    "reading": ("book", "letter", "map", "card", "poem"),
    "clothing": ("hat", "scarf", "coat", "crown", "cap", "ring", "necklace", "watch"),
    "thing": (
        *("cup", "shell", "flower", "box", "key", "lamp", "coin", "basket", "blanket", "umbrella", "bell", "stone"),
        *("feather", "leaf", "brush", "pencil", "bucket", "mirror", "pen", "bottle", "gift", "present", "bag"),
        *("computer", "bone", "picture"),
    ),
}
"""Objects by kind; the kind decides what can be done with one."""

KIND_OF: dict[str, str] = {noun: kind for kind, nouns in OBJECTS.items() for noun in nouns}
BREAKABLE = frozenset(("kite", "doll", "drum", "truck", "robot", "boat", "train", "car", "wagon", "plane", "whistle"))
SMALL = frozenset(("coin", "key", "shell", "stone", "feather", "leaf", "pencil", "brush", "bell"))
ADJECTIVES: dict[str, tuple[str, ...]] = {
    "ball": ("red", "blue", "yellow", "big", "small", "new"),
    "toy": ("red", "blue", "green", "old", "new", "small", "pretty", "tiny"),
    "food": ("big", "small", "sweet", "fresh", "tasty"),
    "reading": ("old", "new", "funny", "pretty"),
    "clothing": ("red", "purple", "warm", "new", "old", "pretty", "shiny"),
    "thing": ("white", "black", "green", "shiny", "old", "little", "pretty", "big"),
}


@cache
def thing(noun: str, adjective: str = "") -> Thing:
    """The object of that noun, its first mention with the adjective."""
    phrase = f"{adjective} {noun}" if adjective else noun
    article = "an" if phrase[0] in "aeiou" else "a"
    return Thing(noun, KIND_OF[noun], f"{article} {phrase}", f"the {noun}")


def _places(at: str, nouns: str, *, outdoors: bool, sells: bool = False) -> list[Place]:
    return [Place(n, at, outdoors, sells, f"the {n}") for n in nouns.split()]


PLACES: tuple[Place, ...] = (
    *_places("in", "park garden forest field yard meadow", outdoors=True),
    *_places("at", "beach zoo farm lake river playground pond fair", outdoors=True),
    *_places("on", "hill", outdoors=True),
    *_places("in", "kitchen library museum barn attic classroom house room", outdoors=False),
    *_places("at", "school station restaurant office hospital", outdoors=False),
    *_places("at", "market", outdoors=True, sells=True),
    *_places("at", "shop store", outdoors=False, sells=True),
)


def _spots(spots: str) -> tuple[Spot, ...]:
    pairs = [spot.split() for spot in spots.split(",")]
    return tuple(Spot(noun, under, f"the {noun}") for under, noun in pairs)


OUTDOOR_SPOTS = _spots(
    "under bench, under tree, behind tree, behind rock, near gate, behind bush, near fence, in grass, behind wall"
)
INDOOR_SPOTS = _spots(
    "under table, behind door, under chair, on shelf, near window, behind curtain, in corner, on floor, behind wall"
)
_ANIMALS = "dog cat bird duck rabbit frog squirrel butterfly fox pony mouse goat turtle"
ANIMALS = tuple(Animal(noun) for noun in _ANIMALS.split())
GLAD = tuple(map(Feeling, ("happy", "glad", "excited", "cheerful", "pleased")))
PROUD = (*GLAD, Feeling("proud"))
SAD = tuple(map(Feeling, ("sad", "upset", "worried", "unhappy")))
NEEDY = tuple(map(Feeling, ("hungry", "tired", "thirsty", "cold", "sleepy")))

PART_OF_SPEECH: dict[str, str] = {
    word: tag
    for tag, words in {
        "DET": "a the every that both another all some no",
        "PRON": "it everyone there",
        "ADP": "to in at on near with for of from upon after about until next",
        "AUX": "was were can could had did will",
        "VERB": (
            "went walked ran met played sat lived loved liked held holding brought carried found saw bought took "
            "gave handed passed lent offered decided give wanted threw showed read said told asked thanked tried "
            "put looked lost dropped find help fixed broke felt play sing dance draw swim shared ate sang danced "
            "laughed talked jumped smiled waved dreamed slept learned named picked have see hold like love thank "
            "came come go visited invited got made sent sold kicked stood stopped turned knew thought helped "
            "rested working thinking going playing walking sitting talking smiling laughing rolled pass keep "
            "bring called hugged followed listened offer drank started chose show get"
        ),
        "NOUN": (
            "hand day morning afternoon evening night time friend friends children house sun sky wind birds lunch "
            "school end game song story fun lot way dinner breakfast week flowers people talk water milk bottle "
            "glass kiss hug pocket bread work something"
        ),
        "SCONJ": "while when because where as",
        "ADJ": (
            "sunny warm bright windy cool lovely little young kind clever brave small big white good best blue "
            "soft brown funny wonderful great beautiful gone broken welcome quiet long sad late tired last nice "
            "happy"
        ),
        "ADV": (
            "once together outside then so later soon very kindly quickly gently happily slowly carefully too "
            "again suddenly ago back well please over now also everywhere yesterday today just finally first "
            "still afterwards"
        ),
        "CCONJ": "and but",
        "NUM": "one two",
        "INTJ": "yes hello look",
    }.items()
    for word in words.split()
}
"""Universal part of speech of the fixed words of the patterns, where a template gives none as `word/TAG`."""

PARTS_OF_SPEECH = (
    *("NOUN", "PROPN", "PRON", "VERB", "AUX", "ADJ", "ADV", "ADP", "DET", "CCONJ", "SCONJ", "PART", "NUM", "INTJ"),
    "PUNCT",
)


def held_out_pairs(seed: int = 0, share: float = 0.2) -> frozenset[frozenset[str]]:
    """Pairs of names that no generated story holds together, in either order: a random `share` of all pairs.

    Raises:
        ValueError: share outside [0, 0.5].
    """
    if not 0 <= share <= 0.5:
        raise ValueError(f"share={share} of held-out name pairs must lie between 0 and 0.5")
    pairs = [frozenset(pair) for pair in itertools.combinations(NAMES, 2)]
    random.Random(seed).shuffle(pairs)
    return frozenset(pairs[: round(share * len(pairs))])
