"""A tour of the shipped pair: skill, stories, patching, circuits, masks, units, a report, and a short training."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from sa_lens.catalogue import about, run_folder
from sa_lens.circuits import Circuit, Experiment, PromptPairs, acdc, faithfulness, patch
from sa_lens.circuits.tasks import make_unseen
from sa_lens.config import RunConfig, Stream
from sa_lens.core import SelfAblatingTransformer
from sa_lens.core.host import streams_of
from sa_lens.data import PreparedData
from sa_lens.demo.pair import pair_run
from sa_lens.demo.printing import Clock, loss_table, print_table, skill_table
from sa_lens.report import make_report
from sa_lens.report import save as save_report
from sa_lens.shipped.make import figures_of
from sa_lens.shipped.measuring import skills
from sa_lens.training import load_run, sample, text_of_run, train
from sa_lens.training.run_folder import is_run
from sa_lens.units import calibrate, specialization, summary
from sa_lens.views import patch_map, save, side_by_side, training_curves

LOCAL, DENSE = "stories-local", "stories-dense"
STREAMS: tuple[Stream, ...] = ("clean", "ablated")
SHORT_STEPS = 700
"""Steps of the short training."""
PROMPTS, SKILL_PROMPTS = 48, 200
"""Prompt pairs of patching and circuits, and of each task's skill."""
UNIT_TOKENS, REPORT_UNITS = 20_000, 48
"""Tokens that units are described on, and units of each model that the report explains."""
UNIT_FIGURES = {
    "live": "share of units that are live",
    "firing_rate": "share of tokens that they fire at",
    "effective_tokens": "different tokens that they fire at, effectively",
    "top_token_share": "share of their firing on one token",
}
"""Figures of the units that are printed, and what each says."""
TAU = 0.01
"""ACDC's threshold, nats."""


def tour(out: Path, clock: Clock, *, seed: int, device: str, progress: bool) -> Path:
    """Runs the parts one after the other and prints the results of each; see `sa_lens.demo.demo`."""
    out.mkdir(parents=True, exist_ok=True)
    with clock.part("loading the two models"):
        models = {name: load_run(name, device=device).requires_grad_(False) for name in (DENSE, LOCAL)}
        local = models[LOCAL]
    for name in models:
        print(f"{name}: {about(name)['description']}")

    with clock.part("skill"):
        accuracies = {
            name.removeprefix("stories-"): {"skills": skills(model, "stories", n=SKILL_PROMPTS, seed=seed)}
            for name, model in models.items()
        }
    print_table(
        f"Pair accuracy on {SKILL_PROMPTS} prompts of each task, IOI with names that never meet in training",
        skill_table(accuracies),
    )

    with clock.part("stories"):
        print("\nA story of the dense model, and one of each stream of the self-ablating model")
        for name, model in models.items():
            print(f"\n{name}")
            print(sample(model, "One day, Lily and Tom", max_new_tokens=50, seed=seed).side_by_side())

    assert local.tokenizer is not None
    pairs = make_unseen("ioi", local.tokenizer, 4 * PROMPTS, seed, words="stories")
    pairs = max((group for _, group in pairs.by_length(PROMPTS)), key=len)
    with clock.part("patching"):
        written = patching_figures(local, pairs, out, progress)
    with clock.part("circuits"):
        circuits: dict[Stream, Circuit] = {}
        shares: dict[Stream, float] = {}
        for stream in STREAMS:
            exp = Experiment(local, pairs, stream=stream)
            circuits[stream] = acdc(exp, TAU, progress=progress).circuit
            shares[stream] = faithfulness(exp, [circuits[stream]], progress=progress).points[0].f.mean
        written.append(circuit_figure(circuits, out))
    tell_circuits(circuits, shares)

    with clock.part("text"):
        data = text_of_run(LOCAL, local)
    with clock.part("units"):
        tell_units(local, data, seed, progress)
    with clock.part("report"):
        made = make_report(
            [LOCAL, DENSE],
            title="The shipped models of the generated stories",
            n_units=REPORT_UNITS,
            seed=seed,
            device=device,
            progress=progress,
        )
        page = save_report(made, out / "report.html")

    with clock.part("training"):
        trained = short_training(out / "short", seed, device, progress)
        short = figures_of(trained, pair_run(seed=seed), "stories", data)
        written.append(save(training_curves([out / "short"]), out / "training.html"))
    stored = {name: about(name)["figures"] for name in (DENSE, LOCAL)}
    print_table("Validation loss, nats per token", loss_table({"trained just now": short, **stored}))

    ioi = {row["stream"]: row["pair_accuracy"] for row in accuracies["local"]["skills"] if row["task"] == "ioi"}
    sizes = {stream: len(circuit.prune_dangling()) for stream, circuit in circuits.items()}
    total = len(circuits["clean"].graph)
    print(
        "\nWhat was found\n"
        f"  The self-ablating model names the receiver in {ioi['clean']:.0%} of the prompts; with only\n"
        f"  {local.gates.k_attn} of {local.cfg.n_heads * local.cfg.d_head} attention units and {local.gates.k_mlp} of "
        f"{local.cfg.d_mlp} neurons per layer, in {ioi['ablated']:.0%}.\n"
        f"  Its circuit has {sizes['clean']} of {total} edges in the clean stream and {sizes['ablated']} in the "
        "ablated one."
    )
    print(f"\nWhere the time went\n{clock.table()}")
    print("\nFigures:", *(f"  {path}" for path in written), sep="\n")
    print(f"\nReport, to open in a browser:\n  {page}")
    print(
        "\nNext:\n"
        f'  sa-lens generate {LOCAL} "Lily and Tom went to the park."\n'
        f"  sa-lens circuit {LOCAL} --task object --stream ablated\n"
        "  sa-lens demo --train\n"
        "  sa-lens train --preset laptop --data.source stories --out runs/mine\n"
        "  jupyter lab examples/01_two_streams.ipynb"
    )
    return out


