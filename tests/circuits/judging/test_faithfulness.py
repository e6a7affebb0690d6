"""Curves, areas and edges needed are what the definitions give on circuits known by hand, and what whole runs give."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from known import known_model, known_pairs, path, random_ranking, ranking
from micro import gated, plain, token_pairs

from sa_lens.circuits.discovery.acdc import acdc
from sa_lens.circuits.experiment import Experiment
from sa_lens.circuits.graph import Circuit, Graph
from sa_lens.circuits.judging.circuit_metric import CircuitMetric
from sa_lens.circuits.judging.completeness import completeness, minimality
from sa_lens.circuits.judging.faithfulness import MIB_SIZES, RESAMPLES, faithfulness
from sa_lens.circuits.judging.faithfulness_curve import curves_table, summary_table
from sa_lens.circuits.metrics import METRICS, Metric, kl, logit_difference
from sa_lens.circuits.running.circuit_by_hooks import run_circuit
from sa_lens.circuits.running.recorded_passes import last_logits
from sa_lens.statistics import resampled_means

STRONG, WEAK, HARMFUL = path(0, 0), path(0, 1), path(1, 0)

ANY_GAP = replace(METRICS["logit_difference"], minimum_gap=1e-6)


def two_heads():
    """Heads that give 3/4 and 1/4 of the logit difference, and a ranking with their edges first."""
    model = known_model({(0, 0): 3.0, (0, 1): 1.0})
    scores = dict(zip((*STRONG, *WEAK), (10.0, 9.0, 8.0, 7.0), strict=True))
    return model, known_pairs(), ranking(Graph.from_model(model), scores)


def mib_areas(shares, f):
    """Areas as MIB takes them, size by size."""
    cpr = cmd = 0.0
    for i in range(len(shares) - 1):
        width = shares[i + 1] - shares[i]
        cpr += width * (f[i] + f[i + 1]) / 2
        cmd += width * (abs(1 - f[i]) + abs(1 - f[i + 1])) / 2
    return cpr, cmd


# ---------------------------------------------------------------------------------------------------- known circuits


def test_the_curve_of_a_known_circuit() -> None:
    model, pairs, scores = two_heads()
    curve = faithfulness(model, pairs, scores, order="absolute")
    # 29 edges, rounded down: 0 0 0 0 0 1 2 5 14 29
    assert [p.edges for p in curve.points] == [0, 0, 0, 0, 0, 1, 2, 5, 14, 29]
    assert [p.share for p in curve.points] == list(MIB_SIZES)
    expected = [0, 0, 0, 0, 0, 0, 0.75, 1, 1, 1]
    assert [p.f.mean for p in curve.points] == pytest.approx(expected, abs=1e-6)
    # under f: 0.05 wide at 0.375, 0.1 at 0.875, 0.8 at 1; under |1 - f|: 0.049 wide at 1, 0.05 at 0.625, 0.1 at 0.125
    assert curve.cpr.mean == pytest.approx(0.90625, abs=1e-6)
    assert curve.cmd.mean == pytest.approx(0.09275, abs=1e-6)
    # every prompt has the same f, so the intervals have no width
    assert all(p.f.high - p.f.low < 1e-6 for p in curve.points)
    # mean over rows of 2 * 4 * (row + 1) / 7 is 20 / 7
    assert curve.gap.mean == pytest.approx(20 / 7, abs=1e-6)
    assert curve.warnings == ()


def test_only_edges_on_a_whole_path_are_connected() -> None:
    model, pairs, scores = two_heads()
    curve = faithfulness(model, pairs, scores, sizes=[1, 2, 3, 4], order="signed", levels=())
    assert [p.connected for p in curve.points] == [0, 2, 2, 4]


def test_harmful_edges_come_last_when_signed_and_early_when_absolute() -> None:
    model = known_model({(0, 0): 3.0, (0, 1): 1.0, (1, 0): -1.0})
    scores = dict(zip((*STRONG, *HARMFUL, *WEAK), (10.0, 9.0, -8.0, -7.0, 6.0, 5.0), strict=True))
    curve = faithfulness(model, known_pairs(), ranking(Graph.from_model(model), scores))
    found = {o: [p.f.mean for p in curve.points if p.order == o] for o in ("absolute", "signed")}
    assert found["absolute"] == pytest.approx([0, 0, 0, 0, 0, 0, 1, 2 / 3, 1, 1], abs=1e-6)
    assert found["signed"] == pytest.approx([0, 0, 0, 0, 0, 0, 1, 4 / 3, 4 / 3, 1], abs=1e-6)
    assert curve.cpr.mean == pytest.approx(mib_areas(MIB_SIZES, found["signed"])[0], abs=1e-6)
    assert curve.cmd.mean == pytest.approx(mib_areas(MIB_SIZES, found["absolute"])[1], abs=1e-6)
    for order in ("absolute", "signed"):
        one = faithfulness(model, known_pairs(), ranking(Graph.from_model(model), scores), order=order)
        areas = mib_areas(MIB_SIZES, found[order])
        assert (one.cpr.mean, one.cmd.mean) == pytest.approx(areas, abs=1e-6)


def test_edges_needed() -> None:
    model, pairs, scores = two_heads()
    curve = faithfulness(model, pairs, scores, sizes=[1], levels=(0.7, 0.9))
    # 0.7: sizes 1, 2 are tried; 0.9: 1, 2, 4, 3
    strong, both = curve.edges_for(0.7), curve.edges_for(0.9)
    assert (strong.edges, strong.connected, strong.tried) == (2, 2, 2)
    assert (both.edges, both.connected, both.tried) == (4, 4, 4)
    assert (strong.f, both.f) == pytest.approx((0.75, 1.0), abs=1e-6)
    with pytest.raises(ValueError, match=r"level=0.5 was not searched for \(searched: 0.7, 0.9\)"):
        curve.edges_for(0.5)


def test_the_interval_of_edges_needed_is_that_of_the_search_on_bootstrap_samples() -> None:
    """Two of the four prompts reach their whole metric with the strong head alone, the others need both heads; f rises
    with size on every sample of the prompts, so each sample's number is found by looking at all sizes."""
    model, pairs, scores = two_heads()

    def capped(logits, pairs):
        caps = torch.tensor([0.2857, 10.0, 0.8, 10.0])
        return torch.minimum(logit_difference(logits, pairs), caps)

    metric = Metric("capped", capped)
    needed = faithfulness(model, pairs, scores, sizes=[1], metric=metric, levels=(0.8,)).edges_for(0.8)
    measure = CircuitMetric.of(Experiment(model, pairs, metric=metric))
    sizes = measure.each([scores.keep(n).mask for n in range(1, len(scores.graph) + 1)])
    columns = torch.stack([measure.clean, measure.empty, *(m.value for m in sizes)], -1).numpy()
    draws = resampled_means(columns, RESAMPLES, np.random.default_rng(0))
    f = (draws[:, 2:] - draws[:, 1:2]) / (draws[:, :1] - draws[:, 1:2])
    numbers = [next(n for n, value in enumerate(row, 1) if value >= 0.8) for row in f]
    low, high = np.quantile(numbers, [0.025, 0.975], method="inverted_cdf")
    assert (needed.low, needed.edges, needed.high) == (low, 2, high)
    assert low < high


