"""What is measured of a shipped model, and what it must reach."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from sa_lens.circuits.metrics import METRICS
from sa_lens.circuits.running.recorded_passes import last_logits
from sa_lens.circuits.tasks import TASKS, make_unseen
from sa_lens.config import Stream, Words
from sa_lens.core import SelfAblatingTransformer
from sa_lens.core.host import streams_of

PROMPTS = 400
"""Prompts of each task."""
ACCURACIES = ("pair_accuracy", "top1_accuracy")
PAIR_BARS: dict[Stream, float] = {"clean": 0.95, "ablated": 0.90}
"""Least pair accuracy on IOI with name pairs that never meet in training."""
CLEAN_BAR, ABLATED_BAR = 1.05, 1.15
"""Largest clean and largest ablated loss, as multiples of the dense model's: what a loss in nats is worth depends on
how much the stories leave open."""


class Bar(NamedTuple):
    """A figure beside what it must be."""

    reached: bool
    text: str
    """The figure and the bar, in words."""

    def __str__(self) -> str:
        return f"  {'yes' if self.reached else 'NO '}  {self.text}"


def skills(
    model: SelfAblatingTransformer, words: Words, *, n: int | None = None, seed: int = 0
) -> list[dict[str, Any]]:
    """Pair and top-1 accuracy of each task in each stream of the model; IOI on name pairs that training has not shown.

    A task that the tokenizer has too few words for is left out.

    Args:
        n: prompts of each task; None: `PROMPTS`.
    """
    if model.tokenizer is None:
        raise ValueError("this model has no tokenizer, which the prompts of a task need")
    rows = []
    for task in TASKS:
        try:
            pairs = make_unseen(task, model.tokenizer, n or PROMPTS, seed, words=words)
        except ValueError:
            continue
        for stream in streams_of(model):
            logits = last_logits(model, pairs, stream)
            means = {name: round(float(METRICS[name](logits, pairs).mean()), 4) for name in ACCURACIES}
            rows.append({"task": task, "stream": stream, "n": len(pairs), **means})
    return rows


def losses_on(model: SelfAblatingTransformer, texts: Sequence[str]) -> dict[str, float]:
    """Mean loss of both streams over texts, nats per token, each text cut to the model's context."""
    sums: dict[str, list[float]] = {"clean": [], "ablated": []}
    with torch.no_grad():
        for text in texts:
            streams = model.run_streams(model.to_tokens(text, prepend_bos=True)[:, : model.cfg.n_ctx])
            sums["clean"].append(float(streams.clean_loss))
            if streams.ablated_loss is not None:
                sums["ablated"].append(float(streams.ablated_loss))
    return {stream: round(sum(values) / len(values), 4) for stream, values in sums.items() if values}


def stories_bars(local: Mapping[str, Any], dense: Mapping[str, Any]) -> list[Bar]:
    """What the self-ablating model of the generated stories must reach.

    Args:
        local, dense: figures of the two models, as `about.json` has them: `losses` by stream, `skills` by task.
    """
    ioi = {row["stream"]: row["pair_accuracy"] for row in local["skills"] if row["task"] == "ioi"}
    bars = [
        Bar(ioi[stream] >= least, f"IOI on held-out name pairs, {stream} stream: {ioi[stream]:.1%} (bar: {least:.0%})")
        for stream, least in PAIR_BARS.items()
    ]
    for stream, most in (("clean", CLEAN_BAR), ("ablated", ABLATED_BAR)):
        loss = local["losses"][stream]
        ratio = loss / dense["losses"]["clean"]
        bars.append(
            Bar(ratio <= most, f"{stream} loss {loss:.3f} nats, {ratio:.3f} x the dense model's (bar: {most:.2f} x)")
        )
    return bars