def patching_figures(model: SelfAblatingTransformer, pairs: PromptPairs, out: Path, progress: bool) -> list[Path]:
    """Patches residual streams and heads in both streams and draws the results, a figure for each."""
    written = []
    for what, title in (("resid_pre", "residual streams"), ("heads", "heads")):
        tables = [patch(model, pairs, what, stream=stream, progress=progress) for stream in STREAMS]
        records = [patch_map(table, "value") for table in tables]
        figure = side_by_side(records, f"Which {title} carry the indirect object?", names=STREAMS)
        written.append(save(figure, out / f"patching-{what}.html"))
    return written


def circuit_figure(circuits: dict[Stream, Circuit], out: Path) -> Path:
    """Draws the circuits of both streams next to one another."""
    figure = side_by_side(
        list(circuits.values()), "ACDC's circuit of the indirect object", names=[f"{name} stream" for name in circuits]
    )
    return save(figure, out / "circuits.html")


def tell_circuits(circuits: dict[Stream, Circuit], shares: dict[Stream, float]) -> None:
    """Prints the sizes of the circuits, and the share of the effect that each carries."""
    print(f"\nCircuits of the indirect object (ACDC, tau {TAU} nats)")
    for stream, circuit in circuits.items():
        edges = f"{len(circuit.prune_dangling())} of {len(circuit.graph)} edges"
        masks = "" if circuit.about["masks"] == "none" else f", {circuit.about['masks']} masks"
        print(f"  {stream:<8} stream: {edges} carry {shares[stream]:.0%} of the effect{masks}")


def tell_units(model: SelfAblatingTransformer, data: PreparedData, seed: int, progress: bool) -> None:
    """Prints what the units of each stream fire on, as means over units."""
    thresholds = calibrate(model, data.train, streams_of(model), n_tokens=UNIT_TOKENS, progress=progress)
    table = specialization(model, data.validation, thresholds, n_tokens=UNIT_TOKENS, progress=progress).table
    means = summary(table, list(UNIT_FIGURES), seed=seed).query("site == 'all'")
    shown = means.pivot(index="column", columns="stream", values="mean").reindex(list(UNIT_FIGURES))
    print_table("Units, means over those that are live", shown.rename(index=UNIT_FIGURES))


def short_training(folder: Path, seed: int, device: str, progress: bool) -> SelfAblatingTransformer:
    """Trains a model like the shipped one from scratch, with its tokenizer and a schedule of fewer steps."""
    run = short_run(seed)
    print(
        f"\nTraining a self-ablating model from scratch: {run.train.steps:,} steps of {run.train.batch_size} x "
        f"{run.model.n_ctx} tokens, the first {run.train.dense_steps:,} of the clean stream alone",
        flush=True,
    )
    train(run, folder, device=device, resume=is_run(folder), progress=progress)
    return load_run(str(folder), device=device)


def short_run(seed: int) -> RunConfig:
    """The configuration of the short training."""
    run = pair_run(seed=seed)
    options: dict[str, Any] = {"steps": SHORT_STEPS, "eval_every": SHORT_STEPS // 2, "save_every": SHORT_STEPS}
    return dataclasses.replace(
        run,
        data=dataclasses.replace(run.data, tokenizer=str(run_folder(LOCAL))),
        train=dataclasses.replace(run.train, **options),
    )
