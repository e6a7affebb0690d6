"""`compare` trains and measures a grid and writes its table; `plan` lists the remaining work.

Models are trained and measured one after the other. What is on disk is not done again, and several processes may work
on one folder.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sa_lens.compare.dry_run import plan_table
from sa_lens.compare.grids import Grid, apply_choices, grid_named, keep_names_whole, write_names
from sa_lens.compare.learning import skill_while_training
from sa_lens.compare.markdown_latex import write
from sa_lens.compare.measurement import TrainedModel, check_validation, words_of
from sa_lens.compare.model_folder import ModelFolder, model_folders
from sa_lens.compare.verdicts import Comparison, collect
from sa_lens.core.architecture import check_supported, hooked_config
from sa_lens.data import PreparedData, prepare
from sa_lens.places import output_folder
from sa_lens.stopping import Interrupted, stop_requests
from sa_lens.training import load_run, train
from sa_lens.training.processes import check_device
from sa_lens.training.training_setup import load_text_and_model

if TYPE_CHECKING:
    import pandas as pd

NAMES_FILE = "names.txt"
"""Names that a tokenizer trained on real text keeps whole."""
WAIT = 2.0
"""Seconds between looks at models that other processes work on."""


def compare(
    grid: str | Grid,
    out: str | Path,
    *,
    seeds: int | Sequence[int] | None = None,
    columns: Sequence[str] | None = None,
    variants: Sequence[str] | None = None,
    text: str | None = None,
    validation: str | None = None,
    progress: bool = True,
    device: str = "auto",
) -> Comparison:
    """Trains and measures a grid of models under equal conditions and writes one table.

    Everything that is finished stays on disk and is found again by what went into it: a stopped comparison goes on
    with the same call, and a further measurement or seed costs only itself. Several processes may share a folder; each
    takes models that no other works on.

    Args:
        grid: `laptop`, `laptop-tinystories`, `paper`, `smoke`, or a `Grid` of your own.
        out: folder of models, tables and figure.
        seeds: number of seeds (from 0 on), or a list of seeds; None takes those of the grid.
        columns: labels of the measurements whose columns are wanted, such as `losses` or `object-acdc`; None: all.
        variants: names of the variants that are wanted besides the baseline, such as `local-8`; None: all.
        text: train on this text instead: a file or folder, or a dataset id on the Hub.
        validation: its validation text; None: a part of it.
        progress: say what is being done.
        device: auto, cpu, cuda or mps.

    Returns:
        The comparison.

    Raises:
        ValueError: an unknown grid, measurement or variant, bad seeds, validation without text, gates that do not fit
            the model, too short a validation text, another text than that of earlier models, or what training raises.
        Interrupted: Ctrl-C or SIGTERM; everything finished is on disk.
    """
    choices = {"seeds": seeds, "columns": columns, "variants": variants, "text": text, "validation": validation}
    out = output_folder(out)
    folders = _folders(grid, out, device, choices)
    run = folders[0].grid.run
    check_gates(folders[0].grid)
    if run.data.keep_whole == str(out / NAMES_FILE):
        write_names(out / NAMES_FILE)
    data = prepare(run.data, run.model.n_ctx, progress=progress)
    check_validation(data, run.model.n_ctx)
    _train_and_measure_all(folders, data, device, progress)
    comparison = collect(folders)
    write(comparison, out)
    return comparison


def plan(
    grid: str | Grid,
    out: str | Path,
    *,
    seeds: int | Sequence[int] | None = None,
    columns: Sequence[str] | None = None,
    variants: Sequence[str] | None = None,
    text: str | None = None,
    validation: str | None = None,
    device: str = "auto",
) -> pd.DataFrame:
    """Lists what `compare` with the same arguments would do, with estimated times.

    Returns:
        One row per training and per measurement of a model: variant, seed, what, status (`done`, `to do`,
        `step N of M`, or why it is not available), tokens of training, estimated seconds left.

    Raises:
        ValueError: as for `compare`.
    """
    choices = {"seeds": seeds, "columns": columns, "variants": variants, "text": text, "validation": validation}
    return plan_table(_folders(grid, Path(out), device, choices), device)


def _folders(grid: str | Grid, out: Path, device: str, choices: Mapping[str, Any]) -> list[ModelFolder]:
    """Returns the models of the grid with the user's choices."""
    grid = keep_names_whole(apply_choices(grid_named(grid), **choices), out / NAMES_FILE)
    check_device(device)
    return model_folders(grid, out)


