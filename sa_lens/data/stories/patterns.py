r"""The sentence patterns of the generated stories, and how a pattern becomes sentences and labels.

A pattern is a few templates. In a template `{g:giver}` is a slot: the variable `g`, in its default form, with the role
`giver`; `{x.he:speaker}` asks for another form (a field of the entity). `[a|b]` is a choice between fixed words,
`{x?:agent}` a subject that may be a pronoun, `{o?}` an object that may be `it`; `to/PART` gives the part of speech of
a word where it differs from the usual one. Variables: x y g r characters, o q objects, p a place, s a spot, n an
animal, f a feeling.

Every name comes after a space (never first in a story or after an opening quote), so that a byte-level tokenizer has
one token for it. After `to` in a giving sentence comes a name and nothing else.
"""

from __future__ import annotations

import itertools
import re
from functools import cache
from typing import NamedTuple

from sa_lens.data.stories.words import (
    ADJECTIVES,
    ANIMALS,
    GLAD,
    INDOOR_SPOTS,
    KIND_OF,
    NAMES,
    NEEDY,
    OUTDOOR_SPOTS,
    PART_OF_SPEECH,
    PARTS_OF_SPEECH,
    PLACES,
    PROUD,
    SAD,
    character,
)

PATTERNS: dict[str, tuple[str, ...]] = {
    # settings and introductions
    "weather": ("It was a [sunny|warm|bright|windy|cool|lovely] [day|morning|afternoon].",),
    "sky": ("The [sun was warm|sky was blue|sun was bright|birds were singing/VERB|wind was soft].",),
    "intro_one": (
        "[Once upon a time|Long ago], there/PRON was a [little|young|kind|clever|brave] {x.girl:protagonist} named "
        "{x:protagonist}.",
    ),
    "intro_home": ("{x.He:agent} lived in a [small|big|little|white] house near {p}.",),
    "intro_likes": ("{x.He:experiencer} [loved|liked] to/PART [play|read|sing|dance|draw|swim] [every day|outside].",),
    "intro_friend": ("{x:agent} had/VERB a [good|best] friend named {y:friend}.",),
    "intro_two": (
        "[Once upon a time|Long ago], there/PRON were two [friends|children|good friends] named {x:member} and "
        "{y:member}.",
    ),
    "intro_two_like": ("{x.They:group} [loved|liked] to/PART [play|read|sing|dance|draw|swim] together.",),
    "go": (
        "[One day|One morning|One afternoon|After lunch|After school], {x:member} and {y:member} "
        "[went|walked|ran] to {p}.",
    ),
    "go_plain": ("{x:member} and {y:member} [went|walked|ran] to {p}.",),
    "at": (
        "[One day|One morning|One afternoon|After lunch|After school], {x:member} and {y:member} "
        "[met|played|were/VERB] {p.at} {p}.",
    ),
    "at_plain": ("{x:member} and {y:member} [met|played|were/VERB] {p.at} {p}.",),
    "carry": ("[One day|One morning|One afternoon|After school], {x:member} and {y:member} took {o.a} to {p}.",),
    "go_alone": ("[One day|One morning|One afternoon|After lunch|After school], {x:agent} [went|walked|ran] to {p}.",),
    "meet": ("{x?:agent} met {y:friend} {p.at} {p}.", "{x?:agent} saw {y:friend} {p.at} {p}."),
    "next_day": ("[The next day|The next morning|Later], {x:member} and {y:member} [went|walked|ran] to {p}.",),
    "meet_new": (
        "[The next day|The next morning|Later], {x:agent} met a {y.girl:friend} named {y:friend} {p.at} {p}.",
    ),
    # in between
    "animal": ("{x.They:group} saw a [small|little|brown|funny|white] {n}.", "A [small|brown] {n} went by/ADV."),
    "fun": ("{x.They:group} had/VERB [a lot of|so much/ADJ] fun.", "{x.They:group} laughed and [danced|sang|jumped]."),
    "game": ("{x.They:group} [played a game|sang a song|told a story|sat down/ADV].",),
    "walk": ("{x.They:group} [walked|talked|played] for a long time.",),
    "glad_together": ("{x.They:group} were [very|so] {f}.",),
    "place_is": ("{p.The} was [big|quiet|beautiful|lovely].",),
    "like_place": ("{x?:experiencer} [liked|loved] {p}.",),
    "hello": ("{g:speaker} [said hello|waved] to {r:listener}.",),
    "smile": ("{x?:agent} [smiled|laughed].", "{x?:agent} was [very|so] {f}."),
    # having and finding things
    "have": ("{x?:owner} [had/VERB|was holding|brought|carried] {o.a}.",),
    "have_each": ("{x:owner} had/VERB {o.a} and {y:owner} had/VERB {q.a}.",),
    "buy": ("{x?:owner} bought {o.a}.",),
    "find_new": ("{x?:finder} found {o.a} {s.under} {s}.", "Then {x:finder} found {o.a} {s.under} {s}."),
    "pick_up": ("{x?:holder} picked up/ADV {o}.",),
    # giving: "to" is followed by the other one's name
    "give": ("{g:giver} [gave|handed|passed|offered] {o} to {r:recipient}.",),
    "give_new": ("{g:giver} [gave|handed|passed|offered] {o.a} to {r:recipient}.",),
    "lend": ("{g:giver} lent {o} to {r:recipient}.",),
    "lend_new": ("{g:giver} lent {o.a} to {r:recipient}.",),
    "give_then": ("[Then|Soon] {g:giver} [gave|handed|passed] {o} to {r:recipient}.",),
    "give_so": ("So {g:giver} [gave|handed|passed] {o} to {r:recipient}.",),
    "give_adverb": ("{g:giver} [kindly|quickly|gently|happily|slowly] [gave|handed|passed] {o} to {r:recipient}.",),
    "give_decide": ("{g:giver} decided to/PART give {o} to {r:recipient}.",),
    "give_decide_new": ("{g:giver} decided to/PART give {o.a} to {r:recipient}.",),
    "give_when": (
        "[When|While] {x:member} and {y:member} were/VERB {p.at} {p}, {g:giver} [gave|handed|passed] {o.a} to "
        "{r:recipient}.",
    ),
    "give_after": (
        "After/SCONJ {x:member} and {y:member} [went|walked|ran] to {p}, {g:giver} [gave|handed|passed] {o.a} to "
        "{r:recipient}.",
    ),
    "want_give": ("{g:owner} wanted to/PART give {o} to {r:listener}.",),
    "give_it": ("Then {g:giver} gave {o.it} to {r:recipient}.", "{g:giver} gave {o.it} to {r:recipient}."),
    "give_back": (
        "{g:giver} [gave|handed|passed] {o} back to {r:recipient}.",
        "Then {g:giver} gave {o} back to {r:recipient}.",
    ),
    "give_pronoun": ("{g.He:giver} [gave|handed|passed] {o} to {r:recipient}.",),
    "give_double": ("{g:giver} gave {r:recipient} {o}.", "{g:giver} gave {r.him:recipient} {o}."),
    "throw": ("{g:giver} threw {o} to {r:recipient}.",),
    "show": ("{g:presenter} showed {o} to {r:viewer}.",),
    "read_to": ("{g:presenter} read {o} to {r:viewer}.",),
    # thanks and speech
    "thank": ("{x:speaker} thanked {y:listener}.", "{x:speaker} smiled and thanked {y:listener}."),
    "thank_for": ("{x:speaker} thanked {y:listener} for {o}.",),
    "thank_quote": ('"Thank {y.you:listener}[| so much/ADV], {y:listener}," said {x:speaker}.',),
    "reply": ('"{x.You:listener} are/VERB welcome," said {y:speaker}.',),
    "say_like": ('"{x.I:speaker} [like|love] {o}," said {x:speaker}.',),
    "say_to": ('{g:speaker} said to {r:listener}, "{g.I:speaker} like {o}."',),
    "ask_like": ('"Do/AUX {y.you:listener} like {o}?" asked {x:speaker}.',),
    "answer_like": ('"Yes, {y.I:speaker} [do/VERB|like {o.it}|love {o.it}]," said {y:speaker}.',),
    "ask_for": ("{x:speaker} asked {y:listener} for {o}.", "{x:speaker} wanted {o}."),
    "ask_quote": ('"Can {x.I:speaker} [have|see|hold] {o}, please?" asked {x:speaker}.',),
    "answer_yes": ('"Yes, {x.you:listener} can," said {y:speaker}.', '"Of course/ADV," said {y:speaker}.'),
    "say_want": ("{x:speaker} said that/SCONJ {x.he:speaker} wanted {o}.",),
    "say_need": ("{x:speaker} said that/SCONJ {x.he:speaker} was [very|so] {f}.",),
    # feelings
    "feel": ("{x?:experiencer} [was|felt] [very|so] {f}.",),
    "feel_has_new": ("{x:experiencer} was {f} because {x.he:owner} had/VERB {o.a}.",),
    "feel_has": ("{x:experiencer} was {f} because {x.he:owner} had/VERB {o}.",),
    "feel_likes": ("{x:experiencer} was {f} because {x.he:experiencer} [liked|loved] {o}.",),
    "feel_place": ("{x:experiencer} was {f} because {x.he:experiencer} [liked|loved] {p}.",),
    "feel_lost": ("{x:experiencer} was {f} because {x.he:loser} had lost {o}.",),
    # using things
    "use_ball": ("{x?:agent} [played with|ran with] {o?}.", "{x?:agent} held {o?} up/ADV."),
    "use_toy": ("{x?:agent} played with {o?}.", "{x?:agent} looked at {o?}."),
    "use_food": ("{x?:agent} looked at {o?}.", "{x?:agent} [liked|loved] {o?}."),
    "use_reading": ("{x?:agent} [read|looked at] {o?}.",),
    "use_clothing": ("{x?:agent} [tried|put] on/ADV {o}.", "{x?:agent} looked at {o?}."),
    "use_thing": ("{x?:agent} [looked at|liked|loved] {o?}.",),
    "bag": ("{x?:agent} put {o?} in {x.his:owner} bag.",),
    "play_with": ("{x.They:group} played with {o?}.", "{x.They:group} played with {o?} for a long time."),
    "share_food": ("{x.They:group} [shared|ate] {o?} together.",),
    # losing, seeking, finding, mending
    "lose": ("[Then|But then|Later], {x:loser} lost {o}.", "Then {x:loser} dropped {o} and {o.it} was gone."),
    "not_find": ("{x?:seeker} [could not/PART find|looked for] {o?}.",),
    "look_for": ("{x.They:group} looked for {o?} [everywhere/ADV|for a long time].",),
    "ask_where": ("{y:speaker} asked {x:listener} where {o} was/VERB.",),
    "tell_lost": (
        '"{x.I:speaker} lost {o}," said {x:speaker}.',
        "{x:speaker} told {y:listener} that/SCONJ {o} was gone.",
    ),
    "offer_help": (
        '"{y.I:speaker} can help {x.you:listener}," said {y:speaker}.',
        '"Do/AUX not/PART be sad," said {y:speaker}.',
    ),
    "find": (
        "[Soon|Then] {y:finder} found {o} {s.under} {s}.",
        "{y:finder} looked {s.under} {s} and found {o}.",
        "{y:finder} found {o?} {s.under} {s}.",
    ),
    "tell_found": ("{y:speaker} told {x:listener} that/SCONJ {o} was {s.under} {s}.",),
    "take": ("[|So ]{y:finder} picked up/ADV {o}.",),
    "breaks": ("[Then|But then|Suddenly,] {o} broke.", "{o.The} was broken."),
    "mend": ("{y?:helper} fixed {o?}.", "{y?:helper} [quickly|carefully|soon] fixed {o?}."),
    # endings
    "go_home": ("[In the evening|At the end of the day|After that/PRON], {x:member} and {y:member} went home/ADV.",),
    "best_friends": ("{x:member} and {y:member} were/VERB [best|good|great] friends.",),
    "good_day": ("It was a [good|great|wonderful|beautiful] day.",),
    "from_then": ("From that day on/ADV, {x.they:group} [played|laughed|sang] together every day.",),
    "dream": ("That night, {x:experiencer} dreamed of {o}.", "That night, {x:experiencer} slept well."),
    "lesson": ("{x.They:group} learned that/SCONJ [sharing/VERB|helping/VERB] is/VERB good.",),
    "happy_end": ("{x.They:group} were [very|so] {f}.",),
}
"""Every sentence pattern by name, with its templates."""

