"""The pair of the generated stories, trained from scratch in two processes."""

from __future__ import annotations

import dataclasses
import multiprocessing
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sa_lens.config import RunConfig, Scope
from sa_lens.data import prepare
from sa_lens.demo.printing import Clock, loss_table, print_table, skill_table
from sa_lens.shipped.make import figures_of, train_model
from sa_lens.shipped.measuring import stories_bars
from sa_lens.shipped.recipes import SHORT
from sa_lens.stopping import Interrupted
from sa_lens.training import load_run, text_of_run
from sa_lens.training.run_folder import METRICS
from sa_lens.training.run_log import MetricsFile

POLL_SECONDS = 1.0
"""Seconds between two looks at how far the trainings are."""


def pair_run(scope: Scope = "local", seed: int = 0) -> RunConfig:
    """The configuration of a model of the pair; with scope `none`, of the dense one."""
    gates = dataclasses.replace(SHORT.gates, scope=scope)
    return dataclasses.replace(SHORT, gates=gates, train=dataclasses.replace(SHORT.train, seed=seed))


def train_pair(runs: Mapping[str, RunConfig], out: Path, clock: Clock, *, device: str, progress: bool) -> bool:
    """Trains the models `dense` and `local`, prints their figures beside the bars, and returns whether they pass."""
    with clock.part("stories and tokenizer"):
        for run in runs.values():
            prepare(run.data, run.model.n_ctx, progress=progress)
    with clock.part("training"):
        train_both(runs, out, device=device, progress=progress)
    with clock.part("measuring"):
        figures: dict[str, dict[str, Any]] = {}
        for name, run in runs.items():
            model = load_run(str(out / name), device=device)
            figures[name] = figures_of(model, run, "stories", text_of_run(out / name, model))
    print_table("Validation loss, nats per token", loss_table(figures))
    print_table("Pair accuracy, names that never meet in training", skill_table(figures))
    bars = stories_bars(figures["local"], figures["dense"])
    print("\nWhat was reached", *bars, sep="\n")
    print(f"\nWhere the time went\n{clock.table()}")
    print(
        f"\nNext:\n  sa-lens generate {out / 'local'} 'Lily and Tom went to the park.'\n"
        f"  sa-lens report {out / 'local'} {out / 'dense'} -o report.html"
    )
    return all(bar.reached for bar in bars)


def train_both(runs: Mapping[str, RunConfig], out: Path, *, device: str, progress: bool) -> None:
    """Trains models at once, each in a process of one thread; runs that are there go on.

    Raises:
        RuntimeError: a training failed; its own message is on standard error.
        Interrupted: Ctrl-C; the trainings have saved their states.
    """
    context = multiprocessing.get_context("spawn")
    processes = {
        name: context.Process(target=_train_one, args=(run, out / name, device), name=name)
        for name, run in runs.items()
    }
    for process in processes.values():
        process.start()
    try:
        _watch(runs, out, processes, progress)
    except KeyboardInterrupt as stop:
        for process in processes.values():
            # a training that is told to end saves its state first
            process.terminate()
            process.join()
        raise Interrupted(f"stopped; the same command goes on with the runs in {out}", folder=out) from stop
    for process in processes.values():
        process.join()
    failed = [name for name, process in processes.items() if process.exitcode != 0]
    if failed:
        raise RuntimeError(f"the training of {failed[0]} in {out / failed[0]} failed: its message is above")


def _train_one(run: RunConfig, folder: Path, device: str) -> None:
    torch.set_num_threads(1)
    try:
        train_model(run, folder, device=device, progress=False)
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"{folder}: {error}")


def _watch(runs: Mapping[str, RunConfig], out: Path, processes: Mapping[str, Any], progress: bool) -> None:
    """Shows how far each training is until both have ended."""
    from tqdm.auto import tqdm

    bars = {
        name: tqdm(total=run.train.steps, desc=name, position=place, unit="step", disable=not progress)
        for place, (name, run) in enumerate(runs.items())
    }
    while any(process.is_alive() for process in processes.values()):
        time.sleep(POLL_SECONDS)
        for name, bar in bars.items():
            rows = [row for row in MetricsFile(out / name / METRICS).read() if row["kind"] == "train"]
            if rows:
                bar.update(rows[-1]["step"] - bar.n)
                losses = {key: f"{rows[-1][key]:.3f}" for key in ("clean", "ablated") if rows[-1].get(key) is not None}
                bar.set_postfix(losses, refresh=False)
    for bar in bars.values():
        bar.close()
