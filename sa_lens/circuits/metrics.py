"""What is measured at the end of a prompt: metrics, their intervals, and how well a model does a task at all.

A metric is a plain function of the logits at the last position and the pairs, and gives one value per pair; means are
the caller's. It is computed in float32 or wider, whatever the model's precision. All but accuracies and rank are
differentiable.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sa_lens.circuits.tasks.pairs import PromptPairs
from sa_lens.config import Stream
from sa_lens.core.host import Host, at_least_float32, device_of, in_stream, run_to_last, streams_of
from sa_lens.core.last_position import Prompts, embed_prompts, run_to_position, why_not_by_nodes
from sa_lens.core.nodes import NodeFunctions

if TYPE_CHECKING:
    import pandas as pd

Metric = Callable[[Float[Tensor, "pair d_vocab"], PromptPairs], Float[Tensor, " pair"]]
"""A metric: logits at the last position and the pairs they belong to; one finite value per pair."""

SKILL_BAR = 0.8
"""Pair accuracy below which a circuit for the task explains little: the model cannot do it."""


def logit_difference(logits: Float[Tensor, "pair d_vocab"], pairs: PromptPairs) -> Float[Tensor, " pair"]:
    """Logit of the answer minus logit of the wrong answer."""
    return _pick(logits, pairs.answers) - _pick(logits, pairs.wrong_answers)


def pair_accuracy(logits: Float[Tensor, "pair d_vocab"], pairs: PromptPairs) -> Float[Tensor, " pair"]:
    """1 where the answer's logit is above the wrong answer's, else 0; a tie is wrong."""
    difference = logit_difference(logits, pairs)
    return (difference > 0).to(difference.dtype)


def top1_accuracy(logits: Float[Tensor, "pair d_vocab"], pairs: PromptPairs) -> Float[Tensor, " pair"]:
    """1 where the answer's logit is above that of every other token, else 0; a tie is wrong."""
    rank = answer_rank(logits, pairs)
    return (rank == 0).to(rank.dtype)


def answer_rank(logits: Float[Tensor, "pair d_vocab"], pairs: PromptPairs) -> Float[Tensor, " pair"]:
    """Number of other tokens whose logit is not below the answer's; 0 is best."""
    answer = _pick(logits, pairs.answers)
    return (at_least_float32(logits) >= answer[:, None]).sum(-1).to(answer.dtype) - 1


def answer_log_probability(logits: Float[Tensor, "pair d_vocab"], pairs: PromptPairs) -> Float[Tensor, " pair"]:
    """Log-probability of the answer, in nats."""
    return _pick(at_least_float32(logits).log_softmax(-1), pairs.answers)


def kl(logits: Float[Tensor, "pair d_vocab"], reference: Float[Tensor, "pair d_vocab"]) -> Float[Tensor, " pair"]:
    """KL(p || q) over the full vocabulary, in nats: p of the reference logits (of the unedited clean prompt, in the
    same stream), q of `logits`."""
    p, q = at_least_float32(reference).log_softmax(-1), at_least_float32(logits).log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


METRICS: dict[str, Metric] = {
    "logit_difference": logit_difference,
    "pair_accuracy": pair_accuracy,
    "top1_accuracy": top1_accuracy,
    "answer_rank": answer_rank,
    "answer_log_probability": answer_log_probability,
}
"""Metrics by name; `kl` comes beside them, since it needs the clean prompt's logits."""


def _pick(x: Float[Tensor, "pair d_vocab"], tokens: Int[Tensor, " pair"]) -> Float[Tensor, " pair"]:
    return at_least_float32(x.gather(-1, tokens.to(x.device)[:, None])[:, 0])


def metric_named(metric: str | Metric, clean_logits: Float[Tensor, "pair d_vocab"] | None) -> tuple[str, Metric]:
    """Name and function of a metric; every call checks that the function gives one finite value per pair.

    Args:
        clean_logits: of the unedited clean prompts, for `kl`.

    Raises:
        ValueError: an unknown name; and by the function: values of another shape, or not finite.
    """
    if callable(metric):
        name, function = getattr(metric, "__name__", type(metric).__name__), metric
    elif metric == "kl":
        if clean_logits is None:
            raise ValueError("metric='kl' needs the logits of the unedited clean prompts")
        name, function = "kl", lambda logits, pairs: kl(logits, clean_logits.to(logits.device))
    elif metric in METRICS:
        name, function = metric, METRICS[metric]
    else:
        raise ValueError(f"metric={metric!r} is none of {', '.join([*METRICS, 'kl'])}, nor a function")

    def checked(logits: Float[Tensor, "pair d_vocab"], pairs: PromptPairs) -> Float[Tensor, " pair"]:
        if callable(metric) and len(pairs) == 1:
            # one pair alone cannot show whether there is a value for each
            return checked(logits.expand(2, -1), pairs.subset([0, 0]))[:1]
        values = function(logits, pairs)
        if not isinstance(values, Tensor):
            given = f"a {type(values).__name__}"
        elif tuple(values.shape) != (len(pairs),):
            given = f"a tensor of shape {tuple(values.shape)}"
        elif not bool(values.isfinite().all()):
            given = "values that are not finite"
        else:
            return at_least_float32(values)
        raise ValueError(f"metric {name!r} gave {given} for {len(pairs)} pairs: it must give one finite value for each")

    return name, checked


