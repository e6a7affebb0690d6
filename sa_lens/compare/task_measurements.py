"""Measurements of a task: the model's skill, and the circuits that ACDC and EAP-IG find.

A stream below 80 % pair accuracy has no value in the columns of circuits: the model cannot do the task, so that a
circuit for it explains nothing.
"""

from __future__ import annotations

import statistics
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from sa_lens.circuits import Experiment, Graph, PromptPairs, acdc, eap_ig, faithfulness, skill, visiting_order
from sa_lens.circuits.judging.circuit_metric import GapTooSmall
from sa_lens.circuits.judging.faithfulness_curve import FaithfulnessCurve
from sa_lens.circuits.metrics import SKILL_BAR, kl
from sa_lens.circuits.tasks import make_unseen
from sa_lens.compare.measurement import Measurement, Result, TrainedModel
from sa_lens.config import Masks, RunConfig, Stream

PROMPT_TOKENS = 32
"""Length of a prompt for estimates of cost, in tokens."""
OWN_SHARE = 0.01
"""Share of the model's own KL(clean prompt || corrupt prompt) that makes the threshold `own`."""
SKILL_PROMPTS = 400
"""Prompts that skill is measured on, and so which models have circuits."""


StreamResult = tuple[dict[str, float], str]
"""The columns that have a value in a stream, and a note; empty: none."""


@dataclass(frozen=True)
class TaskMeasurement(Measurement):
    """Columns about a task, measured stream by stream on prompts that are the same for every model of a grid."""

    pairs: int = SKILL_PROMPTS
    """Prompt pairs."""
    task: str = field(default="ioi", kw_only=True)
    """The task: `ioi`, or `object` (object recall), which small models learn before IOI."""

    def measure(self, trained: TrainedModel) -> Result:
        values, notes = trained.no_values(self.columns), []
        try:
            prompts = [self.prompts(trained, n) for n in self.prompt_counts()]
        except ValueError as error:
            return Result(values, (f"no prompts: {error}",))
        for stream in trained.streams:
            figures, note = self.measure_stream(trained, stream, prompts)
            notes += [note] if note else []
            for name, value in figures.items():
                values[name][stream] = float(value)
        return Result(values, tuple(notes))

    def prompts(self, trained: TrainedModel, n: int) -> PromptPairs:
        """Returns pairs of the task; IOI on generated stories uses names that never occur together in one."""
        return make_unseen(self.task, trained.data.tokenizer, n, 0, words=trained.words)

    def prompt_counts(self) -> tuple[int, ...]:
        """Returns the sizes of the prompt sets that `measure_stream` gets."""
        return (self.pairs,)

    @abstractmethod
    def measure_stream(self, trained: TrainedModel, stream: Stream, prompts: Sequence[PromptPairs]) -> StreamResult:
        """Measures one stream."""


@dataclass(frozen=True)
class Skill(TaskMeasurement):
    """How well both streams do the task."""

    name: ClassVar[str] = "skill"
    version: ClassVar[int] = 2
    columns: ClassVar[tuple[str, ...]] = ("pair_accuracy", "top1_accuracy", "logit_difference")

    def work(self, run: RunConfig) -> float:
        return 3.0 * self.pairs * PROMPT_TOKENS

    def measure_stream(self, trained: TrainedModel, stream: Stream, prompts: Sequence[PromptPairs]) -> StreamResult:
        row: dict[Any, Any] = skill(trained.model, prompts[0], stream).iloc[0].to_dict()
        weak = f"the {stream} stream has {row['pair_accuracy']:.0%} pair accuracy: below {SKILL_BAR:.0%}"
        return {name: row[name] for name in self.columns}, "" if row["able"] else weak


@dataclass(frozen=True)
class CircuitMeasurement(TaskMeasurement):
    """Columns about the circuit of a task."""

    bar: float = field(default=SKILL_BAR, kw_only=True)
    """Pair accuracy below which there is no value."""
    skill_pairs: int = field(default=SKILL_PROMPTS, kw_only=True)
    """Prompts that pair accuracy is judged on: those of `Skill`, so that all circuits are of the same models."""

    def too_weak(self, trained: TrainedModel, pairs: PromptPairs, stream: Stream) -> str:
        """Returns why a circuit of this stream would explain nothing; empty if the stream does the task."""
        accuracy = skill(trained.model, pairs, stream)["pair_accuracy"].item()
        weak = f"the {stream} stream has {accuracy:.1%} pair accuracy, below {self.bar:.0%}: no circuit"
        return weak if accuracy < self.bar else ""


