"""Commands that look into trained models: circuit, units, sae, compare, report."""

from __future__ import annotations

import dataclasses
from json import dumps
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from sa_lens.catalogue import results_folder
from sa_lens.cli.argument_checks import (
    FEWEST_PROMPTS,
    MayBeEmpty,
    Run,
    check_hook,
    check_measurements,
    check_number_of_prompts,
    check_run,
    check_task,
)
from sa_lens.cli.prompt_arguments import load_for_prompts
from sa_lens.cli.starting import start
from sa_lens.config import Ablation, Device, GridName, Masks, Method, ReportMethod, SAEPreset, Stream, Words
from sa_lens.places import output_file, output_folder
from sa_lens.stopping import Interrupted


def circuit(
    run: Run,
    task: str = "ioi",
    method: Method = "acdc",
    stream: Stream = "clean",
    tau: float = 0.01,
    edges: int | None = None,
    ablation: Ablation = "resample",
    masks: Masks | None = None,
    pairs: int = 128,
    words: Words | Literal["auto"] = "auto",
    seed: int = 0,
    out: Path | None = None,
    resume: bool = False,
    device: Device = "auto",
    json: bool = False,
) -> None:
    """Find the circuit of a task and judge it.

    The circuit is found in one stream; its faithfulness is measured on other prompts.

    Prints the task skill first: a circuit for a task that the model cannot do explains nothing. Writes the circuit,
    its ranking, tables and figures into a folder.

    Example: sa-lens circuit runs/local --task ioi --stream ablated

    Args:
        run: Run folder, shipped model or Hub id.
        task: ioi, pronoun, object, repeated, or a JSON file.
        method: acdc decides edge by edge; the others rank all edges.
        stream: Stream to look at.
        tau: ACDC's threshold, nats of KL.
        edges: Size of a ranking's circuit; None: the fewest with f >= 0.9.
        ablation: What other edges carry.
        masks: Masks of the ablated stream. frozen: kept from the clean prompt. None: live, and frozen for relp.
        pairs: Prompts to find with, and to report on.
        words: Words of the prompts; auto: as the run's text.
        seed: Seed of prompts and bootstrap.
        out: Folder to write; None: in RUN/circuits.
        resume: Go on with an interrupted search by ACDC.
        device: Where to run.
        json: Print one JSON object.
    """
    check_task(task)
    if 2 * pairs < FEWEST_PROMPTS:
        raise ValueError(
            f"--pairs {pairs}: figures of fewer than {FEWEST_PROMPTS} prompts in all mean little; give at least "
            f"{FEWEST_PROMPTS // 2}"
        )
    choices = {"masks": masks, "ablation": ablation, "tau": tau if method == "acdc" else 0.01}
    usual = {"masks": None, "ablation": "resample", "tau": 0.01}
    unusual = [f"{name}-{value}" for name, value in choices.items() if value != usual[name]]
    folder = out or results_folder(run) / "circuits" / "-".join([Path(task).stem, method, stream, *unusual])
    folder = output_folder(folder)
    unfinished = folder / "unfinished.json"
    if resume and not unfinished.is_file():
        raise FileNotFoundError(f"{folder} holds no interrupted search (no {unfinished.name}): leave --resume out")
    check_run(run)
    start(f"circuit: {task} in the {stream} stream of {run} by {method}")

    from sa_lens.circuits import Circuit, Experiment, find_circuit
    from sa_lens.circuits.tasks import make_unseen
    from sa_lens.views import faithfulness_chart, save

    model, tokenizer, words = load_for_prompts(run, device, words)
    both = make_unseen(task, tokenizer, 2 * pairs, seed, words=words)
    check_number_of_prompts(task, len(both))
    find, report = both.split(seed)
    exp = Experiment(model, find, stream=stream, ablation=ablation, masks=masks, seed=seed)
    try:
        judged = find_circuit(
            exp,
            report,
            method,
            tau=tau,
            edges=edges,
            resume=Circuit.load(unfinished) if resume else None,
            progress=not json,
        )
    except Interrupted as stop:
        folder.mkdir(parents=True, exist_ok=True)
        stop.result.circuit.save(unfinished)
        raise Interrupted(
            f"stopped after {stop.result.visited:,} of {len(exp.graph):,} edges; {unfinished} has what is decided. "
            "Go on with the same command and --resume",
            folder=folder,
        ) from stop
    judged.save(folder)
    unfinished.unlink(missing_ok=True)
    figures: dict[str, Any] = {"circuit": judged}
    if judged.curve is not None:
        figures["faithfulness"] = faithfulness_chart({f"{method}, {stream} stream": judged.curve.table()})
    for name, figure in figures.items():
        save(figure, folder / f"{name}.html")
    if json:
        print(dumps(judged.row(), indent=1))
        return
    print(f"{both.report()}; {len(find)} to find with, {len(report)} to report on\n")
    print(judged.summary())
    print(f"\nIn {folder}: circuit.json, ranking.json, edges.csv, {', '.join(f'{name}.html' for name in figures)}")


