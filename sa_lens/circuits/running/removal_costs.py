"""The cost that a search minimises: the metric from the final residual stream, for many rows; larger is worse.

KL needs the full vocabulary only for one number per prompt, the log of the sum of exponentials (lse). With p the
probabilities of the clean prompt and y = n W_U + b_U the logits of the normalised stream n,

    KL(p || q) = lse(y) - lse(y_clean) - (sum over tokens of p W_U) . (n - n_clean).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from sa_lens.circuits.metrics import METRICS, Metric
from sa_lens.circuits.tasks.pairs import PromptPairs
from sa_lens.core.nodes import NodeFunctions
from sa_lens.core.products import linear

Cost = Callable[[Float[Tensor, "row pair d_model"]], Float[Tensor, " row"]]
"""Cost of each row from the normalised final residual stream at the metric position; larger is worse."""

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


class KLCost:
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
        self.clean = clean.double()
        logits = linear(clean, W_U.T, b_U)
        self.lse = logits.double().logsumexp(-1)
        p = logits.softmax(-1)
        parts = zip(p.split([len(b) for _, b in self.parts], dim=1), self.parts, strict=True)
        self.mean = torch.stack([q.double() @ w.double() for q, (w, _) in parts]).sum(0)

    def __call__(self, final: Float[Tensor, "row pair d_model"]) -> Float[Tensor, " row"]:
        drift = (self.mean * (final.double() - self.clean)).sum(-1)
        return (self.lse_minus_clean(final) - drift).mean(-1)

    def lse_minus_clean(self, final: Float[Tensor, "row pair d_model"]) -> Float[Tensor, "row pair"]:
        """Returns lse(y) - lse(y_clean) of each row and prompt, in float64."""
        flat = final.flatten(0, 1)
        shift = self.lse.to(flat.dtype).repeat(len(final))[:, None]
        rows = max(1, _CHUNK // len(self.parts[0][0]))
        logs = torch.cat([self._log_sum_exp(x, s) for x, s in zip(flat.split(rows), shift.split(rows), strict=True)])
        rounded = shift[:, 0].double() - self.lse.repeat(len(final))
        return (logs + rounded).view(final.shape[:2])

    def _log_sum_exp(self, x: Float[Tensor, "row d_model"], shift: Float[Tensor, "row 1"]) -> Float[Tensor, " row"]:
        """Returns lse(y - shift) of each row, in float64."""
        total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        for W, b in self.parts:
            total += linear(x, W, b).sub_(shift).exp_().sum(-1)
        if bool(torch.isfinite(total).all()) and bool((total > 0).all()):
            return total.log()
        # logits so far from the clean ones that the exponentials leave the range of floats
        logits = torch.cat([linear(x, W, b).sub_(shift) for W, b in self.parts], -1)
        return logits.double().logsumexp(-1)


class LogitsCost:
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
