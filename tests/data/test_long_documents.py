"""Long documents in pieces: the tokens of the whole, with bounded memory."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sa_lens.data import load_tokenizer, long_documents
from sa_lens.data.tokenizers import train_bpe
from sa_lens.data.tokens import write_tokens

LETTERS = "abcdefgh"


@pytest.fixture(autouse=True)
def _short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_documents, "PIECE", 400)
    monkeypatch.setattr(long_documents, "CONTEXT", 60)


def prose(n: int, seed: int = 0) -> str:
    """Words, numbers, punctuation, line ends, runs of spaces and letters of other scripts."""
    rng = random.Random(seed)
    parts = [" ", " ", " ", "  ", "\n", "\n\n", ", ", '. "', " 2024", "'s ", " é", " 猫", "\t", " 🐈 "]
    text = ""
    while len(text) < n:
        text += "".join(rng.choices(LETTERS, k=rng.randint(1, 7))) + rng.choice(parts)
    return text


def tokenizers() -> dict[str, Callable[[str], list[int]]]:
    """Encoders of every kind that matters, trained on the same prose."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    def trained(model: Any, trainer: Any, pre: Any = None, normalizer: Any = None) -> Callable[[str], list[int]]:
        tokenizer = Tokenizer(model)
        if pre is not None:
            tokenizer.pre_tokenizer = pre
        tokenizer.train_from_iterator([prose(4000, 1)], trainer)
        if normalizer is not None:
            # SentencePiece learns merges within words, and applies them to the whole text
            tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, None
        return lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids)

    bytes_ = pre_tokenizers.ByteLevel.alphabet()
    bpe = trainers.BpeTrainer(vocab_size=500, initial_alphabet=bytes_, show_progress=False)
    plain = trainers.BpeTrainer(vocab_size=500, special_tokens=["?"], show_progress=False)
    unigram = trainers.UnigramTrainer(vocab_size=200, special_tokens=["?"], unk_token="?", show_progress=False)
    word_piece = trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]"], show_progress=False)
    digits = pre_tokenizers.Split(Regex(r"\\p{N}{1,3}|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\s+(?!\\S)|\\s+|\\S"), "isolated")
    llama = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return {
        "GPT-2": trained(models.BPE(), bpe, pre_tokenizers.ByteLevel(add_prefix_space=False)),
        "GPT-2 with a space first": trained(models.BPE(), bpe, pre_tokenizers.ByteLevel(add_prefix_space=True)),
        "GPT-4": trained(
            models.BPE(), bpe, pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(False, use_regex=False)])
        ),
        "Metaspace": trained(models.Unigram(), unigram, pre_tokenizers.Metaspace()),
        "WordPiece": trained(models.WordPiece(unk_token="[UNK]"), word_piece, pre_tokenizers.Whitespace()),
        "Llama, no words": trained(models.BPE(unk_token="?"), plain, pre_tokenizers.Metaspace(), llama),
    }


@pytest.mark.parametrize(
    "name", ["GPT-2", "GPT-2 with a space first", "GPT-4", "Metaspace", "WordPiece", "Llama, no words"]
)
def test_pieces_have_the_tokens_of_the_whole(name: str) -> None:
    encode = tokenizers()[name]
    for seed in range(5):
        text = prose(6000, seed + 2)
        parts = [part for part, _ in long_documents.split_document(text, encode)]
        assert [token for part in parts for token in encode(part)] == encode(text)
        assert len(parts) >= 12
        assert max(map(len, parts)) < 800


def test_only_the_last_piece_is_the_last() -> None:
    encode = tokenizers()["GPT-2"]
    assert [last for _, last in long_documents.split_document(prose(2000), encode)][-2:] == [False, True]
    assert list(long_documents.split_document("short", encode)) == [("short", True)]
    assert list(long_documents.split_document("", encode)) == [("", True)]


def test_a_text_without_spaces_is_cut_too() -> None:
    encode = tokenizers()["GPT-2"]
    text = "".join(random.Random(0).choices(LETTERS + "12.", k=4000))
    parts = [part for part, _ in long_documents.split_document(text, encode)]
    assert [token for part in parts for token in encode(part)] == encode(text)
    assert len(parts) >= 5


def test_where_nothing_can_be_cut_the_text_stays_whole() -> None:
    def sign(text: str) -> list[int]:
        return [sum(map(ord, text))]

    assert list(long_documents.split_document("ab " * 900, sign)) == [("ab " * 900, True)]


def test_long_documents_on_disk_are_those_in_one_piece(
    bpe_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sa_lens.data.tokens.PARTS", 3)
    documents = [prose(3000, 1), "short", prose(1500, 2)]
    tokenizer = load_tokenizer(bpe_folder)
    file = write_tokens(tmp_path / "a.bin", documents, tokenizer, name="test", progress=False)
    row = [token for text in documents for token in [*tokenizer.encode(text), tokenizer.eos_token_id]]
    assert file.tokens.tolist() == row
    assert file.n_documents == 3
    assert file.n_bytes == sum(len(text.encode()) for text in documents)


def test_a_tokenizer_is_the_same_from_long_documents(tmp_path: Path) -> None:
    text = prose(5000)
    for name, size in (("pieces", 400), ("whole", 10**6)):
        long_documents.PIECE = size
        train_bpe([text], tmp_path / name, vocab_size=350, keep_whole=["abc"], progress=False)
    assert (tmp_path / "pieces" / "tokenizer.json").read_bytes() == (tmp_path / "whole" / "tokenizer.json").read_bytes()


def test_memory_of_a_long_document(bpe_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is encoded at a time is bounded, whatever the length of the document."""
    import sa_lens.data.tokens as module

    monkeypatch.setattr(module, "CHARACTERS", 2000)
    tokenizer = load_tokenizer(bpe_folder)
    sizes = []
    encoded = module._encode

    def counted(tokenizer: Any, texts: list[str]) -> list[list[int]]:
        sizes.append(sum(map(len, texts)))
        return encoded(tokenizer, texts)

    monkeypatch.setattr(module, "_encode", counted)
    write_tokens(tmp_path / "a.bin", [prose(20_000)], tokenizer, name="test", progress=False)
    assert max(sizes) <= 2000
