"""The cost that a search minimises: the metric from the final residual stream, for many rows; larger is worse.

KL needs the full vocabulary only for one number per prompt, the log of the sum of exponentials (lse). With p the
probabilities of the clean prompt and y = n W_U + b_U the logits of the normalised stream n,

    KL(p || q) = lse(y) - lse(y_clean) - (sum over tokens of p W_U) . (n - n_clean).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from sa_lens.circuits.metrics import METRICS, Metric
from sa_lens.circuits.tasks.pairs import PromptPairs
from sa_lens.core.nodes import NodeFunctions
from sa_lens.core.products import linear, packed


class Near(NamedTuple):
    """A state near which costs are estimated."""

    cost: float
    """Its cost."""
    final: Float[Tensor, "pair d_model"]
    """Its normalised final residual stream."""
    logits: list[Float[Tensor, "pair words"]]
    """Its logits minus the clean lse, for some words at a time; empty if costs are not estimated from them."""


class Cost(Protocol):
    """Cost of each row from the normalised final residual stream at the metric position; larger is worse."""

    def __call__(self, final: Float[Tensor, "row pair d_model"]) -> Float[Tensor, " row"]: ...

    def near(self, final: Float[Tensor, "pair d_model"]) -> Near:
        """Returns the state of the cost at a final residual stream."""
        return Near(float(self(final[None])[0]), final, [])

    def estimate(
        self, final: Float[Tensor, "row pair d_model"], near: Near, dtype: torch.dtype
    ) -> Float[Tensor, " row"]:
        """Returns about the cost of each row, with products of changes from a state near it rounded to `dtype`."""
        return self(final)


_CHUNK = 2**19
"""Largest number of logits in memory at a time, so that they stay in a processor's cache."""


def cost_of(metric: Metric, functions: NodeFunctions, pairs: PromptPairs, clean: Float[Tensor, "pair d_model"]) -> Cost:
    """Returns the metric as a cost.

    Args:
        pairs: the pairs, in the order of the rows' prompts.
        clean: normalised final residual stream of the unedited clean prompts.
    """
    if metric is METRICS["kl"]:
        return KLCost(functions.W_U, functions.b_U, clean)
    return LogitsCost(metric, functions.W_U, functions.b_U, pairs, clean)


class KLCost(Cost):
    """Computes the mean KL(unedited clean prompt || row) in nats over the full vocabulary; see `cost_of`."""

    def __init__(
        self,
        W_U: Float[Tensor, "d_model d_vocab"],
        b_U: Float[Tensor, " d_vocab"],
        clean: Float[Tensor, "pair d_model"],
    ) -> None:
        n = max(1, W_U.shape[1] // 1024)
        self.parts = list(zip(W_U.T.contiguous().tensor_split(n), b_U.contiguous().tensor_split(n), strict=True))
        """Rows and biases of some words at a time."""
        self.rounded: dict[torch.dtype, list[Tensor]] = {}
        """The rows in another type, for estimates."""
        self.clean = clean.double()
        logits = linear(clean, W_U.T, b_U)
        lse = logits.double().logsumexp(-1)
        self.shift = lse.to(clean.dtype)[:, None]
        self.rest = self.shift[:, 0].double() - lse
        p = logits.softmax(-1)
        parts = zip(p.split([len(b) for _, b in self.parts], dim=1), self.parts, strict=True)
        self.mean = torch.stack([q.double() @ w.double() for q, (w, _) in parts]).sum(0)

    def __call__(self, final: Float[Tensor, "row pair d_model"]) -> Float[Tensor, " row"]:
        return self._costs(final, self._logits)

    def near(self, final: Float[Tensor, "pair d_model"]) -> Near:
        logits = list(self._logits(final))
        return Near(float(self._costs(final[None], lambda _: (x[None].clone() for x in logits))[0]), final, logits)

    def estimate(
        self, final: Float[Tensor, "row pair d_model"], near: Near, dtype: torch.dtype
    ) -> Float[Tensor, " row"]:
        rounded = self.rounded.setdefault(dtype, [])
        if not rounded:
            rounded += [packed(W, dtype) for W, _ in self.parts]

        def logits(x: Tensor) -> Iterator[Tensor]:
            change = (x - near.final).to(dtype)
            return (was + linear(change, W) for was, W in zip(near.logits, rounded, strict=True))

        return self._costs(final, logits)

    def _logits(self, x: Float[Tensor, "... pair d_model"]) -> Iterator[Float[Tensor, "... pair words"]]:
        """Yields the logits minus the clean lse, of some words at a time."""
        return (linear(x, W, b).sub_(self.shift) for W, b in self.parts)

    def _costs(
        self, final: Float[Tensor, "row pair d_model"], logits: Callable[[Tensor], Iterator[Tensor]]
    ) -> Float[Tensor, " row"]:
        rows = max(1, _CHUNK // (len(self.clean) * len(self.parts[0][0])))
        logs = torch.cat([_log_sum_exp(partial(logits, x)) for x in final.split(rows)])
        drift = (self.mean * (final.double() - self.clean)).sum(-1)
        return (logs + self.rest - drift).mean(-1)


def _log_sum_exp(parts: Callable[[], Iterator[Float[Tensor, "row pair words"]]]) -> Float[Tensor, "row pair"]:
    """Returns the log of the sum of exponentials over all parts, in float64; the parts are overwritten."""
    total = torch.stack([x.exp_().sum(-1) for x in parts()]).double().sum(0)
    if bool(torch.isfinite(total).all()) and bool((total > 0).all()):
        return total.log()
    # logits so far from the clean ones that the exponentials leave the range of floats
    return torch.cat(list(parts()), -1).double().logsumexp(-1)


class LogitsCost(Cost):
    """Computes any other metric from all logits; see `cost_of`."""

    def __init__(
        self,
        metric: Metric,
        W_U: Float[Tensor, "d_model d_vocab"],
        b_U: Float[Tensor, " d_vocab"],
        pairs: PromptPairs,
        clean: Float[Tensor, "pair d_model"],
    ) -> None:
        self.metric, self.W_U, self.b_U, self.pairs = metric, W_U.contiguous(), b_U, pairs
        self.clean_logits = clean @ W_U + b_U if metric.needs_clean_logits else None

    def __call__(self, final: Float[Tensor, "row pair d_model"]) -> Float[Tensor, " row"]:
        logits = (torch.addmm(self.b_U, x, self.W_U) for x in final)
        return self.metric.sign * torch.stack(
            [self.metric(x, self.pairs, self.clean_logits).double().mean() for x in logits]
        )
