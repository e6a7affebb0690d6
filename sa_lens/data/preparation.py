"""Preparation of data: from a configuration to tokenizer and token files, with a validation split."""

from __future__ import annotations

import functools
import hashlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sa_lens.config import DataConfig
from sa_lens.data.cache import cache_folder, hold_lock, key_of, make_once
from sa_lens.data.sources import Source, open_source, stories_source, story_words
from sa_lens.data.tokenizers import fetch_tokenizer, load_tokenizer, read_words, tokenizer_fingerprint, train_bpe
from sa_lens.data.tokens import FORMAT, TokenFile, check_blocks, vocabulary_of, write_tokens
from sa_lens.data.whole_files import remove_leftovers
from sa_lens.places import local_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class PreparedData:
    """A text that is ready for training: tokenizer and two token files."""

    train: TokenFile
    """Training tokens."""
    validation: TokenFile
    """Validation tokens."""
    tokenizer: PreTrainedTokenizerBase
    """The tokenizer that made them."""
    tokenizer_folder: Path
    """A full Hugging Face folder of it, or a GGUF file."""

    @property
    def d_vocab(self) -> int:
        """Tokens of the vocabulary."""
        return self.train.d_vocab


def prepare(data: DataConfig, n_ctx: int, *, progress: bool = True) -> PreparedData:
    """Prepares tokenizer and token files of a data configuration; later calls find them in the cache.

    Any number of processes may call it at once: one makes each file, the others wait for it. Files are keyed by the
    content of the text, the tokenizer and the settings; they do not depend on `n_ctx`.

    Args:
        data: text and tokenizer. Without a named validation text, `validation_fraction` of the distinct documents are
            held out by `stories_seed`; equal documents fall on the same side, and the choice does not depend on their
            order.
        n_ctx: predictions a block; both texts must hold at least one block.
        progress: show progress bars.

    Raises:
        FileNotFoundError: a file that is not there.
        HubUnreachable: a Hub dataset or tokenizer and no network; raised within seconds.
        ValueError: wrong column or split, empty text, text shorter than one block, a tokenizer without a begin- or
            end-of-text token, a damaged file in the cache.
    """
    cache = cache_folder(data.cache_dir)
    for part in ("tokens", "tokenizers", "documents"):
        remove_leftovers(cache / part)
    words = _words_to_keep(data)
    texts = _open_texts(data, cache, progress)
    if data.tokenizer == "bpe":
        folder = _make_tokenizer(data, texts["train"], words, cache, progress)
    else:
        folder = fetch_tokenizer(data.tokenizer, cache)
    tokenizer = load_tokenizer(folder)
    train, validation = (_make_token_file(text, tokenizer, name, cache, progress) for name, text in texts.items())
    if progress:
        same = data.validation in (None, data.source)
        print_form(data.source, [train, validation] if same else [train])
        if not same:
            print_form(str(data.validation), [validation])
    check_blocks(train, n_ctx, "train")
    check_blocks(validation, n_ctx, "validation")
    if train.fingerprint == validation.fingerprint:
        raise ValueError("the validation text equals the training text; name another in data.validation")
    return PreparedData(train, validation, tokenizer, folder)


def print_form(name: str, files: Sequence[TokenFile]) -> None:
    """Prints on standard error how a plain text was divided into documents; prints nothing for other kinds of text."""
    if files[0].form is not None:
        print(f"{name}: {sum(file.n_documents for file in files):,} documents, {files[0].form}", file=sys.stderr)


def _words_to_keep(data: DataConfig) -> list[str]:
    words = read_words(data.keep_whole) if data.keep_whole is not None else []
    if data.tokenizer == "bpe":
        return sorted({*words, *story_words(data.vocab_size)}) if data.source == "stories" else words
    if words:
        raise ValueError(f"data.keep_whole applies to data.tokenizer='bpe', not to {data.tokenizer!r}; leave it out")
    return []


@dataclass(frozen=True)
class _Text:
    """One side of the data: a whole source, or the part of it on one side of the split."""

    source: Source
    split: _Split | None = None
    held_out: bool = False

    @property
    def key(self) -> str:
        side = None if self.split is None else [self.split.fraction, self.split.seed, self.held_out]
        return key_of([self.source.fingerprint, side])

    def read(self) -> Iterator[str]:
        texts, split = self.source.read(), self.split
        if split is None:
            return texts
        limit = split.threshold
        return (text for text in texts if (split.lot(text) <= limit) == self.held_out)


