"""Tasks as pairs of prompts: indirect objects, pronouns, objects and names to recall, and any JSON of pairs.

The words are those of TinyStories, or of the generated stories that sa_lens trains on by default (`words="stories"`),
whose prompts come from the sentence patterns of these stories. Each task makes different clean prompts until enough
pairs can be used with the tokenizer; `pairs.report()` says which were left out.

A new task needs a function here and an entry in `TASKS`, a name in `config.Task`, its sentences in `tinystories` and
`data.stories.prompts`, and its name in print in `views.wording`.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from sa_lens.circuits.tasks import tinystories
from sa_lens.circuits.tasks.pairs import PromptPairs
from sa_lens.config import NamePairs, Patterns, Words, check_choice, check_whole, shown
from sa_lens.data.whole_files import DamagedFile, check_object
from sa_lens.data.whole_files import read_json as read_file
from sa_lens.drafts import Draft

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sa_lens.data.stories import PromptTemplate


class Options(TypedDict, total=False):
    """Options of the tasks. `names` and `name_pairs` apply to `ioi` and `repeated_name` alone."""

    words: Words
    """Words and sentences of `tinystories` (default), or of the generated `stories`."""
    names: Sequence[str] | None
    """Names to draw from; default: all names of these words that are single tokens."""
    templates: Sequence[str] | None
    """For `tinystories`, format strings (see the module of that name). For `stories`, the first parts of names of
    `sa_lens.data.stories.prompt_templates`, such as `go-give`."""
    name_pairs: NamePairs
    """Only for `stories`: pairs of names that never occur together in a story (`held-out`), other pairs (`seen`), or
    `any`."""
    patterns: Patterns
    """Only for `stories`: sentences of patterns that occur in stories (`seen`), or prompts with at least one sentence
    of a pattern that occurs in none (`held-out`)."""
    length: int | None
    """Number of tokens of each prompt, with the begin-of-text token; None allows all lengths."""


_MARKS: dict[str, Callable[[str, str], tuple[tuple[str, str | None, int], ...]]] = {
    "ioi": lambda answer, wrong: (("IO", answer, 0), ("S1", wrong, 0), ("S2", wrong, -1)),
    "pronoun": lambda answer, wrong: (("name", None, -1),),
    "object": lambda answer, wrong: (("object", answer, 0),),
    "repeated": lambda answer, wrong: (("A1", wrong, 0), ("B1", answer, 0), ("A2", wrong, -1)),
}
_PROMPT = {"clean": str, "corrupt": str, "answers": list, "wrong_answers": list}
"""Keys of a prompt in a JSON file."""
_TRIES = 30
"""Largest number of drafts per pair; ten times as many if the length is prescribed."""


def _make(
    task: str,
    tokenizer: PreTrainedTokenizerBase,
    n: int,
    seed: int,
    *,
    words: Words = "tinystories",
    names: Sequence[str] | None = None,
    templates: Sequence[str] | None = None,
    name_pairs: NamePairs = "any",
    patterns: Patterns = "seen",
    length: int | None = None,
) -> PromptPairs:
    check_whole("n", n, 1, f"pairs of {task}")
    check_choice("words", words, Words)
    check_choice("name_pairs", name_pairs, NamePairs)
    if names is not None:
        _check_names(names, tokenizer)
    if words == "tinystories" and (name_pairs, patterns) != ("any", "seen"):
        raise ValueError(
            f"name_pairs={name_pairs!r} and patterns={patterns!r} need words='stories': of TinyStories it is not "
            "recorded which names meet and which sentences occur"
        )
    tries = _TRIES if length is None else 10 * _TRIES
    if words == "stories":
        drafts = _from_stories(task, n, seed, names, templates, name_pairs, patterns, tries)
    else:
        drafts = _from_tinystories(task, tokenizer, n, seed, names, templates, tries)
    marked = (draft._replace(marks=_MARKS[task](draft.answer, draft.wrong_answer)) for draft in drafts)
    return PromptPairs.from_texts(marked, tokenizer, task=task, minimum=n, wanted=n, length=length)


def _check_names(names: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> None:
    if len(set(names)) < 5 or len(set(names)) < len(names):
        raise ValueError(
            f"names={list(names)}: give at least five different names; a pair needs two for the clean prompt and three "
            "for the corrupt one"
        )
    for name in names:
        if not _is_single_token(tokenizer, name):
            pieces = [tokenizer.decode([i]) for i in tokenizer.encode(f" {name}", add_special_tokens=False)]
            raise ValueError(f"the name {name!r} is not a single token after a space but {pieces}: leave it out")


def _is_single_token(tokenizer: PreTrainedTokenizerBase, word: str) -> bool:
    return len(tokenizer.encode(f" {word}", add_special_tokens=False)) == 1


def _from_tinystories(
    task: str,
    tokenizer: PreTrainedTokenizerBase,
    n: int,
    seed: int,
    names: Sequence[str] | None,
    templates: Sequence[str] | None,
    tries: int,
) -> Iterator[Draft]:
    genders = {**dict.fromkeys(tinystories.GIRLS, "girl"), **dict.fromkeys(tinystories.BOYS, "boy")}
    if names is None:
        names = [name for name in tinystories.NAMES if _is_single_token(tokenizer, name)]
        if len(names) < 5:
            cut = next(name for name in tinystories.NAMES if name not in names)
            raise ValueError(
                f"only {len(names)} names are single tokens of this tokenizer ({cut!r}, for example, is not), but five "
                "are needed: train a tokenizer that keeps them whole (data.keep_whole), or give your own names"
            )
    genders = {name: gender for name, gender in genders.items() if name in names}
    templates = tinystories.TEMPLATES[task] if templates is None else templates
    if not templates:
        raise ValueError(f"templates of {task}: give at least one")
    for template in templates:
        tinystories.check_template(task, template)
    if task == "pronoun":
        names = list(genders)
        if len(set(genders.values())) < 2:
            raise ValueError("the pronoun task needs single-token names of girls and of boys")
    return tinystories.drafts(task, seed, names, templates, tries * n, genders)


def _from_stories(
    task: Any,
    n: int,
    seed: int,
    names: Sequence[str] | None,
    templates: Sequence[str] | None,
    name_pairs: NamePairs,
    patterns: Patterns,
    tries: int,
) -> Iterator[Draft]:
    from sa_lens.data.stories import NAMES, draw_prompts, held_out_pairs, prompt_templates

    chosen = list(NAMES) if names is None else list(names)
    for name in chosen:
        if name not in NAMES:
            raise ValueError(f"the name {name!r} is not in the generated stories; theirs are {', '.join(NAMES)}")
    held_out = held_out_pairs()
    allowed = [
        pair
        for pair in map(frozenset, itertools.combinations(chosen, 2))
        if name_pairs == "any" or (pair in held_out) == (name_pairs == "held-out")
    ]
    if not allowed:
        raise ValueError(f"no {name_pairs} pair among the names {', '.join(chosen)}: give more names")
    known: tuple[PromptTemplate, ...] = prompt_templates(task, patterns)
    if templates is not None:
        for template in templates:
            if not any(t.name.startswith(template) for t in known):
                recipes = sorted({t.name.rsplit("-", 1)[0] for t in known})
                raise ValueError(f"template {template!r} of {task} is none of the stories': {', '.join(recipes)}")
        known = tuple(t for t in known if t.name.startswith(tuple(templates)))

    def drafts() -> Iterator[Draft]:
        for part in range(tries):
            for p in draw_prompts(task, n, seed=1000 * seed + part, pairs=allowed, templates=known):
                yield Draft(p.clean, p.corrupt, p.answer, p.wrong)

    return drafts()


def ioi(tokenizer: PreTrainedTokenizerBase, n: int = 256, seed: int = 0, **options: Unpack[Options]) -> PromptPairs:
    """Makes pairs of indirect object identification.

    For example, "One day, Lily and Tom went to the park. Tom gave a ball to" has the answer " Lily", not " Tom".
    The giver is the first named (BABA) or the second (ABBA), equally often. The corrupt prompt has three other names
    (ABC). Named positions: IO and S1 (first mention of the answer and of the giver), S2 (last mention of the giver),
    end.

    Args:
        tokenizer: the model's tokenizer.
        n: number of pairs.
        seed: seed of the pairs.
        options: see `Options`.

    Raises:
        ValueError: a given name is not a single token, a template is wrong, or fewer than n pairs can be used.

    Source: arXiv 2211.00593, sections 2 and 3.
    """
    return _make("ioi", tokenizer, n, seed, **options)


def pronoun_gender(
    tokenizer: PreTrainedTokenizerBase, n: int = 256, seed: int = 0, **options: Unpack[Options]
) -> PromptPairs:
    """Makes pairs about the gender of a pronoun.

    For example, "One day, Lily went to the park. Lily was happy because" has the answer " she", not " he".
    The corrupt prompt names people of the other gender. Named positions: name (its last mention), end. Arguments and
    errors as in `ioi`.
    """
    return _make("pronoun", tokenizer, n, seed, **_refuse_names(options))


def object_recall(
    tokenizer: PreTrainedTokenizerBase, n: int = 256, seed: int = 0, **options: Unpack[Options]
) -> PromptPairs:
    """Makes pairs about an object that was named before.

    For example, "... Tom gave a ball to Lily. Lily thanked Tom for the" has the answer " ball", not " kite".
    The corrupt prompt has another object in its place. The wrong answer is this object, or, if the clean prompt names
    two objects, the second of them. Named positions: object, end. Arguments and errors as in `ioi`.
    """
    return _make("object", tokenizer, n, seed, **_refuse_names(options))


def repeated_name(
    tokenizer: PreTrainedTokenizerBase, n: int = 256, seed: int = 0, **options: Unpack[Options]
) -> PromptPairs:
    """Makes pairs about a repeated name (induction).

    For example, "... two friends named Lily and Tom. One day, Lily and" has the answer " Tom", not " Lily".
    The corrupt prompt has three other names. Named positions: A1, B1, A2, end. Arguments and errors as in `ioi`.
    """
    return _make("repeated", tokenizer, n, seed, **options)


def _refuse_names(options: Options) -> Options:
    for name in ("names", "name_pairs"):
        if name in options:
            raise TypeError(f"{name} applies to the tasks ioi and repeated_name alone: leave it out")
    return options


def read_json(path: str | Path, tokenizer: PreTrainedTokenizerBase, *, minimum: int = 1) -> PromptPairs:
    """Reads pairs from a JSON file.

    Its form is `{"prompts": [{"clean", "corrupt", "answers": [one], "wrong_answers": [one]}, ...]}`.
    Answers include their leading space. Other keys (such as `word_idxs`) are ignored, because positions are determined
    for each prompt. Named positions that every prompt has: IO (first mention of the answer), S1 and S2 (first and last
    mention of the wrong answer), end.

    Args:
        minimum: smallest number of usable pairs.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file has another form, or too few pairs can be used.

    Source: the format of github.com/UFO-101/auto-circuit.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file of prompt pairs at {path}")
    form = "make it JSON with `prompts`, a list of objects with `clean`, `corrupt`, `answers` and `wrong_answers`"
    content = read_file(path, remedy=form, complaint="holds no prompt pairs", keys={"prompts": list}, other_keys=True)
    try:
        drafts = [_draft_of(prompt, f"prompts[{index}].") for index, prompt in enumerate(content["prompts"])]
    except ValueError as error:
        raise DamagedFile(f"{path} holds no prompt pairs: {error}; {form}") from error
    return PromptPairs.from_texts(drafts, tokenizer, task=path.stem, minimum=minimum)


