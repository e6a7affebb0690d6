"""The command line: what a user types and sees."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch

from sa_lens import cli
from sa_lens.circuits.graph import Circuit
from sa_lens.cli import argument_checks, model_commands
from sa_lens.config import PRESETS, RunConfig, read_yaml, to_dict

TINY = [
    *("--model.n-layers", "2", "--model.d-model", "16", "--model.n-heads", "2", "--model.n-ctx", "16"),
    *("--gates.k-attn", "4", "--gates.k-mlp", "8", "--data.n-stories", "200", "--data.vocab-size", "900"),
    *("--train.steps", "4", "--train.batch-size", "2", "--train.eval-every", "2", "--train.save-every", "2"),
    *("--train.eval-tokens", "160", "--train.sample-tokens", "8", "--train.log-every", "1"),
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return ["--data.cache-dir", str(tmp_path_factory.mktemp("cache"))]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, cache: list[str]) -> str:
    """A trained run folder."""
    out = str(tmp_path_factory.mktemp("cli") / "run")
    assert cli.main(["train", "--out", out, "--device", "cpu", *TINY, *cache]) == 0
    return out


def fails(arguments: list[str], capsys: pytest.CaptureFixture[str], *, code: int = 2) -> str:
    """What a command that must fail says on standard error: one line, or a box by tyro, made one line here."""
    try:
        found = cli.main(arguments)
    except SystemExit as stop:
        found = stop.code  # type: ignore[assignment]
    printed = capsys.readouterr()
    assert found == code
    assert printed.out == ""
    lines = printed.err.strip().splitlines()
    if code == 130:
        # progress comes before the line
        return lines[-1]
    assert len(lines) == 1 or "For full helptext" in printed.err, printed.err
    return " ".join(re.sub(r"[│╭╮╰╯─]|-{3,}", " ", printed.err).split())


class TestHelp:
    @pytest.mark.parametrize("name", cli.COMMANDS)
    def test_fits_a_screen_and_has_an_example(self, name: str, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as stop:
            cli.main([name, "--help"])
        assert stop.value.code == 0
        text = capsys.readouterr().out
        assert len(text.splitlines()) <= 42
        assert re.search(rf"sa-lens {name}\b", text.split("Example")[1])

    def test_lists_every_command(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as stop:
            cli.main([])
        assert stop.value.code == 0
        text = capsys.readouterr().out
        for name, command in cli.COMMANDS.items():
            summary = command.__doc__.splitlines()[0]
            assert len(summary) < 60
            assert re.search(rf"^\W+{name} +{re.escape(summary)}\W*$", text, re.MULTILINE)

    def test_all_settings_are_flags(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            cli.main(["train", "--help-all"])
        text = capsys.readouterr().out
        for section, values in to_dict(RunConfig()).items():
            for name in values:
                assert f"--{section}.{name.replace('_', '-')}" in text

    def test_flags_named_in_the_short_help_exist(self) -> None:
        settings = to_dict(RunConfig())
        named = re.findall(r"--(\w+)\.([\w-]+)", model_commands.train.__doc__)
        assert len(named) > 10
        for section, name in named:
            assert name.replace("-", "_") in settings[section]

    def test_needs_nothing_heavy(self) -> None:
        program = (
            "import sys; from sa_lens.cli import main; main(['--help']); print(sorted(sys.modules), file=sys.stderr)"
        )
        found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        for heavy in ("torch", "transformers", "transformer_lens", "datasets", "accelerate", "pandas", "plotly"):
            assert f"'{heavy}'" not in found.stderr

    def test_as_a_module(self) -> None:
        found = subprocess.run(
            [sys.executable, "-m", "sa_lens", "--version"], capture_output=True, text=True, check=True
        )
        assert re.fullmatch(r"sa-lens \d+\.\d+\.\d+\n", found.stdout)

    def test_a_terminal_of_ascii_characters_gets_it_too(self, monkeypatch: pytest.MonkeyPatch) -> None:
        written = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
        with pytest.raises(SystemExit):
            cli.main(["train", "--help"])
        sys.stdout.flush()
        assert b"--preset" in written.getvalue()


class TestErrors:
    def test_commands_and_flags(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        out = ["train", "--out", str(tmp_path / "run")]
        assert "Unrecognized options: tran Available subcommands: train, demo, eval," in fails(["tran"], capsys)
        assert "--out" in fails(["train"], capsys)
        assert "Perhaps you meant: --train.steps" in fails([*out, "--train.stps", "3"], capsys)
        assert "train.steps=0 must be at least 1" in fails([*out, "--train.steps", "0"], capsys)
        assert "--train.steps" in fails([*out, "--train.steps", "x"], capsys)
        assert "'foo' is not one of none, local, global, both" in fails([*out, "--gates.scope", "foo"], capsys)
        assert "more than the 512" in fails([*out, "--gates.k-mlp", "600"], capsys)
        assert "name it in train.init" in fails([*out, "--train.freeze", "base"], capsys)
        assert not (tmp_path / "run").exists()

    def test_files(self, capsys: pytest.CaptureFixture[str], tmp_path: Path, run: str) -> None:
        capsys.readouterr()
        missing = str(tmp_path / "missing")
        assert f"No such file or directory: {missing}" in fails(["train", "--out", "x", "--config", missing], capsys)
        assert "holds no run" in fails(["train", "--out", missing, "--resume"], capsys)
        assert "no folder" in fails(["eval", missing], capsys)
        assert "add --resume" in fails(["train", "--out", run], capsys)
        assert "missing.txt" in fails(["train", "--out", missing, "--data.source", "missing.txt"], capsys)
        (tmp_path / "odd.yaml").write_text("train: {stps: 3}")
        assert "unknown key train.'stps'" in fails(
            ["train", "--out", missing, "--config", str(tmp_path / "odd.yaml")], capsys
        )

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["train", "--out", ""], "--out: it is empty"),
            (["train", "--out="], "--out: it is empty"),
            (["train", "--out", "run", "--data.source", ""], "--data.source: it is empty"),
            (["train", "--out", "run", "--data.tokenizer", " "], "--data.tokenizer: it is empty"),
            (["train", "--out", "run", "--init", ""], "--init: it is empty"),
            (["generate", "", "Tom"], "RUN: it is empty"),
            (["eval", "run", "--text", ""], "--text: it is empty"),
            (["report", "run", ""], "the name of a run is empty"),
            (["report", "run", "-o", ""], "--out: it is empty"),
            (["export", "run", "--to", "hf", "--out", ""], "--out: it is empty"),
            (["train", "--out", "file"], "file is a file: name a folder"),
            (["train", "--out", "file/run"], "nothing can be written below it"),
            (["demo", "--out", "file"], "file is a file"),
            (["circuit", "run", "--out", "file"], "file is a file"),
            (["units", "run", "--out", "file"], "file is a file"),
            (["sae", "run", "--out", "file"], "file is a file"),
            (["compare", "--out", "file"], "file is a file"),
            (["report", "run", "-o", "folder.html"], "folder.html is a folder"),
            (["report", "run", "-o", "file/a.html"], "nothing can be written below it"),
            (["export", "run", "--to", "hf", "--out", "."], "is not empty"),
            (["export", "run", "--to", "reference", "--out", "folder.html"], "is a folder"),
            (["circuit", "run", "--task", "io"], "perhaps you meant ioi"),
            (["circuit", "run", "--task", "no.json"], "no file of prompt pairs at no.json"),
            (["circuit", "run", "--method", "eap-gi"], "perhaps you meant eap-ig"),
            (["circuit", "run", "--stream", "albated"], "perhaps you meant ablated"),
            (["circuit", "run", "--resume"], "holds no interrupted search"),
            (["report", "run", "--tasks", "pronuon"], "perhaps you meant pronoun"),
            (["compare", "--grid", "laptpo"], "perhaps you meant laptop"),
            (
                ["compare", "--columns", "losses,unit"],
                "no measurement unit; there are losses, .*; perhaps you meant units",
            ),
            (["train", "--out", "run", "--preset", "papr-head"], "perhaps you meant paper-head"),
            (["sae", "run", "--hook", "blocks.1.hook_mlp_ou"], "perhaps you meant blocks.1.hook_mlp_out"),
            (["sae", "run", "--hook", "blocks.3.hook_mlp_out"], "the model has the layers 0 to 1"),
            (["sae", "run", "--tokens", "0"], "tokens=0 must be at least 1"),
            (["circuit", "run", "--tau", "nan"], "tau=nan must be a finite number"),
            (["circuit", "run", "--seed", "-1"], "seed=-1 must be 0 or more"),
            (["units", "run", "--seed", str(2**32)], "seed=4294967296 must be at most"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else "",
    )
    def test_what_was_typed_is_checked_before_anything_is_imported(
        self,
        arguments: list[str],
        message: str,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """A model of two layers, a file and a folder lie in the current folder; no command may get as far as torch."""
        monkeypatch.chdir(tmp_path)
        (tmp_path / "file").write_text("x")
        (tmp_path / "folder.html").mkdir()
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "config.json").write_text('{"model": {"n_layers": 2}}')
        before = sorted(tmp_path.rglob("*"))
        # an import of any of these would fail
        for name in ("sa_lens.core", "sa_lens.training", "sa_lens.circuits", "sa_lens.data", "sa_lens.report"):
            for loaded in [module for module in sys.modules if f"{module}.".startswith(f"{name}.")]:
                monkeypatch.setitem(sys.modules, loaded, None)
            monkeypatch.setitem(sys.modules, name, None)
        assert re.search(message, fails(arguments, capsys))
        assert sorted(tmp_path.rglob("*")) == before

    def test_what_may_be_empty(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        missing = str(tmp_path / "missing")
        for arguments in (["generate", missing, ""], ["report", missing, "--title", ""]):
            assert "missing" in fails(arguments, capsys)

    def test_names_are_those_that_the_packages_define(self) -> None:
        from sa_lens.circuits.tasks import TASKS
        from sa_lens.circuits.tasks.pairs import MINIMUM
        from sa_lens.compare import GRIDS
        from sa_lens.config import GateConfig, ModelConfig
        from sa_lens.core import SelfAblatingTransformer

        assert (tuple(TASKS), MINIMUM) == (argument_checks.TASKS, argument_checks.FEWEST_PROMPTS)
        labels = {measurement.label for grid in GRIDS.values() for measurement in grid().measurements}
        assert labels == {*argument_checks.MEASUREMENTS}
        shape = ModelConfig(n_layers=1, d_model=16, n_heads=2, n_ctx=8, d_vocab=10, act_fn="solu_ln")
        model = SelfAblatingTransformer(shape, GateConfig(k_attn=2, k_mlp=2), device="cpu")
        assert {*model.hook_dict} <= {*argument_checks.HOOKS}

    def test_debug_shows_where(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            cli.main(["eval", str(tmp_path / "missing"), "--debug"])
        monkeypatch.setenv("SA_LENS_DEBUG", "1")
        with pytest.raises(FileNotFoundError):
            cli.main(["eval", str(tmp_path / "missing")])

    def test_interruption_and_divergence_have_their_codes(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        from sa_lens import training

        def stopped(*_: object, **__: object) -> None:
            raise training.Interrupted("stopped after step 7; go on with --resume")

        monkeypatch.setattr(training, "train", stopped)
        line = fails(["train", "--out", str(tmp_path / "run")], capsys, code=130)
        assert "stopped after step 7" in line
        assert "--resume" in line

        def diverged(*_: object, **__: object) -> None:
            raise training.TrainingDiverged("training stopped: at step 3 clean = nan")

        monkeypatch.setattr(training, "train", diverged)
        assert "step 3" in fails(["train", "--out", str(tmp_path / "run")], capsys, code=1)


class TestTrain:
    def seen(self, monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> RunConfig:
        """The configuration that a command line comes to."""
        from sa_lens import training

        class Enough(Exception):
            pass

        seen = []

        def record(run: RunConfig, *_: object, **__: object) -> None:
            seen.append(run)
            raise Enough

        monkeypatch.setattr(training, "train", record)
        with pytest.raises(Enough):
            cli.main(["train", "--out", "unused", *arguments])
        return seen[0]

    def test_flags_before_file_before_preset(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        file = tmp_path / "run.yaml"
        file.write_text("train: {lr: 0.5, steps: 7777}\n")
        found = self.seen(
            monkeypatch, ["--preset", "laptop", "--config", str(file), "--train.lr", "0.25", "--gates.scope", "none"]
        )
        assert found.model == PRESETS["laptop"].model
        assert found.train.warmup_steps == PRESETS["laptop"].train.warmup_steps
        assert found.train.steps == 7777
        assert found.train.lr == 0.25
        assert found.gates.scope == "none"
        assert self.seen(monkeypatch, []) == RunConfig()
        assert self.seen(monkeypatch, ["--preset", "paper-head"]) == PRESETS["paper-head"]

    def test_every_kind_of_flag(self, monkeypatch: pytest.MonkeyPatch) -> None:
        found = self.seen(
            monkeypatch,
            [
                *("--train.betas", "0.8", "0.9", "--train.batch_size", "8", "--model.d-mlp", "0"),
                *("--model.attn-scale", "--model.no-tied-embedding", "--data.max-documents", "None"),
                *("--init", "somewhere", "--train.freeze", "base"),
            ],
        )
        assert found.train.betas == (0.8, 0.9)
        assert found.train.batch_size == 8
        assert found.model.d_mlp == 0
        assert found.model.attn_scale
        assert not found.model.tied_embedding
        assert (found.train.init, found.train.freeze) == ("somewhere", "base")

    def test_resume_takes_the_stored_configuration(
        self, run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        before = (Path(run) / "metrics.jsonl").read_text()
        assert cli.main(["train", "--out", run, "--resume", "--device", "cpu"]) == 0
        assert (Path(run) / "metrics.jsonl").read_text() == before
        assert "4 steps" in capsys.readouterr().out
        assert "train.lr" in fails(["train", "--out", run, "--resume", "--train.lr", "9"], capsys)

    def test_the_configuration_is_kept(self, run: str, cache: list[str]) -> None:
        stored = read_yaml(Path(run) / "run.yaml")
        assert stored.train.steps == 4
        assert stored.data.cache_dir == cache[1]
        assert stored.gates.k_mlp == 8


class TestEval:
    def test_is_the_evaluation_of_training(self, run: str, capsys: pytest.CaptureFixture[str]) -> None:
        capsys.readouterr()
        assert cli.main(["eval", run, "--tokens", "160", "--device", "cpu", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        stored = json.loads((Path(run) / "config.json").read_text())["validation"]
        assert found.keys() == stored.keys()
        for name, value in stored.items():
            assert found[name] == pytest.approx(value, rel=1e-6)

    def test_table(self, run: str, capsys: pytest.CaptureFixture[str]) -> None:
        capsys.readouterr()
        assert cli.main(["eval", run, "--tokens", "160", "--device", "cpu", "--which", "last"]) == 0
        text = capsys.readouterr().out
        assert re.search(r"^clean +\d+\.\d{4} +\d+\.\d{2} +\d\.\d{4}$", text, re.MULTILINE)
        assert re.search(r"^ablated +\d", text, re.MULTILINE)
        assert "neurons used" in text

    def test_other_text(self, run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        text = tmp_path / "text.txt"
        text.write_text("Lily and Tom went to the park. Tom gave the ball to Lily.\n\n" * 5)
        capsys.readouterr()
        assert cli.main(["eval", run, "--text", str(text), "--device", "cpu", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["clean_loss"] > 0
        assert "tokens=0" in fails(["eval", run, "--tokens", "0"], capsys)


class TestGenerate:
    def test_both_streams_and_the_seed(self, run: str, capsys: pytest.CaptureFixture[str]) -> None:
        command = ["generate", run, "Lily", "--max-new-tokens", "8", "--device", "cpu", "--temperature", "2"]
        texts = []
        for seed in ("1", "1", "2"):
            capsys.readouterr()
            assert cli.main([*command, "--seed", seed, "--json"]) == 0
            texts.append(json.loads(capsys.readouterr().out))
        assert texts[0] == texts[1] != texts[2]
        assert texts[0]["clean"].startswith("Lily")
        assert texts[0]["ablated"].startswith("Lily")
        assert cli.main(command) == 0
        assert "clean stream" in capsys.readouterr().out

    def test_refusals(self, run: str, capsys: pytest.CaptureFixture[str]) -> None:
        capsys.readouterr()
        assert "temperature=-1" in fails(["generate", run, "Lily", "--temperature", "-1"], capsys)


class TestExport:
    def test_every_format(self, run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        from transformers import AutoModelForCausalLM

        from sa_lens.config import GateConfig
        from sa_lens.core import SelfAblatingTransformer

        model = SelfAblatingTransformer.from_pretrained(run)
        tokens = torch.arange(10)[None]
        capsys.readouterr()
        assert cli.main(["export", run, "--to", "hf", "--out", str(tmp_path / "hf")]) == 0
        hf = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
        with torch.no_grad():
            assert torch.allclose(hf(tokens).logits.log_softmax(-1), model(tokens).log_softmax(-1), atol=1e-5)
        capsys.readouterr()
        assert cli.main(["export", run, "--to", "hooked", "--out", str(tmp_path / "hooked")]) == 0
        assert "HookedTransformerConfig" in capsys.readouterr().out
        assert (tmp_path / "hooked" / "model.safetensors").is_file()
        assert cli.main(["export", run, "--to", "reference", "--out", str(tmp_path / "model.pt")]) == 0
        gates = GateConfig(k_attn=4, k_mlp=8)
        back = SelfAblatingTransformer.from_reference(tmp_path / "model.pt", gates, n_heads=2)
        assert torch.allclose(back(tokens), model(tokens), atol=1e-5)
        capsys.readouterr()
        assert "not empty" in fails(["export", run, "--to", "hf", "--out", str(tmp_path / "hf")], capsys)


# ------------------------------------------------------------------------------------------------------------ circuits


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory, cache: list[str]) -> str:
    """A run whose context holds a prompt and whose tokenizer keeps names whole."""
    out = str(tmp_path_factory.mktemp("cli") / "reader")
    longer = ["--model.n-ctx", "48", "--data.vocab-size", "1000", "--train.sample-tokens", "0"]
    assert cli.main(["train", "--out", out, "--device", "cpu", *TINY, *longer, *cache]) == 0
    return out


class TestCircuit:
    def test_words_files_and_figures(self, reader: str, capsys: pytest.CaptureFixture[str]) -> None:
        arguments = ["circuit", reader, "--task", "ioi", "--stream", "ablated", "--pairs", "32", "--device", "cpu"]
        assert cli.main(arguments) == 0
        printed = capsys.readouterr().out
        assert "pair accuracy" in printed
        assert "does not do ioi" in printed, "an untrained model is named as such"
        folder = Path(reader) / "circuits" / "ioi-acdc-ablated"
        assert {"circuit.json", "ranking.json", "edges.csv", "summary.csv", "circuit.html"} <= {
            file.name for file in folder.iterdir()
        }
        kept = Circuit.load(folder / "circuit.json")
        assert kept.about["method"] == "acdc"
        assert kept.about["tau"] == 0.01
        assert f"{len(kept)} of {len(kept.graph)} edges" in printed

    def test_json(self, reader: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        arguments = [
            "circuit",
            reader,
            "--method",
            "eap",
            "--edges",
            "7",
            "--pairs",
            "32",
            "--out",
            str(tmp_path),
            "--json",
        ]
        assert cli.main([*arguments, "--device", "cpu"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["method"], found["edges"], found["stream"]) == ("eap", 7, "clean")

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (["--tau", "-1"], "tau=-1.0 must be 0 or more"),
            (["--task", "chess"], "task='chess' is none of ioi"),
            (["--task", "no.json"], "no file of prompt pairs at no.json"),
            (["--edges", "3"], "edges=3 has no meaning for ACDC"),
            (["--method", "eap", "--edges", "100000"], "choose from 0"),
            (["--masks", "live"], "masks"),
            (["--pairs", "8"], "64"),
        ],
    )
    def test_bad_input(
        self, reader: str, flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        arguments = ["circuit", reader, "--pairs", "32", "--out", str(tmp_path / "out"), "--device", "cpu"]
        assert message in fails([*arguments, *flags], capsys)
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_an_interrupted_search_is_no_result_and_goes_on(
        self,
        reader: str,
        number: int,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        from sa_lens.circuits import Experiment
        from sa_lens.circuits.running.edge_removals import Recomputation

        def command(folder: str, *flags: str) -> list[str]:
            out = ["--out", str(tmp_path / folder)]
            return ["circuit", reader, "--pairs", "32", *out, "--device", "cpu", "--json", *flags]

        assert cli.main(command("whole")) == 0
        capsys.readouterr()
        plainly, calls = Recomputation.try_removals, []

        def interrupted(self: Recomputation, rows: Any) -> Any:
            calls.append(1)
            if len(calls) == 1:
                os.kill(os.getpid(), number)
            return plainly(self, rows)

        # a process that runs in the background ignores Ctrl-C
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            with monkeypatch.context() as patch:
                patch.setattr(Recomputation, "try_removals", interrupted)
                line = fails(command("part"), capsys, code=130)
        finally:
            signal.signal(signal.SIGINT, before)
        unfinished = tmp_path / "part" / "unfinished.json"
        assert re.search(rf"stopped after \d+ of \d+ edges; {unfinished} has .* same command and --resume", line)
        assert list(unfinished.parent.iterdir()) == [unfinished]

        def stopped(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(Experiment, "skill", stopped)
            edges = len(Circuit.load(unfinished).graph)
            line = fails(command("part", "--resume"), capsys, code=130)
        assert f"stopped after {edges} of {edges} edges" in line, "a search that is done waits to be judged"
        assert cli.main(command("part", "--resume")) == 0
        capsys.readouterr()
        assert not unfinished.exists()
        found, whole = (Circuit.load(tmp_path / name / "circuit.json") for name in ("part", "whole"))
        assert found == whole
        assert "no interrupted search" in fails(command("part", "--resume"), capsys)


class TestSAE:
    def test_trains_measures_and_goes_on(self, reader: str, capsys: pytest.CaptureFixture[str]) -> None:
        sae_lens = pytest.importorskip("sae_lens")
        arguments = ["sae", reader, "--hook", "blocks.1.hook_mlp_out", "--stream", "ablated", "--steps", "3"]
        arguments += ["--d-sae", "24", "--tokens", "500", "--device", "cpu"]
        assert cli.main([*arguments, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["stream"], found["n_latents"]) == ("ablated", 24)
        folder = Path(reader) / "sae" / "blocks.1.hook_mlp_out-ablated-laptop-0"
        assert sae_lens.SAE.load_from_disk(str(folder)).cfg.d_sae == 24
        assert cli.main([*arguments, "--resume"]) == 0
        assert f"{found['ce_sae']:.4g}" in capsys.readouterr().out

    def test_bad_input(self, reader: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        pytest.importorskip("sae_lens")
        arguments = ["sae", reader, "--out", str(tmp_path / "sae"), "--device", "cpu"]
        assert "blocks.9.hook_mlp_out" in fails([*arguments, "--hook", "blocks.9.hook_mlp_out"], capsys)
        assert "steps=0" in fails([*arguments, "--steps", "0"], capsys)


class TestUnits:
    def test_tables(self, reader: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        arguments = ["units", reader, "--tokens", "1000", "--labels", "30", "--device", "cpu", "--out", str(tmp_path)]
        assert cli.main(arguments) == 0
        assert "effective_tokens" in capsys.readouterr().out
        names = {file.name for file in tmp_path.iterdir()}
        assert names == {
            f"{name}.csv" for name in ("units", "sparsity", "connections", "labels", "coverage", "summary")
        }
        table = pandas.read_csv(tmp_path / "units.csv")
        assert len(table) == 2 * 2 * (16 + 64), "streams, layers, attention units and neurons"
        assert cli.main([*arguments[:4], "--labels", "0", "--device", "cpu", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert set(found) == {"clean", "ablated"}
        assert "auroc" not in found["clean"]

    def test_bad_input(self, reader: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert "tokens" in fails(["units", reader, "--tokens", "0", "--device", "cpu"], capsys)

    def test_an_interruption_says_so_and_leaves_no_table(
        self, reader: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import sa_lens.units

        def stopped(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(sa_lens.units, "sparsity", stopped)
        out = tmp_path / "units"
        arguments = ["units", reader, "--tokens", "500", "--labels", "0", "--device", "cpu", "--json"]
        line = fails([*arguments, "--out", str(out)], capsys, code=130)
        assert line == "sa-lens units: interrupted before it finished; run the same command again"
        assert not out.exists()

    def test_missing_runs(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert "no-such-run" in fails(["units", "no-such-run"], capsys)


class TestReport:
    def test_one_page(self, tmp_path: Path, cache: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        reader, page = str(tmp_path / "reader"), tmp_path / "report.html"
        longer = ["--model.n-ctx", "48", "--data.vocab-size", "1000", "--data.validation-fraction", "0.1"]
        assert cli.main(["train", "--out", reader, "--device", "cpu", *TINY, *longer, *cache]) == 0
        small = ["--stories", "2", "--units", "2", "--device", "cpu", "--title", "Mine & yours"]
        assert cli.main(["report", reader, "-o", str(page), *small]) == 0
        assert str(page) in capsys.readouterr().out
        assert "<title>Mine &amp; yours" in page.read_text(encoding="utf-8")

    def test_bad_input(self, reader: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert "name at least one run" in fails(["report"], capsys)
        assert "must end in .html" in fails(["report", reader, "-o", str(tmp_path / "report.pdf")], capsys)
        assert "stories" in fails(["report", reader, "--stories", "0", "--device", "cpu"], capsys)
        assert "no-such-run" in fails(["report", reader, "no-such-run"], capsys)
        assert not list(tmp_path.iterdir())


class TestCompare:
    def test_says_what_is_to_do(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        folder = tmp_path / "out"
        assert cli.main(["compare", "--grid", "smoke", "--out", str(folder), "--device", "cpu", "--dry-run"]) == 0
        printed = capsys.readouterr().out
        assert "random-token" in printed
        assert "left in all" in printed
        assert not folder.exists()

    def test_trains_measures_and_says_where_it_is(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("SA_LENS_CACHE", str(tmp_path / "cache"))
        folder = tmp_path / "out"
        arguments = [
            "compare",
            "--grid",
            "smoke",
            "--out",
            str(folder),
            "--device",
            "cpu",
            "--columns",
            "weights,losses",
        ]
        assert cli.main([*arguments, "--seeds", "1"]) == 0
        printed = capsys.readouterr().out
        assert "weights are less sparse\n" in printed
        assert re.search("perplexity: lower, clean +undecided: all", printed), "one seed decides nothing"
        files = re.findall(r"[\w.]+\.\w+", printed.splitlines()[-1].split(": ")[1])
        assert {"table.md", "figure.html"} <= set(files)
        assert all((folder / file).is_file() for file in files)
        values = pandas.read_csv(folder / "values.csv")
        assert set(values["seed"]) == {0}
        assert {"loss", "hoyer"} <= set(values["column"])
        assert "cpr" not in set(values["column"])

    def test_a_stop_says_that_the_same_command_goes_on(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from sa_lens.compare import run_grid

        def stopped(*arguments: object, **options: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setenv("SA_LENS_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(run_grid, "train", stopped)
        line = fails(
            ["compare", "--grid", "smoke", "--out", str(tmp_path / "out"), "--device", "cpu"], capsys, code=130
        )
        assert "stopped at baseline, seed 0" in line
        assert "The same command goes on" in line

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (["--grid", "desk"], "laptop-tinystories"),
            (["--seeds", "0"], "seeds=0 must be at least 1"),
            (["--columns", "losses,circuits"], "no measurement circuits; there are losses, weights"),
            (["--columns", ","], "no measurement given"),
            (["--validation", "text.txt"], "goes with text="),
            (["--text", "no-such.txt"], "no-such.txt"),
        ],
    )
    def test_bad_input(
        self,
        flags: list[str],
        message: str,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setenv("SA_LENS_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        arguments = ["compare", "--grid", "smoke", "--out", str(tmp_path / "out"), "--device", "cpu"]
        assert message in fails([*arguments, *flags], capsys)
        assert not (tmp_path / "out" / "models").exists()
