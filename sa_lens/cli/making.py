"""Commands that make models and run them: train, demo, eval, generate, export."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from sa_lens.cli.parsing import COMMANDS, Command, Run, as_json, command, parse
from sa_lens.config import PRESETS, Device, ExportFormat, PresetName, RunConfig, Which, read_yaml
from sa_lens.launching import unfinished_launch
from sa_lens.places import output_file, output_folder


@dataclass(frozen=True)
class TrainOptions:
    """What `sa-lens train` takes beside the configuration."""

    out: Path
    """Run folder, new unless --resume."""
    preset: PresetName | None = None
    """Named starting point of the configuration."""
    config: Path | None = None
    """YAML file; its values come before the preset's."""
    resume: bool = False
    """Go on with the run in the folder, bit for bit."""
    init: str | None = None
    """Start from this run folder, shipped model, Hub id or TransformerLens model (train.init)."""
    device: Device = "auto"
    """Where to train."""


TRAIN_HELP = """Train a model: gates and transformer together, or a dense baseline with --gates.scope none.

Every setting of the YAML file is a flag too, and flags come first:
  --gates.scope local|global|both|none   --gates.k-attn 8   --gates.k-mlp 8
  --model.n-layers 4   --model.d-model 128   --model.n-heads 8   --model.n-ctx 256
  --data.source FILE   --data.validation FILE   --data.tokenizer FOLDER   --data.keep-whole FILE
  --train.steps 2000   --train.batch-size 16   --train.lr 3e-3   --train.freeze base
  --help-all                             lists all of them

Examples:
  sa-lens train --preset laptop --out runs/local
  sa-lens train --preset laptop --gates.scope none --out runs/dense
  sa-lens train --resume --out runs/local"""


def train_command(arguments: list[str]) -> int | None:
    """Precedence of settings: flags, then --config, then --preset, then the defaults."""
    if "--help-all" in arguments:
        parse(RunConfig, ["--help"], "train", "All settings, by section.", default=RunConfig())
    options, flags = parse(
        TrainOptions, arguments, "train", TRAIN_HELP, return_unknown_args=True, config=(tyro.conf.FlagCreatePairsOff,)
    )
    output_folder(options.out)
    launch = unfinished_launch()
    if launch is not None and (launch.cpu or options.device == "cpu"):
        command = launch.command(["sa_lens", "train", *arguments])
        os.execv(command[0], command)
    if options.resume and options.preset is None and options.config is None:
        from sa_lens.training.run_folder import stored_config

        run = stored_config(options.out)
    else:
        run = PRESETS[options.preset] if options.preset is not None else RunConfig()
        run = read_yaml(options.config, base=run) if options.config is not None else run
    if options.init is not None:
        run = dataclasses.replace(run, train=dataclasses.replace(run.train, init=options.init))
    run = parse(RunConfig, flags, "train", "", default=run)

    from sa_lens.training import train

    result = train(run, options.out, device=options.device, resume=options.resume)
    if not _is_first_process():
        return None
    stream = "clean" if result.evaluation.ablated_loss is None else "ablated"
    print(
        f"\n{result.folder}: {result.steps:,} steps in {_duration(result.seconds)}; best validation loss of the ",
        end="",
    )
    print(f"{stream} stream {result.best_loss:.4f} at step {result.best_step:,}")
    if result.sample is not None:
        print(f"\n{result.sample.side_by_side()}")
    print(f'\nNext: sa-lens eval {result.folder}\n      sa-lens generate {result.folder} "Once upon a time"')
    return None


COMMANDS["train"] = Command("train a model", "sa-lens train --preset laptop --out runs/local", train_command)


