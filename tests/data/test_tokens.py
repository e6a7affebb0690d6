"""Token files: what is written is what is read, whole or not at all."""

import json
import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from sa_lens.data import TokenFile, load_tokenizer, validation_blocks
from sa_lens.data.tokens import write_tokens


@pytest.fixture
def tokens(tmp_path: Path, stories: list[str], bpe_folder: Path, monkeypatch: pytest.MonkeyPatch) -> TokenFile:
    monkeypatch.setattr("sa_lens.data.tokens.PARTS", 7)
    return write_tokens(tmp_path / "a.bin", stories, load_tokenizer(bpe_folder), name="test", progress=False)


def test_a_file_is_each_document_and_an_end_of_text_token(
    tokens: TokenFile, stories: list[str], bpe_folder: Path
) -> None:
    tokenizer = load_tokenizer(bpe_folder)
    row = [token for text in stories for token in [*tokenizer.encode(text), tokenizer.eos_token_id]]
    assert tokens.tokens.tolist() == row
    assert tokens.n_tokens == len(row)
    assert tokens.n_documents == len(stories)
    assert tokens.n_bytes == sum(len(text.encode()) for text in stories)
    assert tokenizer.decode(tokens.tokens[:-1].tolist()).split("<|endoftext|>") == stories


def test_batch_size_does_not_matter(tokens: TokenFile, tmp_path: Path, stories: list[str], bpe_folder: Path) -> None:
    other = write_tokens(tmp_path / "b.bin", stories, load_tokenizer(bpe_folder), name="test", progress=False)
    assert other.fingerprint == tokens.fingerprint
    assert other.path.read_bytes() == tokens.path.read_bytes()


def test_blocks_overlap_by_the_token_that_is_target_and_next_input(tokens: TokenFile) -> None:
    n_ctx = 16
    row = tokens.tokens.tolist()
    assert tokens.n_blocks(n_ctx) == (len(row) - 1) // n_ctx
    for index in (0, 1, tokens.n_blocks(n_ctx) - 1):
        block = tokens.block(index, n_ctx)
        assert block.dtype == np.int64
        assert block.tolist() == row[index * n_ctx : index * n_ctx + n_ctx + 1]
        assert len(block) == n_ctx + 1


def test_a_file_is_a_sequence_of_tokens(tokens: TokenFile) -> None:
    row = tokens.tokens.tolist()
    assert len(tokens) == len(row)
    assert (tokens[0], tokens[7], tokens[-1]) == (row[0], row[7], row[-1])
    assert isinstance(tokens[7], int)
    for piece in (slice(5), slice(3, 9), slice(-4, None), slice(9, 3), slice(20, 2, -3), slice(None, None, 7)):
        assert tokens[piece].tolist() == row[piece]
        assert tokens[piece].dtype == torch.int64
    with pytest.raises(IndexError):
        tokens[len(row)]


def test_blocks_are_consecutive_batches(tokens: TokenFile) -> None:
    row = tokens.tokens.tolist()
    rows = [row[start : start + 16] for start in range(0, len(row) - 15, 16)]
    assert tokens.blocks(16).tolist() == rows
    assert tokens.blocks(16).dtype == torch.int64
    for start, stop in ((0, 4), (2, 5), (-2, None), (5, 2), (3, 10**6)):
        assert tokens.blocks(16, start, stop).tolist() == rows[start:stop]
        assert tokens.blocks(16, start, stop).shape[1] == 16
    assert tokens.blocks(len(row)).tolist() == [row]
    for length in (0, -1, len(row) + 1):
        with pytest.raises(ValueError, match=f"length={length} must be from 1 to"):
            tokens.blocks(length)


@pytest.mark.parametrize("index", [-1, 10**6])
def test_blocks_that_are_not_there_are_refused(tokens: TokenFile, index: int) -> None:
    with pytest.raises(IndexError, match=f"block {index} is not one of the"):
        tokens.block(index, 16)


def test_the_last_token_makes_a_block_whole(tmp_path: Path, stories: list[str], bpe_folder: Path) -> None:
    tokenizer = load_tokenizer(bpe_folder)
    file = write_tokens(tmp_path / "one.bin", stories[:1], tokenizer, name="test", progress=False)
    assert file.n_blocks(file.n_tokens - 1) == 1
    assert file.n_blocks(file.n_tokens) == 0


def test_validation_blocks_are_the_first_ones(tokens: TokenFile) -> None:
    blocks = validation_blocks(tokens, 16, n_tokens=40)
    assert blocks.tolist() == [tokens.block(0, 16).tolist(), tokens.block(1, 16).tolist()]
    assert len(validation_blocks(tokens, 16, n_tokens=1)) == 1
    assert len(validation_blocks(tokens, 16, n_tokens=10**9)) == tokens.n_blocks(16)
    with pytest.raises(ValueError, match="fewer than one block"):
        validation_blocks(tokens, tokens.n_tokens, n_tokens=100)