ROLES = (
    *("none", "protagonist", "friend", "member", "group", "agent", "experiencer", "giver", "recipient", "owner"),
    *("holder", "loser", "seeker", "finder", "helper", "presenter", "viewer", "speaker", "listener"),
    *("object", "property", "place", "spot", "animal", "feeling", "action"),
)
REFERENTS = (
    *("none", "character-0", "character-1", "character-2", "group"),
    *("object-0", "object-1", "object-2", "object-3", "place-0", "place-1", "place-2", "spot", "animal"),
)
LABELS: dict[str, tuple[str, ...]] = {
    "role": ROLES,
    "referent": REFERENTS,
    "pattern": tuple(PATTERNS),
    "pos": PARTS_OF_SPEECH,
}
"""Every value that each label of a word can take."""

# default form and role of a variable's slots
_DEFAULTS: dict[str, tuple[str, str]] = {
    **dict.fromkeys("xygr", ("name", "none")),
    **dict.fromkeys("oq", ("the", "object")),
    "p": ("the", "place"),
    "s": ("the", "spot"),
    "n": ("noun", "animal"),
    "f": ("word", "feeling"),
}
# forms that are the same whoever the character is
_FIXED_FORMS = {"They": "They", "they": "they", "You": "You"}
_PIECE = re.compile(
    r"\{(?P<var>\w)(?:\.(?P<form>\w+))?(?::(?P<role>\w+))?\}|(?P<word>[A-Za-z]+)(?:/(?P<tag>[A-Z]+))?"
    r"|(?P<mark>[.,!?\"])|(?P<gap> )"
)


