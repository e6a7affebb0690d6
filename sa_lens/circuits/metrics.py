"""Metrics, which turn the logits at the last position into one number per prompt.

Values are computed in float32 or wider, whatever the precision of the model; means over prompts are the caller's. All
metrics except accuracies and rank are differentiable.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sa_lens.circuits.tasks.pairs import PromptPairs
from sa_lens.core.host import at_least_float32

SKILL_BAR = 0.8
"""Smallest pair accuracy at which the model counts as able to do the task."""


def logit_difference(logits: Float[Tensor, "pair d_vocab"], pairs: PromptPairs) -> Float[Tensor, " pair"]:
    """Returns the logit of the answer minus the logit of the wrong answer."""
    return _pick(logits, pairs.answers) - _pick(logits, pairs.wrong_answers)


def pair_accuracy(logits: Float[Tensor, "pair d_vocab"], pairs: PromptPairs) -> Float[Tensor, " pair"]:
    """Returns 1 where the answer's logit is above the wrong answer's, and 0 elsewhere; a tie counts as wrong."""
    difference = logit_difference(logits, pairs)
    return (difference > 0).to(difference.dtype)


def top1_accuracy(logits: Float[Tensor, "pair d_vocab"], pairs: PromptPairs) -> Float[Tensor, " pair"]:
    """Returns 1 where the answer's logit is above that of every other token, and 0 elsewhere; a tie counts as wrong."""
    rank = answer_rank(logits, pairs)
    return (rank == 0).to(rank.dtype)


def answer_rank(logits: Float[Tensor, "pair d_vocab"], pairs: PromptPairs) -> Float[Tensor, " pair"]:
    """Returns the number of other tokens whose logit is not below the answer's; 0 is best."""
    answer = _pick(logits, pairs.answers)
    return (at_least_float32(logits) >= answer[:, None]).sum(-1).to(answer.dtype) - 1


def answer_log_probability(logits: Float[Tensor, "pair d_vocab"], pairs: PromptPairs) -> Float[Tensor, " pair"]:
    """Returns the log-probability of the answer, in nats."""
    return _pick(at_least_float32(logits).log_softmax(-1), pairs.answers)


def kl(logits: Float[Tensor, "pair d_vocab"], reference: Float[Tensor, "pair d_vocab"]) -> Float[Tensor, " pair"]:
    """Returns KL(p || q) over the full vocabulary, in nats.

    p are the probabilities of the reference logits (of the unedited clean prompt, in the same stream), q those of
    `logits`.
    """
    p, q = at_least_float32(reference.to(logits.device)).log_softmax(-1), at_least_float32(logits).log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def _pick(x: Float[Tensor, "pair d_vocab"], tokens: Int[Tensor, " pair"]) -> Float[Tensor, " pair"]:
    return at_least_float32(x.gather(-1, tokens.to(x.device)[:, None])[:, 0])


@dataclass(frozen=True)
class Metric:
    """A quantity at the end of each prompt, and whether larger or smaller is better."""

    name: str
    """Name in tables and files."""
    function: Callable[..., Float[Tensor, " pair"]]
    """Takes the logits at the last position `[pair, d_vocab]` and the pairs that they belong to, and with
    `needs_clean_logits` also the logits of the unedited clean prompts. Returns one finite value per pair."""
    larger_is_better: bool = True
    """Whether a larger value means that the model does the task better."""
    needs_clean_logits: bool = False
    """Whether the function compares with the unedited clean prompts. Such a metric is best at the clean prompt, so it
    has no gradient there."""
    minimum_gap: float = 0.1
    """Smallest difference between the clean prompts and the empty circuit for which faithfulness is computed."""

    @classmethod
    def named(cls, metric: str | Metric | Callable[..., Any]) -> Metric:
        """Returns the metric of this name, or makes one of a function of logits and pairs (larger is better).

        Raises:
            ValueError: the name is not in `METRICS`.
        """
        if isinstance(metric, Metric):
            return metric
        if callable(metric):
            return cls(getattr(metric, "__name__", type(metric).__name__), metric)
        if metric not in METRICS:
            raise ValueError(f"metric={metric!r} is none of {', '.join(METRICS)}, nor a function")
        return METRICS[metric]

    @property
    def sign(self) -> float:
        """1 if larger values are worse, -1 if they are better."""
        return -1.0 if self.larger_is_better else 1.0

    def __call__(
        self, logits: Float[Tensor, "pair d_vocab"], pairs: PromptPairs, clean_logits: Tensor | None = None
    ) -> Float[Tensor, " pair"]:
        """Returns the value of each pair, in float32 or wider.

        Args:
            clean_logits: logits of the unedited clean prompts; only needed with `needs_clean_logits`.

        Raises:
            ValueError: clean logits are needed but not given, or the function does not return one finite value per
                pair.
        """
        if self.needs_clean_logits and clean_logits is None:
            raise ValueError(f"metric={self.name!r} needs the logits of the unedited clean prompts")
        if len(pairs) == 1:
            # one pair alone cannot show whether there is a value for each
            twice = None if clean_logits is None else clean_logits.expand(2, -1)
            return self(logits.expand(2, -1), pairs.subset([0, 0]), twice)[:1]
        values = self.function(logits, pairs, *([clean_logits] if self.needs_clean_logits else []))
        if not isinstance(values, Tensor):
            given = f"a {type(values).__name__}"
        elif tuple(values.shape) != (len(pairs),):
            given = f"a tensor of shape {tuple(values.shape)}"
        elif not bool(values.isfinite().all()):
            given = "values that are not finite"
        else:
            return at_least_float32(values)
        raise ValueError(
            f"metric {self.name!r} gave {given} for {len(pairs)} pairs: it must give one finite value for each"
        )

    def require_gradient(self, pairs: PromptPairs, d_vocab: int, at_clean_prompt_for: str | None = None) -> None:
        """Checks that the metric has a gradient.

        Args:
            at_clean_prompt_for: method that needs the gradient at the clean prompt; None if it is needed elsewhere.

        Raises:
            ValueError: the metric has no gradient.
        """
        if at_clean_prompt_for and self.needs_clean_logits:
            raise ValueError(
                f"metric={self.name!r} has no gradient at the clean prompt, where it is best, so {at_clean_prompt_for} "
                "would give 0 everywhere: use 'logit_difference', eap_ig, whose gradients are taken elsewhere, or "
                "exact_effects"
            )
        with torch.inference_mode(False), torch.enable_grad():
            logits = torch.linspace(-1, 1, d_vocab)[None].requires_grad_()
            values = self(logits, pairs.subset([0]), torch.zeros(1, d_vocab))
        if not values.requires_grad:
            raise ValueError(
                f"metric={self.name!r} has no gradient, because it is constant except for jumps: use "
                "'logit_difference' or 'answer_log_probability', or exact_effects, which takes any metric"
            )


METRICS: dict[str, Metric] = {
    "logit_difference": Metric("logit_difference", logit_difference),
    "pair_accuracy": Metric("pair_accuracy", pair_accuracy),
    "top1_accuracy": Metric("top1_accuracy", top1_accuracy),
    "answer_rank": Metric("answer_rank", answer_rank, larger_is_better=False),
    "answer_log_probability": Metric("answer_log_probability", answer_log_probability),
    "kl": Metric(
        "kl",
        lambda logits, pairs, clean_logits: kl(logits, clean_logits),
        larger_is_better=False,
        needs_clean_logits=True,
    ),
}
"""All metrics by name. `kl` is KL(unedited clean prompt || edited prompt) in the same stream."""
