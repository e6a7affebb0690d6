"""Commands that make models and run them: train, demo, eval, generate, export."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from json import dumps
from pathlib import Path
from typing import Annotated, Any

import tyro

from sa_lens.catalogue import about, shipped_names
from sa_lens.cli.argument_checks import MayBeEmpty, Run, argument_types, check_run
from sa_lens.cli.starting import start
from sa_lens.config import PRESETS, Device, ExportFormat, PresetName, RunConfig, Which, read_yaml
from sa_lens.launching import unfinished_launch
from sa_lens.places import output_file, output_folder


@dataclass(frozen=True)
class TrainOptions:
    """What `sa-lens train` takes beside the settings of the configuration."""

    out: Path
    """Run folder, new unless --resume."""
    preset: PresetName | None = None
    """Named starting point of the configuration."""
    config: Path | None = None
    """YAML file; its values come before the preset's."""
    resume: bool = False
    """Go on with the run in the folder, bit for bit."""
    init: str | None = None
    """Start from this run folder, shipped model, Hugging Face folder, GGUF file, Hub id or TransformerLens model
    (train.init)."""
    device: Device = "auto"
    """Where to train."""
    dry_run: bool = False
    """Say which model, gates, types and memory the run would have, and do nothing."""

    def settings(self) -> RunConfig:
        """The settings before flags: those of the run to resume, or the file's over the preset's over the defaults."""
        if self.resume and self.preset is None and self.config is None:
            from sa_lens.training.run_folder import stored_config

            run = stored_config(self.out)
        else:
            run = PRESETS[self.preset] if self.preset is not None else RunConfig()
            run = read_yaml(self.config, base=run) if self.config is not None else run
        if self.init is not None:
            run = dataclasses.replace(run, train=dataclasses.replace(run.train, init=self.init))
        return run


def train(options: TrainOptions, settings: RunConfig) -> None:
    """Train a model.

    Gates and transformer are trained together, or a dense baseline with --gates.scope none. Every setting of the YAML
    file is a flag too; --help-all lists all of them. The usual ones:

      --gates.scope local|global|both|none   --gates.k-attn 8   --gates.k-mlp 8
      --model.n-layers 4   --model.d-model 128   --model.n-heads 8   --model.n-ctx 256
      --data.source FILE   --data.validation FILE   --data.tokenizer FOLDER   --data.keep-whole FILE
      --train.steps 2000   --train.batch-size 16   --train.lr 3e-3   --train.freeze base

    Example: sa-lens train --preset laptop --out runs/local
             sa-lens train --preset laptop --gates.scope none --out runs/dense
             sa-lens train --resume --out runs/local
    """
    start(f"train: {options.out}", trains=True)

    from sa_lens.training import plan
    from sa_lens.training import train as run_training

    if options.dry_run:
        print(plan(settings))
        return
    result = run_training(settings, options.out, device=options.device, resume=options.resume)
    if os.environ.get("RANK", "0") != "0":
        return
    stream = "clean" if result.evaluation.ablated_loss is None else "ablated"
    print(
        f"\n{result.folder}: {result.steps:,} steps in {_duration(result.seconds)}; best validation loss of the "
        f"{stream} stream {result.best_loss:.4f} at step {result.best_step:,}"
    )
    if result.sample is not None:
        print(f"\n{result.sample.side_by_side()}")
    print(f'\nNext: sa-lens eval {result.folder}\n      sa-lens generate {result.folder} "Once upon a time"')


def train_from(arguments: list[str]) -> tuple[list[str], Callable[..., None]]:
    """`train` with the defaults that --preset, --config, --resume and --init set, which flags then change.

    Args:
        arguments: the command line, beginning with `train`.

    Returns:
        The command line for tyro, and the command. Its short help leaves the settings out; that of --help-all does not.
    """
    default, shown = RunConfig(), [tyro.conf.arg(name="")]
    if {"-h", "--help"} & set(arguments):
        shown.append(tyro.conf.Suppress)
    arguments = ["--help" if word == "--help-all" else word for word in arguments]
    # what tyro cannot read here, it cannot read later either, and then it says so
    with contextlib.suppress(SystemExit), contextlib.redirect_stderr(io.StringIO()):
        options, _ = tyro.cli(
            TrainOptions,
            args=arguments[1:],
            return_unknown_args=True,
            add_help=False,
            console_outputs=False,
            config=(tyro.conf.FlagCreatePairsOff,),
            registry=argument_types,
        )
        output_folder(options.out)
        launch = unfinished_launch()
        if launch is not None and (launch.cpu or options.device == "cpu"):
            command = launch.command(["sa_lens", *arguments])
            os.execv(command[0], command)
        default = options.settings()

    def command_with_defaults(options: Any, settings: Any = default) -> None:
        train(options, settings)

    command_with_defaults.__doc__ = train.__doc__
    command_with_defaults.__annotations__ = {
        "options": Annotated[TrainOptions, tyro.conf.arg(name=""), tyro.conf.FlagCreatePairsOff],
        "settings": Annotated[RunConfig, *shown],
        "return": None,
    }
    return arguments, command_with_defaults