def test_the_search_finds_the_smallest_size_where_f_only_rises() -> None:
    model, pairs, _ = two_heads()
    graph = Graph.from_model(model)
    for place in (4, 9, 17, 23, 29):
        # the last of the four edges that matter stands at this place
        others = [str(e) for e in graph.edges if str(e) not in (*STRONG, *WEAK)]
        order = [*STRONG, WEAK[0], *others]
        order.insert(place - 1, WEAK[1])
        scores = Circuit.of(graph, {edge: 100.0 - i for i, edge in enumerate(order)})
        curve = faithfulness(model, pairs, scores, sizes=[1])
        assert curve.edges_for(0.9).edges == place


# ---------------------------------------------------------------------------------------------------------- twins


@pytest.mark.parametrize(
    ("stream", "masks", "ablation", "prune"),
    [
        ("clean", None, "resample", True),
        ("clean", None, "zero", False),
        ("ablated", "frozen", "mean", True),
        ("ablated", "frozen", "resample", True),
        ("ablated", "frozen", "resample", False),
        ("ablated", "live", "resample", False),
    ],
)
def test_every_size_equals_a_run_of_its_own(stream, masks, ablation, prune) -> None:
    model, pairs = gated(), token_pairs(n=6, lengths=(6, 8))
    graph = Graph.from_model(model)
    scores = random_ranking(graph)
    curve = faithfulness(
        model, pairs, scores, sizes=[0.05, 0.3, 0.6, 1.0, 17], stream=stream, masks=masks, ablation=ablation,
        prune=prune, levels=(), batch_size=4, metric=ANY_GAP,
    )  # fmt: skip
    assert curve.about["masks"] == (masks or "none")

    def run(circuit: Circuit) -> torch.Tensor:
        return run_circuit(model, pairs, circuit, ablation=ablation, stream=stream, masks=masks)

    reference = last_logits(model, pairs, stream)
    clean, empty = (float(logit_difference(x, pairs).mean()) for x in (reference, run(Circuit.of(graph))))
    assert (curve.clean.mean, curve.empty.mean) == pytest.approx((clean, empty), abs=1e-5)
    assert len(curve.points) == 10
    for point in curve.points:
        circuit = scores.keep(point.edges, absolute=point.order == "absolute")
        logits = run(circuit.prune_dangling() if prune else circuit)
        value = float(logit_difference(logits, pairs).mean())
        assert point.value.mean == pytest.approx(value, abs=1e-5)
        assert point.f.mean == pytest.approx((value - empty) / (clean - empty), rel=1e-4, abs=1e-5)
        assert point.kl.mean == pytest.approx(float(kl(logits, reference).mean()), abs=1e-5)


