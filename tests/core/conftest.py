"""Fixtures shared by the tests of `sa_lens.core`."""

from __future__ import annotations

import pytest
from small_models import D_VOCAB
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    """A saved word-level tokenizer with `D_VOCAB` entries: <eos> (also begin of text), <pad>, <unk> and w0, w1, ..."""
    words = ["<eos>", "<pad>", "<unk>", *(f"w{i}" for i in range(D_VOCAB - 3))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<eos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def tokenizer(tokenizer_folder):
    """A fresh copy of the tokenizer, for models that change its padding side."""
    return AutoTokenizer.from_pretrained(tokenizer_folder)
