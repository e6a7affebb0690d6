"""Trained tokenizers: exact round trips, kept words, and a folder that TransformerLens takes."""

import json
import re
import shutil
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from sa_lens.config import DataConfig
from sa_lens.core import HookedTransformer, HookedTransformerConfig
from sa_lens.core.base import TRANSFORMER_LENS
from sa_lens.core.initial_model import initial_model
from sa_lens.data import load_tokenizer, prepare
from sa_lens.data.tokenizers import (
    END_OF_TEXT,
    boundary_tokens,
    byte_letters,
    fetch_tokenizer,
    prompt_tokenizer,
    read_words,
    token_text,
    tokenizer_fingerprint,
    train_bpe,
)
from sa_lens.data.tokens import vocabulary_of, write_tokens

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


def test_the_text_of_a_token_shows_bytes_of_characters(tokenizer: PreTrainedTokenizerBase) -> None:
    text = "Lily said “漢😀 é”\n\ufffd \x00 <0x41>"
    tokens = tokenizer.encode(text, add_special_tokens=False)
    shown = [token_text(tokenizer, token) for token in tokens]
    assert "<0xE2>" in shown
    assert " said" in shown
    assert "\ufffd" not in "".join(shown)
    # oracle: the bytes that are shown, with the characters between them, are those of the text
    parts = re.split("<0x([0-9A-F]{2})>", "".join(shown).replace("<0x41>", "<&0x41>"))
    whole = b"".join(bytes.fromhex(x) if i % 2 else x.encode() for i, x in enumerate(parts))
    assert whole == text.replace("<0x41>", "<&0x41>").encode()
    assert token_text(None, 17) == "17"


def test_byte_letters_are_those_of_byte_level_tokenizers() -> None:
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    assert set(byte_letters()) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(byte_letters().values()) == list(range(256))
    for character in map(chr, (*range(0x800), 0x2028, 0x1F600)):
        [(letters, _)] = split.pre_tokenize_str(character)
        assert bytes(byte_letters()[letter] for letter in letters) == character.encode()


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


# -------------------------------------------------------------------------------------------------------- foreign code


def test_python_in_a_tokenizers_folder_is_never_run(bpe_folder: Path, tmp_path: Path, monkeypatch) -> None:
    """`auto_map` names a class in a file beside it; transformers would import that file where it may."""
    mark = tmp_path / "it ran"
    folder = tmp_path / "tokenizer"
    shutil.copytree(bpe_folder, folder)
    (folder / "own.py").write_text(
        "from pathlib import Path\nfrom transformers import PreTrainedTokenizerFast\n"
        f"Path({str(mark)!r}).touch()\nclass Own(PreTrainedTokenizerFast):\n    pass\n"
    )
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.Own"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    try:
        load_tokenizer(folder)
    except ValueError as error:
        assert "needs Python code of its own, which is never run" in str(error)  # noqa: PT017
    assert not mark.exists()
    # it would have run: the test tests something
    AutoTokenizer.from_pretrained(str(folder), trust_remote_code=True)
    assert mark.exists()


def test_trust_is_refused_at_every_call_of_the_package() -> None:
    """Every call that may load code from a folder or the Hub says that it must not."""
    calls = re.compile(
        r"(?:Auto\w+\.from_(?:pretrained|config)|from_pretrained_no_processing|load_dataset(?:_builder)?)\("
    )
    found = 0
    for file in (Path(__file__).parents[2] / "sa_lens").rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        for call in calls.finditer(text):
            line = text[text.rfind("\n", 0, call.start()) : text.find("\n", call.start())]
            if '"' not in line[: line.find(call.group())]:  # not a line of text for people
                found += 1
                assert "trust_remote_code=False" in text[call.start() : call.start() + 160], f"{file}: {line.strip()}"
    assert found >= 5


# ------------------------------------------------------------------------------------------------ beginning and end

_TEMPLATES = {"nothing": None, "both": "<s> $A </s>", "the end": "$A </s>", "the beginning": "<s> $A"}