def test_what_frozen_masks_bring_without_any_edge_is_told() -> None:
    model, pairs = gated(), token_pairs(n=6, lengths=(6, 8))
    graph = Graph.from_model(model)
    scores = random_ranking(graph)
    options = {"stream": "ablated", "levels": (), "metric": ANY_GAP}
    frozen, live = (faithfulness(model, pairs, scores, masks=masks, **options) for masks in ("frozen", "live"))
    without = Circuit.of(graph, [edge for edge in graph.edges if str(edge.source) != "embed"])
    value = float(logit_difference(run_circuit(model, pairs, without, stream="ablated", masks="frozen"), pairs).mean())
    expected = (value - frozen.empty.mean) / (frozen.clean.mean - frozen.empty.mean)
    assert abs(expected) > 0.05
    assert frozen.about["masks_alone"] == pytest.approx(expected, abs=1e-4)
    assert any("masks of the clean prompt" in warning for warning in frozen.warnings) == (expected > 0)
    # live gates choose from what the edges bring: nothing
    assert math.isnan(live.about["masks_alone"])
    logits = [run_circuit(model, pairs, c, stream="ablated", masks="live") for c in (without, Circuit.of(graph))]
    torch.testing.assert_close(*logits)


def test_pruning_changes_nothing_with_resampling_in_the_clean_stream() -> None:
    model, pairs = plain(), token_pairs()
    scores = random_ranking(Graph.from_model(model))
    curves = [faithfulness(model, pairs, scores, prune=p, metric=ANY_GAP, levels=()) for p in (True, False)]
    first, second = ([p.f.mean for p in c.points] for c in curves)
    assert first == pytest.approx(second, abs=1e-4)