def demo(out: Path = Path("runs/demo"), train: bool = False, seed: int = 0, device: Device = "auto") -> int | None:
    """Show what the shipped models do, and train a small one.

    This takes about three minutes and needs no network. With the two shipped models: skill, a story, patching and
    circuits in both streams, what the masks carry, units and a report; then a self-ablating model is trained from
    scratch for a minute.

    Example: sa-lens demo

    Args:
        out: Folder of figures, report and runs; an interrupted training goes on.
        train: Train the two models from scratch instead, both at once, in under eight minutes on two idle cores; exit
            code 1 if they miss what the shipped ones reach.
        seed: Seed of prompts and samples, or of initialisation and data order.
        device: Where to run.
    """
    output_folder(out)
    start(f"demo: {out}", trains=True)

    from sa_lens.demo import demo as run_demo
    from sa_lens.demo import train_demo

    if train:
        return 0 if train_demo(out, seed=seed, device=device) else 1
    run_demo(out, seed=seed, device=device)
    return None


def evaluate(
    run: Run,
    text: str | None = None,
    column: str = "text",
    tokens: int = 100_000,
    which: Which = "best",
    device: Device = "auto",
    json: bool = False,
) -> None:
    """Evaluate a model on validation text.

    Prints clean and ablated loss, perplexity and bits per byte, and how the gates use their units.

    Example: sa-lens eval runs/local --tokens 200000

    Args:
        run: Run folder, shipped model or Hub id.
        text: Text to evaluate on, as data.source; default: the run's own validation text.
        column: Column of --text that holds the text.
        tokens: Predicted tokens, from the beginning of the text.
        which: The best weights, or the last checkpoint's.
        device: Where to run.
        json: Print one JSON object.
    """
    check_run(run)
    start(f"eval: {run}")

    from sa_lens.training import evaluate_run, evaluation_table

    evaluation = evaluate_run(run, text=text, column=column, tokens=tokens, which=which, device=device)
    print(dumps(dataclasses.asdict(evaluation), indent=1) if json else evaluation_table(evaluation))


def generate(
    run: Run,
    prompt: Annotated[MayBeEmpty, tyro.conf.arg(metavar="PROMPT"), tyro.conf.Positional] = "",
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_k: int | None = None,
    seed: int = 0,
    which: Which = "best",
    device: Device = "auto",
    json: bool = False,
) -> None:
    """Continue a prompt in both streams.

    Both streams use the same random draws.

    Example: sa-lens generate runs/local "Once upon a time"

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
    check_run(run)
    start(f"generate: {run}")

    from sa_lens.training import load_run, sample

    model = load_run(run, which=which, device=device)
    drawn = sample(model, prompt, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, seed=seed)
    print(dumps(dataclasses.asdict(drawn), indent=1) if json else drawn.side_by_side())


def models(json: bool = False) -> None:
    """List the models that come with the package.

    Every command takes these names as a run: sa-lens generate stories-local "Lily".

    Example: sa-lens models

    Args:
        json: Print one JSON object.
    """
    known = {name: about(name) for name in shipped_names()}
    if json:
        print(dumps(known, indent=1))
        return
    for name, model in known.items():
        losses = (f"{stream} loss {loss:.2f}" for stream, loss in model["figures"]["losses"].items())
        print(f"{name:<18} {model['description']}")
        print(f"{'':<18} {model['sizes']['parameters']:,} parameters, {', '.join(losses)}")


def export(
    run: Run,
    to: ExportFormat,
    out: Path,
    which: Which = "best",
) -> None:
    """Write a model for other programs.

    Example: sa-lens export runs/local --to hf --out local-gpt2

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
    check_run(run)
    start(f"export: {run}")

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


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
