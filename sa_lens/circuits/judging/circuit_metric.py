"""The metric of many circuits on the same pairs, prompt by prompt, and the gap by which faithfulness divides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from sa_lens.circuits.experiment import Experiment
from sa_lens.circuits.metrics import kl, pair_accuracy
from sa_lens.circuits.running.many_circuits import CircuitLogits

_TOGETHER = 16
"""Largest number of circuits that run together and share the nodes that they have in common."""


class GapTooSmall(ValueError):
    """The clean prompts and the empty circuit have almost the same score, so that faithfulness is not defined."""


class Measured(NamedTuple):
    """The results of a run of a circuit, prompt by prompt, in float64."""

    value: Float[Tensor, " pair"]
    """The metric."""
    kl: Float[Tensor, " pair"]
    """KL(unedited clean prompt || circuit), nats, full vocabulary, same stream."""


class CircuitMetric:
    """Measures circuits of an experiment; each circuit runs once, however often it is measured.

    All analyses of an experiment share the object that `CircuitMetric.of(exp)` returns.
    """

    def __init__(self, exp: Experiment) -> None:
        self.exp, self.graph = exp, exp.graph
        self._run = CircuitLogits(exp)
        self._seen: dict[bytes, Measured] = {}
        self.clean = self._measured(exp.logits()).value
        self.empty = self(torch.zeros_like(self.graph.exists)).value
        self.accuracy = float(pair_accuracy(exp.logits(), exp.pairs).double().mean())

    @classmethod
    def of(cls, exp: Experiment) -> CircuitMetric:
        """Returns the object that the experiment keeps.

        Raises:
            GapTooSmall: |m(clean) - m(empty)| is below the metric's `minimum_gap`.
        """
        metric = exp.metric
        if not metric.minimum_gap > 0:
            raise ValueError(f"minimum_gap={metric.minimum_gap} must be above 0: f divides by the gap")
        measure = exp.record((cls, metric, exp.masks), lambda: cls(exp))
        if not abs(measure.gap) >= metric.minimum_gap:
            raise GapTooSmall(
                f"{metric.name} is {float(measure.clean.mean()):.4g} on the clean prompts and "
                f"{float(measure.empty.mean()):.4g} for the empty circuit: a difference of {abs(measure.gap):.3g}, "
                f"below minimum_gap={metric.minimum_gap:g}, is too small to divide by. Choose a task that the "
                "model can do, another metric (such as 'kl') or more pairs, or give a Metric with a lower minimum_gap "
                "if its unit is small"
            )
        return measure

    @property
    def about(self) -> dict[str, Any]:
        """Task, number of pairs and settings."""
        return self.exp.about

    @property
    def gap(self) -> float:
        """Mean metric of the clean prompts minus that of the empty circuit."""
        return float(self.clean.mean() - self.empty.mean())

    def __call__(self, mask: Bool[Tensor, "input source"]) -> Measured:
        """Measures the circuit with these edges."""
        return self.each([mask])[0]

    def each(self, masks: Sequence[Bool[Tensor, "input source"]], *, progress: bool = False) -> list[Measured]:
        """Measures several circuits; those that were not measured before run together.

        Args:
            progress: whether to show a progress bar if it takes more than a few seconds.
        """
        keys = [mask[self.graph.exists].numpy().tobytes() for mask in masks]
        new = {key: mask for key, mask in zip(keys, masks, strict=True) if key not in self._seen}
        with tqdm(total=len(new), desc="circuits", delay=3, disable=not progress) as bar:
            for first in range(0, len(new), _TOGETHER):
                together = dict(list(new.items())[first : first + _TOGETHER])
                for key, logits in zip(together, self._run(list(together.values())), strict=True):
                    self._seen[key] = self._measured(logits)
                bar.update(len(together))
        return [self._seen[key] for key in keys]

    def f(self, mask: Bool[Tensor, "input source"]) -> float:
        """Returns the faithfulness of the circuit with these edges."""
        return float(self(mask).value.mean() - self.empty.mean()) / self.gap

    def _measured(self, logits: Float[Tensor, "pair d_vocab"]) -> Measured:
        divergence = kl(logits, self.exp.logits())
        return Measured(self.exp.values(logits), divergence.double().cpu())
