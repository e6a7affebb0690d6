"""The command line: `sa-lens COMMAND ...`.

A command is one function below with a typed signature, from which its flags and help are made. Only the standard
library, tyro and the configuration are imported here; each command imports what it needs when it runs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import itertools
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from sa_lens.config import PRESETS, RunConfig, read_yaml

Device = Literal["auto", "cpu", "cuda", "mps"]
Run = Annotated[str, tyro.conf.arg(metavar="RUN"), tyro.conf.Positional]


@dataclass(frozen=True)
class Command:
    """A subcommand."""

    summary: str
    """One line for the list of commands."""
    example: str
    """A whole command line."""
    call: Callable[[list[str]], int | None]
    """Runs it on its arguments; returns the exit code, None for 0."""


COMMANDS: dict[str, Command] = {}


def command(summary: str, example: str) -> Callable[[Callable[..., int | None]], Callable[..., int | None]]:
    """Registers a function as the subcommand of its name; its parameters become arguments and flags."""

    def register(function: Callable[..., int | None]) -> Callable[..., int | None]:
        name = function.__name__.rstrip("_")

        def call(arguments: list[str]) -> int | None:
            about = (inspect.getdoc(function) or "").split("\nArgs:")[0].strip()
            return _parse(
                function,
                arguments,
                name,
                f"{about}\n\nExample:\n  {example}",
                config=(tyro.conf.FlagCreatePairsOff,),
            )

        COMMANDS[name] = Command(summary, example, call)
        return function

    return register


# ---------------------------------------------------------------------------------------------------------- commands


@dataclass(frozen=True)
class TrainOptions:
    """What `sa-lens train` takes beside the configuration."""

    out: Path
    """Run folder, new unless --resume."""
    preset: Literal["paper-2024-10", "paper-head", "laptop"] | None = None
    """Named starting point of the configuration."""
    config: Path | None = None
    """YAML file; its values come before the preset's."""
    resume: bool = False
    """Go on with the run in the folder, bit for bit."""
    init: str | None = None
    """Start from this run folder, Hub id or TransformerLens model (train.init)."""
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
        _parse(RunConfig, ["--help"], "train", "All settings, by section.", default=RunConfig())
    options, flags = _parse(
        TrainOptions, arguments, "train", TRAIN_HELP, return_unknown_args=True, config=(tyro.conf.FlagCreatePairsOff,)
    )
    if options.resume and options.preset is None and options.config is None:
        from sa_lens.training.run_folder import stored_config

        run = stored_config(options.out)
    else:
        run = PRESETS[options.preset] if options.preset is not None else RunConfig()
        run = read_yaml(options.config, base=run) if options.config is not None else run
    if options.init is not None:
        run = dataclasses.replace(run, train=dataclasses.replace(run.train, init=options.init))
    run = _parse(RunConfig, flags, "train", "", default=run)

    from sa_lens.training import side_by_side, train

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
        print(f"\n{side_by_side(result.sample)}")
    print(f'\nNext: sa-lens eval {result.folder}\n      sa-lens generate {result.folder} "Once upon a time"')
    return None


COMMANDS["train"] = Command("train a model", "sa-lens train --preset laptop --out runs/local", train_command)


@command("two small models on generated stories, and patching", "sa-lens demo")
def demo(out: Path = Path("runs/demo"), seed: int = 0, device: Device = "auto") -> int | None:
    """Show it all on generated stories, offline, in about ten minutes.

    Trains a dense baseline and a local self-ablating model, compares their losses, prints a story from each stream,
    measures indirect-object identification on names that never met in training, patches both streams, draws figures.

    Args:
        out: Folder of the runs and figures; a model that is there already is not trained again.
        seed: Seed of initialisation and data order.
        device: Where to run.
    """
    from sa_lens.demo import demo as run_demo

    run_demo(out, seed=seed, device=device)
    return None


@command("losses of both streams on validation text", "sa-lens eval runs/local --tokens 200000")
def eval_(
    run: Run,
    text: str | None = None,
    column: str = "text",
    tokens: int = 100_000,
    which: Literal["best", "last"] = "best",
    device: Device = "auto",
    json: bool = False,
) -> int | None:
    """Evaluate a model: clean and ablated loss, perplexity, bits per byte, and how the gates use their units.

    Args:
        run: Run folder or Hub id.
        text: Text to evaluate on, as data.source; default: the run's own validation text.
        column: Column of --text that holds the text.
        tokens: Predicted tokens, from the beginning of the text.
        which: The best weights, or the last checkpoint's.
        device: Where to run.
        json: Print one JSON object.
    """
    from sa_lens.training.report import evaluate_run, table

    found = evaluate_run(run, text=text, column=column, tokens=tokens, which=which, device=device)
    print(_json(dataclasses.asdict(found)) if json else table(found))
    return None


