"""Tokens on disk: written once, memory-mapped, cut into blocks of n_ctx + 1.

A token file is raw little-endian unsigned integers (`.bin`) and a JSON header beside it (`.json`), written last:
without its header a file does not exist. The header holds fingerprints of the tokens and of itself, which are checked
whenever the file is opened.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from sa_lens.data.cache import key_of, new_file
from sa_lens.data.long_documents import split_document
from sa_lens.data.tokenizers import boundary_tokens
from sa_lens.data.whole_files import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = 2
"""Version of the layout of token files; part of every key."""

REMEDY = "delete it and the file beside it, they will be made again"

CHARACTERS = 2**20
"""Largest number of characters that are encoded together; each takes about 160 bytes meanwhile."""

PARTS = 1000
"""Largest number of documents, or pieces of long ones, that are encoded together."""


@dataclass(frozen=True)
class TokenFile:
    """A text as one long row of tokens: every document between its boundary tokens.

    `len(file)` is the number of tokens, `file[10]` one token, `file[10:20]` a tensor of tokens. Where a tokenizer has
    one token for the beginning and the end of a text, it follows every document.
    """

    path: Path
    """The `.bin` file; its header has the same name with `.json`."""
    n_tokens: int
    """Tokens, boundary tokens included."""
    d_vocab: int
    """Vocabulary of the tokenizer: every token is below it."""
    dtype: str
    """Smallest unsigned type that holds the vocabulary: uint8, uint16 or uint32."""
    n_documents: int
    """Documents."""
    n_bytes: int
    """Bytes of the text in UTF-8, boundary tokens not counted: for bits per byte."""
    begin_token_id: int
    """The token before a document, and before every prompt."""
    end_token_id: int
    """The token after a document; the same one for many tokenizers."""
    fingerprint: str
    """SHA-256 of the tokens: equal tokens, equal fingerprint."""
    form: str | None = None
    """Where the documents of a plain text file begin and end, in words."""

    @classmethod
    def open(cls, path: str | Path) -> TokenFile:
        """Reads the header of a token file and compares both files with their fingerprints.

        Raises:
            FileNotFoundError: no such file, or no header.
            ValueError: the file or its header is damaged or of another format.
        """
        path = Path(path)
        header_path = path.with_suffix(".json")
        if not path.is_file() or not header_path.is_file():
            raise FileNotFoundError(f"no token file {path} with its header {header_path.name}")
        header = read_json(header_path, remedy=REMEDY, keys={"format": int}, other_keys=True)
        if header.pop("format") != FORMAT:
            raise ValueError(f"token file {path} has another format; {REMEDY}")
        checksum = header.pop("checksum", None)
        if checksum != key_of(header) or {"path", *header} != {field.name for field in fields(cls)}:
            raise ValueError(f"{header_path} is damaged: it is not what was written; {REMEDY}")
        file = cls(path=path, **header)
        size, expected = path.stat().st_size, file.n_tokens * np.dtype(file.dtype).itemsize
        if size != expected:
            raise ValueError(
                f"token file {path} is truncated or damaged: {size:,} bytes instead of {expected:,}; {REMEDY}"
            )
        with path.open("rb") as opened:
            if hashlib.file_digest(opened, "sha256").hexdigest() != file.fingerprint:
                raise ValueError(f"token file {path} is damaged: its tokens are not those that were written; {REMEDY}")
        return file

    @functools.cached_property
    def tokens(self) -> np.ndarray:
        """All tokens `[n_tokens]`, memory-mapped and read-only."""
        return np.memmap(self.path, dtype=np.dtype(self.dtype).newbyteorder("<"), mode="r", shape=(self.n_tokens,))

    def __getstate__(self) -> dict[str, Any]:
        # A pickled memory map carries its contents; data workers map the file themselves.
        return {name: value for name, value in self.__dict__.items() if name != "tokens"}

    def __len__(self) -> int:
        return self.n_tokens

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> Int64[Tensor, " pos"]: ...
    def __getitem__(self, index: int | slice) -> int | Int64[Tensor, " pos"]:
        """Returns one token, or the tokens of a slice as a tensor that a model reads; only these are read from disk."""
        tokens = self.tokens[index].astype(np.int64)
        return torch.from_numpy(tokens) if isinstance(index, slice) else int(tokens)

    def blocks(self, length: int, start: int = 0, stop: int | None = None) -> Int64[Tensor, "block pos"]:
        """Returns blocks `start` to `stop - 1` of the text, a batch that a model reads; only these are read from disk.

        Blocks are consecutive; tokens after the last whole block are left out.

        Args:
            length: tokens per block, at most the context of the model.
            start: first block; negative numbers count from the end.
            stop: block after the last one; None: all.

        Raises:
            ValueError: `length` is below 1 or above the number of tokens.
        """
        if not 1 <= length <= self.n_tokens:
            raise ValueError(f"length={length} must be from 1 to {self.n_tokens:,}, the tokens of {self.path}")
        start, stop, _ = slice(start, stop).indices(self.n_tokens // length)
        return self[start * length : max(start, stop) * length].view(-1, length)

    def n_blocks(self, n_ctx: int) -> int:
        """Returns the number of whole blocks of `n_ctx` predictions."""
        return max(0, (self.n_tokens - 1) // n_ctx)

    def block(self, index: int, n_ctx: int) -> Int64[np.ndarray, " pos_and_next"]:
        """Returns block `index`: `n_ctx + 1` tokens from position `index * n_ctx` on, so neighbours share one token.

        Raises:
            IndexError: no such block.
        """
        if not 0 <= index < self.n_blocks(n_ctx):
            raise IndexError(f"block {index} is not one of the {self.n_blocks(n_ctx)} blocks of {n_ctx} tokens")
        start = int(index) * n_ctx
        return self.tokens[start : start + n_ctx + 1].astype(np.int64)

    def documents(self, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
        """Yields the documents as text, in their order.

        Args:
            tokenizer: the one that made the tokens.
        """
        start = 0
        for end in (self.tokens == self.end_token_id).nonzero()[0].tolist():
            ids = [token for token in self.tokens[start:end].tolist() if token != self.begin_token_id]
            yield str(tokenizer.decode(ids))
            start = end + 1

    def check_vocabulary(self, d_vocab: int) -> None:
        """Checks that a model with `d_vocab` tokens can read this file.

        Raises:
            ValueError: the file's vocabulary is larger.
        """
        if self.d_vocab > d_vocab:
            raise ValueError(
                f"token file {self.path} has a vocabulary of {self.d_vocab:,} tokens, beyond the model's {d_vocab:,}; "
                f"set model.d_vocab to {self.d_vocab} or more, or leave it unset"
            )


def validation_blocks(file: TokenFile, n_ctx: int, n_tokens: int) -> Int64[np.ndarray, "batch pos_and_next"]:
    """Returns the first blocks of a file, with at most `n_tokens` predictions but at least one block.

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
    """Returns the largest token id + 1, with added tokens."""
    return max(tokenizer.get_vocab().values()) + 1


