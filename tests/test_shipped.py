"""The models shipped with the package: what they reach on this machine, how they are named, how they are made.

Tests of the models themselves run over those that are packed in `sa_lens/shipped`.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import socket
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_shelf import fill, tiny

import sa_lens as sa
from sa_lens import catalogue, cli
from sa_lens.config import from_dict, to_dict
from sa_lens.report.subjects import open_subjects
from sa_lens.shipped import make, measuring, recipes
from sa_lens.training import train
from sa_lens.training.evaluation import evaluate_run
from sa_lens.training.trained_run import settings_of, text_of_run

ROOT = Path(__file__).parents[1]
LARGEST = 8_000_000
"""Bytes of all shipped models together."""
LOSS_TOLERANCE, SKILL_TOLERANCE = 0.01, 0.03
"""What rounding on another processor may change: nats per token, and the share of prompts."""

NAMES = catalogue.shipped_names()


# ------------------------------------------------------------------------------------------------ the shipped models


@pytest.fixture(scope="module")
def loaded() -> dict[str, sa.SelfAblatingTransformer]:
    return {}


@pytest.fixture
def model(name: str, loaded: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> sa.SelfAblatingTransformer:
    """A shipped model, loaded where every connection fails."""

    def refuse(*arguments: object) -> None:
        raise AssertionError(f"asked the network for {arguments[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    if name not in loaded:
        loaded[name] = sa.SelfAblatingTransformer.from_pretrained(name, device="cpu")
    return loaded[name]


@pytest.mark.parametrize("name", NAMES)
class TestEachModel:
    def test_is_stored_in_half_precision_and_loaded_in_float32(
        self, name: str, model: sa.SelfAblatingTransformer
    ) -> None:
        stored = load_file(catalogue.SHIPPED / name / "model.safetensors")
        assert {weight.dtype for weight in stored.values()} == {torch.float16}
        for key, parameter in model.named_parameters():
            assert parameter.dtype == torch.float32
            assert torch.equal(parameter, stored[key].float())
        assert model.cfg.dtype == torch.float32

    def test_has_the_losses_that_are_stored_with_it(self, name: str, model: sa.SelfAblatingTransformer) -> None:
        sample = catalogue.about(name)["sample"]
        losses = measuring.losses_on(model, sample["texts"])
        assert losses.keys() == sample["losses"].keys()
        assert losses == pytest.approx(sample["losses"], abs=LOSS_TOLERANCE)

    def test_has_the_skills_that_are_stored_with_it(self, name: str, model: sa.SelfAblatingTransformer) -> None:
        stored = catalogue.about(name)["figures"]["skills"]
        for row, now in zip(stored, measuring.skills(model, recipes.RECIPES[name].words), strict=True):
            assert (row["task"], row["stream"], row["n"]) == (now["task"], now["stream"], now["n"])
            for key in ("pair_accuracy", "top1_accuracy"):
                assert now[key] == pytest.approx(row[key], abs=SKILL_TOLERANCE), row

    def test_says_where_it_comes_from(self, name: str) -> None:
        known = catalogue.about(name)
        assert from_dict(sa.RunConfig, known["settings"]) == settings_of(name)
        assert known["seed"] == known["settings"]["train"]["seed"]
        assert known["commit"] != "unknown"
        assert not known["commit"].endswith("+"), "made from a checkout with changes"
        if known["settings"]["data"]["source"] != "stories":
            assert known["text"]["licence"] == "CDLA-Sharing-1.0"
            assert "Eldan" in known["text"]["attribution"]

    def test_names_no_place_of_the_machine_that_made_it(self, name: str) -> None:
        for file in (catalogue.SHIPPED / name).glob("*.json"):
            if file.name != "tokenizer.json":
                assert '"/' not in file.read_text(encoding="utf-8")


@pytest.mark.skipif(not {"stories-local", "stories-dense"} <= set(NAMES), reason="the stories models are not packed")
def test_the_stories_models_pass_the_bars() -> None:
    local, dense = (catalogue.about(f"stories-{kind}")["figures"] for kind in ("local", "dense"))
    missed = [bar.text for bar in measuring.stories_bars(local, dense) if not bar.reached]
    assert not missed


@pytest.mark.skipif(not NAMES, reason="no model is packed")
def test_all_models_are_there_and_small_enough() -> None:
    assert set(NAMES) == set(recipes.RECIPES)
    assert sum(make.size_of(catalogue.SHIPPED / name) for name in NAMES) <= LARGEST


@pytest.mark.skipif(not NAMES, reason="no model is packed")
def test_wheel_and_sdist_hold_them() -> None:
    """Both hold all of sa_lens/ but what .gitignore names."""
    pathspec = pytest.importorskip("pathspec")
    targets = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]["targets"]
    assert targets["wheel"] == {"packages": ["sa_lens"]}
    assert "sa_lens" in targets["sdist"]["include"]
    ignored = pathspec.GitIgnoreSpec.from_lines((ROOT / ".gitignore").read_text(encoding="utf-8").splitlines())
    files = {file.relative_to(ROOT).as_posix() for name in NAMES for file in (catalogue.SHIPPED / name).iterdir()}
    assert {Path(file).name for file in files} >= {"about.json", "config.json", "model.safetensors", "tokenizer.json"}
    assert list(ignored.match_files(files)) == []


# -------------------------------------------------------------------------------------- making them, and their names


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def tiny_shelf(tmp_path_factory: pytest.TempPathFactory, work: Path) -> Path:
    """A folder of tiny models under the names of the shipped ones."""
    shelf = tmp_path_factory.mktemp("shelf")
    fill(shelf, work, ("stories-local", "stories-dense", "tinystories-local"))
    return shelf


@pytest.fixture
def shelf(tiny_shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny models take the place of the shipped ones, and the current folder is empty."""
    monkeypatch.setattr(catalogue, "SHIPPED", tiny_shelf)
    monkeypatch.chdir(tmp_path)
    catalogue._say_which.cache_clear()
    return tiny_shelf