def test_intervals_are_those_of_resampled_prompts() -> None:
    model, pairs = plain(), token_pairs(n=12)
    graph = Graph.from_model(model)
    scores = random_ranking(graph)
    options = {"order": "signed", "levels": (), "seed": 5, "metric": ANY_GAP}
    curve = faithfulness(model, pairs, scores, **options)
    runs = [last_logits(model, pairs), last_logits(model, pairs, prompt="corrupt")]
    runs += [run_circuit(model, pairs, scores.keep(p.edges, absolute=False)) for p in curve.points]
    clean, empty, *found = (logit_difference(x, pairs).double().numpy() for x in runs)
    f, cpr, cmd = [], [], []
    for counts in np.random.default_rng(5).multinomial(12, [1 / 12] * 12, size=2000):
        rows = np.repeat(np.arange(12), counts)
        f.append([(x[rows].mean() - empty[rows].mean()) / (clean[rows].mean() - empty[rows].mean()) for x in found])
        areas = mib_areas(MIB_SIZES, f[-1])
        cpr.append(areas[0])
        cmd.append(areas[1])
    for i, point in enumerate(curve.points):
        assert point.f[1:] == pytest.approx(np.quantile([x[i] for x in f], [0.025, 0.975]), rel=1e-3, abs=1e-4)
    assert curve.cpr[1:] == pytest.approx(np.quantile(cpr, [0.025, 0.975]), rel=1e-3, abs=1e-4)
    assert curve.cmd[1:] == pytest.approx(np.quantile(cmd, [0.025, 0.975]), rel=1e-3, abs=1e-4)
    again = faithfulness(model, pairs, scores, **options)
    assert again == curve
    assert faithfulness(model, pairs, scores, **{**options, "seed": 6}).cpr != curve.cpr


def test_kl_as_the_metric_falls_from_the_empty_circuit_to_zero() -> None:
    model, pairs = plain(), token_pairs()
    curve = faithfulness(model, pairs, random_ranking(Graph.from_model(model)), metric="kl", levels=())
    assert curve.clean.mean == pytest.approx(0, abs=1e-6)
    for point in curve.points:
        assert point.value == point.kl
        assert point.f.mean == pytest.approx(1 - point.kl.mean / curve.empty.mean, abs=1e-6)


# ------------------------------------------------------------------------------------------- circuits and tables


def test_what_acdc_found_is_measured_as_it_is() -> None:
    model, pairs, _ = two_heads()
    result = acdc(model, pairs, 0.01, metric="logit_difference", progress=False)
    assert {str(e) for e in result.circuit} == {*STRONG, *WEAK}
    curve = faithfulness(model, pairs, result)
    (point,) = curve.points
    assert (point.order, point.edges, point.connected, point.area) == ("given", 4, 4, False)
    assert point.f.mean == pytest.approx(1, abs=1e-6)
    assert math.isnan(curve.cpr.mean)
    assert curve.needed == ()
    some = [Circuit.of(result.circuit.graph, STRONG), result]
    assert [p.f.mean for p in faithfulness(model, pairs, some).points] == pytest.approx([0.75, 1], abs=1e-6)


def test_counts_are_measured_but_stay_out_of_the_areas() -> None:
    model, pairs, scores = two_heads()
    bare, more = (faithfulness(model, pairs, scores, sizes=s) for s in (MIB_SIZES, (*MIB_SIZES, 3, 1)))
    assert (bare.cpr, bare.cmd) == (more.cpr, more.cmd)
    assert len(more.points) == len(bare.points) + 4


