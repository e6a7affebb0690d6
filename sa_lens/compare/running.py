"""Training and measuring the cells of a grid, one after the other; what is on disk is not done again.

Several processes may work on one folder: each takes cells that nobody else is at.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sa_lens.compare.cells import Cell, cells_of
from sa_lens.compare.grids import Grid
from sa_lens.compare.subject import Group, Subject, check_validation
from sa_lens.core import SelfAblatingTransformer
from sa_lens.core.architecture import check_supported, hooked_config
from sa_lens.data import PreparedData, prepare
from sa_lens.stopping import Interrupted, terminable
from sa_lens.training import train
from sa_lens.training.report import load_run
from sa_lens.training.start import initial

WAIT = 2.0
"""Seconds between looks at cells that other processes work on."""


def run_cells(
    grid: Grid, seeds: tuple[int, ...], groups: Sequence[Group], out: Path, *, device: str, progress: bool
) -> list[Cell]:
    """Trains and measures all cells that are not on disk yet; returns all of them.

    Raises:
        Interrupted: Ctrl-C or SIGTERM; what is finished is on disk.
        ValueError, OSError: gates that do not fit the model, too short a validation text, another text than that of
            earlier cells, or what training or measuring raises.
    """
    check_gates(grid)
    data = prepare(grid.run.data, grid.run.model.n_ctx, progress=progress)
    check_validation(data, grid.run.model.n_ctx)
    text = {"train": data.train.fingerprint, "validation": data.validation.fingerprint}
    cells = cells_of(grid, seeds, out)
    waiting, done = list(cells), 0
    while waiting:
        later = []
        for cell in waiting:
            with cell.held() as ours:
                if ours and _ready(cell):
                    done += 1
                    try:
                        with terminable():
                            _work(cell, groups, data, text, device, progress, f"[{done}/{len(cells)}] {cell.name}")
                    except KeyboardInterrupt as stop:
                        message = f"stopped at {cell.name}; {out} keeps everything so far. The same command goes on"
                        raise Interrupted(message, folder=out) from stop
                    continue
            later.append(cell)
        if len(later) == len(waiting):
            time.sleep(WAIT)
        waiting = later
    return cells


def check_gates(grid: Grid) -> None:
    """Raises ValueError if the gates of a variant do not fit the grid's model."""
    shape = dataclasses.replace(grid.run.model, d_vocab=grid.run.model.d_vocab or 2)
    for variant in grid.variants:
        try:
            check_supported(hooked_config(shape, device="cpu"), variant.gates)
        except ValueError as error:
            raise ValueError(f"variant {variant.name}: {error}") from error


def _ready(cell: Cell) -> bool:
    """Whether what the cell stands on is finished."""
    base = cell.baseline
    return base is None or base.trained() is not None


def _work(
    cell: Cell,
    groups: Sequence[Group],
    data: PreparedData,
    text: dict[str, str],
    device: str,
    progress: bool,
    title: str,
) -> None:
    trained = cell.trained()
    if trained is None:
        _say(progress, f"{title}: training")
        trained = _train(cell, data, text, device, progress)
    if trained["text"] != text:
        raise ValueError(
            f"the text is not the one that {cell.folder} was trained on (its tokens differ): restore it, or compare in "
            "another folder"
        )
    missing = [group for group in groups if group.missing() is None and cell.measured(group) is None]
    if not missing:
        return
    model = load_run(str(cell.final), device=device)
    base = cell.baseline
    dense: SelfAblatingTransformer | None = None
    if base is not None and any(group.against_baseline for group in missing):
        dense = load_run(str(base.final), device=device)
    subject = Subject(model, data, cell.config, cell.folder, dense)
    for group in missing:
        _say(progress, f"{title}: {group.name}")
        began = time.perf_counter()
        measured = group.measure(subject)
        cell.keep(group, measured, time.perf_counter() - began)


def _train(cell: Cell, data: PreparedData, text: dict[str, str], device: str, progress: bool) -> dict[str, Any]:
    """Trains a cell's model, from its last checkpoint if there is one, and puts the last step into `final`."""
    run = cell.config
    if cell.variant.training == "gates":
        # the tokens of all others, which the copy of the tokenizer beside the baseline would make anew
        same = dataclasses.replace(run.data, tokenizer=str(data.tokenizer_folder), keep_whole=None)
        run = dataclasses.replace(run, data=same)
    began = time.perf_counter()
    if cell.variant.training == "none":
        _, model = initial(run, progress=False)
        model.save_pretrained(cell.final)
        return cell.finish(text, time.perf_counter() - began)
    result = train(run, cell.run, device=device, resume=cell.run.exists(), progress=progress)
    result.model.save_pretrained(cell.final)
    return cell.finish(text, result.seconds)


def _say(progress: bool, line: str) -> None:
    if progress:
        print(line, file=sys.stderr, flush=True)
