"""How much of a model's behaviour a circuit carries: faithfulness curves, their areas, and edges needed.

With m the mean metric over the prompts of a circuit's run, of the unedited clean prompts, and of the empty circuit,

    f(circuit) = (m(circuit) - m(empty)) / (m(clean) - m(empty)).

With `ablation="resample"` the empty circuit's run is that of the corrupt prompts. The areas are those of the
Mechanistic Interpretability Benchmark (MIB): f at ten shares of the edges, trapezoids over the shares as they stand,
from 0.001 to 1. CPR is the area under f (at most 0.999 where f never exceeds 1), CMD that of |1 - f| (0 is best).

Source: Mueller et al., arXiv 2504.13151, section 3; sizes, rounding, pruning and the rule of areas are those of the
code of its circuit track.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch

from sa_lens.circuits.discovery.acdc import ACDCResult
from sa_lens.circuits.graph import Circuit, Graph
from sa_lens.circuits.judging.circuit_metric import MINIMUM_GAP, CircuitMetric
from sa_lens.circuits.judging.faithfulness_curve import FaithfulnessCurve, Needed, Point
from sa_lens.circuits.metrics import SKILL_BAR, Interval, Metric
from sa_lens.circuits.running.circuit_by_hooks import Ablation, Gates
from sa_lens.circuits.tasks.pairs import PromptPairs
from sa_lens.config import Stream
from sa_lens.core.host import Host

MIB_SIZES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Shares of all edges at which MIB measures f."""

MASKS_BRING = 0.05
"""f of frozen masks alone from which a warning says so."""

Order = Literal["mib", "absolute", "signed"]
"""Which edges of a ranking come first: those with the largest score (`signed`: harmful edges come last), or with the
largest absolute score (`absolute`: strong edges come first, whatever they do). `mib`: both, CPR from the signed order
and CMD from the absolute one, as MIB publishes them."""

RankingLike = Circuit | ACDCResult | Sequence[Circuit | ACDCResult]
"""A ranking (a circuit whose every edge has a score), or circuits to be measured as they are: an `ACDCResult`, or a
sequence of circuits."""


def faithfulness_curve(
    model: Host,
    pairs: PromptPairs,
    ranking: RankingLike,
    *,
    metric: str | Metric = "logit_difference",
    sizes: Sequence[int | float] = MIB_SIZES,
    order: Order = "mib",
    levels: Sequence[float] = (0.9,),
    prune: bool = False,
    ablation: Ablation = "resample",
    stream: Stream = "clean",
    gates: Gates | None = None,
    batch_size: int = 64,
    minimum_gap: float = MINIMUM_GAP,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    progress: bool = True,
) -> FaithfulnessCurve:
    """Faithfulness of a ranking along its sizes, or of given circuits.

    Args:
        ranking: a circuit whose every edge has a score: its largest n are run for each size. An `ACDCResult` or a
            sequence of circuits: each is run as it is, and `sizes`, `order` and `levels` mean nothing.
        metric: a name of `METRICS`, `kl`, or a function of last logits and pairs.
        sizes: floats in (0, 1] are shares of all edges, rounded down, and make up the areas; whole numbers are counts
            of edges, measured beside them.
        order: which edges come first; see `Order`. Where no score is negative all are the same.
        levels: values of f, below 1, to search the edges needed for: along absolute scores unless `order="signed"`.
        prune: leave out edges on no path from the embedding to the logits before running, as MIB does. This changes
            nothing in the clean stream with `resample`. In the ablated stream with frozen gates such edges do work:
            their nodes are under the masks of the clean prompt, and so write something else than in the corrupt run.
        ablation: what edges outside carry; see `running.Ablation`.
        gates: in the ablated stream, `frozen` (default) or `live`; see `run_circuit`.
        batch_size: prompts run at once.
        minimum_gap: |m(clean) - m(empty)| below which this refuses, in units of the metric.
        level: coverage of the intervals.
        resamples: bootstrap samples of the prompts.
        seed: of the bootstrap.
        progress: a progress bar, where it takes more than a few seconds.

    Raises:
        ValueError: an edge without a score, sizes or levels out of range, an unknown choice, a gap below the minimum,
            or what `run_circuit` raises.
    """
    found = faithfulness_curves(
        *(model, pairs, {"": ranking}),
        metric=metric,
        sizes=sizes,
        order=order,
        levels=levels,
        prune=prune,
        ablation=ablation,
        stream=stream,
        gates=gates,
        batch_size=batch_size,
        minimum_gap=minimum_gap,
        level=level,
        resamples=resamples,
        seed=seed,
        progress=progress,
    )
    return found[""]