def in_memory(
    begin: str | None, end: str | None, template: str = "nothing", pre: str = "bytes"
) -> PreTrainedTokenizerFast:
    """A tokenizer that was never on disk."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

    inner = Tokenizer(models.BPE())
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|end:of|>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(False) if pre == "bytes" else pre_tokenizers.Metaspace()
    inner.train_from_iterator(["Lily and Tom went to the park."], trainer)
    if _TEMPLATES[template] is not None:
        ids = [("<s>", 1), ("</s>", 2)]
        inner.post_processor = processors.TemplateProcessing(single=_TEMPLATES[template], special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=begin, eos_token=end)


BOUNDARIES = {
    "equal": ("<|end:of|>", "<|end:of|>", 0, 0),
    "different": ("<s>", "</s>", 1, 2),
    "no beginning": (None, "</s>", 2, 2),
    "no end": ("<s>", None, 1, 1),
}


@pytest.mark.parametrize("pre", ["bytes", "spaces"])
@pytest.mark.parametrize("template", _TEMPLATES)
@pytest.mark.parametrize("name", BOUNDARIES)
def test_one_token_stands_before_every_text(name: str, template: str, pre: str, tmp_path: Path) -> None:
    """In the training text, `to_tokens`, tasks, views, and units: the same, and the one that training has seen."""
    import sa_lens as sa
    from sa_lens.circuits import PromptPairs
    from sa_lens.units.labels import label_stories
    from sa_lens.views.wording import encode_text

    begin_token, end_token, begin, end = BOUNDARIES[name]
    tokenizer = in_memory(begin_token, end_token, template, pre)
    assert boundary_tokens(tokenizer) == (begin, end)
    text = "Lily and Tom"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert not {0, 1, 2} & set(ids)

    file = write_tokens(tmp_path / "a.bin", [text, text], tokenizer, name="test", progress=False)
    document = [*ids, end] if begin == end else [begin, *ids, end]
    assert file.tokens.tolist() == document * 2
    assert begin in file.tokens
    assert (file.begin_token_id, file.end_token_id) == (begin, end)

    cfg = sa.ModelConfig(n_layers=1, d_model=8, n_heads=2, n_ctx=32, d_vocab=vocabulary_of(tokenizer))
    model = sa.SelfAblatingTransformer(cfg, sa.GateConfig(k_attn=2, k_mlp=2), tokenizer, device="cpu")
    for _ in range(2):
        assert model.to_tokens(text).tolist() == [[begin, *ids]]
        assert model.to_tokens(text, prepend_bos=False).tolist() == [ids]
        assert model.to_tokens(["Tom", text], padding_side="left")[1].tolist() == [begin, *ids]
        assert model.to_tokens("").tolist() == [[begin]]
        assert encode_text(model.tokenizer, text) == encode_text(tokenizer, text) == [begin, *ids]
        assert model.tokenizer.eos_token_id == end, "where generated text stops"
        pairs = PromptPairs.from_texts([("x", "q", "z", "v")], model.tokenizer) if pre == "bytes" else None
        assert pairs is None or set(pairs.clean[:, 0].tolist()) == {begin}
        labelled = label_stories(model.tokenizer, 3, 32).tokens.flatten().tolist()
        assert labelled[0] == (begin if begin != end else labelled[0])
        assert labelled.count(begin) >= 1
        # saved and loaded, it is still the same
        model.save_pretrained(tmp_path / "model")
        model = sa.SelfAblatingTransformer.from_pretrained(tmp_path / "model")
    assert tokenizer.bos_token == begin_token, "the tokenizer that was given is untouched"


def test_what_is_no_hugging_face_tokenizer_is_refused_with_the_way_out() -> None:
    import sa_lens as sa

    cfg = sa.ModelConfig(n_layers=1, d_model=8, n_heads=2, n_ctx=8, d_vocab=300)
    inner = in_memory("<s>", "</s>").backend_tokenizer
    with pytest.raises(ValueError, match=r"wrap one of the tokenizers library in PreTrainedTokenizerFast\("):
        sa.SelfAblatingTransformer(cfg, None, inner, device="cpu")
    with pytest.raises(ValueError, match="the tokenizer is a str, but must be a Hugging Face one"):
        sa.SelfAblatingTransformer(cfg, None, "gpt2", device="cpu")


def test_a_configuration_does_not_let_transformer_lens_run_code() -> None:
    import sa_lens as sa

    cfg = HookedTransformerConfig(
        n_layers=1, d_model=8, n_heads=2, d_head=4, n_ctx=8, d_vocab=9, act_fn="gelu", device="cpu"
    )
    cfg.trust_remote_code = True
    assert sa.SelfAblatingTransformer(cfg, sa.GateConfig(k_attn=2, k_mlp=2)).cfg.trust_remote_code is False


@pytest.mark.skipif(TRANSFORMER_LENS > 3, reason="the loader of TransformerLens 4 is told to run no code itself")
def test_a_model_that_needs_code_from_the_hub_is_refused() -> None:
    import sa_lens as sa

    with pytest.raises(ValueError, match="with Python code from the Hub, which is never run here"):
        initial_model("microsoft/phi-2", sa.GateConfig())


def test_a_prompt_tokenizer_adds_one_token_and_no_more() -> None:
    for template in _TEMPLATES:
        once = prompt_tokenizer(in_memory("<s>", "</s>", template))
        twice = prompt_tokenizer(once)
        plain = once("Tom", add_special_tokens=False)["input_ids"]
        assert once("Tom")["input_ids"] == twice("Tom")["input_ids"] == [1, *plain]
        assert once("")["input_ids"] == [1]


def test_a_tokenizer_without_boundaries_is_refused_with_the_way_out() -> None:
    with pytest.raises(ValueError, match=r"has neither an end-of-text token .* or set tokenizer\.eos_token"):
        prompt_tokenizer(in_memory(None, None))


def test_fingerprints_are_of_what_decides_the_tokens() -> None:
    tokenizer = in_memory("<s>", "</s>")
    key = tokenizer_fingerprint(tokenizer)
    tokenizer(["a", "a b c"], padding=True, truncation=True, max_length=2) if tokenizer.pad_token else None
    assert tokenizer_fingerprint(in_memory("<s>", "</s>", "both")) == key, "what it adds by itself has no say"
    assert tokenizer_fingerprint(prompt_tokenizer(tokenizer)) == key
    assert tokenizer_fingerprint(in_memory(None, "</s>")) != key
    assert tokenizer_fingerprint(in_memory("<s>", "</s>", pre="spaces")) != key


def test_a_damaged_tokenizer_in_the_cache_is_refused(tmp_path: Path) -> None:
    """Other words in the same place would give other tokens, and with them another model."""
    texts = tmp_path / "a.txt"
    texts.write_text("\n".join(f"Tom has {i} apples." for i in range(100)))
    config = DataConfig(source=str(texts), vocab_size=300, cache_dir=str(tmp_path / "cache"))
    folder = prepare(config, 8, progress=False).tokenizer_folder
    file = folder / "tokenizer.json"
    file.write_text(file.read_text().replace("Tom", "Tim"))
    with pytest.raises(ValueError, match="in the cache is damaged; delete it and"):
        prepare(config, 8, progress=False)