def _train_and_measure_all(folders: Sequence[ModelFolder], data: PreparedData, device: str, progress: bool) -> None:
    """Trains and measures all models that are not on disk yet."""
    waiting, done = list(folders), 0
    while waiting:
        later = []
        for folder in waiting:
            with folder.hold() as ours:
                if not ours or (folder.baseline is not None and folder.baseline.trained() is None):
                    later.append(folder)
                    continue
                done += 1
                try:
                    with stop_requests(at_once=True):
                        _train_and_measure(folder, data, device, progress, f"[{done}/{len(folders)}]")
                except KeyboardInterrupt as stop:
                    kept = f"{folder.out} keeps everything so far. The same command goes on"
                    raise Interrupted(f"stopped at {folder.name}; {kept}", folder=folder.out) from stop
        if len(later) == len(waiting):
            time.sleep(WAIT)
        waiting = later


def check_gates(grid: Grid) -> None:
    """Raises ValueError if the gates of a variant do not fit the grid's model."""
    shape = dataclasses.replace(grid.run.model, d_vocab=grid.run.model.d_vocab or 2)
    for variant in grid.variants:
        try:
            check_supported(hooked_config(shape, device="cpu"), variant.gates)
        except ValueError as error:
            raise ValueError(f"variant {variant.name}: {error}") from error


def _train_and_measure(folder: ModelFolder, data: PreparedData, device: str, progress: bool, place: str) -> None:
    """Trains the model of a folder and makes the measurements that are missing."""

    def say(what: str) -> None:
        if progress:
            print(f"{place} {folder.name}: {what}", file=sys.stderr, flush=True)

    text = {"train": data.train.fingerprint, "validation": data.validation.fingerprint}
    record = folder.trained()
    if record is None:
        say("training")
        record = _train(folder, data, text, device, progress)
    if record["text"] != text:
        raise ValueError(
            f"the text is not the one that {folder.path} was trained on (its tokens differ): restore it, or compare in "
            "another folder"
        )
    missing = [m for m in folder.grid.measurements if m.missing() is None and folder.result(m) is None]
    if not missing:
        return
    model, baseline = load_run(str(folder.final), device=device), None
    if folder.baseline is not None and any(measurement.against_baseline for measurement in missing):
        baseline = load_run(str(folder.baseline.final), device=device)
    trained = TrainedModel(model, data, folder.config, folder.path, baseline)
    for measurement in missing:
        say(measurement.label)
        start = time.perf_counter()
        result = measurement.measure(trained)
        folder.keep(measurement, result, time.perf_counter() - start)


def _train(
    folder: ModelFolder, data: PreparedData, text: dict[str, str], device: str, progress: bool
) -> dict[str, Any]:
    """Trains a model, from its last checkpoint if there is one, and saves its last step in `final`."""
    run = folder.config
    if folder.variant.training == "gates":
        # the tokens of all other models, which the copy of the tokenizer beside the baseline would make anew
        same = dataclasses.replace(run.data, tokenizer=str(data.tokenizer_folder), keep_whole=None)
        run = dataclasses.replace(run, data=same)
    if folder.variant.training == "none":
        (_, model), seconds = load_text_and_model(run, progress=False), 0.0
    else:
        measure = None
        if folder.variant.name in folder.grid.learners:
            measure = skill_while_training(data, words_of(run), folder.grid.learning_pairs)
        options: dict[str, Any] = {"device": device, "resume": folder.run.exists(), "progress": progress}
        trained = train(run, folder.run, measure=measure, **options)
        model, seconds = trained.model, trained.seconds
    model.save_pretrained(folder.final)
    return folder.finish(text, seconds)