def units(
    run: Run,
    tokens: int = 200_000,
    labels: int = 2_000,
    text: str | None = None,
    column: str = "text",
    seed: int = 1,
    out: Path | None = None,
    device: Device = "auto",
    json: bool = False,
) -> None:
    """Describe every unit, and how sparse the model is.

    Units are described in every stream on the run's validation text. Firing thresholds come from the beginning of the
    training text. Labels are those of generated stories.

    Example: sa-lens units runs/local --tokens 200000

    Args:
        run: Run folder, shipped model or Hub id.
        tokens: Validation tokens to read, and training tokens to calibrate on.
        labels: How many generated stories to score labels on; 0: none.
        text: Text to read instead of the run's own, as data.source; half of its documents set the thresholds.
        column: Column of --text that holds the text.
        seed: Seed of these stories.
        out: Folder to write; None: RUN/units.
        device: Where to run.
        json: Print one JSON object.
    """
    folder = output_folder(out or results_folder(run) / "units")
    check_run(run)
    start(f"units: {run}")

    import pandas as pd

    from sa_lens.core.host import streams_of
    from sa_lens.data.whole_files import atomic_write
    from sa_lens.training import load_run, text_of_run
    from sa_lens.units import (
        calibrate,
        effective_connections,
        label_stories,
        selectivity,
        sparsity,
        specialization,
        summary,
    )

    model = load_run(run, device=device)
    data = text_of_run(run, model, text, column=column)
    labelled = label_stories(model.tokenizer, labels, model.cfg.n_ctx, seed=seed) if labels else None
    thresholds = calibrate(model, data.train, streams_of(model), n_tokens=tokens, progress=not json)
    firing = specialization(model, data.validation, thresholds, n_tokens=tokens, progress=not json).table
    tables = {"units": firing, "sparsity": sparsity(model), "connections": effective_connections(model, firing)}
    summaries = [summary(firing)]
    if labelled is not None:
        selected = selectivity(model, labelled, thresholds, progress=not json)
        tables |= {"labels": selected.table, "coverage": selected.coverage}
        summaries.append(summary(selected.table))
    tables["summary"] = pd.concat(summaries, ignore_index=True)
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        atomic_write(folder / f"{name}.csv", table.to_csv(index=False).encode())
    whole = tables["summary"].query("site == 'all'").drop_duplicates(["column", "stream"])
    if json:
        means = {str(name): dict(zip(at["column"], at["mean"], strict=True)) for name, at in whole.groupby("stream")}
        print(dumps(means, indent=1))
        return
    shown = whole.pivot(index="column", columns="stream", values="mean").reindex(whole["column"].unique())
    print("Means over live units (live: over all), by stream\n")
    print(shown.dropna(how="all").to_string(float_format=lambda x: f"{x:.3f}", index_names=False))
    print(f"\nIn {folder}: {', '.join(f'{name}.csv' for name in tables)}")


