"""From configuration to tokens: the split, the cache, two processes at once, and errors before any training."""

import dataclasses
import json
import os
from pathlib import Path

import forked
import pytest

from sa_lens.config import DataConfig
from sa_lens.data import TokenFile, prepare

SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture
def text_file(tmp_path: Path, stories: list[str]) -> Path:
    path = tmp_path / "stories.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in stories), encoding="utf-8")
    return path


@pytest.fixture
def config(text_file: Path, tmp_path: Path) -> DataConfig:
    return DataConfig(source=str(text_file), vocab_size=400, validation_fraction=0.1, cache_dir=str(tmp_path / "cache"))


def documents(file: TokenFile, tokenizer: object) -> list[str]:
    return tokenizer.decode(file.tokens.tolist()).split("<|endoftext|>")[:-1]  # type: ignore[attr-defined]


def test_documents_are_split_once_and_for_all(config: DataConfig, stories: list[str]) -> None:
    data = prepare(config, 16, progress=False)
    train, held_out = (documents(file, data.tokenizer) for file in (data.train, data.validation))
    assert len(held_out) == 30
    assert sorted(train + held_out) == sorted(stories)
    assert [text for text in stories if text in set(train)] == train, "documents keep their order"
    assert data.d_vocab == len(data.tokenizer) == 400
    assert (data.tokenizer_folder / "tokenizer.json").is_file()


def test_the_split_follows_its_seed_and_not_the_order(config: DataConfig, text_file: Path, stories: list[str]) -> None:
    def held_out(settings: DataConfig) -> set[str]:
        data = prepare(settings, 16, progress=False)
        return set(documents(data.validation, data.tokenizer))

    first = held_out(config)
    assert held_out(dataclasses.replace(config, stories_seed=1)) != first
    text_file.write_text("".join(json.dumps({"text": text}) + "\n" for text in reversed(stories)), encoding="utf-8")
    assert held_out(config) == first


def test_equal_documents_fall_on_one_side(config: DataConfig, text_file: Path, stories: list[str]) -> None:
    text_file.write_text("".join(json.dumps({"text": text}) + "\n" for text in stories * 2), encoding="utf-8")
    data = prepare(config, 16, progress=False)
    train, held_out = (documents(file, data.tokenizer) for file in (data.train, data.validation))
    assert len(held_out) == 60
    assert not set(train) & set(held_out)