def write_tokens(
    path: Path,
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str,
    total: int | None = None,
    progress: bool = True,
    form: str | None = None,
) -> TokenFile:
    """Encodes documents, each between its boundary tokens, into a token file.

    Long documents are encoded in pieces; see `split_document` for how far that gives the same tokens.

    Args:
        path: the `.bin` file to write.
        texts: documents.
        tokenizer: used as it is, without the special tokens it would add.
        name: what the text is, for messages and the progress bar.
        total: number of documents if known, for the progress bar.
        form: how the text was divided into documents; it is recorded in the file.

    Raises:
        ValueError: the text is empty, a token is beyond the vocabulary, or the tokenizer has neither a begin- nor an
            end-of-text token.
    """
    from tqdm.auto import tqdm

    d_vocab, boundary = vocabulary_of(tokenizer), boundary_tokens(tokenizer)
    dtype = np.min_scalar_type(d_vocab - 1)
    digest, n_tokens, n_documents, n_bytes = hashlib.sha256(), 0, 0, 0
    with (
        new_file(path) as temporary,
        temporary.open("wb") as out,
        tqdm(total=total, desc=f"{name} tokens", unit=" documents", disable=not progress) as bar,
    ):
        for parts in _batches(_split_documents(texts, tokenizer)):
            encoded = _encode(tokenizer, [part.text for part in parts])
            rows = [
                np.array([*boundary.before * part.first, *ids, *boundary.after * part.last], dtype=np.int64)
                for part, ids in zip(parts, encoded, strict=True)
            ]
            row = np.concatenate(rows)
            if len(row) and (row.max() >= d_vocab or row.min() < 0):
                raise ValueError(
                    f"tokenizer {tokenizer.name_or_path!r} gives token {row.max():,}, beyond its vocabulary of "
                    f"{d_vocab:,}"
                )
            raw = row.astype(dtype.newbyteorder("<")).tobytes()
            out.write(raw)
            digest.update(raw)
            n_tokens += len(row)
            n_bytes += sum(part.n_bytes for part in parts)
            finished = sum(part.last for part in parts)
            n_documents += finished
            bar.update(finished)
            bar.set_postfix_str(f"{n_tokens:,} tokens", refresh=False)
        if n_documents == 0:
            raise ValueError(f"the {name} text is empty")
    header: dict[str, Any] = {
        "n_tokens": n_tokens,
        "d_vocab": d_vocab,
        "dtype": dtype.name,
        "n_documents": n_documents,
        "n_bytes": n_bytes,
        "begin_token_id": boundary.begin,
        "end_token_id": boundary.end,
        "fingerprint": digest.hexdigest(),
        "form": form,
    }
    header = {"format": FORMAT, **header, "checksum": key_of(header)}
    with new_file(path.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(header, indent=1), encoding="utf-8")
    return TokenFile.open(path)


class _Part(NamedTuple):
    """A document, or a piece of a long one."""

    text: str
    first: bool
    last: bool
    n_bytes: int
    """Bytes of the document, counted with its first piece."""


def _split_documents(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[_Part]:
    for text in texts:
        first, n_bytes = True, len(text.encode())
        for piece, last in split_document(text, lambda part: _encode(tokenizer, [part])[0]):
            yield _Part(piece, first, last, n_bytes if first else 0)
            first = False


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    encoded: Any = tokenizer(
        texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
    )
    return encoded["input_ids"]


def _batches(parts: Iterable[_Part]) -> Iterator[list[_Part]]:
    """Batches of at most `PARTS` parts and, unless a single part is longer, `CHARACTERS` characters."""
    batch: list[_Part] = []
    room = CHARACTERS
    for part in parts:
        if batch and (len(batch) == PARTS or len(part.text) > room):
            yield batch
            batch, room = [], CHARACTERS
        batch.append(part)
        room -= len(part.text)
    if batch:
        yield batch
