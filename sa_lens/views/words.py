"""Words of figures for the names that tables and records use."""

from __future__ import annotations

TASKS = {"ioi": "IOI", "pronoun": "Pronoun gender", "object": "Object recall", "repeated": "Repeated name"}
"""Words for tasks."""

_METRICS = {
    "kl": "KL, nats",
    "logit_difference": "logit difference",
    "pair_accuracy": "pair accuracy",
    "top1_accuracy": "top-1 accuracy",
    "answer_rank": "rank of the answer",
    "answer_log_probability": "log-probability of the answer, nats",
}


def metric_words(name: str) -> str:
    """A metric in words, with its unit where it has one."""
    return _METRICS.get(name, name.replace("_", " "))