@command("what the shipped models do, and a minute of training", "sa-lens demo")
def demo(out: Path = Path("runs/demo"), train: bool = False, seed: int = 0, device: Device = "auto") -> int | None:
    """Show it all on generated stories, offline, in about three minutes.

    With the two shipped models: skill, a story, patching and circuits in both streams, what the masks carry, units and
    a report; then a self-ablating model is trained from scratch for a minute.

    Args:
        out: Folder of figures, report and runs; an interrupted training goes on.
        train: Train the two models from scratch instead, both at once, in at most eight minutes on two cores; exit
            code 1 if they miss what the shipped ones reach.
        seed: Seed of prompts and samples, or of initialisation and data order.
        device: Where to run.
    """
    output_folder(out)

    from sa_lens.demo import demo as run_demo
    from sa_lens.demo import train_demo

    if train:
        return 0 if train_demo(out, seed=seed, device=device) else 1
    run_demo(out, seed=seed, device=device)
    return None


@command("losses of both streams on validation text", "sa-lens eval runs/local --tokens 200000")
def eval_(
    run: Run,
    text: str | None = None,
    column: str = "text",
    tokens: int = 100_000,
    which: Which = "best",
    device: Device = "auto",
    json: bool = False,
) -> int | None:
    """Evaluate a model: clean and ablated loss, perplexity, bits per byte, and how the gates use their units.

    Args:
        run: Run folder, shipped model or Hub id.
        text: Text to evaluate on, as data.source; default: the run's own validation text.
        column: Column of --text that holds the text.
        tokens: Predicted tokens, from the beginning of the text.
        which: The best weights, or the last checkpoint's.
        device: Where to run.
        json: Print one JSON object.
    """
    from sa_lens.training import evaluate_run, evaluation_table

    found = evaluate_run(run, text=text, column=column, tokens=tokens, which=which, device=device)
    print(as_json(dataclasses.asdict(found)) if json else evaluation_table(found))
    return None


@command("text from both streams, side by side", 'sa-lens generate runs/local "Once upon a time"')
def generate(
    run: Run,
    prompt: Annotated[str, tyro.conf.arg(metavar="PROMPT"), tyro.conf.Positional] = "",
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_k: int | None = None,
    seed: int = 0,
    which: Which = "best",
    device: Device = "auto",
    json: bool = False,
) -> int | None:
    """Continue a prompt in both streams, with the same random draws.

    Args:
        run: Run folder, shipped model or Hub id.
        prompt: Text to continue; empty: a text from its beginning.
        max_new_tokens: Tokens to write at most.
        temperature: 0: always the likeliest token.
        top_k: Draw from so many likeliest tokens; None: from all.
        seed: Seed of the draws.
        which: The best weights, or the last checkpoint's.
        device: Where to run.
        json: Print one JSON object.
    """
    from sa_lens.training import load_run, sample

    model = load_run(run, which=which, device=device)
    drawn = sample(model, prompt, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, seed=seed)
    print(as_json(dataclasses.asdict(drawn)) if json else drawn.side_by_side())
    return None


@command("write a model for other programs", "sa-lens export runs/local --to hf --out local-gpt2")
def export(
    run: Run,
    to: ExportFormat,
    out: Path,
    which: Which = "best",
) -> int | None:
    """Write a model in a format of other programs.

    Args:
        run: Run folder, shipped model or Hub id.
        to: hooked: a plain HookedTransformer, with the lines of Python that load it; reference: a state dict (.pt) with
            the names of the paper's code, gates included; hf: a GPT-2 folder for transformers, clean stream only.
        out: Folder to write, or file for reference.
        which: The best weights, or the last checkpoint's.
    """
    if to == "reference":
        output_file(out)
    else:
        output_folder(out, free=True)

    from sa_lens.core import export as formats
    from sa_lens.training import load_run

    model = load_run(run, which=which, device="cpu")
    if to == "hooked":
        loader = formats.to_hooked(model, out)
        print(f"{out} written. Load it with:\n\n{loader}")
    elif to == "reference":
        print(f"{formats.to_reference(model, out)} written")
    else:
        print(f"{formats.to_hf(model, out)} written. Load it with: AutoModelForCausalLM.from_pretrained({str(out)!r})")
    return None


def _is_first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
