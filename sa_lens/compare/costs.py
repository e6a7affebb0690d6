"""What a comparison will cost: its cells, tokens and hours, and what is on disk already.

Times of cells that were finished in the same folder count for their like; all others are estimated from a few timed
steps of a model of the grid's shape on this machine.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from sa_lens.compare.cells import Cell
from sa_lens.compare.grids import Grid, Variant
from sa_lens.compare.subject import Group
from sa_lens.config import GateConfig, RunConfig
from sa_lens.core import SelfAblatingTransformer, TwoStreamLoss

if TYPE_CHECKING:
    import pandas as pd

TIMED_STEPS = 3
"""Steps that are timed, after one that is not."""
OF_UNKNOWN_TOKENIZER = 50_257
"""Vocabulary that is assumed where only the tokenizer's name is known."""


def plan_table(cells: Sequence[Cell], groups: Sequence[Group], device: str) -> pd.DataFrame:
    """A row for each thing to do: variant, seed, what (`training` or a group), status, tokens, seconds left.

    Status: `done`, `to do`, `step N of M`, or why it is not available. Tokens are those of training.
    """
    import pandas as pd

    rows, speeds = [], _Speeds(cells, groups, device)
    for cell in cells:
        train = cell.grid.run.train
        tokens = train.steps * train.batch_size * cell.grid.run.model.n_ctx if cell.variant.training != "none" else 0
        place = {"variant": cell.variant.name, "seed": cell.seed}
        done = cell.trained() is not None
        steps = cell.steps_done()
        left = 0.0 if done else 1 - steps / train.steps
        status = "done" if done else f"step {steps} of {train.steps}" if steps else "to do"
        seconds = left * speeds.training(cell) if left and tokens else 0.0
        rows.append({**place, "what": "training", "status": status, "tokens": tokens, "seconds": seconds})
        for group in groups:
            measured, why = cell.measured(group) is not None, group.missing()
            status = "done" if measured else why or "to do"
            seconds = speeds.group(cell, group) if status == "to do" else 0.0
            rows.append({**place, "what": group.name, "status": status, "tokens": 0, "seconds": seconds})
    return pd.DataFrame(rows)


class _Speeds:
    """Seconds of trainings and groups, from finished cells or else from timed steps."""

    def __init__(self, cells: Sequence[Cell], groups: Sequence[Group], device: str) -> None:
        self.device = "cuda" if device == "auto" and torch.cuda.is_available() else device.replace("auto", "cpu")
        self.trainings: dict[str, list[float]] = {}
        self.groups: dict[tuple[str, bool], list[float]] = {}
        self.timed: dict[GateConfig, StepTimes] = {}
        for cell in cells:
            trained = cell.trained()
            if trained is not None and cell.variant.training != "none":
                self.trainings.setdefault(cell.variant.name, []).append(trained["seconds"])
            for group in groups:
                record = cell.record_of(group)
                if record is not None:
                    self.groups.setdefault((group.name, cell.variant.gates.gated), []).append(record["seconds"])

    def training(self, cell: Cell) -> float:
        known = self.trainings.get(cell.variant.name)
        if known:
            return sum(known) / len(known)
        times, train = self._timed(cell.grid, cell.variant), cell.config.train
        dense = train.dense_steps if cell.variant.gates.gated else 0
        return dense * times.dense + (train.steps - dense) * times.full

    def group(self, cell: Cell, group: Group) -> float:
        known = self.groups.get((group.name, cell.variant.gates.gated))
        if known:
            return sum(known) / len(known)
        run = dataclasses.replace(cell.grid.run, gates=cell.variant.gates)
        streams = 2 if cell.variant.gates.gated else 1
        return streams / 2 * group.work(run) * self._timed(cell.grid, cell.grid.variants[0]).token

    def _timed(self, grid: Grid, variant: Variant) -> StepTimes:
        gates = dataclasses.replace(variant.gates, scores="learned")
        if gates not in self.timed:
            run = dataclasses.replace(grid.run, gates=gates)
            self.timed[gates] = timed_steps(run, self.device)
        return self.timed[gates]


class StepTimes(NamedTuple):
    """Seconds of one training step, data loading left out, and of a forward pass."""

    full: float
    """A step that trains all streams of the model."""
    dense: float
    """A step that trains the clean stream alone."""
    token: float
    """One token of a clean forward pass."""


def timed_steps(run: RunConfig, device: str) -> StepTimes:
    """Times of a model of the run's shape, from a few steps."""
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
    """Mean seconds of an action, the first one not counted."""
    action()
    _wait(device)
    began = time.perf_counter()
    for _ in range(TIMED_STEPS):
        action()
    _wait(device)
    return (time.perf_counter() - began) / TIMED_STEPS


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def plan_text(plan: pd.DataFrame) -> str:
    """The plan in words: a line a variant, then tokens and hours."""
    lines = [f"{'variant':<16}{'seeds':>6}{'tokens':>16}{'done':>10}{'left':>12}"]
    for variant, rows in plan.groupby("variant", sort=False):
        done = f"{int((rows['status'] == 'done').sum())}/{len(rows)}"
        tokens = f"{int(rows['tokens'].sum()):,}"
        lines.append(
            f"{variant:<16}{rows['seed'].nunique():>6}{tokens:>16}{done:>10}{duration(rows['seconds'].sum()):>12}"
        )
    training = plan["what"] == "training"
    parts = plan[~training].groupby("what", sort=False)["seconds"].sum()
    lines.append("")
    lines.append(f"training     {duration(plan[training]['seconds'].sum()):>10}")
    lines += [f"{name:<13}{duration(seconds):>10}" for name, seconds in parts.items()]
    for (what, why), some in plan[~plan["status"].str.match(r"done|to do|step \d")].groupby(["what", "status"]):
        lines.append(f"not available: {what} ({why}), {len(some)} cells")
    lines.append(f"\nleft in all, one process on this machine: {duration(plan['seconds'].sum())}")
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """Seconds in words: 45 s, 12 min, 3.5 h, 2.1 days."""
    for limit, unit, name in ((90, 1, "s"), (5400, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.1f} {name}" if name == "h" else f"{seconds / unit:.0f} {name}"
    return f"{seconds / 86_400:.1f} days"
