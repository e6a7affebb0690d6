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
from sa_lens.circuits.running.expected_work import expected_outlook, expected_work
from sa_lens.circuits.running.whole_removals import WholeRuns
from sa_lens.stopping import Interrupted

MODULE = sys.modules["sa_lens.circuits.discovery.acdc"]


class Clock:
    """A clock that the tries of a search advance."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
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
            self.now += engine.work - before
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
    assert median(factors[False]) < 1.5
    assert median(factors[True]) > 2.5


def test_forecast_with_live_gates(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    acdc(gated(n_heads=2), token_pairs(n=2), 0.05, stream="ablated", progress=False)
    assert clock.factor(0.1) < 1.25
    assert clock.factor(0.5) < 1.25


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


def test_receivers_of_kept_edges_are_certain_and_others_follow_from_those_between() -> None:
    graph = Graph(3, 2)
    visited, kept = torch.zeros_like(graph.exists), torch.zeros_like(graph.exists)
    assert all(x.live == 1 for node, x in expected_outlook(graph, kept, visited).items() if node.kind == "logits")
    for edge in graph.edges:
        visited[graph.place(edge)] = edge.destination.kind == "logits" or edge.destination.layer == 2
    for edge in ("m1->logits", "a2.h0->logits", "a1.h0->a2.h0.q", "a1.h1->a2.h0.k"):
        kept[graph.place(edge)] = True
    outlook = expected_outlook(graph, kept, visited)
    assert outlook[Node("mlp", 1)] == (1.0, 0.0)
    assert outlook[Node("head", 1, 0)].live == outlook[Node("head", 1, 1)].live == 1
    assert outlook[Node("head", 1, 1)].everywhere == 1
    # a head without a kept edge has no path yet, and only the MLP above it, which is not visited, can give it one
    assert outlook[Node("head", 1, 0)].everywhere < 0.05
    assert outlook[Node("head", 2, 1)].live == 0
    assert 0 < outlook[Node("head", 0, 0)].live < 1
    # nothing is left once all is visited
    assert expected_work(graph, kept, graph.exists, lambda node, everywhere: 1.0, 1.0, 0.5) == 0
    work = expected_work(graph, kept, visited, lambda node, everywhere: 0.0, 1.0, 0.5)
    certain = sum(graph.n_sources[to] for to, i in enumerate(graph.inputs) if i.node.layer == 1)
    assert certain < work < certain + sum(graph.n_sources[to] for to, i in enumerate(graph.inputs) if not i.node.layer)
