"""The metric of many circuits on the same pairs, prompt by prompt, and the gap that shares of it are taken of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from sa_lens.circuits.metrics import Metric, kl, last_logits, metric_named, pair_accuracy
from sa_lens.circuits.running.circuit_by_hooks import Ablation, Gates
from sa_lens.circuits.running.many_circuits import CircuitLogits
from sa_lens.circuits.tasks.pairs import PromptPairs
from sa_lens.config import Stream
from sa_lens.core.host import Host

MINIMUM_GAP = 0.1
"""Smallest |m(clean) - m(empty)|, in units of the metric, that f is computed with unless the caller says otherwise."""


_TOGETHER = 16
"""Circuits that run together, which share what they have in common."""


class GapTooSmall(ValueError):
    """Clean and empty runs score too much alike to take shares of their difference."""


class Measured(NamedTuple):
    """A circuit's run, prompt by prompt, in float64."""

    value: Float[Tensor, " pair"]
    """The metric."""
    kl: Float[Tensor, " pair"]
    """KL(unedited clean prompt || circuit), nats, full vocabulary, same stream."""


class CircuitMetric:
    """The metric of circuits on one set of pairs; each circuit is run once, however often it is asked for.

    Args: as `faithfulness_curve`.

    Raises:
        ValueError: what `run_circuit` raises; an unknown metric; or |m(clean) - m(empty)| below `minimum_gap`.
    """

    def __init__(
        self,
        model: Host,
        pairs: PromptPairs,
        metric: str | Metric = "logit_difference",
        ablation: Ablation = "resample",
        stream: Stream = "clean",
        gates: Gates | None = None,
        *,
        batch_size: int = 64,
        minimum_gap: float = MINIMUM_GAP,
    ) -> None:
        if not minimum_gap > 0:
            raise ValueError(f"minimum_gap={minimum_gap} must be above 0: f divides by the gap")
        metric_named(metric, torch.empty(0))
        self._run = CircuitLogits(model, pairs, ablation, stream, gates, batch_size=batch_size)
        self.pairs, self.graph = pairs, self._run.graph
        self._clean_logits = last_logits(model, pairs, stream, batch_size=batch_size)
        self.name, self._metric = metric_named(metric, self._clean_logits)
        self._seen: dict[bytes, Measured] = {}
        self.clean = self._measured(self._clean_logits).value
        self.empty = self(torch.zeros_like(self.graph.exists)).value
        self.accuracy = float(pair_accuracy(self._clean_logits, pairs).double().mean())
        self.about: dict[str, Any] = {
            "task": pairs.task,
            "n": len(pairs),
            "metric": self.name,
            "stream": stream,
            "gates": self._run.gates,
            "ablation": ablation,
        }
        if not abs(self.gap) >= minimum_gap:
            raise GapTooSmall(
                f"{self.name} is {float(self.clean.mean()):.4g} on the clean prompts and "
                f"{float(self.empty.mean()):.4g} for the empty circuit: a difference of {abs(self.gap):.3g}, below "
                f"minimum_gap={minimum_gap:g}, is too small to take shares of. Choose a task that the model can do, "
                "another metric (such as 'kl') or more pairs, or lower minimum_gap if the metric's unit is small"
            )

    @property
    def gap(self) -> float:
        """m(clean) - m(empty)."""
        return float(self.clean.mean() - self.empty.mean())

    def __call__(self, mask: Bool[Tensor, "input source"]) -> Measured:
        """The run of the circuit with these edges."""
        return self.each([mask])[0]

    def each(self, masks: Sequence[Bool[Tensor, "input source"]], *, progress: bool = False) -> list[Measured]:
        """The run of each circuit; those that are new run together.

        Args:
            progress: a progress bar, where it takes more than a few seconds.
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
        """Faithfulness of the circuit with these edges."""
        return float(self(mask).value.mean() - self.empty.mean()) / self.gap

    def _measured(self, logits: Float[Tensor, "pair d_vocab"]) -> Measured:
        value = self._metric(logits, self.pairs).detach()
        return Measured(value.double().cpu(), kl(logits, self._clean_logits.to(logits.device)).double().cpu())


class SharedRuns:
    """Metrics of circuits that several searches ask for: each is made once for the same pairs and choices."""

    def __init__(self) -> None:
        self._made: dict[tuple[object, ...], tuple[Host, PromptPairs, CircuitMetric | GapTooSmall]] = {}

    def metric(self, model: Host, pairs: PromptPairs, **choices: Any) -> CircuitMetric:
        """The metric `CircuitMetric(model, pairs, **choices)`.

        Raises:
            ValueError: what `CircuitMetric` raises, each time that it is asked for.
        """
        # model and pairs are kept, so that nothing else can come to have their identity
        key = (id(model), id(pairs), *sorted(choices.items()))
        if key not in self._made:
            made: CircuitMetric | GapTooSmall
            try:
                made = CircuitMetric(model, pairs, **choices)
            except GapTooSmall as error:
                made = error
            self._made[key] = (model, pairs, made)
        found = self._made[key][2]
        if isinstance(found, GapTooSmall):
            raise found
        return found