def test_packing_rounds_first_and_measures_then(shelf: Path, work: Path) -> None:
    name = "stories-local"
    trained = sa.SelfAblatingTransformer.from_pretrained(work / name)
    shipped = sa.SelfAblatingTransformer.from_pretrained(name)
    for key, parameter in shipped.named_parameters():
        assert torch.equal(parameter, trained.get_parameter(key).half().float())
    known = catalogue.about(name)
    found = evaluate_run(name, tokens=known["settings"]["train"]["eval_tokens"])
    assert known["figures"]["validation_tokens"] == found.tokens
    assert known["figures"]["losses"] == pytest.approx(
        {"clean": found.clean_loss, "ablated": found.ablated_loss}, abs=1e-4
    )
    assert measuring.losses_on(shipped, known["sample"]["texts"]) == pytest.approx(known["sample"]["losses"], abs=1e-3)
    assert known["settings"] == to_dict(tiny(name).run)
    assert not [file for file in shelf.rglob("*.json") if str(work) in file.read_text(encoding="utf-8")]


def test_a_finished_run_is_packed_again_without_training(
    shelf: Path, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "PROMPTS", 20)
    monkeypatch.setitem(recipes.RECIPES, "stories-dense", tiny("stories-dense"))
    before = (work / "stories-dense" / "metrics.jsonl").read_bytes()
    make.make(("stories-dense",), work=work, out=tmp_path / "again")
    assert (work / "stories-dense" / "metrics.jsonl").read_bytes() == before
    first, second = (
        load_file(folder / "stories-dense" / "model.safetensors") for folder in (shelf, tmp_path / "again")
    )
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_the_command_names_a_misspelt_model_and_the_folder_it_needs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no model 'storis-local'.*perhaps you meant stories-local"):
        make.make(("storis-local",), work=tmp_path)
    with pytest.raises(ValueError, match=r"tinystories-train\.parquet.*--text"):
        make.make(("tinystories-local",), work=tmp_path)


