"""The time that ACDC says is left is about the time that is left, on a clock that counts work."""

from __future__ import annotations

import math
import sys
from statistics import median
from typing import Any

import pytest
import torch
from micro import gated, plain, token_pairs

from sa_lens.circuits.discovery.acdc import _Search, acdc
from sa_lens.circuits.graph import Graph, Node
from sa_lens.circuits.running.edge_removals import Recomputation
from sa_lens.circuits.running.expected_work import REACHED, REACHED_BY_MASKS, expected_work
from sa_lens.circuits.running.removal_state import Block
from sa_lens.circuits.running.whole_removals import WholeRuns
from sa_lens.stopping import Interrupted

MODULE = sys.modules["sa_lens.circuits.discovery.acdc"]


def computed(engine: Recomputation, block: Block) -> float:
    """Work of all that a block with live gates computed again."""
    assert engine.gates is not None
    work = engine.metric_work
    for lane, changed in ((engine.gates.clean, block.clean), (engine.lane, block.changed)):
        live = {item.node: item for item in (*lane.here.values(), *lane.above)}
        work += sum(engine.work_of(node, live[node].everywhere) for node in changed)
    return len(block.rows) * work


class Clock:
    """A clock that the tries of a search advance.

    Args:
        by_nodes: whether it counts what is computed again under live gates, and not the work that the search counts.
    """

    def __init__(self, patch: pytest.MonkeyPatch, *, by_nodes: bool = False) -> None:
        self.now, self.by_nodes = 0.0, by_nodes
        self.said: list[tuple[float, float, float]] = []
        """Share of the edges that are visited, time and forecast, after each decision."""
        patch.setattr(MODULE, "perf_counter", lambda: self.now)
        for kind in (Recomputation, WholeRuns):
            patch.setattr(kind, "try_removals", self._counted(kind.try_removals))
        record = _Search._record

        def recorded(search: Any, *args: Any, **counts: int) -> None:
            record(search, *args, **counts)
            visited = float((~search.state.rises.isnan()).sum()) / len(search.graph)
            self.said.append((visited, self.now, search.forecast()))

        patch.setattr(_Search, "_record", recorded)

    def _counted(self, plainly: Any) -> Any:
        def try_removals(engine: Any, rows: Any) -> Any:
            before = engine.work
            block = plainly(engine, rows)
            self.now += computed(engine, block) if self.by_nodes else engine.work - before
            return block

        return try_removals

    def factor(self, share: float, *, per_edge: bool = False) -> float:
        """How many times too long or too short the forecast is when this share of the edges is visited.

        Args:
            per_edge: whether the forecast is that of the mean time per edge.
        """
        visited, then, said = next(x for x in self.said if x[0] >= share)
        ratio = (then * (1 - visited) / visited if per_edge else said) / (self.now - then)
        return max(ratio, 1 / ratio)


def test_forecast_after_a_tenth() -> None:
    factors: dict[bool, list[float]] = {True: [], False: []}
    for seed in range(3, 8):
        with pytest.MonkeyPatch.context() as patch:
            clock = Clock(patch)
            model = plain(n_layers=6, d_head=6, seed=seed)
            found = acdc(model, token_pairs(n=3), 0.05, progress=False)
        assert found.untouched > 0
        for per_edge, of_models in factors.items():
            of_models.append(clock.factor(0.1, per_edge=per_edge))
    # random weights, of which attribution foresees less than of trained ones
    assert median(factors[False]) < 1.75
    assert median(factors[True]) > 1.5 * median(factors[False])


def test_forecast_with_live_gates() -> None:
    factors: dict[float, list[float]] = {0.1: [], 0.5: []}
    for seed in range(5, 8):
        with pytest.MonkeyPatch.context() as patch:
            clock = Clock(patch)
            acdc(gated(n_layers=4, n_heads=2, seed=seed), token_pairs(n=2), 0.05, stream="ablated", progress=False)
        for share, of_models in factors.items():
            of_models.append(clock.factor(share))
    for of_models in factors.values():
        assert median(of_models) < 1.25
        assert max(of_models) < 1.5


def test_forecast_with_live_gates_of_what_is_computed() -> None:
    factors: dict[float, list[float]] = {0.1: [], 0.5: []}
    for seed in range(5, 8):
        with pytest.MonkeyPatch.context() as patch:
            clock = Clock(patch, by_nodes=True)
            acdc(gated(n_layers=4, n_heads=2, seed=seed), token_pairs(n=2), 0.05, stream="ablated", progress=False)
        for share, of_models in factors.items():
            of_models.append(clock.factor(share))
            assert of_models[-1] < clock.factor(share, per_edge=True) / 2
    for of_models in factors.values():
        assert median(of_models) < 1.2
        assert max(of_models) < 1.6


def test_forecast_after_an_interruption(monkeypatch: pytest.MonkeyPatch) -> None:
    model, pairs = plain(n_layers=6, d_head=6, seed=3), token_pairs(n=3)
    plainly = _Search.try_removals

    def stopped(search: Any, rows: Any) -> Any:
        if search.state.tried > 60:
            raise KeyboardInterrupt
        return plainly(search, rows)

    monkeypatch.setattr(_Search, "try_removals", stopped)
    with pytest.raises(Interrupted) as stop:
        acdc(model, pairs, 0.05, progress=False)
    monkeypatch.undo()
    clock = Clock(monkeypatch)
    acdc(model, pairs, 0.05, progress=False, resume=stop.value.result)
    first = next(visited for visited, _, said in clock.said if not math.isnan(said))
    assert clock.factor(first) < 2


def test_bar_tells_the_time_left(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock(monkeypatch)
    clock.now = 10.0
    acdc(plain(), token_pairs(n=2), 0.05)
    assert " left]" in capsys.readouterr().err


def test_a_metric_without_a_gradient_has_no_forecast(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(monkeypatch)
    acdc(plain(), token_pairs(n=2), 0.05, metric="answer_rank")
    assert all(math.isnan(said) for _, _, said in clock.said)
    assert " left]" not in capsys.readouterr().err


def test_work_left_counts_the_tries_of_receivers_with_a_path_and_what_lies_above() -> None:
    graph = Graph(2, 2)
    kept, visited = torch.zeros_like(graph.exists), torch.zeros_like(graph.exists)
    for edge in graph.edges:
        visited[graph.place(edge)] = edge.destination.kind == "logits"
    for edge in ("m1->logits", "a1.h0->m1", "a0.h1->a1.h0.k", "m0->a1.h1.q"):
        kept[graph.place(edge)] = True

    def work(node: Node, everywhere: bool) -> float:
        return 0.0 if node.kind == "logits" else 100.0 if everywhere else 10.0

    # m1 and a1.h0 have a path at the metric position, a0.h1 at all positions; a1.h1 and so m0 have none
    by_hand = 6 * (1 + 10) + 3 * 4 * (1 + 10 + REACHED * 10) + 3 * (1 + 100 + REACHED * 20)
    assert abs(expected_work(graph, kept, visited, work, 1.0) - by_hand) < 1e-9
    assert expected_work(graph, kept, graph.exists, work, 1.0) == 0
    # live gates also read a1.h1, m0 and a0.h0
    by_masks = 3 * 4 * (1 + 10 + REACHED_BY_MASKS * 10) + 2 * 3 * (1 + 10 + REACHED_BY_MASKS * 20)
    assert abs(expected_work(graph, kept, visited, work, 1.0, live_gates=True) - by_hand - by_masks) < 1e-9