def faithfulness_curves(
    model: Host,
    pairs: PromptPairs,
    rankings: Mapping[str, RankingLike],
    *,
    metric: str | Metric = "logit_difference",
    sizes: Sequence[int | float] = MIB_SIZES,
    order: Order = "mib",
    levels: Sequence[float] = (0.9,),
    prune: bool = False,
    ablation: Ablation = "resample",
    stream: Stream = "clean",
    gates: Gates | None = None,
    batch_size: int = 64,
    minimum_gap: float = MINIMUM_GAP,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, FaithfulnessCurve]:
    """The curve of each ranking by its name, at the same sizes and on the same draws of prompts.

    Arguments and errors as in `faithfulness_curve`; tables of the result: `curves_table`, `summary_table`,
    `kl_at_sizes`.
    """
    _check_options(sizes, order, levels, level, resamples)
    graph = Graph.from_model(model)
    for name, ranking in rankings.items():
        _check_ranking(ranking, graph, sizes, f"{name}: " if name else "")
    measure = CircuitMetric(
        model, pairs, metric, ablation, stream, gates, batch_size=batch_size, minimum_gap=minimum_gap
    )
    return {
        name: _curve(measure, ranking, sizes, order, levels, prune, level, resamples, seed, progress)
        for name, ranking in rankings.items()
    }


def curve_of(
    measure: CircuitMetric,
    ranking: RankingLike,
    *,
    sizes: Sequence[int | float] = MIB_SIZES,
    order: Order = "mib",
    levels: Sequence[float] = (0.9,),
    prune: bool = False,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    progress: bool = True,
) -> FaithfulnessCurve:
    """What `faithfulness_curve` gives, on a metric whose runs are kept for the next curve.

    Arguments and errors as in `faithfulness_curve`.
    """
    _check_options(sizes, order, levels, level, resamples)
    _check_ranking(ranking, measure.graph, sizes, "")
    return _curve(measure, ranking, sizes, order, levels, prune, level, resamples, seed, progress)


def _check_options(
    sizes: Sequence[int | float], order: str, levels: Sequence[float], level: float, resamples: int
) -> None:
    if order not in get_args(Order):
        raise ValueError(f"order={order!r} must be one of {', '.join(map(repr, get_args(Order)))}")
    if not sizes:
        raise ValueError("sizes is empty: give shares in (0, 1] or counts of edges")
    for size in sizes:
        whole = isinstance(size, int) and not isinstance(size, bool)
        if not (whole and size >= 0) and not (isinstance(size, float) and 0 < size <= 1):
            raise ValueError(
                f"size {size!r}: give floats in (0, 1] for shares, whole numbers from 0 for counts of edges"
            )
    for wanted in levels:
        if not 0 < wanted < 1:
            raise ValueError(f"level {wanted} of f to search for must lie above 0 and below 1")
    if not 0 < level < 1 or resamples < 1:
        raise ValueError(f"level={level}, resamples={resamples}: level in (0, 1), at least one resample")


def _check_ranking(ranking: RankingLike, graph: Graph, sizes: Sequence[int | float], name: str) -> None:
    """Checks that circuits fit the model, and that a ranking ranks."""
    alone = isinstance(ranking, Circuit)
    too_large = [size for size in sizes if isinstance(size, int) and size > len(graph)]
    if alone and too_large:
        raise ValueError(f"size {too_large[0]}: the graph has {len(graph)} edges (whole numbers are counts of edges)")
    parts = [ranking] if isinstance(ranking, Circuit | ACDCResult) else list(ranking)
    if not parts:
        raise ValueError(f"{name}no circuit given")
    for part in parts:
        circuit = part.circuit if isinstance(part, ACDCResult) else part
        if circuit.graph != graph:
            raise ValueError(f"{name}a circuit of {circuit.graph} does not fit this model, whose graph is {graph}")
        missing = int(circuit.scores[graph.exists].isnan().sum())
        if alone and missing:
            raise ValueError(
                f"{name}{missing} of {len(graph)} edges have no score, so this circuit is no ranking: give it as "
                "[circuit] to measure it as it is"
            )


class _Size(NamedTuple):
    order: str
    share: float
    area: bool
    circuit: Circuit