def test_listing_them(shelf: Path) -> None:
    table = sa.models()
    assert list(table.index) == ["stories-dense", "stories-local", "tinystories-local"]
    losses = catalogue.about("stories-local")["figures"]["losses"]
    row = table.loc["stories-local"]
    assert (row["clean_loss"], row["ablated_loss"]) == (losses["clean"], losses["ablated"])
    assert {"description", "parameters", "megabytes", "ioi_clean", "ioi_ablated"} <= set(table.columns)
    assert table["ablated_loss"].isna().to_dict()["stories-dense"]


def test_listing_them_imports_no_torch() -> None:
    code = "import sys, sa_lens; sa_lens.models(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_folder_of_that_name_does_not_shadow_them(
    shelf: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = sa.SelfAblatingTransformer(sa.ModelConfig(n_layers=1, d_model=8, n_heads=2, n_ctx=8, d_vocab=5))
    other.save_pretrained("stories-local")
    with caplog.at_level(logging.WARNING):
        assert sa.SelfAblatingTransformer.from_pretrained("stories-local").cfg.d_model == 16
        assert sa.SelfAblatingTransformer.from_pretrained("stories-local").cfg.d_model == 16
    said = [message for message in caplog.messages if "./stories-local" in message]
    assert len(said) == 1
    for folder in ("./stories-local", Path("stories-local"), str(Path.cwd() / "stories-local")):
        assert sa.SelfAblatingTransformer.from_pretrained(folder).cfg.d_model == 8
    with pytest.raises(ValueError, match="stories-local has no tokenizer"):
        open_subjects([Path("stories-local")], "cpu")


@pytest.mark.parametrize("name", ["storis-local", "stories_local"])
def test_a_misspelt_name(shelf: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(FileNotFoundError, match="perhaps you meant stories-local"):
        sa.SelfAblatingTransformer.from_pretrained(name)
    assert cli.main(["eval", name]) == 2
    assert "perhaps you meant stories-local" in capsys.readouterr().err


def test_keywords_of_transformer_lens_are_refused_with_the_fix(shelf: Path) -> None:
    with pytest.raises(ValueError, match="change it afterwards"):
        sa.SelfAblatingTransformer.from_pretrained("stories-local", dtype=torch.float64)


def test_training_starts_from_one(shelf: Path, tmp_path: Path) -> None:
    run = settings_of("stories-local")
    assert run is not None
    settings = dataclasses.replace(run.train, steps=1, dense_share=0.0, eval_every=1, init="stories-local")
    result = train(dataclasses.replace(run, train=settings), tmp_path / "run", device="cpu", progress=False)
    shipped = sa.SelfAblatingTransformer.from_pretrained("stories-local")
    assert result.model.tokenizer.get_vocab() == shipped.tokenizer.get_vocab()


class TestCommands:
    """The command line takes a shipped name for a run; results are kept in runs/NAME."""

    def test_eval_and_generate(self, shelf: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["eval", "stories-local", "--tokens", "200", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["tokens"] > 0
        assert cli.main(["generate", "stories-local", "Lily", "--max-new-tokens", "3"]) == 0
        assert "ablated stream" in capsys.readouterr().out

    def test_units(self, shelf: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["units", "stories-local", "--tokens", "1000", "--labels", "0"]) == 0
        assert Path("runs/stories-local/units/units.csv").is_file()
        assert not [file for file in shelf.rglob("*") if file.suffix == ".csv"]

    @pytest.mark.parametrize("command", ["eval", "units", "sae"])
    def test_a_text_that_is_not_shipped_has_to_be_named(
        self, shelf: Path, command: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert cli.main([command, "tinystories-local"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "TinyStories" in line
        assert "name a text with --text" in line

    def test_another_text(self, shelf: Path, tmp_path: Path) -> None:
        texts = [f"Lily has {i} red balls and {i + 1} blue ones. " * 5 for i in range(20)]
        (tmp_path / "own.jsonl").write_text("\n".join(json.dumps({"words": text}) for text in texts))
        model = sa.SelfAblatingTransformer.from_pretrained("tinystories-local")
        data = text_of_run("tinystories-local", model, str(tmp_path / "own.jsonl"), column="words")
        documents = [file.n_documents for file in (data.train, data.validation)]
        assert documents == [10, 10]
        assert data.tokenizer.get_vocab() == model.tokenizer.get_vocab()
