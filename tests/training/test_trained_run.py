"""The text of a finished run, wherever the run, its text and the working directory have gone."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from pathlib import Path

import pytest

import sa_lens as sa
from sa_lens.data import hub, sources
from sa_lens.data.stories import generate
from sa_lens.training import load_run, text_of_run, train


def write(path: Path, n: int = 60, seed: int = 1) -> None:
    """Generated stories as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps({"text": story.text}) for story in generate(n, seed)), encoding="utf-8")


def project(folder: Path, **data: object) -> Path:
    """A folder with a text at data/text.jsonl, and a run at runs/run that was trained from there on relative names."""
    write(folder / "data" / "text.jsonl")
    run = sa.RunConfig(
        model=sa.ModelConfig(n_layers=1, d_model=16, n_heads=2, n_ctx=16),
        gates=sa.GateConfig(k_attn=4, k_mlp=8),
        data=sa.DataConfig(**{"source": "data/text.jsonl", "vocab_size": 400, "validation_fraction": 0.2, **data}),
        train=sa.TrainConfig(steps=2, batch_size=2, eval_tokens=64, sample_tokens=0, save_every=1),
    )
    with pytest.MonkeyPatch.context() as inside:
        inside.chdir(folder)
        train(run, "runs/run", device="cpu", progress=False)
    return folder / "runs" / "run"


def fingerprints(run: Path) -> list[str]:
    text = json.loads((run / "config.json").read_text())["text"]
    return [text["train"], text["validation"]]


def found(run: Path) -> list[str]:
    """Fingerprints of the text that is found for a run."""
    data = text_of_run(str(run), load_run(str(run), device="cpu"))
    return [data.train.fingerprint, data.validation.fingerprint]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return project(tmp_path_factory.mktemp("project"))


@pytest.fixture
def run(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the project, elsewhere than it was trained; the working directory is yet another."""
    shutil.copytree(made.parents[1], tmp_path / "project")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "project" / "runs" / "run"


def test_run_and_text_that_moved_together(run: Path) -> None:
    assert found(run) == fingerprints(run)


def test_a_run_that_moved_alone_is_read_from_where_its_text_is(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = run.rename(run.parents[2] / "moved")
    with pytest.raises(FileNotFoundError, match=r"data.source='data/text.jsonl' of .*moved is neither in the current"):
        found(moved)
    monkeypatch.chdir(moved.parent / "project")
    assert found(moved) == fingerprints(moved)


def test_another_text_of_the_same_name_is_passed_over(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(Path("data/text.jsonl"), seed=9)
    assert found(run) == fingerprints(run)
    (run.parents[2] / "other" / "runs").mkdir(parents=True)
    moved = run.rename(run.parents[2] / "other" / "runs" / "run")
    write(moved.parents[1] / "data" / "text.jsonl", seed=8)
    monkeypatch.chdir(run.parents[1])
    assert found(moved) == fingerprints(moved), "here the one beside the run is the wrong one"


def test_a_text_that_changed_is_refused(run: Path) -> None:
    write(run.parents[1] / "data" / "text.jsonl", n=70)
    with pytest.raises(ValueError, match=r"data/text.jsonl is not the text that .*run was trained on"):
        found(run)


def test_stories_of_another_generator_are_said(run: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    config = json.loads((run / "config.json").read_text())
    config["run"]["data"] |= {"source": "stories", "n_stories": 100}
    (run / "config.json").write_text(json.dumps(config))
    with caplog.at_level(logging.WARNING):
        assert found(run) != fingerprints(run)
    assert "was trained on stories of another version of their generator" in caplog.text


def test_a_text_is_found_without_encoding_it_again(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        pytest.fail("the text was encoded again")

    monkeypatch.chdir(made.parents[1])
    monkeypatch.setattr("sa_lens.data.preparation.write_tokens", refuse)
    monkeypatch.setattr("sa_lens.data.preparation.train_bpe", refuse)
    assert found(made) == fingerprints(made)


def test_a_configuration_never_chooses_where_to_write(run: Path) -> None:
    config = json.loads((run / "config.json").read_text())
    config["run"]["data"]["cache_dir"] = str(run.parent / "chosen")
    (run / "config.json").write_text(json.dumps(config))
    assert found(run) == fingerprints(run)
    assert not (run.parent / "chosen").exists()


def test_a_dataset_of_the_hub_is_read_in_the_runs_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the Hub has a newer one, and without asking it."""
    opened = sources.open_source
    revisions = {"old": 1, "new": 2}

    def open_source(name: str, **options: object) -> sources.Source:
        if not name.startswith("some/stories"):
            return opened(name, **options)
        revision = name.partition("@")[2] or hub.dataset_revision(name, tmp_path / "cache", "")
        write(file := tmp_path / f"{revision}.jsonl", seed=revisions[revision])
        return opened(str(file), **{**options, "split": None})

    def current(revision: str) -> None:
        record = tmp_path / "cache" / "hub" / "some--stories.json"
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps({"revision": revision}))

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("sa_lens.data.hub.probe", lambda: "there is no network")
    monkeypatch.setattr("sa_lens.data.preparation.open_source", open_source)
    current("old")
    run = project(tmp_path / "project", source="some/stories", cache_dir=str(tmp_path / "cache"))
    current("new")
    assert found(run) == fingerprints(run)
    stored = sa.config.read_yaml(run / "run.yaml")
    assert train(stored, run, device="cpu", resume=True, progress=False).steps == 2
    assert found(run) == fingerprints(run)