def _curve(
    measure: CircuitMetric,
    ranking: RankingLike,
    sizes: Sequence[int | float],
    order: Order,
    levels: Sequence[float],
    prune: bool,
    level: float,
    resamples: int,
    seed: int,
    progress: bool,
) -> FaithfulnessCurve:
    about: dict[str, Any] = {**measure.about, "prune": prune, "pair_accuracy": measure.accuracy}
    about["masks_alone"] = _masks_alone(measure) if measure.about["gates"] == "frozen" else math.nan
    about |= {"level": level, "resamples": resamples, "seed": seed}
    if isinstance(ranking, Circuit):
        about |= {"order": order, "ranking": dict(ranking.about)}
        chosen = _along(ranking, sizes, order)
    else:
        parts = [ranking] if isinstance(ranking, ACDCResult) else ranking
        circuits = [part.circuit if isinstance(part, ACDCResult) else part for part in parts]
        about |= {"order": "given", "ranking": [dict(c.about) for c in circuits]}
        chosen = [_Size("given", len(c) / len(c.graph), False, c) for c in sorted(circuits, key=len)]
    run = [s.circuit.prune_dangling() for s in chosen]
    masks = [(pruned if prune else s.circuit).mask for s, pruned in zip(chosen, run, strict=True)]
    measured = measure.each(masks, progress=progress)
    needed = _needed(measure, ranking, levels, order != "signed", prune) if isinstance(ranking, Circuit) else ()
    values = torch.stack([measure.clean, measure.empty, *(m.value for m in measured)], -1)
    divergences = torch.stack([m.kl for m in measured], -1)
    # row 0 of each: the prompts themselves; further rows: their resamples
    value, divergence = _resampled(torch.cat([values, divergences], -1).numpy(), resamples, seed, values.shape[1])
    clean, empty, found = value[:, 0], value[:, 1], value[:, 2:]
    with np.errstate(divide="ignore", invalid="ignore"):
        f = (found - empty[:, None]) / (clean - empty)[:, None] + 0.0  # no minus zero
    points = tuple(
        Point(
            *(size.order, size.share, size.area, len(size.circuit), len(pruned)),
            *(_interval(x[:, i], level) for x in (found, f, divergence)),
        )
        for i, (size, pruned) in enumerate(zip(chosen, run, strict=True))
    )
    gap = _interval(clean - empty, level)
    areas = {}
    for name, wanted, curve in (("cpr", "signed", f), ("cmd", "absolute", np.abs(1 - f))):
        wanted = wanted if order == "mib" else order
        columns = [i for i, s in enumerate(chosen) if s.area and s.order == wanted]
        areas[name] = _interval(_area([chosen[i].share for i in columns], curve[:, columns]), level)
    return FaithfulnessCurve(
        *(points, _interval(clean, level), _interval(empty, level), gap, areas["cpr"], areas["cmd"], needed),
        _warnings(measure.pairs.task, measure.accuracy, gap, about["masks_alone"]),
        about,
    )


def _along(ranking: Circuit, sizes: Sequence[int | float], order: Order) -> list[_Size]:
    """The circuits of a ranking at all sizes."""
    total = len(ranking.graph)
    asked = [
        (size, size / total, False) if isinstance(size, int) else (int(size * total), size, True) for size in sizes
    ]
    orders = ("absolute", "signed") if order == "mib" else (order,)
    return [
        _Size(one, share, area, ranking.keep(count, absolute=one == "absolute"))
        for one in orders
        for count, share, area in sorted(set(asked))
    ]


def _needed(
    measure: CircuitMetric, ranking: Circuit, levels: Sequence[float], absolute: bool, prune: bool
) -> tuple[Needed, ...]:
    total = len(ranking.graph)
    known: dict[int, float] = {}

    def f(n: int) -> float:
        if n not in known:
            circuit = ranking.keep(n, absolute=absolute)
            known[n] = measure.f((circuit.prune_dangling() if prune else circuit).mask)
        return known[n]

    found = []
    for level in levels:
        tried = {high := 1}
        low = 0
        while f(high) < level and high < total:
            low, high = high, min(2 * high, total)
            tried.add(high)
        if f(high) < level:
            raise ValueError(
                f"all {total} edges give f={f(high):.4g}, below {level}: this circuit metric is not stable"
            )
        while high - low > 1:
            middle = (low + high) // 2
            tried.add(middle)
            low, high = (low, middle) if f(middle) >= level else (middle, high)
        connected = len(ranking.keep(high, absolute=absolute).prune_dangling())
        found.append(Needed(level, high, connected, f(high), len(tried)))
    return tuple(found)


def _resampled(values: np.ndarray, resamples: int, seed: int, split: int) -> tuple[np.ndarray, np.ndarray]:
    """Means over prompts: of the prompts themselves, then of each bootstrap sample; columns cut in two."""
    n = len(values)
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)
    means = np.concatenate([values.mean(0, keepdims=True), counts @ values / n])
    return means[:, :split], means[:, split:]


def _interval(means: np.ndarray, level: float) -> Interval:
    """From the value itself and its resamples."""
    low, high = np.quantile(means[1:], [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(means[0]), float(low), float(high))


def _area(shares: Sequence[float], y: np.ndarray) -> np.ndarray:
    """Trapezoids over the shares, for each row; NaN with fewer than two."""
    if len(shares) < 2:
        return np.full(len(y), math.nan)
    return ((y[:, 1:] + y[:, :-1]) / 2) @ np.diff(shares)


def _masks_alone(measure: CircuitMetric) -> float:
    """f of all edges but those out of the embedding: no edge brings a token, so it is what frozen masks bring."""
    mask = measure.graph.exists.clone()
    mask[:, 0] = False
    return measure.f(mask)


def _warnings(task: str, accuracy: float, gap: Interval, masks_alone: float) -> tuple[str, ...]:
    found = []
    if masks_alone >= MASKS_BRING:
        found.append(
            f"without any edge out of the embedding f is {masks_alone:.2f}: the frozen masks of the clean prompt bring "
            "that much of the answer themselves, which no edge has to carry; gates='live' brings nothing"
        )
    if accuracy < SKILL_BAR:
        found.append(
            f"the model does not do {task}: pair accuracy {accuracy:.2f} is below {SKILL_BAR}, so a circuit for it "
            "explains little"
        )
    if gap.low <= 0 <= gap.high:
        found.append(
            f"the gap of {gap.mean:.3g} between clean and empty is not told apart from 0 (interval {gap.low:.3g} to "
            f"{gap.high:.3g}), so f is unstable"
        )
    return tuple(found)