def test_tables_of_several_rankings_at_matched_sizes() -> None:
    model, pairs, scores = two_heads()
    found = acdc(model, pairs, 0.01, metric="logit_difference", progress=False)
    curves = {
        name: faithfulness(model, pairs, ranking, sizes=[4, 0.5, 1.0])
        for name, ranking in {"known": scores, "random": random_ranking(scores.graph), "acdc": found}.items()
    }
    assert curves["known"] == faithfulness(model, pairs, scores, sizes=[4, 0.5, 1.0])
    table = curves_table(curves)
    assert table["ranking"].tolist() == ["known"] * 6 + ["random"] * 6 + ["acdc"]
    wide = table.query("order != 'signed'").pivot_table("kl", "edges", "ranking")
    assert wide.index.tolist() == [4, 14, 29]
    assert wide.loc[4, "known"] == pytest.approx(0, abs=1e-6)
    assert wide.loc[4, "acdc"] == pytest.approx(0, abs=1e-6)
    assert wide.loc[29, ["known", "random"]].tolist() == pytest.approx([0, 0], abs=1e-6)
    assert math.isnan(wide.loc[29, "acdc"])
    at = table[(table["ranking"] == "random") & (table["edges"] == 14) & (table["order"] == "absolute")]
    assert wide.loc[14, "random"] == at["kl"].item()
    short = summary_table(curves).set_index("ranking")
    assert short.loc["known", "edges_0.9"] == 4
    assert math.isnan(short.loc["acdc", "edges_0.9"])
    assert bool(short.loc["known", "able"])


def test_a_task_that_the_model_cannot_do_carries_a_warning() -> None:
    model, pairs, scores = two_heads()
    swapped = replace(pairs, answers=pairs.wrong_answers, wrong_answers=pairs.answers)
    curve = faithfulness(model, swapped, scores, sizes=[4])
    assert "does not do random tokens: pair accuracy 0.00" in curve.warnings[0]
    assert not curve.table()["able"].any()
    # the two halves cancel but for a little, so the gap's interval holds 0
    half = torch.tensor([0, 1, 2, 3])
    both = replace(pairs, answers=1 + half % 2, wrong_answers=2 - half % 2)
    assert "and the empty circuit may be 0" in faithfulness(model, both, scores, sizes=[4]).warnings[1]


# ------------------------------------------------------------------------------------- completeness, minimality


def test_completeness_of_a_known_circuit() -> None:
    model, pairs, _ = two_heads()
    graph, gap = Graph.from_model(model), 20 / 7
    part = completeness(model, pairs, Circuit.of(graph, STRONG), subsets=6, steps=2, seed=1, progress=False)
    # the other head gives a quarter to the model whatever is taken out of this one
    assert part["normalised"].tolist() == pytest.approx([0.25] * len(part), abs=1e-6)
    assert part["incompleteness"].tolist() == pytest.approx([0.25 * gap] * len(part), abs=1e-6)
    assert part["how"].tolist() == ["none", *["random"] * 6, "greedy"]
    whole = completeness(model, pairs, Circuit.of(graph, [*STRONG, *WEAK]), by="nodes", progress=False)
    assert whole["incompleteness"].max() < 1e-6
    assert set(", ".join(whole["elements"]).split(", ")) <= {"a0.h0", "a0.h1", ""}


def test_greedy_takes_the_worst_element() -> None:
    model, pairs = plain(), token_pairs()
    circuit = random_ranking(Graph.from_model(model), 2).keep(20)
    found = completeness(
        model,
        pairs,
        circuit,
        subsets=0,
        steps=1,
        candidates=20,
        metric=replace(METRICS["kl"], minimum_gap=1e-3),
        progress=False,
    )

    def value(mask: torch.Tensor) -> float:
        run = run_circuit(model, pairs, replace(circuit, mask=mask))
        return float(kl(run, last_logits(model, pairs)).mean())

    apart = []
    for to, source in circuit.mask.nonzero().tolist():
        inside, whole = circuit.mask.clone(), circuit.graph.exists.clone()
        inside[to, source] = whole[to, source] = False
        apart.append(abs(value(inside) - value(whole)))
    worst = found[found["how"] == "greedy"].iloc[0]
    assert worst["incompleteness"] == pytest.approx(max(apart), abs=1e-5)
    assert worst["elements"] == str(list(circuit)[apart.index(max(apart))])


