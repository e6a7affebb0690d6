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
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from sa_lens.circuits.discovery.acdc import ACDCResult
from sa_lens.circuits.experiment import Experiment, analysis
from sa_lens.circuits.graph import Circuit, Graph
from sa_lens.circuits.judging.circuit_metric import CircuitMetric
from sa_lens.circuits.judging.faithfulness_curve import FaithfulnessCurve, Needed, Point
from sa_lens.circuits.metrics import SKILL_BAR
from sa_lens.config import check_choice
from sa_lens.statistics import LEVEL, Interval, percentile_interval, resampled_means

RESAMPLES = 2000
"""Bootstrap samples of the prompts."""

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


@analysis
def faithfulness(
    exp: Experiment,
    ranking: RankingLike,
    *,
    sizes: Sequence[int | float] = MIB_SIZES,
    order: Order = "mib",
    levels: Sequence[float] = (0.9,),
    prune: bool = False,
    progress: bool = True,
) -> FaithfulnessCurve:
    """Faithfulness of a ranking along its sizes, or of given circuits, with 95 % intervals over prompts.

    Runs of circuits are kept by the experiment, so that several rankings share what they have in common. Tables of
    several curves: `curves_table`, `summary_table`.

    Args:
        ranking: a circuit whose every edge has a score: its largest n are run for each size. An `ACDCResult` or a
            sequence of circuits: each is run as it is, and `sizes`, `order` and `levels` mean nothing.
        sizes: floats in (0, 1] are shares of all edges, rounded down, and make up the areas; whole numbers are counts
            of edges, measured beside them.
        order: which edges come first; see `Order`. Where no score is negative all are the same.
        levels: values of f, below 1, to search the edges needed for: along absolute scores unless `order="signed"`.
        prune: leave out edges on no path from the embedding to the logits before running, as MIB does. This changes
            nothing in the clean stream with `resample`. In the ablated stream with frozen masks such edges do work:
            their nodes are under the masks of the clean prompt, and so write something else than in the corrupt run.
        progress: show a progress bar if it takes more than a few seconds.

    Raises:
        ValueError: an edge without a score, sizes or levels out of range, an unknown choice, or a gap below the
            metric's `minimum_gap`.
    """
    _check_options(sizes, order, levels)
    _check_ranking(ranking, exp.graph, sizes)
    measure = CircuitMetric.of(exp)
    about: dict[str, Any] = {**measure.about, "prune": prune, "pair_accuracy": measure.accuracy}
    about["masks_alone"] = _masks_alone(measure) if exp.masks == "frozen" else math.nan
    about |= {"level": LEVEL, "resamples": RESAMPLES, "seed": exp.seed}
    if isinstance(ranking, Circuit):
        about |= {"order": order, "ranking": dict(ranking.about)}
        chosen = _along(ranking, sizes, order)
    else:
        circuits = _circuits(ranking)
        about |= {"order": "given", "ranking": [dict(c.about) for c in circuits]}
        chosen = [_Size("given", len(c) / len(c.graph), False, c) for c in sorted(circuits, key=len)]
    pruned = [size.circuit.prune_dangling() for size in chosen]
    run = pruned if prune else [size.circuit for size in chosen]
    measured = measure.each([circuit.mask for circuit in run], progress=progress)
    needed = _needed(measure, ranking, levels, order != "signed", prune) if isinstance(ranking, Circuit) else ()
    columns = [measure.clean, measure.empty, *(m.value for m in measured), *(m.kl for m in measured)]
    means = _resampled(torch.stack(columns, -1).numpy(), exp.seed)
    clean, empty = means[:, 0], means[:, 1]
    value, divergence = means[:, 2 : 2 + len(chosen)], means[:, 2 + len(chosen) :]
    with np.errstate(divide="ignore", invalid="ignore"):
        f = (value - empty[:, None]) / (clean - empty)[:, None] + 0.0  # no minus zero
    points = tuple(
        Point(
            *(size.order, size.share, size.area, len(size.circuit), len(connected)),
            *(_interval(x[:, i]) for x in (value, f, divergence)),
        )
        for i, (size, connected) in enumerate(zip(chosen, pruned, strict=True))
    )
    gap = _interval(clean - empty)
    areas = {}
    for name, usual, curve in (("cpr", "signed", f), ("cmd", "absolute", np.abs(1 - f))):
        along = usual if order == "mib" else order
        in_area = [i for i, size in enumerate(chosen) if size.area and size.order == along]
        areas[name] = _interval(_area([chosen[i].share for i in in_area], curve[:, in_area]))
    return FaithfulnessCurve(
        *(points, _interval(clean), _interval(empty), gap, areas["cpr"], areas["cmd"], needed),
        _warnings(exp.pairs.task, measure.accuracy, gap, about["masks_alone"]),
        about,
    )