def test_a_second_call_finds_everything(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare(config, 16, progress=False)
    for name in ("write_tokens", "train_bpe"):
        monkeypatch.setattr(f"sa_lens.data.preparation.{name}", lambda *_, **__: pytest.fail("made again"))
    again = prepare(config, 32, progress=False)
    assert (again.train, again.validation) == (first.train, first.validation)


def test_each_setting_that_matters_makes_other_files(config: DataConfig, tmp_path: Path) -> None:
    words = tmp_path / "words.txt"
    words.write_text("Rumpel\n")
    variants = [
        config,
        dataclasses.replace(config, vocab_size=399),
        dataclasses.replace(config, validation_fraction=0.2),
        dataclasses.replace(config, stories_seed=1),
        dataclasses.replace(config, max_documents=250),
        dataclasses.replace(config, keep_whole=str(words)),
    ]
    assert len({prepare(variant, 16, progress=False).train.path for variant in variants}) == len(variants)


def _prepare_in_process(settings: dict[str, object], barrier: object, results: object) -> None:
    barrier.wait()  # type: ignore[attr-defined]
    data = prepare(DataConfig(**settings), 16, progress=False)  # type: ignore[arg-type]
    results.put((data.train.fingerprint, data.train.path.stat().st_ino, data.tokenizer_folder))  # type: ignore[attr-defined]


def test_two_processes_at_once_make_one_file_and_a_third_the_same(config: DataConfig, tmp_path: Path) -> None:
    barrier, results = forked.CONTEXT.Barrier(2), forked.CONTEXT.Queue()
    settings = dataclasses.asdict(config)
    processes = [forked.start(_prepare_in_process, settings, barrier, results) for _ in range(2)]
    first, second = results.get(timeout=60), results.get(timeout=60)
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    assert first == second
    assert len(list(Path(str(config.cache_dir), "tokens").glob("*.bin"))) == 2
    elsewhere = dataclasses.replace(config, cache_dir=str(tmp_path / "elsewhere"))
    assert prepare(elsewhere, 16, progress=False).train.fingerprint == first[0]


def test_a_named_validation_file_is_read_whole(config: DataConfig, tmp_path: Path, stories: list[str]) -> None:
    path = tmp_path / "held-out.txt"
    path.write_text("\n<|endoftext|>\n".join(["A different story.\nWith two lines.", "Another one, as long as that."]))
    for split in (None, "validation"):
        settings = dataclasses.replace(config, validation=str(path), validation_split=split)
        data = prepare(settings, 8, progress=False)
        assert documents(data.train, data.tokenizer) == stories
        assert documents(data.validation, data.tokenizer)[0] == "A different story.\nWith two lines."


def test_a_split_of_the_source(tmp_path: Path, stories: list[str]) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.txt").write_text("\n<|endoftext|>\n".join(stories[:200]), encoding="utf-8")
    (folder / "dev.txt").write_text("\n<|endoftext|>\n".join(stories[200:]), encoding="utf-8")
    settings = DataConfig(
        source=str(folder), validation_split="validation", vocab_size=400, cache_dir=str(tmp_path / "cache")
    )
    data = prepare(settings, 8, progress=False)
    assert documents(data.train, data.tokenizer) == stories[:200]
    assert documents(data.validation, data.tokenizer) == stories[200:]


def test_a_tokenizer_folder(config: DataConfig, bpe_folder: Path, stories: list[str]) -> None:
    data = prepare(dataclasses.replace(config, tokenizer=str(bpe_folder)), 16, progress=False)
    assert data.tokenizer_folder == bpe_folder
    assert data.tokenizer.encode(" Rumpel") == [data.tokenizer.convert_tokens_to_ids("ĠRumpel")]
    assert len(documents(data.train, data.tokenizer)) == 270


@pytest.mark.parametrize("vocab_size", [600, 1000])
def test_words_of_generated_stories_are_single_tokens(vocab_size: int, tmp_path: Path) -> None:
    from sa_lens.data import stories

    config = DataConfig(n_stories=100, vocab_size=vocab_size, cache_dir=str(tmp_path))
    data = prepare(config, 32, progress=False)
    for word in stories.vocabulary() if vocab_size == 1000 else stories.NAMES:
        assert len(data.tokenizer.encode(" " + word)) == 1, word
    starts = [story.text.split()[0].strip(',"') for story in stories.generate(100)]
    for word in starts if vocab_size == 1000 else set(starts) & set(stories.NAMES):
        assert len(data.tokenizer.encode(word)) == 1, word
    assert data.train.n_documents + data.validation.n_documents == 100


def test_a_truncated_token_file_is_refused(config: DataConfig) -> None:
    path = prepare(config, 16, progress=False).train.path
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="is truncated or damaged"):
        prepare(config, 16, progress=False)