def test_minimality_of_a_known_circuit() -> None:
    model, pairs, _ = two_heads()
    idle = "embed->logits"
    table = minimality(model, pairs, Circuit.of(Graph.from_model(model), [*WEAK, idle, *STRONG]), progress=False)
    assert set(table["element"][:2]) == set(STRONG)
    assert set(table["element"][2:4]) == set(WEAK)
    assert table["element"][4] == idle
    assert table["normalised"].tolist() == pytest.approx([0.75, 0.75, 0.25, 0.25, 0], abs=1e-6)
    assert (table["change_low"] <= table["change"]).all()
    nodes = minimality(model, pairs, Circuit.of(Graph.from_model(model), [*WEAK, *STRONG]), by="nodes", progress=False)
    assert dict(zip(nodes["element"], nodes["normalised"], strict=True)) == pytest.approx(
        {"a0.h0": 0.75, "a0.h1": 0.25}, abs=1e-6
    )


# ------------------------------------------------------------------------------------------------------- refusals


def test_a_gap_that_is_too_small_is_refused() -> None:
    model, pairs, scores = two_heads()
    same = replace(pairs, corrupt=pairs.clean)
    for call in (faithfulness, minimality, completeness):
        with pytest.raises(ValueError, match=r"a difference of 0, below minimum_gap=0.1, .* Choose a task"):
            call(model, same, scores)
    with pytest.raises(ValueError, match=r"below minimum_gap=3"):
        faithfulness(model, pairs, scores, metric=replace(METRICS["logit_difference"], minimum_gap=3.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": "best"}, "is not one of 'mib'"),
        ({"sizes": []}, "sizes is empty"),
        ({"sizes": [1.5]}, "floats in"),
        ({"sizes": [True]}, "floats in"),
        ({"sizes": [-1]}, "floats in"),
        ({"sizes": [30]}, "the graph has 29 edges"),
        ({"levels": (1.0,)}, "above 0 and below 1"),
        ({"metric": replace(METRICS["kl"], minimum_gap=0.0)}, "must be above 0"),
        ({"metric": "skill"}, "is none of"),
        ({"metric": lambda logits, pairs: logits}, "for 4 pairs: it must give one finite value for each"),
        ({"ablation": "noise"}, "is not one of"),
        ({"stream": "ablated"}, "needs gates"),
        ({"masks": "live"}, "gates do not act in the clean stream"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str) -> None:
    model, pairs, scores = two_heads()
    with pytest.raises(ValueError, match=message):
        faithfulness(model, pairs, scores, **options)


def test_bad_circuits_are_refused() -> None:
    model, pairs, scores = two_heads()
    bare = Circuit.of(scores.graph, STRONG)
    with pytest.raises(ValueError, match=r"29 of 29 edges have no score.*\[circuit\]"):
        faithfulness(model, pairs, bare)
    with pytest.raises(ValueError, match=r"does not fit this model"):
        faithfulness(model, pairs, [Circuit.full(Graph(3, 2))])
    with pytest.raises(ValueError, match="no circuit given"):
        faithfulness(model, pairs, [])
    for call in (completeness, minimality):
        with pytest.raises(ValueError, match="no edges to take out"):
            call(model, pairs, Circuit.of(scores.graph))
        with pytest.raises(ValueError, match=r"by='[a-z]+' is not one of 'edges', 'nodes'"):
            call(model, pairs, bare, by="heads")
        with pytest.raises(ValueError, match="does not fit"):
            call(model, pairs, Circuit.full(Graph(3, 2)))
    for options in ({"subsets": -1}, {"steps": -1}, {"candidates": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            completeness(model, pairs, bare, **options)


def test_tables_of_no_curve_are_empty() -> None:
    for table in (curves_table, summary_table):
        assert len(table({})) == 0