def _circuits(given: ACDCResult | Sequence[Circuit | ACDCResult]) -> list[Circuit]:
    parts = [given] if isinstance(given, ACDCResult) else given
    return [part.circuit if isinstance(part, ACDCResult) else part for part in parts]


def _check_options(sizes: Sequence[int | float], order: str, levels: Sequence[float]) -> None:
    check_choice("order", order, Order)
    if not sizes:
        raise ValueError("sizes is empty: give shares in (0, 1] or counts of edges")
    for size in sizes:
        whole = isinstance(size, int) and not isinstance(size, bool)
        if not (whole and size >= 0) and not (isinstance(size, float) and 0 < size <= 1):
            raise ValueError(
                f"size {size!r}: give floats in (0, 1] for shares, whole numbers from 0 for counts of edges"
            )
    for level in levels:
        if not 0 < level < 1:
            raise ValueError(f"level {level} of f to search for must lie above 0 and below 1")


def _check_ranking(ranking: RankingLike, graph: Graph, sizes: Sequence[int | float]) -> None:
    """Checks that circuits fit the model, and that a ranking ranks."""
    alone = isinstance(ranking, Circuit)
    too_large = [size for size in sizes if isinstance(size, int) and size > len(graph)]
    if alone and too_large:
        raise ValueError(f"size {too_large[0]}: the graph has {len(graph)} edges (whole numbers are counts of edges)")
    circuits = [ranking] if isinstance(ranking, Circuit) else _circuits(ranking)
    if not circuits:
        raise ValueError("no circuit given")
    for circuit in circuits:
        circuit.check_fits(graph)
        missing = int(circuit.scores[graph.exists].isnan().sum())
        if alone and missing:
            raise ValueError(
                f"{missing} of {len(graph)} edges have no score, so this circuit is no ranking: give it as "
                "[circuit] to measure it as it is"
            )


class _Size(NamedTuple):
    order: str
    share: float
    area: bool
    circuit: Circuit


def _along(ranking: Circuit, sizes: Sequence[int | float], order: Order) -> list[_Size]:
    """The circuits of a ranking at all sizes."""
    total = len(ranking.graph)
    asked = [
        (size, size / total, False) if isinstance(size, int) else (int(size * total), size, True) for size in sizes
    ]
    orders = ("absolute", "signed") if order == "mib" else (order,)
    return [
        _Size(chosen, share, area, ranking.keep(count, absolute=chosen == "absolute"))
        for chosen in orders
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

    needed = []
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
        needed.append(Needed(level, high, connected, f(high), len(tried)))
    return tuple(needed)


def _resampled(values: np.ndarray, seed: int) -> np.ndarray:
    """Means over prompts: row 0 of the prompts themselves, further rows of their bootstrap samples."""
    draws = resampled_means(values, RESAMPLES, np.random.default_rng(seed))
    return np.concatenate([values.mean(0, keepdims=True), draws])


def _interval(means: np.ndarray) -> Interval:
    """From the value itself and its resamples."""
    low, high = percentile_interval(means[1:, None])
    return Interval(float(means[0]), float(low[0]), float(high[0]))


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
    warnings = []
    if masks_alone >= MASKS_BRING:
        warnings.append(
            f"without any edge out of the embedding f is {masks_alone:.2f}: the frozen masks of the clean prompt bring "
            "that much of the answer themselves, which no edge has to carry; masks='live' brings nothing"
        )
    if accuracy < SKILL_BAR:
        warnings.append(
            f"the model does not do {task}: pair accuracy {accuracy:.2f} is below {SKILL_BAR}, so a circuit for it "
            "explains little"
        )
    if gap.low <= 0 <= gap.high:
        warnings.append(
            f"the gap of {gap.mean:.3g} between clean and empty is not told apart from 0 (interval {gap.low:.3g} to "
            f"{gap.high:.3g}), so f is unstable"
        )
    return tuple(warnings)