@command("text from both streams, side by side", 'sa-lens generate runs/local "Once upon a time"')
def generate(
    run: Run,
    prompt: Annotated[str, tyro.conf.arg(metavar="PROMPT"), tyro.conf.Positional] = "",
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_k: int | None = None,
    seed: int = 0,
    which: Literal["best", "last"] = "best",
    device: Device = "auto",
    json: bool = False,
) -> int | None:
    """Continue a prompt in both streams, with the same random draws.

    Args:
        run: Run folder or Hub id.
        prompt: Text to continue; empty: a text from its beginning.
        max_new_tokens: Tokens to write at most.
        temperature: 0: always the likeliest token.
        top_k: Draw from so many likeliest tokens; None: from all.
        seed: Seed of the draws.
        which: The best weights, or the last checkpoint's.
        device: Where to run.
        json: Print one JSON object.
    """
    from sa_lens.training import sample, side_by_side
    from sa_lens.training.report import load_run

    model = load_run(run, which=which, device=device)
    drawn = sample(model, prompt, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, seed=seed)
    print(_json(dataclasses.asdict(drawn)) if json else side_by_side(drawn))
    return None


@command("find a circuit for a task and judge it", "sa-lens circuit runs/local --task ioi --stream ablated")
def circuit(
    run: Run,
    task: str = "ioi",
    method: Literal["acdc", "eap", "eap-ig", "relp", "exact", "gate"] = "acdc",
    stream: Literal["clean", "ablated"] = "clean",
    tau: float = 0.01,
    edges: int | None = None,
    ablation: Literal["resample", "zero", "mean"] = "resample",
    gates: Literal["frozen", "live"] | None = None,
    pairs: int = 128,
    words: Literal["auto", "stories", "tinystories"] = "auto",
    seed: int = 0,
    out: Path | None = None,
    device: Device = "auto",
    json: bool = False,
) -> int | None:
    """Find the circuit of a task in one stream, and say how faithful it is on other prompts.

    Prints the task skill first: a circuit for a task that the model cannot do explains nothing. Writes the circuit,
    its ranking, tables and figures into a folder.

    Args:
        run: Run folder or Hub id.
        task: ioi, pronoun, object, repeated, or a JSON file.
        method: acdc decides edge by edge; the others rank all edges.
        stream: Stream to look at.
        tau: ACDC's threshold, nats of KL.
        edges: Size of a ranking's circuit; None: the fewest with f >= 0.9.
        ablation: What other edges carry.
        gates: Masks of the ablated stream alone; None: frozen.
        pairs: Prompts to find with, and to report on.
        words: Words of the prompts; auto: as the run's text.
        seed: Seed of prompts and bootstrap.
        out: Folder to write; None: in RUN/circuits.
        device: Where to run.
        json: Print one JSON object.
    """
    from sa_lens.circuits.pairs import MINIMUM
    from sa_lens.circuits.search import find_circuit
    from sa_lens.circuits.tasks import make
    from sa_lens.training.report import load_run, trained_on_stories
    from sa_lens.views import draw, faithfulness_chart, save

    if 2 * pairs < MINIMUM:
        raise ValueError(
            f"--pairs {pairs}: figures of fewer than {MINIMUM} prompts in all mean little; give at least {MINIMUM // 2}"
        )
    if words == "auto":
        words = "stories" if trained_on_stories(run) else "tinystories"
    model = load_run(run, device=device)
    if model.tokenizer is None:
        raise ValueError(f"{run} has no tokenizer, which the prompts of a task need")
    unseen: dict[str, Any] = {"name_pairs": "held-out"} if (task, words) == ("ioi", "stories") else {}
    both = make(task, model.tokenizer, 2 * pairs, seed, world=words, **unseen)
    find, report = both.split(seed)
    found = find_circuit(
        model,
        find,
        report,
        method,
        tau=tau,
        edges=edges,
        ablation=ablation,
        stream=stream,
        gates=gates,
        progress=not json,
        seed=seed,
    )
    folder = found.save(out or Path(run) / "circuits" / f"{both.task}-{method}-{stream}")
    figures = {"circuit": draw(found.circuit)}
    if found.curve is not None:
        figures["faithfulness"] = draw(faithfulness_chart({f"{method}, {stream} stream": found.curve.table()}))
    for name, figure in figures.items():
        save(figure, folder / f"{name}.html")
    if json:
        print(_json(found.row()))
        return None
    print(f"{both.report()}; {len(find)} to find with, {len(report)} to report on\n")
    print(found.summary())
    print(f"\nIn {folder}: circuit.json, ranking.json, edges.csv, {', '.join(f'{name}.html' for name in figures)}")
    return None


