"""Columns of circuits: what ACDC leaves at several thresholds, and how faithful a ranking is.

A stream below 80 % pair accuracy has no value in these columns: the model cannot do the task, so that a circuit for it
explains nothing.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any, ClassVar

from sa_lens.circuits.discovery.acdc import acdc, visiting_order
from sa_lens.circuits.discovery.eap import eap_ig
from sa_lens.circuits.graph import Graph
from sa_lens.circuits.judging.circuit_metric import GapTooSmall
from sa_lens.circuits.judging.faithfulness import faithfulness_curve
from sa_lens.circuits.judging.faithfulness_curve import FaithfulnessCurve
from sa_lens.circuits.metrics import SKILL_BAR, kl, last_logits, pair_accuracy
from sa_lens.circuits.running.circuit_by_hooks import Gates
from sa_lens.circuits.tasks.pairs import PromptPairs
from sa_lens.compare.basic_columns import OBJECT, PROMPT_TOKENS, NoPrompts, Skill, task_pairs
from sa_lens.compare.subject import Group, Measured, Subject, Values, in_every_stream
from sa_lens.config import RunConfig, Stream

OWN = 0.01
"""Share of the model's own KL(clean prompt || corrupt prompt) that makes the threshold `own`."""


def too_weak(subject: Subject, pairs: PromptPairs, stream: Stream, bar: float) -> str | None:
    """Why a circuit of this stream would explain nothing; None if it does the task."""
    accuracy = float(pair_accuracy(last_logits(subject.model, pairs, stream), pairs).double().mean())
    if accuracy >= bar:
        return None
    return f"the {stream} stream has {accuracy:.1%} pair accuracy, below {bar:.0%}: no circuit"


def n_edges(run: RunConfig) -> int:
    """Edges of the graph of the run's model."""
    heads, mlp = run.model.n_heads, int(run.model.d_mlp != 0)
    edges, sources = 0, 1
    for _ in range(run.model.n_layers):
        edges += 3 * heads * sources
        sources += heads
        edges += mlp * sources
        sources += mlp
    return edges + sources


@dataclass(frozen=True)
class ACDC(Group):
    """Edges that ACDC keeps, by KL, at fixed thresholds and at 1 % of the model's own KL."""

    pairs: int = 64
    """Prompts of the search."""
    taus: tuple[float, ...] = (0.003, 0.01, 0.03)
    """Thresholds, nats."""
    orders: int = 5
    """Random orders within layers at tau 0.01, for the spread; 0: none."""
    bar: float = SKILL_BAR
    """Pair accuracy below which there is no value."""
    skill_pairs: int = Skill.pairs
    """Prompts that pair accuracy is judged on, those of the columns of skill: one choice of models for all circuits."""

    name: ClassVar[str] = "acdc"
    version: ClassVar[int] = 2
    columns: ClassVar[tuple[str, ...]] = (
        "corrupt_kl",
        "acdc_edges_0.003",
        "acdc_edges_0.01",
        "acdc_edges_0.03",
        "acdc_edges_own",
        "acdc_order_spread",
    )
    task: ClassVar[str] = "ioi"
    prefix: ClassVar[str] = ""

    def work(self, run: RunConfig) -> float:
        searches = len(self.taus) + 1 + self.orders
        return 0.13 * searches * n_edges(run) * self.pairs * PROMPT_TOKENS

    def measure(self, subject: Subject) -> Measured:
        names = tuple(f"{self.prefix}acdc_edges_{name}" for name in (*(f"{tau:g}" for tau in self.taus), "own"))
        kl_name, spread = f"{self.prefix}corrupt_kl", f"{self.prefix}acdc_order_spread"
        values: Values = in_every_stream((*names, kl_name), subject.streams)
        if self.orders:
            values |= in_every_stream((spread,), subject.streams)
        try:
            pairs = task_pairs(subject, self.pairs, self.task)
            judged = task_pairs(subject, self.skill_pairs, self.task)
        except NoPrompts as error:
            return Measured(values, (str(error),))
        notes = []
        for stream in subject.streams:
            weak = too_weak(subject, judged, stream, self.bar)
            clean, corrupt = (last_logits(subject.model, pairs, stream, prompt) for prompt in ("clean", "corrupt"))
            divergence = float(kl(corrupt, clean).double().mean())
            values[kl_name][stream] = divergence
            if weak is not None:
                notes.append(weak)
                continue
            for name, tau in zip(names, (*self.taus, OWN * divergence), strict=True):
                values[name][stream] = float(_edges(subject, pairs, tau, stream, None))
            if self.orders:
                counts = [_edges(subject, pairs, 0.01, stream, seed) for seed in range(self.orders)]
                values[spread][stream] = statistics.stdev(counts) if len(counts) > 1 else 0.0
        return Measured(values, tuple(notes))


