"""Faithfulness: how much of a model's behaviour a circuit carries, and how many edges a ranking needs.

With m the mean metric over the prompts of a circuit's run, of the unedited clean prompts, and of the empty circuit,

    f(circuit) = (m(circuit) - m(empty)) / (m(clean) - m(empty)).

With `ablation="resample"` the empty circuit runs the corrupt prompts. The areas are those of the Mechanistic
Interpretability Benchmark (MIB): f at ten shares of the edges from 0.001 to 1, integrated by trapezoids over the
shares. CPR is the area under f (at most 0.999 if f never exceeds 1), CMD the area under |1 - f| (0 is best).

Source: Mueller et al., arXiv 2504.13151, section 3; sizes, rounding, pruning and the rule of areas are those of the
code of its circuit track.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float

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
"""A warning is given if frozen masks alone reach this f."""

Order = Literal["mib", "absolute", "signed"]
"""Which edges of a ranking come first. `signed`: those with the largest score, so that harmful edges come last.
`absolute`: those with the largest absolute score. `mib`: both orders, with CPR from the signed one and CMD from the
absolute one, as MIB publishes them."""

RankingLike = Circuit | ACDCResult | Sequence[Circuit | ACDCResult]
"""A ranking (a circuit whose edges all have scores), or circuits that are measured as they are: an `ACDCResult`, or a
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
    """Measures the faithfulness of a ranking at several sizes, or of given circuits, with 95 % intervals over prompts.

    The experiment keeps the runs of circuits, so that several rankings share them. `curves_table` and `summary_table`
    make tables of several curves.

    Args:
        ranking: a circuit whose edges all have scores; for each size n its n largest edges run. Or an `ACDCResult` or a
            sequence of circuits, which run as they are; `sizes`, `order` and `levels` then have no effect.
        sizes: floats in (0, 1] are shares of all edges, rounded down, from which the areas are computed; whole numbers
            are numbers of edges, which are measured in addition.
        order: which edges come first; see `Order`. All orders are the same if no score is negative.
        levels: values of f below 1; for each, the number of edges needed is searched, by absolute scores unless
            `order="signed"`.
        prune: whether to leave out edges that are on no path from the embedding to the logits, as MIB does. In the
            clean stream with `resample` this changes nothing. In the ablated stream with frozen masks such edges have
            an effect: the masks of the clean prompt act on their nodes, which so write other values than in the run of
            the corrupt prompt.
        progress: whether to show a progress bar if it takes more than a few seconds.

    Raises:
        ValueError: an edge has no score, a size or level is out of range, a choice is unknown, or the gap is below the
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
        chosen = _cut_ranking(ranking, sizes, order)
    else:
        circuits = _circuits(ranking)
        about |= {"order": "given", "ranking": [dict(c.about) for c in circuits]}
        chosen = [_Size("given", len(c) / len(c.graph), False, c) for c in sorted(circuits, key=len)]
    pruned = [size.circuit.prune_dangling() for size in chosen]
    run = pruned if prune else [size.circuit for size in chosen]
    measured = measure.each([circuit.mask for circuit in run], progress=progress)
    needed = (
        _search_edges_needed(measure, ranking, levels, order != "signed", prune) if isinstance(ranking, Circuit) else ()
    )
    columns = [measure.clean, measure.empty, *(m.value for m in measured), *(m.kl for m in measured)]
    means = _resample(torch.stack(columns, -1).numpy(), exp.seed)
    clean, empty = means[:, 0], means[:, 1]
    value, divergence = means[:, 2 : 2 + len(chosen)], means[:, 2 + len(chosen) :]
    f = _faithfulness(means[:, : 2 + len(chosen)])
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
    """Checks that the circuits fit the model, and that every edge of a ranking has a score."""
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


def _cut_ranking(ranking: Circuit, sizes: Sequence[int | float], order: Order) -> list[_Size]:
    """Returns the circuits of a ranking at all sizes."""
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


def _search_edges_needed(
    measure: CircuitMetric, ranking: Circuit, levels: Sequence[float], absolute: bool, prune: bool
) -> tuple[Needed, ...]:
    total = len(ranking.graph)
    known: dict[int, Interval] = {}

    def f(n: int) -> Interval:
        if n not in known:
            circuit = ranking.keep(n, absolute=absolute)
            value = measure((circuit.prune_dangling() if prune else circuit).mask).value
            columns = torch.stack([measure.clean, measure.empty, value], -1).numpy()
            known[n] = _interval(_faithfulness(_resample(columns, measure.exp.seed))[:, 0])
        return known[n]

    def search(level: float, end: Literal["mean", "low", "high"]) -> tuple[int, int]:
        """Returns the smallest tried size with this end of f at the level or above, and how many sizes were tried."""
        low, high, tried = 0, 1, 1
        while getattr(f(high), end) < level and high < total:
            low, high, tried = high, min(2 * high, total), tried + 1
        while high - low > 1:
            middle, tried = (low + high) // 2, tried + 1
            low, high = (low, middle) if getattr(f(middle), end) >= level else (middle, high)
        return high, tried

    needed = []
    for level in levels:
        edges, tried = search(level, "mean")
        if f(edges).mean < level:
            raise ValueError(
                f"all {total} edges give f={f(edges).mean:.4g}, below {level}: this circuit metric is not stable"
            )
        connected = len(ranking.keep(edges, absolute=absolute).prune_dangling())
        ends = search(level, "high")[0], search(level, "low")[0]
        needed.append(Needed(level, edges, connected, f(edges).mean, tried, *ends))
    return tuple(needed)


def _faithfulness(means: Float[np.ndarray, "draw column"]) -> Float[np.ndarray, "draw circuit"]:
    """Returns f of circuits from means of the metric: clean prompts, the empty circuit, then the circuits."""
    clean, empty, value = means[:, :1], means[:, 1:2], means[:, 2:]
    with np.errstate(divide="ignore", invalid="ignore"):
        return (value - empty) / (clean - empty) + 0.0  # no minus zero


def _resample(values: np.ndarray, seed: int) -> np.ndarray:
    """Returns means over the prompts (row 0) and over their bootstrap samples (further rows)."""
    draws = resampled_means(values, RESAMPLES, np.random.default_rng(seed))
    return np.concatenate([values.mean(0, keepdims=True), draws])


def _interval(means: np.ndarray) -> Interval:
    """Returns the interval of a value (row 0) from its bootstrap samples (further rows)."""
    low, high = percentile_interval(means[1:, None])
    return Interval(float(means[0]), float(low[0]), float(high[0]))


def _area(shares: Sequence[float], y: np.ndarray) -> np.ndarray:
    """Returns the area under each row by trapezoids over the shares, or NaN for fewer than two shares."""
    if len(shares) < 2:
        return np.full(len(y), math.nan)
    return ((y[:, 1:] + y[:, :-1]) / 2) @ np.diff(shares)


def _masks_alone(measure: CircuitMetric) -> float:
    """Returns f of all edges but those out of the embedding: without tokens, only frozen masks carry information."""
    mask = measure.graph.exists.clone()
    mask[:, 0] = False
    return measure.f(mask)


def _warnings(task: str, accuracy: float, gap: Interval, masks_alone: float) -> tuple[str, ...]:
    warnings = []
    if masks_alone >= MASKS_BRING:
        warnings.append(
            f"without any edge out of the embedding f is {masks_alone:.2f}: the frozen masks of the clean prompt carry "
            "this share of the answer, which no edge then has to carry; with masks='live' they carry nothing"
        )
    if accuracy < SKILL_BAR:
        warnings.append(
            f"the model does not do {task}: pair accuracy {accuracy:.2f} is below {SKILL_BAR}, so a circuit for it "
            "explains little"
        )
    if gap.low <= 0 <= gap.high:
        warnings.append(
            f"the gap of {gap.mean:.3g} between the clean prompts and the empty circuit may be 0 (interval "
            f"{gap.low:.3g} to {gap.high:.3g}), so f is unstable"
        )
    return tuple(warnings)