def check_fits(model: Host, pairs: PromptPairs, batch_size: int = 1) -> None:
    """Checks that the model can read these pairs.

    Raises:
        ValueError: a token beyond the vocabulary, a prompt longer than the context, or a batch_size below 1.
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size={batch_size!r} must be a whole number of at least 1: the prompts in one pass")
    highest = max(int(t.max()) for t in (pairs.clean, pairs.corrupt, pairs.answers, pairs.wrong_answers))
    if highest >= model.cfg.d_vocab:
        raise ValueError(
            f"{pairs.task}: token {highest} is beyond the model's vocabulary of {model.cfg.d_vocab}: make the pairs "
            "with the model's own tokenizer"
        )
    longest = int(pairs.lengths.max())
    if longest > model.cfg.n_ctx:
        raise ValueError(f"{pairs.task}: a prompt of {longest} tokens is longer than n_ctx={model.cfg.n_ctx}")


def last_logits(
    model: Host,
    pairs: PromptPairs,
    stream: Stream = "clean",
    prompt: Literal["clean", "corrupt"] = "clean",
    *,
    batch_size: int = 256,
) -> Float[Tensor, "pair d_vocab"]:
    """Logits at the end of each prompt, without gradients.

    In the ablated stream the masks act at the last position, which is that stream there.

    Args:
        prompt: the `clean` or the `corrupt` prompts.
        batch_size: prompts run at once.
    """
    check_fits(model, pairs, batch_size)
    parts, rows = [], []
    with in_stream(model, stream, position=-1):
        pass
    if not pairs.uniform and why_not_by_nodes(model) is None:
        return _by_nodes(model, pairs, stream, prompt, batch_size)
    with torch.no_grad(), in_stream(model, stream, position=-1):
        for at, group in pairs.by_length(batch_size):
            tokens = group.clean if prompt == "clean" else group.corrupt
            parts.append(run_to_last(model, tokens.to(device_of(model))))
            rows.append(at)
    return torch.cat(parts)[torch.cat(rows).argsort().to(parts[0].device)]


def _by_nodes(
    model: Host, pairs: PromptPairs, stream: Stream, prompt: Literal["clean", "corrupt"], batch_size: int
) -> Float[Tensor, "pair d_vocab"]:
    """The same, prompts of several lengths together."""
    functions = NodeFunctions(model, int(pairs.lengths.max()))
    parts, rows = [], []
    for chosen, prompts in prompts_in_batches(model, pairs, prompt, batch_size):
        found = run_to_position(model, functions, prompts, ablated=stream == "ablated")
        parts.append(functions.logits(found.final[stream]))
        rows.append(chosen)
    return torch.cat(parts)[torch.cat(rows).argsort().to(parts[0].device)]


def prompts_in_batches(
    model: Host, pairs: PromptPairs, prompt: Literal["clean", "corrupt"], batch_size: int
) -> Iterator[tuple[Int[Tensor, " pair"], Prompts]]:
    """Places of pairs, ordered by length, and their clean or corrupt prompts."""
    for rows in pairs.lengths.argsort(stable=True).split(batch_size):
        groups = [group for _, group in pairs.subset(rows).by_length()]
        tokens = [group.clean if prompt == "clean" else group.corrupt for group in groups]
        yield rows, Prompts.of(*embed_prompts(model, [x.to(device_of(model)) for x in tokens]))


class Interval(NamedTuple):
    """A mean and its bootstrap interval."""

    mean: float
    low: float
    high: float


def bootstrap_interval(
    values: Float[Tensor, " pair"], *, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Mean over pairs with a percentile interval, pairs drawn with replacement.

    Args:
        level: coverage of the interval, between 0 and 1.

    Raises:
        ValueError: no values, or a level outside (0, 1).
    """
    if not 0 < level < 1 or not len(values):
        raise ValueError(f"an interval of level={level} of {len(values)} values: level in (0, 1), at least one value")
    x = values.detach().double().cpu().numpy()
    rng = np.random.default_rng(seed)
    # as many at once as fit a few megabytes
    at_once = max(1, 2**20 // len(x))
    sizes = [min(at_once, resamples - first) for first in range(0, resamples, at_once)]
    means = np.concatenate([x[rng.integers(len(x), size=(size, len(x)))].mean(1) for size in sizes])
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(x.mean()), float(low), float(high))


def skill(
    model: Host,
    pairs: PromptPairs,
    stream: Stream | None = None,
    *,
    batch_size: int = 256,
    seed: int = 0,
) -> pd.DataFrame:
    """How well the model does the task: pair and top-1 accuracy and logit difference with 95 % intervals.

    Args:
        stream: one stream; None: every one that the model has.
        batch_size: prompts run at once.
        seed: of the bootstrap.

    Returns:
        One row per stream: task, stream, n, each metric with `_low` and `_high`, and `able`: pair accuracy of at least
        0.8.
    """
    import pandas as pd

    streams = streams_of(model, stream)
    rows = []
    for chosen in streams:
        logits = last_logits(model, pairs, chosen, batch_size=batch_size)
        row: dict[str, Any] = {"task": pairs.task, "stream": chosen, "n": len(pairs)}
        for name in ("pair_accuracy", "top1_accuracy", "logit_difference"):
            interval = bootstrap_interval(METRICS[name](logits, pairs), seed=seed)
            row |= {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}
        row["able"] = row["pair_accuracy"] >= SKILL_BAR
        rows.append(row)
    return pd.DataFrame(rows)