class Piece(NamedTuple):
    """A part of a sentence: a fixed word or punctuation mark (`var` empty), or a slot."""

    text: str
    """The fixed text; for a slot, the form asked for."""
    var: str
    role: str
    pos: str
    """Part of speech of a fixed word; empty for gaps between words and for slots."""


class Sentence(NamedTuple):
    """One template without choices, ready to be filled."""

    pattern: str
    format: str
    """For `str.format`, with entities as keyword arguments."""
    pieces: tuple[Piece, ...]
    named: tuple[str, ...]
    """Variables of the characters mentioned."""
    last_thing: str
    """Variable of the thing that a following `it` would mean; empty where it might mean something else."""


def _choices(template: str) -> list[str]:
    parts = re.split(r"\[([^\]]*)\]", template)
    options = [part.split("|") if i % 2 else [part] for i, part in enumerate(parts)]
    return ["".join(chosen) for chosen in itertools.product(*options)]


def _compile(pattern: str, template: str) -> Sentence:
    pieces: list[Piece] = []
    text: list[str] = []
    named: list[str] = []
    last_thing = ""
    position = 0
    for match in _PIECE.finditer(template):
        if match.start() != position:
            raise ValueError(f"pattern {pattern!r}: cannot read {template[position : match.start()]!r} in {template!r}")
        position = match.end()
        var, word = match["var"], match["word"]
        if var:
            form, role = match["form"] or _DEFAULTS[var][0], match["role"] or _DEFAULTS[var][1]
            pieces.append(Piece(form, var, role, ""))
            text.append(_FIXED_FORMS.get(form) or f"{{{var}.{form}}}")
            if var in "xygr" and role != "group":
                named.append(var)
            elif var in "oqn":
                last_thing = var
            elif var in "ps" and form == "the":
                last_thing = ""
        elif word:
            tag = match["tag"] or PART_OF_SPEECH[word.lower()]
            pieces.append(Piece(word, "", "action" if tag == "VERB" else "none", tag))
            text.append(word)
            last_thing = "" if tag == "NOUN" else last_thing
        else:
            pieces.append(Piece(match[0], "", "none", "PUNCT" if match["mark"] else ""))
            text.append(match[0])
    if position != len(template):
        raise ValueError(f"pattern {pattern!r}: cannot read {template[position:]!r} in {template!r}")
    if {"o", "q"} <= {piece.var for piece in pieces}:
        last_thing = ""
    return Sentence(pattern, "".join(text), tuple(pieces), tuple(dict.fromkeys(named)), last_thing)