def test_a_file_without_a_header_is_made_again(config: DataConfig) -> None:
    data = prepare(config, 16, progress=False)
    data.train.path.with_suffix(".json").unlink()
    data.train.path.write_bytes(b"half")
    assert prepare(config, 16, progress=False).train.fingerprint == data.train.fingerprint


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="permissions do not bind this user")
def test_a_folder_that_cannot_be_written(config: DataConfig, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    with pytest.raises(PermissionError, match=r"name a folder with room .* data.cache_dir"):
        prepare(dataclasses.replace(config, cache_dir=str(locked)), 16, progress=False)


def test_a_cache_that_is_a_file(config: DataConfig, text_file: Path) -> None:
    with pytest.raises(OSError, match=r"cannot write the cache file .* data.cache_dir"):
        prepare(dataclasses.replace(config, cache_dir=str(text_file)), 16, progress=False)


def test_a_full_disk(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("sa_lens.data.cache.os.fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: cannot write the cache file .* data.cache_dir"):
        prepare(config, 16, progress=False)
    assert list(Path(str(config.cache_dir), "tokens").glob("*.bin")) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"column": "story"}, "has no column 'story'; its columns: 'text'"),
        ({"validation_split": "validation"}, "has no splits, so no data.validation_split='validation'"),
        ({"split": "test"}, "has no splits, so no data.split='test'"),
        ({"validation": "stories"}, "data.validation='stories' is not a text of its own"),
        ({"streaming": True, "max_documents": 10}, "data.streaming is for datasets on the Hub"),
        ({"source": "stories", "validation_split": "test"}, "has no splits"),
    ],
)
def test_settings_that_do_not_fit_are_refused(config: DataConfig, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepare(dataclasses.replace(config, **changes), 16, progress=False)  # type: ignore[arg-type]


def test_kept_words_need_a_trained_tokenizer(config: DataConfig, bpe_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("Tim\n")
    settings = dataclasses.replace(config, tokenizer=str(bpe_folder), keep_whole=str(tmp_path / "words.txt"))
    with pytest.raises(ValueError, match=r"data.keep_whole applies to data.tokenizer='bpe'"):
        prepare(settings, 16, progress=False)


def test_training_text_is_no_validation_text(config: DataConfig, text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is the training text"):
        prepare(dataclasses.replace(config, validation=str(text_file)), 16, progress=False)
    copy = tmp_path / "copy.jsonl"
    copy.write_text(text_file.read_text() + "\n")
    with pytest.raises(ValueError, match="equals the training text"):
        prepare(dataclasses.replace(config, validation=str(copy)), 16, progress=False)


def test_text_shorter_than_a_block_is_refused(config: DataConfig) -> None:
    with pytest.raises(ValueError, match=r"validation text has .* fewer than one block of n_ctx \+ 1 = 5,001"):
        prepare(config, 5000, progress=False)


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "is empty"), ("\n \n", "is empty"), ('one\n"two"\n', None), ("only one\n", "is a single document")],
)
def test_too_little_text_is_refused(content: str, message: str | None, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(content)
    settings = DataConfig(source=str(path), cache_dir=str(tmp_path / "cache"))
    if message is None:
        assert prepare(settings, 1, progress=False).validation.n_documents == 1
    else:
        with pytest.raises(ValueError, match=message):
            prepare(settings, 1, progress=False)


def test_missing_files_are_named(config: DataConfig) -> None:
    for name in ("source", "validation", "keep_whole"):
        with pytest.raises(FileNotFoundError, match=r"missing\.txt"):
            prepare(dataclasses.replace(config, **{name: "./missing.txt"}), 16, progress=False)


def test_progress_is_shown_and_hidden(config: DataConfig, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    prepare(config, 16, progress=False)
    assert capfd.readouterr().err == ""
    prepare(dataclasses.replace(config, cache_dir=str(tmp_path / "other")), 16, progress=True)
    assert "270/270" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data folder is not here")
def test_published_token_count(tmp_path: Path) -> None:
    settings = DataConfig(
        source=str(SHARED / "tinystories-train.parquet"),
        validation=str(SHARED / "tinystories-valid.parquet"),
        tokenizer=str(SHARED / "gpt2-tokenizer"),
        cache_dir=str(tmp_path),
    )
    data = prepare(settings, 256, progress=False)
    assert data.train.n_tokens - data.train.n_documents == 4_452_079
    assert data.validation.n_tokens - data.validation.n_documents == 571_716
    assert data.train.dtype == "uint16"