def sae(
    run: Run,
    hook: str | None = None,
    stream: Stream = "clean",
    preset: SAEPreset = "laptop",
    steps: int | None = None,
    d_sae: int | None = None,
    l1_coefficient: float | None = None,
    tokens: int = 100_000,
    text: str | None = None,
    column: str = "text",
    seed: int = 0,
    out: Path | None = None,
    resume: bool = False,
    device: Device = "auto",
    json: bool = False,
) -> None:
    """Train a sparse autoencoder on a hook.

    SAELens trains it on the activations of one stream; it is measured on the run's validation text.

    Example: sa-lens sae runs/local --hook blocks.2.hook_mlp_out --stream ablated

    Args:
        run: Run folder, shipped model or Hub id.
        hook: Hook point; None: the MLP's output in the middle layer.
        stream: Stream of the activations and losses.
        preset: Settings to start from.
        steps: Optimizer steps; None: the preset's.
        d_sae: Latents; None: the preset's.
        l1_coefficient: Sparsity penalty; None: the preset's.
        tokens: Validation tokens.
        text: Text to read instead of the run's own, as data.source; half of its documents are for training.
        column: Column of --text that holds the text.
        seed: Seed of weights and order.
        out: Folder to write; None: in RUN/sae.
        resume: Go on from the checkpoint in the folder.
        device: Where to run.
        json: Print one JSON object.
    """
    output_folder(out or results_folder(run) / "sae")
    if hook is not None:
        check_hook(hook, run)
    check_run(run)
    start(f"sae: {run}, {stream} stream")

    from sa_lens.sae import evaluate_sae, train_sae
    from sa_lens.sae.train import check_output
    from sa_lens.training import load_run, text_of_run

    model = load_run(run, device=device)
    hook = hook or f"blocks.{model.cfg.n_layers // 2}.hook_mlp_out"
    folder = out or results_folder(run) / "sae" / f"{hook}-{stream}-{preset}-{seed}"
    check_output(folder, resume)
    data = text_of_run(run, model, text, column=column)
    chosen = {"steps": steps, "d_sae": d_sae, "l1_coefficient": l1_coefficient}
    changes: dict[str, Any] = {name: value for name, value in chosen.items() if value is not None}
    options: dict[str, Any] = {"stream": stream, "preset": preset, "seed": seed, "progress": not json}
    trained = train_sae(model, hook, data.train, output=folder, resume=resume, **options, **changes)
    measures = dataclasses.asdict(evaluate_sae(model, trained, data.validation, n_tokens=tokens, progress=not json))
    measures = {name: value for name, value in measures.items() if name != "density"}
    if json:
        print(dumps(measures, indent=1))
        return
    width = max(map(len, measures))
    print(
        "\n".join(
            f"{name:<{width}}  {value:.4g}" if isinstance(value, float) else f"{name:<{width}}  {value}"
            for name, value in measures.items()
        )
    )
    print(f"\nIn {folder}: load it with sae_lens.SAE.load_from_disk")