@command("what every unit fires on, and sparsity", "sa-lens units runs/local --tokens 200000")
def units(
    run: Run,
    tokens: int = 200_000,
    labels: int = 2_000,
    seed: int = 1,
    out: Path | None = None,
    device: Device = "auto",
    json: bool = False,
) -> int | None:
    """Describe every unit of every stream on the run's validation text, and how sparse weights and activations are.

    Firing thresholds come from the beginning of the training text. Labels are those of generated stories.

    Args:
        run: Run folder or Hub id.
        tokens: Validation tokens to read, and training tokens to calibrate on.
        labels: How many generated stories to score labels on; 0: none.
        seed: Seed of these stories.
        out: Folder to write; None: RUN/units.
        device: Where to run.
        json: Print one JSON object.
    """
    import pandas as pd

    from sa_lens.data.writing import atomic_write
    from sa_lens.training.report import load_run, text_of_run
    from sa_lens.units.activations import model_streams
    from sa_lens.units.comparison import summary
    from sa_lens.units.firing import calibrate
    from sa_lens.units.labels import label_stories, selectivity
    from sa_lens.units.sparsity_tables import effective_connections, sparsity
    from sa_lens.units.unit_tables import specialization

    model = load_run(run, device=device)
    text = text_of_run(run, model)
    labelled = label_stories(model.tokenizer, labels, model.cfg.n_ctx, seed=seed) if labels else None
    thresholds = calibrate(model, text.train, model_streams(model), n_tokens=tokens, progress=not json)
    found = specialization(model, text.validation, thresholds, n_tokens=tokens, progress=not json).table
    tables = {"units": found, "sparsity": sparsity(model), "connections": effective_connections(model, found)}
    summaries = [summary(found)]
    if labelled is not None:
        selected = selectivity(model, labelled, thresholds, progress=not json)
        tables |= {"labels": selected.table, "coverage": selected.coverage}
        summaries.append(summary(selected.table))
    tables["summary"] = pd.concat(summaries, ignore_index=True)
    folder = out or Path(run) / "units"
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        atomic_write(folder / f"{name}.csv", table.to_csv(index=False).encode())
    whole = tables["summary"].query("kind == 'all'").drop_duplicates(["column", "stream"])
    if json:
        means = {str(name): dict(zip(at["column"], at["mean"], strict=True)) for name, at in whole.groupby("stream")}
        print(_json(means))
        return None
    shown = whole.pivot(index="column", columns="stream", values="mean").reindex(whole["column"].unique())
    print("Means over live units, by stream\n")
    print(shown.dropna(how="all").to_string(float_format=lambda x: f"{x:.3f}", index_names=False))
    print(f"\nIn {folder}: {', '.join(f'{name}.csv' for name in tables)}")
    return None


@command("train a sparse autoencoder on a hook", "sa-lens sae runs/local --hook blocks.2.hook_mlp_out --stream ablated")
def sae(
    run: Run,
    hook: str | None = None,
    stream: Literal["clean", "ablated"] = "clean",
    preset: Literal["laptop", "paper"] = "laptop",
    steps: int | None = None,
    d_sae: int | None = None,
    l1_coefficient: float | None = None,
    tokens: int = 100_000,
    seed: int = 0,
    out: Path | None = None,
    resume: bool = False,
    device: Device = "auto",
    json: bool = False,
) -> int | None:
    """Train an SAE on what a hook holds in one stream, with SAELens, and measure it on the run's validation text.

    Args:
        run: Run folder or Hub id.
        hook: Hook point; None: the MLP's output in the middle layer.
        stream: Stream of the activations and losses.
        preset: Settings to start from.
        steps: Optimizer steps; None: the preset's.
        d_sae: Latents; None: the preset's.
        l1_coefficient: Sparsity penalty; None: the preset's.
        tokens: Validation tokens.
        seed: Seed of weights and order.
        out: Folder to write; None: in RUN/sae.
        resume: Go on from the checkpoint in the folder.
        device: Where to run.
        json: Print one JSON object.
    """
    from sa_lens.sae import evaluate_sae, train_sae
    from sa_lens.training.report import load_run, text_of_run

    model = load_run(run, device=device)
    text = text_of_run(run, model)
    hook = hook or f"blocks.{model.cfg.n_layers // 2}.hook_mlp_out"
    folder = out or Path(run) / "sae" / f"{hook}-{stream}-{preset}-{seed}"
    chosen = {"steps": steps, "d_sae": d_sae, "l1_coefficient": l1_coefficient}
    changes: dict[str, Any] = {name: value for name, value in chosen.items() if value is not None}
    options: dict[str, Any] = {"stream": stream, "preset": preset, "seed": seed, "progress": not json}
    trained = train_sae(model, hook, text.train, output=folder, resume=resume, **options, **changes)
    found = dataclasses.asdict(evaluate_sae(model, trained, text.validation, n_tokens=tokens, progress=not json))
    found = {name: value for name, value in found.items() if name != "density"}
    if json:
        print(_json(found))
        return None
    width = max(map(len, found))
    print(
        "\n".join(
            f"{name:<{width}}  {value:.4g}" if isinstance(value, float) else f"{name:<{width}}  {value}"
            for name, value in found.items()
        )
    )
    print(f"\nIn {folder}: load it with sae_lens.SAE.load_from_disk")
    return None