@dataclass(frozen=True)
class _Split:
    """Holds out the documents with the smallest lots; the lot of a document is a hash of seed and text."""

    source: Source
    fraction: float
    seed: int

    def lot(self, text: str) -> int:
        digest = hashlib.blake2b(text.encode(), digest_size=8, key=str(self.seed).encode())
        return int.from_bytes(digest.digest(), "little")

    @functools.cached_property
    def threshold(self) -> int:
        """Largest lot that is held out."""
        lots = np.unique(np.fromiter((self.lot(text) for text in self.source.read()), dtype=np.uint64))
        if len(lots) == 0:
            raise ValueError(f"the text of {self.source.name} is empty")
        if len(lots) == 1:
            raise ValueError(
                f"{self.source.name} is a single document, so no validation text can be held out; name one in "
                "data.validation"
            )
        count = min(max(1, round(self.fraction * len(lots))), len(lots) - 1)
        return int(lots[count - 1])


def _open_texts(data: DataConfig, cache: Path, progress: bool) -> dict[str, _Text]:
    """Opens the training and the validation text."""
    whole = data.source == "stories" or local_path(data.source, "data.source").is_file()
    if whole and data.validation is None and data.validation_split is not None:
        raise ValueError(
            f"data.source={data.source!r} has no splits, so no data.validation_split={data.validation_split!r}; "
            "leave it out to hold out data.validation_fraction, or name a text in data.validation"
        )
    if whole and data.split != "train":
        raise ValueError(f"data.source={data.source!r} has no splits, so no data.split={data.split!r}; leave it out")
    names = [name for name in (data.source, data.validation) if name not in (None, "stories")]
    if data.streaming and all(local_path(str(name), "data.validation").exists() for name in names):
        raise ValueError("data.streaming is for datasets on the Hub; leave it out for local or generated text")
    options: dict[str, Any] = {"column": data.column, "max_documents": data.max_documents}
    options |= {"streaming": data.streaming, "cache": cache, "progress": progress}
    if data.source == "stories":
        source = stories_source(data.n_stories, data.stories_seed, data.max_documents)
    else:
        source = open_source(data.source, split=data.split, **options)
    if data.validation is None and data.validation_split is None:
        split = _Split(source, data.validation_fraction, data.stories_seed)
        return {"train": _Text(source, split), "validation": _Text(source, split, held_out=True)}
    if data.validation == "stories":
        raise ValueError(
            "data.validation='stories' is not a text of its own; leave it out to hold out generated stories"
        )
    validation = open_source(data.validation or data.source, split=data.validation_split, **options)
    if validation.fingerprint == source.fingerprint:
        raise ValueError(f"the validation text {validation.name} is the training text; name another, or leave it out")
    return {"train": _Text(source), "validation": _Text(validation)}


def _make_tokenizer(data: DataConfig, text: _Text, words: list[str], cache: Path, progress: bool) -> Path:
    import tokenizers

    key = key_of([FORMAT, text.key, data.vocab_size, words, tokenizers.__version__])
    folder = cache / "tokenizers" / f"bpe-{key[:32]}"
    make_once(
        folder,
        lambda: train_bpe(text.read(), folder, vocab_size=data.vocab_size, keep_whole=words, progress=progress),
    )
    return folder


def _make_token_file(
    text: _Text, tokenizer: PreTrainedTokenizerBase, name: str, cache: Path, progress: bool
) -> TokenFile:
    key = key_of([FORMAT, text.key, tokenizer_fingerprint(tokenizer), vocabulary_of(tokenizer)])
    path = cache / "tokens" / f"{key[:32]}.bin"

    def exists() -> bool:
        return path.is_file() and path.with_suffix(".json").is_file()

    if not exists():
        with hold_lock(path):
            if not exists():
                # Reading costs a tenth of encoding: a price worth a bar that knows how long it has to go.
                total = sum(1 for _ in text.read()) if progress else None
                form = text.source.form()
                return write_tokens(path, text.read(), tokenizer, name=name, total=total, progress=progress, form=form)
    return TokenFile.open(path)