def compare(
    grid: GridName = "laptop",
    out: Path | None = None,
    seeds: int | None = None,
    columns: str | None = None,
    variants: str | None = None,
    text: str | None = None,
    validation: str | None = None,
    device: Device = "auto",
    dry_run: bool = False,
) -> None:
    """Train and measure a grid of models over seeds.

    A dense baseline, self-ablating models and controls are trained under equal conditions. Everything that is finished
    stays on disk: after Ctrl-C the same command goes on, a further seed or measurement costs only itself, and
    several processes may share the folder.

    Example: sa-lens compare --grid laptop --dry-run

    Args:
        grid: laptop: twenty small models, five seeds, generated stories. laptop-tinystories: the same on real text,
            three seeds. paper: the nine models of the paper, for GPUs. smoke: tiny models, to see that everything runs.
        out: Folder of models, tables and figure; None: runs/compare-GRID.
        seeds: How many, from 0 on; None: the grid's.
        columns: Measurements whose columns are wanted, separated by commas, such as losses,acdc; None: all.
        variants: Variants besides the baseline, separated by commas, such as local-8,joint-8; None: all.
        text: Train on this text instead: a file, a folder or a dataset id on the Hub.
        validation: Its validation text; None: a part of it.
        device: Where to run.
        dry_run: Say what is to do and how long it takes, and do nothing.
    """
    folder = output_folder(out or Path("runs") / f"compare-{grid}")
    names, chosen = (
        None if given is None else [name.strip() for name in given.split(",") if name.strip()]
        for given in (columns, variants)
    )
    check_measurements(names or [])
    start(f"compare: grid {grid} in {folder}", trains=True)

    from sa_lens.compare import compare as run_comparison
    from sa_lens.compare import plan, verdict_text
    from sa_lens.compare.dry_run import plan_text

    options: Any = {"seeds": seeds, "columns": names, "variants": chosen, "device": device}
    options |= {"text": text, "validation": validation}
    if dry_run:
        print(plan_text(plan(grid, folder, **options)))
        return
    comparison = run_comparison(grid, folder, **options)
    verdicts = verdict_text(comparison)
    if verdicts:
        print(f"\nClaims against the dense baseline, over {len(comparison.seeds)} seeds\n\n{verdicts}")
    if comparison.unfinished:
        print(f"\n{comparison.unfinished} measurements of models are not made yet.")
    print(f"\nIn {folder}: table.md, table.tex, values.csv, summary.csv, figure.html, and the models")


def report(
    runs: Annotated[tuple[MayBeEmpty, ...], tyro.conf.arg(metavar="RUN [OTHER_RUN ...]"), tyro.conf.Positional],
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("report.html"),
    text: str | None = None,
    stories: int | None = None,
    units: int | None = None,
    tokens: int | None = None,
    tasks: tuple[str, ...] | None = None,
    methods: tuple[ReportMethod, ...] | None = None,
    title: MayBeEmpty | None = None,
    seed: int = 0,
    device: Device = "auto",
) -> None:
    """Write one HTML page about trained models.

    It opens without a network: losses, stories token by token, circuits, units; several runs beside one another.

    Example: sa-lens report runs/local runs/dense -o report.html

    Args:
        runs: Run folders, shipped models or Hub ids; their stories come from the first one's validation text.
        out: File to write, ending in .html.
        text: Stories to show instead: a file, or a dataset on the Hub. Figures stay those of the first run's text.
        stories: Stories to show; None: 12, and 4 with more than 20 million parameters.
        units: Units of each model to explain, with snippets; None: 96, and 24 with more than 20 million parameters.
        tokens: Tokens to measure on; None: 110,000, and fewer for a model of more than 20 million parameters.
        tasks: ioi, pronoun, object, repeated or JSON files; None: ioi, and the others that a model can do.
        methods: Find circuits: acdc, eap-ig, gate; None: all, but acdc not with more than 20 million parameters.
        title: Heading; None: the names of the runs.
        seed: Seed of samples, prompts and explanations.
        device: Where to run.
    """
    if out.suffix != ".html":
        raise ValueError(f"--out {out} must end in .html: the report is a page for a browser")
    if not runs:
        raise ValueError("name at least one run: sa-lens report runs/local")
    if not all(run.strip() for run in runs):
        raise ValueError("the name of a run is empty, perhaps from an unset variable: name a run, or leave it out")
    output_file(out)
    for task in tasks or ():
        check_task(task)
    for run in runs:
        check_run(run)
    start(f"report: {', '.join(runs)}")

    from sa_lens.report import make_report, save

    made = make_report(
        runs,
        text=text,
        n_stories=stories,
        n_units=units,
        n_tokens=tokens,
        tasks=tasks,
        methods=methods,
        title=title,
        seed=seed,
        device=device,
    )
    path = save(made, out)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, opens in any browser without a network")