def _with_pronouns(template: str, he: bool, it: bool) -> str:
    template = re.sub(r"\{(\w)\?(:\w+)\}", r"{\1.He\2}" if he else r"{\1\2}", template)
    return re.sub(r"\{o\?\}", "{o.it}" if it else "{o}", template)


@cache
def sentences() -> dict[str, tuple[tuple[Sentence, ...], ...]]:
    """All sentences of each pattern: plain, with the subject a pronoun, with the object `it`, with both."""
    compiled: dict[str, tuple[tuple[Sentence, ...], ...]] = {}
    for pattern, templates in PATTERNS.items():
        groups = []
        for it, he in itertools.product((False, True), repeat=2):
            kept = [t for t in templates if (not he or re.search(r"\{\w\?:", t)) and (not it or "{o?}" in t)]
            expanded = [_with_pronouns(choice, he, it) for t in kept for choice in _choices(t)]
            groups.append(tuple(_compile(pattern, t) for t in expanded))
        compiled[pattern] = tuple(groups)
    return compiled


@cache
def vocabulary() -> frozenset[str]:
    """Every word that can occur in a story, as it is written there; without punctuation marks."""
    words = set(NAMES) | set(KIND_OF) | {adjective for some in ADJECTIVES.values() for adjective in some}
    words |= {"a", "an", "the", "The"}
    words |= {spot.under for spot in (*OUTDOOR_SPOTS, *INDOOR_SPOTS)} | {place.at for place in PLACES}
    words |= {
        entity[0] for some in (PLACES, OUTDOOR_SPOTS, INDOOR_SPOTS, ANIMALS, GLAD, PROUD, SAD, NEEDY) for entity in some
    }
    for groups in sentences().values():
        for piece in (piece for group in groups for sentence in group for piece in sentence.pieces):
            if piece.var in tuple("xygr"):
                fixed = _FIXED_FORMS.get(piece.text)
                words |= {fixed} if fixed else {getattr(character(name), piece.text) for name in ("Lily", "Tom")}
            elif piece.var in ("o", "q") and piece.text == "it":
                words.add("it")
            elif not piece.var and piece.pos not in ("", "PUNCT"):
                words.add(piece.text)
    return frozenset(words)
