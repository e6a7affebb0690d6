"""Trained tokenizers: exact round trips, kept words, and a folder that TransformerLens takes."""

import json
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformers import PreTrainedTokenizerBase

from sa_lens.data import load_tokenizer
from sa_lens.data.tokenizers import (
    END_OF_TEXT,
    fetch_tokenizer,
    read_words,
    tokenizer_fingerprint,
    train_bpe,
)
from sa_lens.data.tokens import vocabulary_of

SHARED = Path(__file__).parents[3] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data folder is not here")


@pytest.fixture(scope="module")
def tokenizer(bpe_folder: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(bpe_folder)


@given(text=st.text())
@example(text="Tim  and Timothy's\r\n\t Tim\u00a0Tim ")
@example(text="漢字 🧑‍🚀👩🏽 e\u0301 \x00 \ufffd")
@example(text=f"a{END_OF_TEXT} Tim{END_OF_TEXT}")
def test_every_text_comes_back(text: str, tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_kept_words_are_one_token_as_whole_words_only(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.tokenize(" Tim") == ["ĠTim"]
    assert tokenizer.tokenize(" Rumpel") == ["ĠRumpel"]
    assert "ĠTim" in tokenizer.tokenize("saw Tim's cat")
    # no merge leads to a word that the text does not hold, so longer words are cut as if it were not kept
    assert "ĠRumpel" not in tokenizer.tokenize(" Rumpelstiltskin")
    assert "".join(tokenizer.tokenize(" Rumpelstiltskin")) == "ĠRumpelstiltskin"


def test_a_kept_word_stands_without_space_only_where_the_text_has_it_so(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.tokenize('"Tim') == ['"', "Tim"]
    assert len(tokenizer.tokenize("Rumpel")) > 1


def test_keeping_words_does_not_change_how_other_words_are_cut(stories: list[str], tmp_path: Path) -> None:
    """Against plain training for the room that is left."""
    kept = ["Rumpel", "Stiltskin", "Xanthippe"]
    train_bpe(stories, tmp_path / "kept", vocab_size=350, keep_whole=kept, progress=False)
    train_bpe(stories, tmp_path / "plain", vocab_size=347, progress=False)
    with_kept, plain = load_tokenizer(tmp_path / "kept"), load_tokenizer(tmp_path / "plain")
    assert len(with_kept) == 350
    assert len(plain) == 347
    for text in stories[:50]:
        assert with_kept.encode(text) == plain.encode(text)


def test_words_that_training_merges_take_no_extra_room(stories: list[str], tmp_path: Path) -> None:
    train_bpe(stories, tmp_path / "kept", vocab_size=400, keep_whole=["the", "cat", "dog"], progress=False)
    vocab = load_tokenizer(tmp_path / "kept").get_vocab()
    assert len(vocab) == 400
    assert sorted(vocab.values()) == list(range(400))


def test_training_is_deterministic(stories: list[str], bpe_folder: Path, tmp_path: Path) -> None:
    train_bpe(stories, tmp_path / "again", vocab_size=400, keep_whole=["Rumpel", "Tim"], progress=False)
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == (bpe_folder / "tokenizer.json").read_bytes()


def test_a_vocabulary_ends_where_the_text_has_no_more_to_merge(tmp_path: Path) -> None:
    train_bpe(["ab ab"], tmp_path / "small", vocab_size=1000, progress=False)
    assert load_tokenizer(tmp_path / "small").get_vocab().keys() >= {"ab", "Ġab"}
    assert len(load_tokenizer(tmp_path / "small")) == 259


@pytest.mark.parametrize("word", ["O'Neil", "two words", "R2D2", "Mary-Ann", ""])
def test_words_that_splitting_cuts_are_refused(word: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="more than one word to the tokenizer"):
        train_bpe(["some text"], tmp_path / "t", vocab_size=400, keep_whole=[word], progress=False)


def test_too_many_kept_words_are_refused(tmp_path: Path) -> None:
    words = [f"{a}{b}x" for a in "abcdefgh" for b in "abcdefgh"]
    with pytest.raises(ValueError, match=r"vocab_size=300 is too small.*need 321 at least"):
        train_bpe(["some text"], tmp_path / "t", vocab_size=300, keep_whole=words, progress=False)


def test_special_tokens_are_named(tokenizer: PreTrainedTokenizerBase) -> None:
    names = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token, tokenizer.pad_token)
    assert set(names) == {END_OF_TEXT}
    assert tokenizer.eos_token_id == 0
    assert tokenizer.encode("x") == tokenizer.encode("x", add_special_tokens=False)


def check_transformer_lens_prepends_one_token(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    cfg = HookedTransformerConfig(
        n_layers=1,
        d_model=4,
        n_ctx=16,
        d_head=2,
        n_heads=2,
        act_fn="gelu",
        d_vocab=vocabulary_of(tokenizer),
        device="cpu",
    )
    model = HookedTransformer(cfg, tokenizer=tokenizer)
    plain = tokenizer.encode("x Tim", add_special_tokens=False)
    assert model.to_tokens("x Tim")[0].tolist() == [tokenizer.bos_token_id, *plain]
    assert model.to_tokens("x Tim", prepend_bos=False)[0].tolist() == plain
    assert model.to_string(model.to_tokens("x Tim")[0, 1:]) == "x Tim"
    assert tokenizer.encode("x Tim") == plain, "the tokenizer handed over must stay as it is"


def test_transformer_lens_prepends_one_token(bpe_folder: Path) -> None:
    check_transformer_lens_prepends_one_token(bpe_folder)


@needs_shared
def test_transformer_lens_prepends_one_token_to_gpt2s() -> None:
    check_transformer_lens_prepends_one_token(SHARED / "gpt2-tokenizer")


def test_a_foreign_config_beside_the_tokenizer_does_no_harm(bpe_folder: Path, tmp_path: Path) -> None:
    for file in bpe_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({"model": {"n_layers": 1}, "gates": {}}))
    assert load_tokenizer(tmp_path).encode(" Tim") == load_tokenizer(bpe_folder).encode(" Tim")


def test_saving_again_changes_nothing(bpe_folder: Path, tmp_path: Path) -> None:
    """A model's tokenizer is saved by `save_pretrained`; kept words must survive it."""
    load_tokenizer(bpe_folder).save_pretrained(str(tmp_path))
    again = load_tokenizer(tmp_path)
    assert again.tokenize(" Tim saw Rumpel") == load_tokenizer(bpe_folder).tokenize(" Tim saw Rumpel")
    assert tokenizer_fingerprint(again) == tokenizer_fingerprint(load_tokenizer(bpe_folder))


def test_fingerprints_tell_tokenizers_apart(stories: list[str], bpe_folder: Path, tmp_path: Path) -> None:
    train_bpe(stories, tmp_path / "other", vocab_size=401, progress=False)
    assert tokenizer_fingerprint(load_tokenizer(tmp_path / "other")) != tokenizer_fingerprint(
        load_tokenizer(bpe_folder)
    )


def test_a_tokenizer_without_end_of_text_is_refused(bpe_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((bpe_folder / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    with pytest.raises(ValueError, match="has neither an end-of-text token"):
        load_tokenizer(tmp_path)


def test_folders_without_a_tokenizer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no tokenizer folder"):
        load_tokenizer(tmp_path / "missing")
    with pytest.raises(ValueError, match="holds no Hugging Face tokenizer"):
        load_tokenizer(tmp_path)


def test_names_of_tokenizers(bpe_folder: Path, tmp_path: Path) -> None:
    assert fetch_tokenizer(str(bpe_folder), tmp_path) == bpe_folder.resolve()
    with pytest.raises(ValueError, match="is a file; name the folder"):
        fetch_tokenizer(str(bpe_folder / "tokenizer.json"), tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        fetch_tokenizer("./no/such/folder", tmp_path)


def test_a_tokenizer_of_the_hub_is_saved_in_the_cache(
    bpe_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sa_lens.data.tokenizers._from_hub", lambda name: load_tokenizer(bpe_folder))
    folder = fetch_tokenizer("someone/theirs", tmp_path)
    assert folder.is_relative_to(tmp_path)
    assert load_tokenizer(folder).tokenize(" Rumpel") == ["ĠRumpel"]
    monkeypatch.setattr("sa_lens.data.tokenizers._from_hub", lambda name: pytest.fail("asked twice"))
    assert fetch_tokenizer("someone/theirs", tmp_path) == folder


def test_word_lists(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text("Tim\n\n  Lily \nTim\nZoë\n", encoding="utf-8")
    assert read_words(path) == ["Lily", "Tim", "Zoë"]


def test_ioi_prompts_name_everyone_in_them(tmp_path: Path) -> None:
    prompt = {
        "clean": "Then, Rob and Sue met. Sue gave a bone to",
        "corrupt": "Then, Tina and Anna met. Remy gave a bone to",
        "answers": [" Rob"],
        "wrong_answers": [" Sue"],
    }
    path = tmp_path / "ioi.json"
    path.write_text(json.dumps({"prompts": [prompt]}))
    assert read_words(path) == ["Anna", "Remy", "Rob", "Sue", "Tina"]


@needs_shared
def test_the_published_prompts_have_a_hundred_names() -> None:
    words = read_words(SHARED / "ioi-tinystories.json")
    assert len(words) == 100
    assert {"Lily", "Tim", "Buzz", "May"} <= set(words)


@pytest.mark.parametrize("content", ["[]", "{}", '{"prompts": [{"clean": "a"}]}', "not json"])
def test_other_json_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "ioi.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="is not IOI JSON"):
        read_words(path)


def test_missing_and_empty_word_lists_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_words(tmp_path / "missing.txt")
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(ValueError, match="holds no words"):
        read_words(tmp_path / "empty.txt")
