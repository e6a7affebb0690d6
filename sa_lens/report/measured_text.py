"""The text of a report: stories that every model reads, and held-out text that every model is measured on.

Texts are taken as documents and encoded with each model's own tokenizer, so that models with different ones read the
same words.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sa_lens.data import HubUnreachable, TokenFile
from sa_lens.data.blocks import TextBlocks
from sa_lens.data.sources import open_source
from sa_lens.data.tokens import write_tokens
from sa_lens.report.subjects import Subject
from sa_lens.training import text_of_run
from sa_lens.views.wording import encode_text

HELD_OUT, CALIBRATION = 110_000, 35_000
"""Tokens (of the first model's tokenizer) to measure on at most, and to set firing thresholds with."""
STORY_TOKENS = 128
"""Tokens of a story at most, in every model; longer ones are cut."""
CHARACTERS = 6
"""Characters per token, a high estimate, which limits how much of a long document is encoded."""
LEAST_BLOCKS = 12
"""Blocks that each part of the text must have."""


@dataclass(frozen=True)
class Texts:
    """Documents that a report is made from."""

    name: str
    """What the measured text is, in words."""
    stories: tuple[str, ...]
    """Texts to show."""
    held_out: tuple[str, ...]
    """Documents to measure on."""
    calibration: tuple[str, ...]
    """Documents that set firing thresholds; none of the above is in them."""


@dataclass(frozen=True)
class ModelText:
    """The measured text in the tokens of one model."""

    held_out: TokenFile
    """Documents to measure on."""
    held_out_blocks: TextBlocks
    """The same in blocks of the model's n_ctx."""
    calibration_blocks: TextBlocks
    """Blocks that set firing thresholds."""


def gather_texts(
    subjects: Sequence[Subject], text: str | None, column: str, n_stories: int, n_tokens: int = HELD_OUT
) -> Texts:
    """Returns the stories and the measured text of a report.

    All is measured on the validation text of the first run, with thresholds from its training text. A named text
    gives the stories; if the first run does not know its own text, everything is measured on the named one.

    Args:
        text: path or dataset id; None: stories of the first run's validation text.
        column: column of `text` that holds the text.
        n_stories: stories to show at most, spread evenly over the text.
        n_tokens: tokens to measure on at most; a third as many set thresholds.

    Raises:
        ValueError: a text without documents, or a first run that knows no text where none is named.
        FileNotFoundError: no such text.
    """
    first = subjects[0]
    thresholds = n_tokens * CALIBRATION // HELD_OUT
    named = _read_documents(text, column, first.tokenizer, n_tokens + thresholds) if text is not None else ()
    try:
        own = text_of_run(first.run, first.model)
    except (ValueError, FileNotFoundError, HubUnreachable):
        if text is None:
            raise
        calibration, held_out = _split(named)
        name = Path(text).name
    else:
        calibration = _documents(own.train, own.tokenizer, thresholds)
        held_out = _documents(own.validation, own.tokenizer, n_tokens)
        name = f"validation text of {first.name}"
    stories = _stories(named or held_out, subjects, n_stories)
    return Texts(name, stories, held_out, calibration)


def encode_for(subject: Subject, texts: Texts, folder: Path) -> ModelText:
    """Encodes the measured text for a model, as files in a folder.

    Raises:
        ValueError: a text too short for blocks of the model's context.
    """
    files = {}
    for part in ("held_out", "calibration"):
        documents: tuple[str, ...] = getattr(texts, part)
        path = folder / f"{subject.name.replace('/', '-')}-{part}.bin"
        path.parent.mkdir(parents=True, exist_ok=True)
        file = write_tokens(path, documents, subject.tokenizer, name=part.replace("_", "-"), progress=False)
        file.check_vocabulary(subject.model.cfg.d_vocab)
        if file.n_blocks(subject.n_ctx) < LEAST_BLOCKS:
            raise ValueError(
                f"the {part.replace('_', '-')} part of {texts.name} has {file.n_tokens:,} tokens, "
                f"{file.n_blocks(subject.n_ctx)} blocks of n_ctx={subject.n_ctx}: {LEAST_BLOCKS} are needed. Name a "
                "longer text"
            )
        files[part] = file
    held_out, calibration = (
        TextBlocks(file, subject.n_ctx, d_vocab=subject.model.cfg.d_vocab) for file in files.values()
    )
    return ModelText(files["held_out"], held_out, calibration)


def _read_documents(text: str, column: str, tokenizer: Any, n_tokens: int) -> tuple[str, ...]:
    """Returns the documents of a named text that have so many tokens and a tenth more, the last of them cut.

    It is divided by its characters, so with just as many tokens one of the parts could have too few.
    """
    documents, room = [], n_tokens + n_tokens // 10
    for document in open_source(text, column=column, progress=False).read():
        document = document[: CHARACTERS * room]
        n = len(encode_text(tokenizer, document))
        documents.append(document if n <= room else document[: _seam(document, len(document) * room // n)])
        room -= n
        if room <= 0:
            break
    if not documents:
        raise ValueError(f"the text {text} is empty")
    return tuple(documents)


def _split(documents: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Divides a text: the first part is for calibration, the rest for measuring."""
    if len(documents) == 1:
        whole = documents[0]
        at = _seam(whole, len(whole) * CALIBRATION // (HELD_OUT + CALIBRATION))
        return (whole[:at],), (whole[at:],)
    total = sum(map(len, documents))
    seen = count = 0
    while count < len(documents) - 1 and seen * (HELD_OUT + CALIBRATION) < total * CALIBRATION:
        seen += len(documents[count])
        count += 1
    return documents[:count], documents[count:]


def _documents(file: TokenFile, tokenizer: Any, n_tokens: int) -> tuple[str, ...]:
    """Returns the documents at the beginning of a token file, the last of them whole."""
    count = int((file.tokens[: n_tokens - 1] == file.end_token_id).sum()) + 1
    documents = itertools.islice(file.documents(tokenizer), count)
    return tuple(document for document in documents if document.strip())


# ------------------------------------------------------------------------------------------------------------- stories


def _stories(documents: Iterable[str], subjects: Sequence[Subject], n_stories: int) -> tuple[str, ...]:
    """Returns documents that every model can read, spread evenly; if too few are short enough, beginnings of others."""
    different = [document.strip() for document in dict.fromkeys(documents) if document.strip()]
    whole = [document for document in different if _fits(document, subjects)]
    chosen = _pick_evenly(whole, n_stories)
    if len(chosen) < n_stories:
        rest = [document for document in different if document not in set(whole)]
        chosen += [_cut(document, subjects) for document in _pick_evenly(rest, n_stories - len(chosen))]
    stories = tuple(dict.fromkeys(story for story in chosen if story))
    if not stories:
        raise ValueError("the text has no document that a model can read")
    return stories


def _pick_evenly(items: Sequence[str], count: int) -> list[str]:
    step = max(1.0, len(items) / max(1, count))
    return [items[math.floor(i * step)] for i in range(min(count, len(items)))]


def _fits(text: str, subjects: Sequence[Subject]) -> bool:
    """Returns whether every model can read the whole text at once."""
    return all(
        len(encode_text(subject.tokenizer, text)) <= min(STORY_TOKENS, subject.model.cfg.n_ctx) for subject in subjects
    )


def _cut(text: str, subjects: Sequence[Subject]) -> str:
    """Returns the longest beginning that every model can read, up to the end of a word if there are words."""
    low, high = 0, len(text)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _fits(text[:middle], subjects) else (low, middle)
    return text[: _seam(text, low)].rstrip()


def _seam(text: str, at: int) -> int:
    """Returns the end of the last word before a place; in a text without spaces, the place itself."""
    return next((i for i in range(at, max(0, at - 40), -1) if text[i : i + 1].isspace()), at)