@command("train and measure a grid of models, one table", "sa-lens compare --grid laptop --dry-run")
def compare(
    grid: Literal["laptop", "laptop-tinystories", "paper", "smoke"] = "laptop",
    out: Path | None = None,
    seeds: int | None = None,
    columns: str | None = None,
    text: str | None = None,
    validation: str | None = None,
    device: Device = "auto",
    dry_run: bool = False,
) -> int | None:
    """Train and measure a dense baseline, self-ablating models and controls under equal conditions, over seeds.

    Everything that is finished stays on disk: after Ctrl-C the same command goes on, a further seed or group of columns
    costs only itself, and several processes may share the folder.

    Args:
        grid: laptop: nine small models, five seeds, generated stories. laptop-tinystories: the same on real text, three
            seeds. paper: the nine models of the paper, for GPUs. smoke: tiny models, to see that everything runs.
        out: Folder of models, tables and figure; None: runs/compare-GRID.
        seeds: How many, from 0 on; None: the grid's.
        columns: Groups of columns, separated by commas, such as losses,acdc; None: all.
        text: Train on this text instead: a file, a folder or a dataset id on the Hub.
        validation: Its validation text; None: a part of it.
        device: Where to run.
        dry_run: Say what is to do and how long it takes, and do nothing.
    """
    from sa_lens.compare import compare as run_comparison
    from sa_lens.compare.report import verdict_text

    if seeds is not None and seeds < 1:
        raise ValueError(f"--seeds {seeds}: give at least 1")
    folder = out or Path("runs") / f"compare-{grid}"
    groups = None if columns is None else [name.strip() for name in columns.split(",") if name.strip()]
    found = run_comparison(
        grid, folder, seeds=seeds, columns=groups, text=text, validation=validation, device=device, dry_run=dry_run
    )
    if dry_run:
        return None
    verdicts = verdict_text(found)
    if verdicts:
        print(f"\nClaims against the dense baseline, over {len(found.seeds)} seeds\n\n{verdicts}")
    if found.unfinished:
        print(f"\n{found.unfinished} groups of columns are not measured yet.")
    print(f"\nIn {folder}: table.md, table.tex, values.csv, summary.csv, figure.html, and the models")
    return None


@command("one page about trained models, for a browser", "sa-lens report runs/local runs/dense -o report.html")
def report(
    runs: Annotated[tuple[str, ...], tyro.conf.arg(metavar="RUN [OTHER_RUN ...]"), tyro.conf.Positional],
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("report.html"),
    text: str | None = None,
    stories: int = 12,
    units: int = 96,
    tasks: tuple[str, ...] | None = None,
    title: str | None = None,
    seed: int = 0,
    device: Device = "auto",
) -> int | None:
    """Write one HTML file that opens without a network: losses, stories token by token, circuits, units; several runs
    beside one another.

    Args:
        runs: Run folders or Hub ids; their stories come from the first one's validation text.
        out: File to write, ending in .html.
        text: Stories to show instead: a file, or a dataset on the Hub. Figures stay those of the first run's text.
        stories: Stories to show.
        units: Units of each model to explain, with snippets.
        tasks: ioi, pronoun, object, repeated or JSON files; None: ioi, and the others that a model can do.
        title: Heading; None: the names of the runs.
        seed: Seed of samples, prompts and explanations.
        device: Where to run.
    """
    if out.suffix != ".html":
        raise ValueError(f"--out {out} must end in .html: the report is a page for a browser")
    if not runs:
        raise ValueError("name at least one run: sa-lens report runs/local")

    from sa_lens.report import make_report, write_page

    made = make_report(
        runs, text=text, n_stories=stories, n_units=units, tasks=tasks, title=title, seed=seed, device=device
    )
    path = write_page(made, out)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, opens in any browser without a network")
    return None