@dataclass(frozen=True)
class ACDC(CircuitMeasurement):
    """Edges that ACDC keeps, by KL, at fixed thresholds and at 1 % of the model's own KL.

    In the ablated stream the masks are frozen, as in all published tables, and the labels of the columns say so.
    """

    pairs: int = 64
    """Prompts of the search."""
    taus: tuple[float, ...] = (0.003, 0.01, 0.03)
    """Thresholds, nats."""
    orders: int = 5
    """Random orders within layers at tau 0.01, for the spread; 0: none."""

    name: ClassVar[str] = "acdc"
    version: ClassVar[int] = 2
    columns: ClassVar[tuple[str, ...]] = (
        *("corrupt_kl", "acdc_edges_0.003", "acdc_edges_0.01", "acdc_edges_0.03", "acdc_edges_own"),
        "acdc_order_spread",
    )

    def work(self, run: RunConfig) -> float:
        searches = len(self.taus) + 1 + self.orders
        edges = len(Graph(run.model.n_layers, run.model.n_heads, attn_only=run.model.d_mlp == 0))
        return 0.13 * searches * edges * self.pairs * PROMPT_TOKENS

    def prompt_counts(self) -> tuple[int, ...]:
        return self.pairs, self.skill_pairs

    def measure_stream(self, trained: TrainedModel, stream: Stream, prompts: Sequence[PromptPairs]) -> StreamResult:
        pairs, judged = prompts
        exp = Experiment(trained.model, pairs, stream=stream, masks="frozen" if stream == "ablated" else None)
        divergence = float(kl(exp.logits("corrupt"), exp.logits()).double().mean())
        weak = self.too_weak(trained, judged, stream)
        if weak:
            return {"corrupt_kl": divergence}, weak

        def edges(tau: float, order: int | None = None) -> int:
            visits = None if order is None else visiting_order(exp.graph, order)
            return len(acdc(exp, tau, order=visits, progress=False))

        thresholds = {f"{tau:g}": tau for tau in self.taus} | {"own": OWN_SHARE * divergence}
        figures: dict[str, float] = {f"acdc_edges_{name}": edges(tau) for name, tau in thresholds.items()}
        if self.orders:
            counts = [edges(0.01, seed) for seed in range(self.orders)]
            figures["acdc_order_spread"] = statistics.stdev(counts) if len(counts) > 1 else 0.0
        return {"corrupt_kl": divergence, **figures}, ""


@dataclass(frozen=True)
class Faithfulness(CircuitMeasurement):
    """Faithfulness of the ranking by EAP-IG on prompts other than those of the ranking.

    In the ablated stream the masks are live: the gates choose under the same edits, so that everything a circuit knows
    comes through its edges. Beside it stands what frozen masks, those of the clean prompt, bring without any edge.
    """

    pairs: int = 128
    """Prompts to rank with, and as many others to judge on."""
    steps: int = 5
    """Steps of the integrated gradient."""

    name: ClassVar[str] = "faithfulness"
    version: ClassVar[int] = 4
    columns: ClassVar[tuple[str, ...]] = (
        *("edges_0.9", "edges_0.9_low", "edges_0.9_high", "cpr", "cmd", "edges_0.9_frozen", "masks_alone"),
    )

    def work(self, run: RunConfig) -> float:
        return 400.0 * self.pairs * PROMPT_TOKENS

    def prompt_counts(self) -> tuple[int, ...]:
        return 2 * self.pairs, self.skill_pairs

    def measure_stream(self, trained: TrainedModel, stream: Stream, prompts: Sequence[PromptPairs]) -> StreamResult:
        pairs, judged = prompts
        weak = self.too_weak(trained, judged, stream)
        if weak:
            return {}, weak
        try:
            curve = self._curve(trained, pairs, stream, "live" if stream == "ablated" else None)
            frozen = self._curve(trained, pairs, stream, "frozen") if stream == "ablated" else None
        except GapTooSmall as error:
            return {}, f"the {stream} stream: {error}"
        needed = curve.edges_for(0.9)
        figures: dict[str, float] = {
            "edges_0.9": needed.edges,
            "edges_0.9_low": needed.low,
            "edges_0.9_high": needed.high,
        }
        figures |= {"cpr": curve.cpr.mean, "cmd": curve.cmd.mean}
        if frozen is not None:
            figures |= {"edges_0.9_frozen": frozen.edges_for(0.9).edges, "masks_alone": frozen.about["masks_alone"]}
        return figures, ""

    def _curve(
        self, trained: TrainedModel, pairs: PromptPairs, stream: Stream, masks: Masks | None
    ) -> FaithfulnessCurve:
        to_rank, to_judge = pairs.split(0)
        exp = Experiment(trained.model, to_rank, stream=stream, masks=masks)
        return faithfulness(exp.on(to_judge), eap_ig(exp, steps=self.steps, progress=False), progress=False)
