"""Skill during training: at which step each stream of a model learns each task.

The training of some variants of a grid (`Grid.learners`) measures the skill at every evaluation and writes it into the
`metrics.jsonl` of its run. The column `steps_to_skill`, the table and the figure are made from these files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from sa_lens.circuits import skill
from sa_lens.circuits.metrics import SKILL_BAR
from sa_lens.circuits.tasks import make_unseen
from sa_lens.compare.columns import TASKS, task_title
from sa_lens.compare.measurement import Measurement, Result, TrainedModel
from sa_lens.config import RunConfig, Words
from sa_lens.core import SelfAblatingTransformer
from sa_lens.core.host import streams_of
from sa_lens.data import PreparedData
from sa_lens.training.run_folder import METRICS
from sa_lens.training.run_log import MetricsFile
from sa_lens.views.records import Curves, Level, Line, number

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd

COLUMNS = ("dense_steps", "step", "stream", "loss", *TASKS)
"""Columns of the table of a run: the steps that train the clean stream alone (0 without gates), optimizer steps,
stream, validation loss, and pair accuracy in each task."""


def skill_while_training(
    data: PreparedData, words: Words, pairs: int
) -> Callable[[SelfAblatingTransformer], Mapping[str, float]]:
    """Returns a function for `train(measure=...)`: the pair accuracy of a model in every task and stream."""
    prompts = {task: make_unseen(task, data.tokenizer, pairs, 0, words=words) for task in TASKS}

    def measure(model: SelfAblatingTransformer) -> dict[str, float]:
        return {
            f"{task}_{stream}": float(skill(model, of_task, stream)["pair_accuracy"].item())
            for task, of_task in prompts.items()
            for stream in streams_of(model)
        }

    return measure


def learning_rows(run: Path) -> list[dict[str, Any]]:
    """Returns loss and skill of a run by step and stream, with the columns `COLUMNS`; none if there is no skill."""
    records = MetricsFile(run / METRICS).read()
    losses = {record["step"]: record for record in records if record["kind"] == "eval"}
    dense = max((record["step"] for record in records if record.get("streams") == 1), default=0)
    return [
        {
            **{"dense_steps": dense, "step": record["step"], "stream": stream},
            **{"loss": losses[record["step"]].get(f"{stream}_loss"), **accuracies},
        }
        for record in records
        if record["kind"] == "measured"
        for stream in ("clean", "ablated")
        if (accuracies := {task: record[f"{task}_{stream}"] for task in TASKS if f"{task}_{stream}" in record})
    ]


@dataclass(frozen=True)
class Learning(Measurement):
    """Steps of training until a stream can do a task, as measured by the training itself."""

    task: str = field(default="ioi", kw_only=True)
    """The task: `ioi` or `object`."""

    name: ClassVar[str] = "learning"
    columns: ClassVar[tuple[str, ...]] = ("steps_to_skill",)

    def work(self, run: RunConfig) -> float:
        return 1.0

    def measure(self, trained: TrainedModel) -> Result:
        rows = learning_rows(trained.folder / "run")
        if not rows:
            return Result({})
        values, notes = trained.no_values(self.columns), []
        for stream in trained.streams:
            able = [row["step"] for row in rows if row["stream"] == stream and row[self.task] >= SKILL_BAR]
            values["steps_to_skill"][stream] = min(able, default=None)
            if not able:
                notes.append(f"the {stream} stream never reaches {SKILL_BAR:.0%} pair accuracy in training")
        return Result(values, tuple(notes))


def learning_curves(table: pd.DataFrame, task: str, variants: Sequence[str] | None = None) -> Curves:
    """Returns the curves of pair accuracy over training: means over seeds, with bands from the lowest to the highest.

    A mark says from which step on the ablated stream of a variant is trained.

    Args:
        table: `Comparison.learning`.
        task: `ioi` or `object`; `loss` for the validation loss.
        variants: variants to show; None: all in the table.

    Raises:
        ValueError: no row of these variants, or an unknown task.
    """
    shown = table if variants is None else table[table["variant"].isin(variants)]
    if task not in (*TASKS, "loss") or not len(shown):
        raise ValueError(
            f"task={task!r} must be one of {', '.join((*TASKS, 'loss'))}, and variants some of "
            f"{', '.join(table['variant'].unique())}"
        )
    seeds = [str(n) for n in sorted({*shown.groupby("variant")["seed"].nunique()})]
    lines = []
    for (variant, stream), rows in shown.dropna(subset=task).groupby(["variant", "stream"], sort=False):
        by_step = rows.groupby("step")[task].agg(["mean", "min", "max"])
        y, low, high = (tuple(map(number, by_step[name])) for name in by_step)
        lines.append(Line(str(variant), str(stream), tuple(map(float, by_step.index)), y, low, high))
    what = "loss on the validation text, nats per token" if task == "loss" else "pair accuracy"
    return Curves(
        "Loss during training" if task == "loss" else task_title("Skill during training", task),
        f"means over {' or '.join(seeds)} seeds; bands from the lowest to the highest seed",
        "optimizer steps",
        what,
        tuple(lines),
        levels=() if task == "loss" else (Level(SKILL_BAR, f"{SKILL_BAR:.0%}"),),
        moments=tuple(
            Level(float(step), "ablated stream trained from here") for step in sorted({*shown["dense_steps"]} - {0})
        ),
    )