def _draft_of(prompt: Any, where: str) -> Draft:
    check_object(prompt, _PROMPT, other_keys=True, where=where)
    for key in ("answers", "wrong_answers"):
        if len(prompt[key]) != 1 or not isinstance(prompt[key][0], str):
            raise ValueError(f"{where}{key}={shown(prompt[key])} must be a list of exactly one word")
    answer, wrong = prompt["answers"][0], prompt["wrong_answers"][0]
    return Draft(prompt["clean"], prompt["corrupt"], answer, wrong, _MARKS["ioi"](answer, wrong))


TASKS: dict[str, Callable[..., PromptPairs]] = {
    "ioi": ioi,
    "pronoun": pronoun_gender,
    "object": object_recall,
    "repeated": repeated_name,
}
"""All tasks by name; they take `(tokenizer, n, seed, words=, templates=, length=)`."""


def make(
    task: str,
    tokenizer: PreTrainedTokenizerBase,
    n: int = 256,
    seed: int = 0,
    *,
    words: Words = "tinystories",
    **options: Any,
) -> PromptPairs:
    """Makes the pairs of a task by its name, or reads n pairs from a JSON file by its path, chosen by the seed.

    Args:
        options: further options of the task.

    Raises:
        ValueError: the task is unknown, and what the task raises.
    """
    if task in TASKS:
        return TASKS[task](tokenizer, n, seed, words=words, **options)
    if not task.endswith(".json"):
        raise ValueError(f"task={task!r} is none of {', '.join(TASKS)}, nor a .json file of prompt pairs")
    if options:
        raise ValueError(f"{next(iter(options))} does not apply to prompt pairs read from {task}")
    pairs = read_json(task, tokenizer)
    return pairs.subset(random.Random(seed).sample(range(len(pairs)), min(n, len(pairs))))


def make_unseen(
    task: str,
    tokenizer: PreTrainedTokenizerBase,
    n: int = 256,
    seed: int = 0,
    *,
    words: Words = "tinystories",
) -> PromptPairs:
    """Makes pairs that training cannot have shown: for IOI on generated stories, names never occur together in one.

    For other tasks and words this is not recorded, so they are those of `make`.

    Raises:
        ValueError: as `make`.
    """
    if (task, words) == ("ioi", "stories"):
        return ioi(tokenizer, n, seed, words=words, name_pairs="held-out")
    return make(task, tokenizer, n, seed, words=words)
