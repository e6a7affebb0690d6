"""Small texts and a tokenizer that every data test can share."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from sa_lens.data.tokenizers import train_bpe

_WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "ball",
    "ran",
    "saw",
    "gave",
    "to",
    "and",
    "was",
    "happy",
    "in",
    "park",
    "big",
    "red",
]
_NAMES = ["Tim", "Timothy", "Lily", "Zoë", "Ann", "Anna"]


def make_stories(count: int, seed: int = 0) -> list[str]:
    """Distinct little texts with names in the middle, at the start and after a quotation mark."""
    rng = random.Random(seed)
    stories = []
    for index in range(count):
        words = rng.choices(_WORDS, k=rng.randint(5, 30))
        first, second = rng.sample(_NAMES, 2)
        stories.append(f'One day {first} {" ".join(words)} {index}.\n"{second}, stop!" said {first}.')
    return stories


@pytest.fixture(scope="session")
def stories() -> list[str]:
    return make_stories(300)


@pytest.fixture(scope="session")
def bpe_folder(stories: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained tokenizer with 400 tokens that keeps "Tim" and "Rumpel" (never seen) whole."""
    folder = tmp_path_factory.mktemp("tokenizer") / "bpe"
    train_bpe(stories, folder, vocab_size=400, keep_whole=["Tim", "Rumpel"], progress=False)
    return folder