def _edges(subject: Subject, pairs: PromptPairs, tau: float, stream: Stream, order: int | None) -> int:
    """Edges that ACDC keeps."""
    visits = None if order is None else visiting_order(Graph.from_model(subject.model), order)
    return len(acdc(subject.model, pairs, tau, stream=stream, order=visits, progress=subject.progress))


@dataclass(frozen=True)
class Faithfulness(Group):
    """Faithfulness of the ranking by EAP-IG on other prompts than those that made it.

    In the ablated stream gates are live: they choose under the same edits, so that all a circuit knows comes by its
    edges. Beside it stands what frozen masks, those of the clean prompt, bring without any edge.
    """

    pairs: int = 128
    """Prompts to rank with, and as many others to judge on."""
    steps: int = 5
    """Steps of the integrated gradient."""
    bar: float = SKILL_BAR
    """Pair accuracy below which there is no value."""
    skill_pairs: int = Skill.pairs
    """Prompts that pair accuracy is judged on, those of the columns of skill: one choice of models for all circuits."""

    name: ClassVar[str] = "faithfulness"
    version: ClassVar[int] = 3
    columns: ClassVar[tuple[str, ...]] = ("edges_0.9", "cpr", "cmd", "edges_0.9_frozen", "masks_alone")
    task: ClassVar[str] = "ioi"
    prefix: ClassVar[str] = ""

    def work(self, run: RunConfig) -> float:
        return 400.0 * self.pairs * PROMPT_TOKENS

    def measure(self, subject: Subject) -> Measured:
        values, notes = in_every_stream(self.columns, subject.streams), []
        try:
            find, report = task_pairs(subject, 2 * self.pairs, self.task).split(0)
            judged = task_pairs(subject, self.skill_pairs, self.task)
        except NoPrompts as error:
            return Measured(values, (str(error),))
        for stream in subject.streams:
            weak = too_weak(subject, judged, stream, self.bar)
            if weak is not None:
                notes.append(weak)
                continue
            try:
                curve = self._curve(subject, find, report, stream, "live" if stream == "ablated" else None)
                frozen = self._curve(subject, find, report, stream, "frozen") if stream == "ablated" else None
            except GapTooSmall as error:
                notes.append(f"the {stream} stream: {error}")
                continue
            found = {"edges_0.9": curve.edges_for(0.9).edges, "cpr": curve.cpr.mean, "cmd": curve.cmd.mean}
            if frozen is not None:
                found |= {"edges_0.9_frozen": frozen.edges_for(0.9).edges, "masks_alone": frozen.about["masks_alone"]}
            for name, value in found.items():
                values[self.prefix + name][stream] = float(value) if math.isfinite(value) else None
        return Measured(values, tuple(notes))

    def _curve(
        self, subject: Subject, find: PromptPairs, report: PromptPairs, stream: Stream, gates: Gates | None
    ) -> FaithfulnessCurve:
        options: dict[str, Any] = {"stream": stream, "gates": gates, "progress": False}
        ranking = eap_ig(subject.model, find, steps=self.steps, **options)
        return faithfulness_curve(subject.model, report, ranking, **options)


@dataclass(frozen=True)
class ObjectACDC(ACDC):
    """The same for object recall, which small models learn before IOI; without the spread over orders."""

    orders: int = 0
    """Random orders within layers at tau 0.01, for the spread; 0: none."""

    name: ClassVar[str] = "object-acdc"
    columns: ClassVar[tuple[str, ...]] = tuple(OBJECT + name for name in ACDC.columns[:-1])
    task: ClassVar[str] = "object"
    prefix: ClassVar[str] = OBJECT


@dataclass(frozen=True)
class ObjectFaithfulness(Faithfulness):
    """The same for object recall."""

    name: ClassVar[str] = "object-faithfulness"
    columns: ClassVar[tuple[str, ...]] = tuple(OBJECT + name for name in Faithfulness.columns)
    task: ClassVar[str] = "object"
    prefix: ClassVar[str] = OBJECT