@command("write a model for other programs", "sa-lens export runs/local --to hf --out local-gpt2")
def export(
    run: Run,
    to: Literal["hooked", "reference", "hf"],
    out: Path,
    which: Literal["best", "last"] = "best",
) -> int | None:
    """Write a model in a format of other programs.

    Args:
        run: Run folder or Hub id.
        to: hooked: a plain HookedTransformer, with the lines of Python that load it; reference: a state dict (.pt) with
            the names of the paper's code, gates included; hf: a GPT-2 folder for transformers, clean stream only.
        out: Folder to write, or file for reference.
        which: The best weights, or the last checkpoint's.
    """
    from sa_lens.core import export as formats
    from sa_lens.training.report import load_run

    model = load_run(run, which=which, device="cpu")
    if to == "hooked":
        loader = formats.to_hooked(model, out)
        print(f"{out} written. Load it with:\n\n{loader}")
    elif to == "reference":
        print(f"{formats.to_reference(model, out)} written")
    else:
        print(f"{formats.to_hf(model, out)} written. Load it with: AutoModelForCausalLM.from_pretrained({str(out)!r})")
    return None


# --------------------------------------------------------------------------------------------------------- machinery


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit code: 0, 1 (training failed), 2 (bad input) or 130 (interrupted).

    Errors print one line; with `--debug`, or `SA_LENS_DEBUG` in the environment, their traceback.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments or bool(os.environ.get("SA_LENS_DEBUG"))
    arguments = [a for a in arguments if a != "--debug"]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0
    if arguments[0] == "--version":
        from sa_lens import __version__

        print(f"sa-lens {__version__}")
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        return _fail(f"no command {name!r}: choose from {', '.join(COMMANDS)}")
    logging.basicConfig(level=logging.WARNING, format="sa-lens: %(message)s")
    try:
        return COMMANDS[name].call(rest) or 0
    except BrokenPipeError:
        # the reader of our output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt as stop:
        print(f"sa-lens {name}: {stop or 'interrupted'}", file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        if debug:
            raise
        _fail(f"{name}: {_told(error)}")
        return 1 if type(error).__name__ == "TrainingDiverged" else 2


def usage() -> str:
    """The list of commands."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {found.summary}" for name, found in COMMANDS.items()]
    return "\n".join(
        [
            "usage: sa-lens COMMAND ...",
            "",
            "Self-ablating transformers: train them, read both of their streams.",
            "",
            *lines,
            "",
            "sa-lens COMMAND --help shows a command's flags and an example; --debug shows where an error comes from.",
        ]
    )


def _parse(what: Any, arguments: list[str], name: str, description: str, **options: Any) -> Any:
    """As `tyro.cli`, with its boxed complaints made one line."""
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(what, args=arguments, prog=f"sa-lens {name}", description=description, **options)
    except SystemExit as stop:
        if stop.code not in (0, None):
            message = _one_line(complaint.getvalue()).removeprefix(f"Error parsing {name}: ")
            raise SystemExit(_fail(f"{name}: {message}")) from None
        raise


def _one_line(boxed: str) -> str:
    """The first paragraph of a box drawn by tyro, in Unicode or ASCII, and the flag it suggests."""
    _title, *rows = [re.sub(r"^-{3,}$", "", re.sub(r"[│╭╮╰╯─]+", "", line).strip()) for line in boxed.splitlines()]
    paragraphs = [" ".join(group) for filled, group in itertools.groupby(rows, key=bool) if filled]
    message = paragraphs[0] if paragraphs else boxed.strip()
    suggested = re.search(r"Perhaps you meant:.*?(--[\w.-]+)", " ".join(paragraphs))
    return message + (f" (perhaps you meant {suggested.group(1)})" if suggested else "")


def _fail(message: str) -> int:
    print(f"sa-lens {message}", file=sys.stderr)
    return 2


def _told(error: Exception) -> str:
    """An error's message without the number that Python puts before those of the operating system."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return str(error)


def _json(record: dict[str, Any]) -> str:
    return json.dumps(record, indent=1)


def _is_first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