@pytest.mark.parametrize(("d_vocab", "dtype"), [(400, "uint16"), (256, "uint8"), (70_000, "uint32")])
def test_the_smallest_type_that_fits(tmp_path: Path, d_vocab: int, dtype: str) -> None:
    class Counting:
        """Encodes "3 5" as [3, 5]."""

        bos_token_id = None
        eos_token_id = 0
        name_or_path = "counting"

        def get_vocab(self) -> dict[str, int]:
            return {str(i): i for i in range(d_vocab)}

        def __call__(self, texts: list[str], **_: object) -> dict[str, list[list[int]]]:
            return {"input_ids": [[int(word) for word in text.split()] for text in texts]}

    largest = d_vocab - 1
    file = write_tokens(tmp_path / "t.bin", [f"1 {largest}"], Counting(), name="test", progress=False)  # type: ignore[arg-type]
    assert file.dtype == dtype
    assert file.tokens.tolist() == [1, largest, 0]
    with pytest.raises(ValueError, match="beyond its vocabulary"):
        write_tokens(tmp_path / "u.bin", [f"1 {d_vocab}"], Counting(), name="test", progress=False)  # type: ignore[arg-type]
    assert not (tmp_path / "u.bin").exists()


def test_a_truncated_file_is_refused(tokens: TokenFile) -> None:
    tokens.path.write_bytes(tokens.path.read_bytes()[:-3])
    with pytest.raises(ValueError, match="is truncated or damaged"):
        TokenFile.open(tokens.path)


def test_a_file_without_its_header_does_not_exist(tokens: TokenFile) -> None:
    tokens.path.with_suffix(".json").unlink()
    with pytest.raises(FileNotFoundError, match="with its header"):
        TokenFile.open(tokens.path)


def test_another_format_is_refused(tokens: TokenFile) -> None:
    header = tokens.path.with_suffix(".json")
    header.write_text(json.dumps({**json.loads(header.read_text()), "format": 0}))
    with pytest.raises(ValueError, match="another format"):
        TokenFile.open(tokens.path)


@pytest.mark.parametrize("byte", [b"\0", b"\xff"])
def test_other_tokens_of_the_same_length_are_refused(tokens: TokenFile, byte: bytes) -> None:
    tokens.path.write_bytes(byte * tokens.path.stat().st_size)
    with pytest.raises(ValueError, match="its tokens are not those that were written; delete it"):
        TokenFile.open(tokens.path)


@pytest.mark.parametrize("change", [{"n_bytes": 1}, {"d_vocab": 3}, {"end_token_id": 7}, {"more": 1}])
def test_a_changed_header_is_refused(tokens: TokenFile, change: dict[str, int]) -> None:
    header = tokens.path.with_suffix(".json")
    header.write_text(json.dumps({**json.loads(header.read_text()), **change}))
    with pytest.raises(ValueError, match=r"\.json is damaged: it is not what was written; delete it"):
        TokenFile.open(tokens.path)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 2}', "\0" * 50])
def test_a_header_that_is_no_header_is_refused(tokens: TokenFile, content: str) -> None:
    tokens.path.with_suffix(".json").write_text(content)
    with pytest.raises(ValueError, match=r"\.json is damaged"):
        TokenFile.open(tokens.path)


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_a_failure_half_way_leaves_nothing(
    failure: type[BaseException],
    tmp_path: Path,
    stories: list[str],
    bpe_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sa_lens.data.tokens.PARTS", 7)

    def breaking() -> Iterator[str]:
        yield from stories[:50]
        raise failure("the source broke")

    with pytest.raises(failure, match="the source broke"):
        write_tokens(tmp_path / "x.bin", breaking(), load_tokenizer(bpe_folder), name="test", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_no_text_is_refused(tmp_path: Path, bpe_folder: Path) -> None:
    with pytest.raises(ValueError, match="the test text is empty"):
        write_tokens(tmp_path / "x.bin", [], load_tokenizer(bpe_folder), name="test", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_a_pickle_maps_the_file_again(tokens: TokenFile) -> None:
    assert tokens.tokens.sum() > 0
    raw = pickle.dumps(tokens)
    assert len(raw) < 2000
    assert pickle.loads(raw).tokens.tolist() == tokens.tokens.tolist()


def test_a_model_with_too_small_a_vocabulary_is_refused(tokens: TokenFile) -> None:
    tokens.check_vocabulary(400)
    with pytest.raises(ValueError, match="beyond the model's 399"):
        tokens.check_vocabulary(399)
