"""How a template of `patterns` is read and drawn from.

A template is an English sentence with these marks:

    {g:giver}       a slot: the entity of the variable `g`, in its usual form, with the role `giver`
    {x.he:agent}    another form of the entity (a field of its class in `words`)
    {x?:agent}      the name or `he`;  {o?}  the object or `it`
    [a|b|]          a choice, which may be empty and may hold further marks
    <name>          a choice among the templates of that fragment
    to/PART         the part of speech of a word, where it differs from the usual one

Variables: x y g r characters, o q objects, p a place, s a spot, n an animal, f a feeling. The words they, them
and their mean the two characters of the scene. Spaces between words, the capital letter at the start of a sentence or
of a quotation, and `a` instead of `the` where an object is mentioned first are put in when a sentence is spelled.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from sa_lens.data.stories.words import PART_OF_SPEECH

CHARACTERS, OBJECTS = "xygr", "oq"
"""Variables of characters and of objects."""
OPENING = "``"
"""The mark that begins a quotation, as a piece; in a text it is `"`, as at the end."""
GROUP_WORDS = frozenset(("they", "them", "their"))

_DEFAULTS: dict[str, tuple[str, str]] = {
    **dict.fromkeys(CHARACTERS, ("name", "none")),
    **dict.fromkeys(OBJECTS, ("the", "object")),
    "p": ("the", "place"),
    "s": ("the", "spot"),
    "n": ("noun", "animal"),
    "f": ("word", "feeling"),
}
_MARKS = re.compile(
    r"\s+|(?P<bracket>[\[|\]])|<(?P<fragment>\w+)>"
    r"|\{(?P<var>[a-z])(?P<maybe>\?)?(?:\.(?P<form>\w+))?(?::(?P<role>\w+))?\}"
    r"|(?P<word>[A-Za-z]+)(?:/(?P<tag>[A-Z]+))?|(?P<mark>[.,!?\"]|'s)"
)


class Piece(NamedTuple):
    """A part of a sentence: a fixed word or punctuation mark (`var` empty), or a slot."""

    text: str
    """The fixed text; for a slot, the form asked for."""
    var: str
    role: str
    pos: str
    """Part of speech of a fixed word; empty for slots."""
    space: bool = True
    """Whether a space comes before it, except at the start of a sentence."""


class Choice(NamedTuple):
    """Alternatives, each equally likely."""

    options: tuple[Node, ...]


Node: TypeAlias = "tuple[Piece | Choice, ...]"


def parse(template: str, fragment: Callable[[str], Choice]) -> Node:
    """The tree of a template.

    Args:
        template: the sentence with its marks.
        fragment: the choice that a `<name>` stands for.

    Raises:
        ValueError: a mark that cannot be read, or a bracket that is not closed.
        KeyError: an unknown fragment, or a word without a part of speech.
    """
    open_choices: list[list[list[Piece | Choice]]] = [[[]]]
    position, quoted = 0, False
    for match in _MARKS.finditer(template):
        if match.start() != position:
            break
        position = match.end()
        items = open_choices[-1][-1]
        if match["bracket"] == "[":
            open_choices.append([[]])
        elif match["bracket"] == "|":
            open_choices[-1].append([])
        elif match["bracket"] == "]":
            options = open_choices.pop()
            open_choices[-1][-1].append(Choice(tuple(map(tuple, options))))
        elif match["fragment"]:
            items.append(fragment(match["fragment"]))
        elif match["var"]:
            var, (form, role) = match["var"], _DEFAULTS[match["var"]]
            slot = Piece(match["form"] or form, var, match["role"] or role, "", not _opens(items))
            if match["maybe"]:
                pronoun = slot._replace(text="it" if var in OBJECTS else "he")
                items.append(Choice(((slot,), (pronoun,), (pronoun,))))
            else:
                items.append(slot)
        elif match["word"]:
            items.append(_fixed(match["word"], match["tag"], not _opens(items)))
        elif match["mark"] == '"':
            quoted = not quoted
            items.append(Piece(OPENING if quoted else '"', "", "none", "PUNCT", quoted))
        elif match["mark"]:
            items.append(Piece(match["mark"], "", "none", "PART" if match["mark"] == "'s" else "PUNCT", False))
    if position != len(template) or len(open_choices) != 1 or len(open_choices[0]) != 1:
        raise ValueError(f"cannot read template {template!r} from {template[position:]!r}")
    return tuple(open_choices[0][0])


def _opens(items: Sequence[Piece | Choice]) -> bool:
    """Whether a quotation begins after these items."""
    return bool(items) and isinstance(items[-1], Piece) and items[-1].text == OPENING


def _fixed(word: str, tag: str | None, space: bool) -> Piece:
    if word in GROUP_WORDS:
        return Piece(word, "", "group", "PRON", space)
    pos = tag or PART_OF_SPEECH[word]
    return Piece(word, "", "action" if pos == "VERB" else "none", pos, space)


def draw(node: Node, random: Callable[[], float]) -> list[Piece]:
    """The pieces of one sentence of a tree."""
    pieces: list[Piece] = []
    for item in node:
        if isinstance(item, Choice):
            pieces += draw(item.options[int(random() * len(item.options))], random)
        else:
            pieces.append(item)
    return pieces


def spell(pieces: Sequence[Piece], entities: Mapping[str, Any]) -> Iterator[tuple[Piece, str, bool]]:
    """Each piece with its text and whether a space comes before it."""
    capital = True
    for i, piece in enumerate(pieces):
        text = getattr(entities[piece.var], piece.text) if piece.var else piece.text
        if piece.pos == "PUNCT":
            capital = text == OPENING
            yield piece, '"' if capital else text, piece.space and i > 0
        else:
            yield piece, text[0].upper() + text[1:] if capital else text, piece.space and i > 0
            capital = False


def spelled(pieces: Sequence[Piece], entities: Mapping[str, Any]) -> str:
    """The text of a sentence: what `spell` gives, at a third of its cost."""
    text = "".join(
        [
            (" " if piece.space else "") + (getattr(entities[piece.var], piece.text) if piece.var else piece.text)
            for piece in pieces
        ]
    ).lstrip()
    text = text[:1].upper() + text[1:]
    if OPENING in text:
        before, quoted = text.split(OPENING)
        text = before + '"' + quoted[:1].upper() + quoted[1:]
    return text


def pieces_of(node: Node) -> set[tuple[Piece, bool]]:
    """Every piece that a tree can draw, with whether it begins a sentence or a quotation."""
    pieces: set[tuple[Piece, bool]] = set()

    def walk(items: Node, capitals: set[bool]) -> set[bool]:
        for item in items:
            if isinstance(item, Choice):
                capitals = {capital for option in item.options for capital in walk(option, capitals)}
            elif item.pos == "PUNCT":
                capitals = {item.text == OPENING}
            else:
                pieces.update((item, capital) for capital in capitals)
                capitals = {False}
        return capitals

    walk(node, {True})
    return pieces
