"""Tokens on disk: written once, memory-mapped, cut into blocks of n_ctx + 1.

A token file is raw little-endian unsigned integers (`.bin`) and a JSON header beside it (`.json`), written last:
without its header a file does not exist.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int64

from sa_lens.data.disk import new_file, write_atomically

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = 1
"""Version of the layout of token files; part of every key."""


@dataclass(frozen=True)
class TokenFile:
    """A text as one long row of tokens: every document followed by one end-of-text token."""

    path: Path
    """The `.bin` file; its header has the same name with `.json`."""
    n_tokens: int
    """Tokens, end-of-text tokens included."""
    d_vocab: int
    """Vocabulary of the tokenizer: every token is below it."""
    dtype: str
    """Smallest unsigned type that holds the vocabulary: uint8, uint16 or uint32."""
    n_documents: int
    """Documents."""
    n_bytes: int
    """Bytes of the text in UTF-8, end-of-text tokens not counted: for bits per byte."""
    eos_token_id: int
    """The token between documents."""
    fingerprint: str
    """SHA-256 of the tokens: equal tokens, equal fingerprint."""

    @classmethod
    def open(cls, path: str | Path) -> TokenFile:
        """Reads the header of a token file and checks that the file is as long as it says.

        Raises:
            FileNotFoundError: no such file, or no header.
            ValueError: the file is truncated or its header is of another format.
        """
        path = Path(path)
        header_path = path.with_suffix(".json")
        if not path.is_file() or not header_path.is_file():
            raise FileNotFoundError(f"no token file {path} with its header {header_path.name}")
        header = json.loads(header_path.read_text(encoding="utf-8"))
        if header.pop("format", None) != FORMAT:
            raise ValueError(f"token file {path} has another format; delete it, it will be made again")
        file = cls(path=path, **header)
        size, expected = path.stat().st_size, file.n_tokens * np.dtype(file.dtype).itemsize
        if size != expected:
            raise ValueError(
                f"token file {path} is truncated or damaged: {size:,} bytes instead of {expected:,}; delete it and "
                f"{header_path.name}, they will be made again"
            )
        return file

    @functools.cached_property
    def tokens(self) -> np.ndarray:
        """All tokens `[n_tokens]`, memory-mapped and read-only."""
        return np.memmap(self.path, dtype=np.dtype(self.dtype).newbyteorder("<"), mode="r", shape=(self.n_tokens,))

    def __getstate__(self) -> dict[str, Any]:
        # A pickled memory map carries its contents; data workers map the file themselves.
        return {name: value for name, value in self.__dict__.items() if name != "tokens"}

    def n_blocks(self, n_ctx: int) -> int:
        """Whole blocks of `n_ctx` predictions."""
        return max(0, (self.n_tokens - 1) // n_ctx)

    def block(self, index: int, n_ctx: int) -> Int64[np.ndarray, " pos_and_next"]:
        """Block `index`: `n_ctx + 1` tokens from position `index * n_ctx` on, so blocks share one token at their seam.

        Raises:
            IndexError: no such block.
        """
        if not 0 <= index < self.n_blocks(n_ctx):
            raise IndexError(f"block {index} is not one of the {self.n_blocks(n_ctx)} blocks of {n_ctx} tokens")
        start = int(index) * n_ctx
        return self.tokens[start : start + n_ctx + 1].astype(np.int64)

    def check_vocabulary(self, d_vocab: int) -> None:
        """Returns if a model with `d_vocab` tokens can read this file.

        Raises:
            ValueError: the file's vocabulary is larger.
        """
        if self.d_vocab > d_vocab:
            raise ValueError(
                f"token file {self.path} has a vocabulary of {self.d_vocab:,} tokens, beyond the model's {d_vocab:,}; "
                f"set model.d_vocab to {self.d_vocab} or more, or leave it unset"
            )


def validation_blocks(file: TokenFile, n_ctx: int, n_tokens: int) -> Int64[np.ndarray, "batch pos_and_next"]:
    """The first blocks of a file, as many as give at most `n_tokens` predictions (at least one, at most all).

    Raises:
        ValueError: the file holds no whole block.
    """
    check_blocks(file, n_ctx, "validation")
    count = min(file.n_blocks(n_ctx), max(1, n_tokens // n_ctx))
    return np.stack([file.block(index, n_ctx) for index in range(count)])


def check_blocks(file: TokenFile, n_ctx: int, name: str) -> None:
    """Raises ValueError if the file holds no whole block of `n_ctx + 1` tokens."""
    if file.n_blocks(n_ctx) == 0:
        raise ValueError(
            f"the {name} text has {file.n_tokens:,} tokens, fewer than one block of n_ctx + 1 = {n_ctx + 1:,}; "
            "give more text or a smaller model.n_ctx"
        )


def vocabulary_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """Largest token id + 1, added tokens included."""
    return max(tokenizer.get_vocab().values()) + 1


def write_tokens(
    path: Path,
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str,
    total: int | None = None,
    progress: bool = True,
    batch: int = 1000,
) -> TokenFile:
    """Encodes documents, each followed by one end-of-text token, into a token file.

    Args:
        path: the `.bin` file to write.
        texts: documents.
        tokenizer: used as it is, without the special tokens it would add.
        name: what the text is, for messages and the progress bar.
        total: number of documents if known, for the progress bar.
        batch: documents encoded at a time.

    Raises:
        ValueError: no text, a token beyond the vocabulary, or a tokenizer without an end-of-text token.
    """
    from tqdm.auto import tqdm

    if tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer {tokenizer.name_or_path!r} has no end-of-text token (eos_token)")
    d_vocab, eos = vocabulary_of(tokenizer), int(tokenizer.eos_token_id)
    dtype = np.min_scalar_type(d_vocab - 1)
    digest, n_tokens, n_documents, n_bytes = hashlib.sha256(), 0, 0, 0
    with (
        new_file(path) as temporary,
        temporary.open("wb") as out,
        tqdm(total=total, desc=f"{name} tokens", unit=" documents", disable=not progress) as bar,
    ):
        for documents in _batches(texts, batch):
            encoded = tokenizer(
                documents,
                add_special_tokens=False,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            )["input_ids"]
            row = np.concatenate([np.array([*ids, eos], dtype=np.int64) for ids in encoded])
            if row.max() >= d_vocab or row.min() < 0:
                raise ValueError(
                    f"tokenizer {tokenizer.name_or_path!r} gives token {row.max():,}, beyond its vocabulary of "
                    f"{d_vocab:,}"
                )
            raw = row.astype(dtype.newbyteorder("<")).tobytes()
            out.write(raw)
            digest.update(raw)
            n_tokens += len(row)
            n_documents += len(documents)
            n_bytes += sum(len(text.encode()) for text in documents)
            bar.update(len(documents))
            bar.set_postfix_str(f"{n_tokens:,} tokens", refresh=False)
        if n_documents == 0:
            raise ValueError(f"the {name} text is empty")
    header = {
        "format": FORMAT,
        "n_tokens": n_tokens,
        "d_vocab": d_vocab,
        "dtype": dtype.name,
        "n_documents": n_documents,
        "n_bytes": n_bytes,
        "eos_token_id": eos,
        "fingerprint": digest.hexdigest(),
    }
    write_atomically(path.with_suffix(".json"), json.dumps(header, indent=1))
    return TokenFile.open(path)


def _batches(texts: Iterable[str], size: int) -> Iterator[list[str]]:
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
