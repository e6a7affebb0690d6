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
from sa_lens.catalogue import models
from sa_lens.circuits import tasks
from sa_lens.circuits.graph import Circuit
from sa_lens.cli import argument_checks, model_commands, prompt_arguments
from sa_lens.cli.starting import start
from sa_lens.config import PRESETS, RunConfig, read_yaml, to_dict
from sa_lens.data.tokenizers import load_tokenizer

TINY = [
    *("--model.n-layers", "2", "--model.d-model", "16", "--model.n-heads", "2", "--model.n-ctx", "16"),
    *("--gates.k-attn", "4", "--gates.k-mlp", "8", "--data.n-stories", "200", "--data.vocab-size", "900"),
    *("--train.steps", "4", "--train.batch-size", "2", "--train.eval-every", "2", "--train.save-every", "2"),
    *("--train.eval-tokens", "160", "--train.sample-tokens", "8", "--train.log-every", "1"),
]


OWN = [
    *("--clean", "Lily and Tom went to the park. Tom gave the ball to"),
    *("--corrupt", "Lily and Tom went to the park. Lily gave the ball to"),
    *("--answer", " Lily", "--wrong", " Tom"),
]
"""A pair of prompts of the user's own."""
LONG = ["--clean", "Tom" + " and" * 300, "--corrupt", "Lily" + " and" * 300]


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
        """Nor does the list of models, nor the refusal of a prompt by its tokens."""
        program = """
import sys
from sa_lens.cli import COMMANDS, main
for arguments in [["--help"], *([name, "--help"] for name in COMMANDS)]:
    try:
        main(arguments)
    except SystemExit:
        pass
main(["models"])
pair = ["--clean", "Tom ran", "--corrupt", "Tom", "--answer", " a", "--wrong", " b"]
assert main(["patch", "stories-local", *pair]) == 2
print(sorted(sys.modules), file=sys.stderr)
"""
        found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        assert "'tokenizers'" in found.stderr
        heavy = ("torch", "transformers", "transformer_lens", "datasets", "accelerate", "pandas", "plotly", "numpy")
        for name in heavy:
            assert f"'{name}'" not in found.stderr

    def test_a_model_needs_no_figures(self) -> None:
        """What TransformerLens imports cannot be left out; what only figures and SAEs need can."""
        program = """
import sys
from sa_lens.cli import main
assert main(["generate", "stories-local", "Lily", "--max-new-tokens", "1", "--device", "cpu"]) == 0
print(sorted(sys.modules), file=sys.stderr)
"""
        found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        assert "'torch'" in found.stderr
        for name in ("plotly", "circuitsvis", "sae_lens", "IPython", "sa_lens.views", "sa_lens.circuits"):
            assert f"'{name}'" not in found.stderr

    def test_a_terminal_sees_a_line_before_the_imports(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("OMP_WAIT_POLICY", "active")
        start("eval: runs/local")
        assert capsys.readouterr().err == "", "no terminal, and PyTorch is there already"
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        monkeypatch.delitem(sys.modules, "torch")
        start("eval: runs/local")
        assert capsys.readouterr().err.startswith("sa-lens eval: runs/local (PyTorch")
        assert os.environ["OMP_WAIT_POLICY"] == "active", "the user's own choice stays"
        monkeypatch.delenv("OMP_WAIT_POLICY")
        start("train: runs/local", trains=True)
        assert "OMP_WAIT_POLICY" not in os.environ
        start("eval: runs/local")
        assert os.environ["OMP_WAIT_POLICY"] == "passive"
        monkeypatch.delenv("OMP_WAIT_POLICY")

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
            (["eval", "stories-locl"], "no folder 'stories-locl'.*perhaps you meant stories-local"),
            (["generate", "folder.html", "Tom"], "folder.html holds no config.json: it is not a model folder"),
            (["report", "run", "file"], "file is a file, not a model folder"),
            (["patch", "run"], "--clean, --corrupt, --answer, --wrong missing: give .* or a --task"),
            (["patch", "run", *OWN[:6]], "^sa-lens patch: --wrong missing"),
            (["patch", "run", "--task", "ioi", *OWN], "--task brings its own prompts"),
            (["patch", "run", "--task", "io"], "perhaps you meant ioi"),
            (["patch", "run", "--task", "ioi", "--what", "resid"], "perhaps you meant resid_pre"),
            (["patch", "run", "--task", "ioi", "--what", "blocks.2.attn.hook_z"], "the model has the layers 0 to 1"),
            (["patch", "run", "--task", "ioi", "--out", "file"], "file is a file"),
            (["patch", "run", "--task", "ioi", "--out", "a.html"], "a.html has the ending of a file"),
            (["attribute", "run", "--task", "ioi", "--out", "a.csv"], "a.csv has the ending of a file"),
            (["patch", "run", "--task", "ioi", "--pairs", "0"], "pairs=0 must be at least 1"),
            (
                ["patch", "run", "--task", "ioi", "--stream", "clean", "--what", "mask_mlp"],
                "--what mask_mlp needs the ablated stream",
            ),
            (
                ["patch", "run", "--task", "ioi", "--stream", "clean", "--masks", "live"],
                "--masks live needs the ablated",
            ),
            (
                ["patch", "stories-local", *OWN, "--corrupt", "Lily gave"],
                r"differ in length: 'Lily .* \(13\) and 'Lily gave' \(2\)",
            ),
            (["patch", "stories-local", *OWN, "--corrupt", OWN[1]], "clean and corrupt are the same"),
            (["patch", "stories-local", *OWN, "--answer", "Lily"], r"answer is not one token: 'Lily' .* meant ' Lily'"),
            (
                ["attribute", "stories-local", *OWN, "--wrong", " Zebedee"],
                r"wrong answer is not one token: ' Zebedee' \(.* \+ .*\)$",
            ),
            (["patch", "stories-local", *OWN, *LONG], "have 302 tokens, more than the model's n_ctx=128"),
            (["attribute", "run", "--task", "ioi", "--what", "head"], "perhaps you meant heads"),
            (["attribute", "run", "--task", "ioi", "--exact", "-1"], "exact=-1 must be 0 or more"),
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
        from sa_lens.compare import GRIDS
        from sa_lens.config import GateConfig, ModelConfig
        from sa_lens.core import SelfAblatingTransformer

        assert tuple(TASKS) == argument_checks.TASKS
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
    @pytest.mark.parametrize(
        ("n", "message"), [(15, "has 15 usable pairs, too few"), (24, "has 24 usable pairs: figures")]
    )
    def test_a_file_of_few_prompts(
        self, n: int, message: str, reader: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        tokenizer, path = load_tokenizer(reader), tmp_path / "own.json"
        pairs = tasks.ioi(tokenizer, n, words="stories")
        answers, wrong = ([tokenizer.decode(t) for t in tokens] for tokens in (pairs.answers, pairs.wrong_answers))
        rows = zip(pairs.clean_texts, pairs.corrupt_texts, answers, wrong, strict=True)
        keys = ("clean", "corrupt", "answers", "wrong_answers")
        prompts = [dict(zip(keys, (a, b, [c], [d]), strict=True)) for a, b, c, d in rows]
        path.write_text(json.dumps({"prompts": prompts}))
        arguments = ["circuit", reader, "--task", str(path), "--method", "eap", "--edges", "7", "--device", "cpu"]
        assert cli.main(arguments) == (2 if n < 16 else 0)
        assert message in capsys.readouterr().err

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


class TestPatch:
    def test_both_streams_of_a_pair_in_a_page_and_a_table(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from sa_lens import circuits
        from sa_lens.core import SelfAblatingTransformer

        monkeypatch.chdir(tmp_path)
        command = ["patch", "stories-local", *OWN, "--what", "resid_pre", "mask_mlp", "--device", "cpu"]
        assert cli.main(command) == 0
        printed = capsys.readouterr().out
        folder = Path("runs/stories-local/patching/Lily-or-Tom-resid_pre-mask_mlp")
        assert f"In {folder}: patching.html, patching.csv" in printed
        table = pandas.read_csv(folder / "patching.csv")
        model = SelfAblatingTransformer.from_pretrained("stories-local")
        pairs = circuits.PromptPairs.from_texts([tuple(OWN[1::2])], model.tokenizer)
        assert pairs.task == "Lily or Tom"
        start, rows = 0, {}
        for what, stream in (("resid_pre", "clean"), ("resid_pre", "ablated"), ("mask_mlp", "ablated")):
            expected = circuits.patch(model, pairs, what, stream=stream)
            rows[what, stream] = part = table[start : start + len(expected)]
            start += len(expected)
            assert set(zip(part["what"], part["stream"], strict=True)) == {(what, stream)}
            assert part["value"].tolist() == pytest.approx(expected["value"].tolist(), abs=1e-5)
        assert start == len(table)
        largest = rows["resid_pre", "clean"]["normalised"].abs().max()
        assert re.search(rf"clean +resid_pre +\d+ .* {largest:.2f}\n", printed)
        page = (folder / "patching.html").read_text(encoding="utf-8")
        for text in (
            "Lily and Tom went to the park. Tom gave",
            "Lily or Tom: residual stream",
            "Lily or Tom: MLP masks",
        ):
            assert text in page
        assert not re.search(r"<(?:script|link|img)[^>]+(?:src|href)=", page), "one file holds everything"
        assert cli.main([*command, "--json", "--direction", "noise", "--positions", "12,end"]) == 0
        made = json.loads(capsys.readouterr().out)
        assert made["folder"] == f"{folder}-noise"
        assert {row["position"] for row in made["rows"] if row["what"] == "resid_pre"} == {12, "end"}
        assert {row["direction"] for row in made["rows"]} == {"noise"}

    def test_a_task(self, reader: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        drafts = [
            {"clean": f"{a} gave {b} a hug. {b}", "corrupt": f"{b} gave {a} a hug. {a}", "answers": [" and"]}
            for a, b in (("Tom", "Lily"), ("Ben", "Mia"))
        ]
        file = tmp_path / "hug.json"
        file.write_text(json.dumps({"prompts": [{**draft, "wrong_answers": [" was"]} for draft in drafts]}))
        out = ["--out", str(tmp_path / "out"), "--device", "cpu"]
        arguments = ["patch", reader, "--task", str(file), "--pairs", "2", "--stream", "ablated", "--what", "z"]
        assert cli.main([*arguments, *out]) == 0
        assert "hug: kept 2 of 2 pairs" in capsys.readouterr().out
        table = pandas.read_csv(tmp_path / "out" / "patching.csv")
        assert (set(table["what"]), set(table["stream"]), set(table["n"])) == ({"heads"}, {"ablated"}, {2})

    def test_prompts_are_checked_with_the_tokens_of_the_model(self, reader: str) -> None:
        from sa_lens.core import SelfAblatingTransformer

        for run in ("stories-local", "tinystories-local", reader):
            light = prompt_arguments._light_encoder(run)
            assert light is not None
            tokenizer = SelfAblatingTransformer.from_pretrained(run).tokenizer
            for text in (OWN[1], " Lily", "naïve 🦒 Zebedee's\n  \ttwo", "<|endoftext|> Tom", "Tom" + " and" * 300):
                assert light.encode(text) == tokenizer.encode(text, add_special_tokens=False)
            assert light.unknown == tokenizer.unk_token_id


class TestAttribute:
    def test_heads_and_neurons_of_both_streams(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from sa_lens import circuits
        from sa_lens.core import SelfAblatingTransformer

        monkeypatch.chdir(tmp_path)
        assert cli.main(["attribute", "stories-local", *OWN, "--device", "cpu"]) == 0
        folder = Path("runs/stories-local/attribution/Lily-or-Tom-heads-neurons")
        assert f"In {folder}: attribution.html, attribution.csv" in capsys.readouterr().out
        table = pandas.read_csv(folder / "attribution.csv")
        model = SelfAblatingTransformer.from_pretrained("stories-local")
        pairs = circuits.PromptPairs.from_texts([tuple(OWN[1::2])], model.tokenizer)
        for what, exact in (("heads", "all"), ("neurons", 20)):
            for stream in ("clean", "ablated"):
                expected = circuits.attribute_nodes(model, pairs, what, exact=exact, stream=stream)
                part = table[(table["what"] == what) & (table["stream"] == stream)]
                for name in ("estimate", "effect"):
                    assert part[name].tolist() == pytest.approx(expected[name].tolist(), abs=1e-5, nan_ok=True)
        page = (folder / "attribution.html").read_text(encoding="utf-8")
        assert "heads, exact effect" in page
        assert "heads, estimate by gradient" in page
        assert "neurons, exact effect, ablated stream" in page


class TestModels:
    def test_are_those_that_load_by_name(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["models"]) == 0
        printed = capsys.readouterr().out
        assert re.findall(r"^\S+", printed, re.MULTILINE) == list(models().index)
        assert re.search(r"stories-local .*\n +[\d,]+ parameters, clean loss \d\.\d\d, ablated loss", printed)
        assert cli.main(["models", "--json"]) == 0
        assert json.loads(capsys.readouterr().out).keys() == {*models().index}


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

    def test_trains_measures_and_says_where_it_is(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
        assert cli.main([*arguments, "--seeds", "1", "--variants", "global-4,random-init"]) == 0
        printed = capsys.readouterr().out
        assert "weights are less sparse\n" in printed
        assert re.search("perplexity: lower, clean +undecided: all", printed), "one seed decides nothing"
        files = re.findall(r"[\w.]+\.\w+", printed.splitlines()[-1].split(": ")[1])
        assert {"table.md", "figure.html"} <= set(files)
        assert all((folder / file).is_file() for file in files)
        values = pandas.read_csv(folder / "values.csv")
        assert set(values["seed"]) == {0}
        assert set(values["variant"]) == {"baseline", "global-4", "random-init"}
        assert {"loss", "hoyer"} <= set(values["column"])
        assert "cpr" not in set(values["column"])

    def test_a_stop_says_that_the_same_command_goes_on(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from sa_lens.compare import run_grid

        def stopped(*arguments: object, **options: object) -> None:
            raise KeyboardInterrupt

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
            (["--variants", "local-3"], "no variant local-3; there are baseline, local-4"),
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
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        arguments = ["compare", "--grid", "smoke", "--out", str(tmp_path / "out"), "--device", "cpu"]
        assert message in fails([*arguments, *flags], capsys)
        assert not (tmp_path / "out" / "models").exists()