def test_a_run_in_a_folder_of_any_name(tmp_path: Path) -> None:
    run = project(tmp_path / "we{ird}::[x]*? #%20 ~é")
    assert found(run) == fingerprints(run)


@pytest.mark.parametrize("text", [[], {"train": 1}, {"train": "", "validation": "", "paths": {"data.source": "x"}}])
def test_a_damaged_record_is_named(run: Path, text: object) -> None:
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "text": text}))
    with pytest.raises(ValueError, match=r"config\.json is damaged: text"):
        found(run)


def test_resuming_from_another_working_directory(run: Path) -> None:
    stored = sa.config.read_yaml(run / "run.yaml")
    shutil.rmtree(run / "state" / "step-2")
    result = train(stored, run, device="cpu", resume=True, progress=False)
    assert result.steps == 2
    write(run.parents[1] / "data" / "text.jsonl", n=70)
    with pytest.raises(ValueError, match=r"the train text is not the one that .* was started with"):
        train(stored, run, device="cpu", resume=True, progress=False)


def test_resuming_with_another_text_named(run: Path) -> None:
    stored = sa.config.read_yaml(run / "run.yaml")
    write(Path("other.jsonl"), seed=3)
    other = dataclasses.replace(stored, data=dataclasses.replace(stored.data, source="other.jsonl"))
    with pytest.raises(ValueError, match=r"the train text is not the one that .* was started with"):
        train(other, run, device="cpu", resume=True, progress=False)
    same = dataclasses.replace(
        stored, data=dataclasses.replace(stored.data, source=str(run.parents[1] / "data" / "text.jsonl"))
    )
    assert train(same, run, device="cpu", resume=True, progress=False).steps == 2


def test_every_file_that_a_configuration_names_moves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "words.txt").write_text("Lily\n")
    write(tmp_path / "a" / "held" / "out.jsonl", n=30, seed=4)
    run = project(tmp_path / "a", validation="held/out.jsonl", keep_whole="words.txt")
    moved = tmp_path / "b"
    (tmp_path / "a").rename(moved)
    assert not run.exists()
    run = moved / "runs" / "run"
    monkeypatch.chdir(tmp_path)
    assert found(run) == fingerprints(run)
    assert train(sa.config.read_yaml(run / "run.yaml"), run, device="cpu", resume=True, progress=False).steps == 2
    init = sa.RunConfig(
        model=sa.ModelConfig(n_ctx=16),
        gates=sa.GateConfig(k_attn=4, k_mlp=8),
        data=sa.DataConfig(source="b/data/text.jsonl"),
        train=sa.TrainConfig(steps=1, batch_size=2, eval_tokens=64, sample_tokens=0, init="b/runs/run"),
    )
    train(init, "second", device="cpu", progress=False)
    (tmp_path / "c").mkdir()
    monkeypatch.chdir(tmp_path / "c")
    assert train(init, tmp_path / "second", device="cpu", resume=True, progress=False).steps == 1
