"""The remaining work of a comparison: models, tokens, estimated hours, and what is already on disk.

Times of finished models in the same folder count for models of the same variant. All other times are estimated from a
few timed steps of a model of the grid's shape on this machine.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from sa_lens.compare.grids import Grid, Variant
from sa_lens.compare.measurement import Measurement
from sa_lens.compare.model_folder import ModelFolder
from sa_lens.config import RunConfig
from sa_lens.core import SelfAblatingTransformer, TwoStreamLoss

if TYPE_CHECKING:
    import pandas as pd

TIMED_STEPS = 3
"""Number of steps that are timed, after one that is not."""
OF_UNKNOWN_TOKENIZER = 50_257
"""Vocabulary size that is assumed if only the tokenizer's name is known."""


def plan_table(folders: Sequence[ModelFolder], device: str) -> pd.DataFrame:
    """Returns one row per piece of work: variant, seed, what, status, tokens, seconds left.

    Status: `done`, `to do`, `step N of M`, or why it is not available. Tokens are those of training.
    """
    import pandas as pd

    device = "cuda" if device == "auto" and torch.cuda.is_available() else device.replace("auto", "cpu")
    rows, left, took, estimates = [], [], [], []
    for folder in folders:
        run, gates = folder.config, folder.variant.gates
        tokens = (
            run.train.steps * run.train.batch_size * folder.grid.run.model.n_ctx
            if folder.variant.training != "none"
            else 0
        )
        record, steps = folder.trained(), folder.steps_done()
        status = "done" if record else f"step {steps} of {run.train.steps}" if steps else "to do"
        model = {"variant": folder.variant.name, "seed": folder.seed}
        rows.append({**model, "what": "training", "status": status, "tokens": tokens, "like": folder.variant.name})
        left.append(1 - steps / run.train.steps if tokens and record is None else 0.0)
        took.append(record["seconds"] if tokens and record else math.nan)
        estimates.append(partial(_training_seconds, folder, device))
        for measurement in folder.grid.measurements:
            record = folder.record_of(measurement)
            status = "done" if record else measurement.missing() or "to do"
            rows.append({**model, "what": measurement.label, "status": status, "tokens": 0, "like": gates.gated})
            left.append(float(status == "to do"))
            took.append(record["seconds"] if record else math.nan)
            estimates.append(partial(_measuring_seconds, folder, measurement, device))
    table = pd.DataFrame(rows)
    known = pd.Series(took).groupby([table["what"], table["like"].astype(str)]).transform("mean")
    table["seconds"] = [
        share and share * (estimate() if math.isnan(seconds) else seconds)
        for share, seconds, estimate in zip(left, known, estimates, strict=True)
    ]
    return table.drop(columns="like")


def _training_seconds(folder: ModelFolder, device: str) -> float:
    times, train = _of_steps(folder.grid, folder.variant, device), folder.config.train
    dense = train.dense_steps if folder.variant.gates.gated else 0
    return dense * times.dense + (train.steps - dense) * times.full


def _measuring_seconds(folder: ModelFolder, measurement: Measurement, device: str) -> float:
    work = measurement.work(dataclasses.replace(folder.grid.run, gates=folder.variant.gates))
    streams = 2 if folder.variant.gates.gated else 1
    return streams / 2 * work * _of_steps(folder.grid, folder.grid.variants[0], device).token


def _of_steps(grid: Grid, variant: Variant, device: str) -> StepTimes:
    """Returns the fields on which the times of steps depend; learned and random scores take equally long."""
    return timed_steps(
        dataclasses.replace(grid.run, gates=dataclasses.replace(variant.gates, scores="learned")), device
    )


class StepTimes(NamedTuple):
    """Seconds of one training step, without data loading, and of one forward pass."""

    full: float
    """A step that trains all streams of the model."""
    dense: float
    """A step that trains the clean stream alone."""
    token: float
    """One token of a clean forward pass."""


@cache
def timed_steps(run: RunConfig, device: str) -> StepTimes:
    """Measures the time of a few steps of a model of the run's shape."""
    d_vocab = run.model.d_vocab or (run.data.vocab_size if run.data.tokenizer == "bpe" else OF_UNKNOWN_TOKENIZER)
    shape = dataclasses.replace(run.model, d_vocab=d_vocab)
    model = SelfAblatingTransformer(shape, run.gates, seed=0, device=device)
    dtype = torch.bfloat16 if run.train.precision == "bf16" else None
    loss = TwoStreamLoss(model, run.loss, path=run.train.path, dtype=dtype)
    optimizer = torch.optim.AdamW(model.parameters(), fused=device != "mps")
    generator = torch.Generator().manual_seed(0)
    part = max(1, run.train.batch_size // run.train.accumulate)
    tokens = torch.randint(d_vocab, (part, run.model.n_ctx + 1), generator=generator).to(device)

    def step(clean_alone: bool = False) -> None:
        loss(tokens[:, :-1], tokens[:, 1:], clean_alone=clean_alone).total.backward()
        optimizer.step()
        optimizer.zero_grad()

    def forward() -> None:
        with torch.no_grad():
            model(tokens[:, :-1])

    full = _seconds(step, device) * run.train.accumulate
    has_dense_steps = run.gates.gated and run.train.dense_steps > 0
    dense = _seconds(partial(step, True), device) * run.train.accumulate if has_dense_steps else full
    return StepTimes(full, dense, _seconds(forward, device) / (part * run.model.n_ctx))


def _seconds(action: Any, device: str) -> float:
    """Returns the mean seconds of an action; the first call does not count."""

    def repeat(times: int) -> float:
        start = time.perf_counter()
        for _ in range(times):
            action()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    repeat(1)
    return repeat(TIMED_STEPS) / TIMED_STEPS


def plan_text(plan: pd.DataFrame) -> str:
    """Returns the plan as text: one line per variant, then the time of training and of each measurement."""
    lines = [f"{'variant':<16}{'seeds':>6}{'tokens':>16}{'done':>10}{'left':>12}"]
    for variant, rows in plan.groupby("variant", sort=False):
        done, left = f"{(rows['status'] == 'done').sum()}/{len(rows)}", duration(rows["seconds"].sum())
        lines.append(f"{variant:<16}{rows['seed'].nunique():>6}{rows['tokens'].sum():>16,}{done:>10}{left:>12}")
    parts = plan.groupby("what", sort=False)["seconds"].sum()
    lines += ["", *(f"{what:<20}{duration(seconds):>10}" for what, seconds in parts.items())]
    for (what, why), rows in plan[~plan["status"].str.match(r"done|to do|step \d")].groupby(["what", "status"]):
        lines.append(f"not available: {what} ({why}), {len(rows)} models")
    lines.append(f"\nleft in all, one process on this machine: {duration(plan['seconds'].sum())}")
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """Formats seconds as text: 45 s, 12 min, 3.5 h, 2.1 days."""
    for limit, unit, name in ((90, 1, "s"), (5400, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.1f} {name}" if name == "h" else f"{seconds / unit:.0f} {name}"
    return f"{seconds / 86_400:.1f} days"
