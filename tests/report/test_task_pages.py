"""Tasks and circuits agree with what finds them."""

from __future__ import annotations

import pytest
import torch

from sa_lens.circuits import Circuit, Graph, acdc, faithfulness, find_circuit, skill
from sa_lens.report import Report, task_pages
from sa_lens.report.contents import Ranking, TaskPage
from sa_lens.report.effort import CHOSEN
from sa_lens.report.subjects import Subject
from sa_lens.report.task_pages import order_edges, prompts_for, task_page


@pytest.fixture(scope="module")
def easy(report: Report) -> TaskPage:
    return report.models[0].tasks[1]


def named(edges) -> list[str]:
    return [f"{e.source}->{e.destination}" + (f".{e.port}" if e.port else "") for e in edges]


def of(page: TaskPage, method: str, stream: str) -> Ranking:
    found = [one for one in page.rankings if (one.method, one.stream) == (method, stream)]
    assert len(found) == 1
    return found[0]


def test_an_able_model_has_a_ranking_of_each_method(easy: TaskPage) -> None:
    assert [(one.method, one.stream) for one in easy.rankings] == [
        ("ACDC", "clean"),
        ("EAP-IG", "clean"),
        ("ACDC", "ablated"),
        ("EAP-IG", "ablated"),
        ("gate circuit", "ablated"),
    ]
    assert easy.note == ""
    for one in easy.rankings:
        assert (one.circuit.n_layers, one.circuit.n_heads, one.circuit.attn_only) == (2, 2, False)


def test_skill_is_that_of_the_prompts_to_judge_on(easy: TaskPage, gated: Subject, easy_task: str) -> None:
    prompts = prompts_for(gated, easy_task, 64, 0)
    table = skill(gated.model, prompts.report)
    assert [row[0] for row in easy.skill.rows] == ["clean", "ablated"]
    for row, true in zip(easy.skill.rows, table.itertuples(), strict=True):
        assert float(row[1].split(" ")[0]) == pytest.approx(true.pair_accuracy, abs=1e-3)
        assert row[4] == "yes"


@pytest.mark.parametrize("stream", ["clean", "ablated"])
def test_acdc_is_the_search_itself(easy: TaskPage, gated: Subject, easy_task: str, stream: str) -> None:
    prompts = prompts_for(gated, easy_task, 64, 0)
    true = acdc(gated.model, prompts.find, 0.01, stream=stream, progress=False).circuit
    found = of(easy, "ACDC", stream)
    assert found.chosen == len(true)
    assert set(named(found.circuit.edges[: found.chosen])) == {str(edge) for edge in true}
    scores = [edge.score for edge in found.circuit.edges]
    assert scores == sorted(scores, reverse=True)
    for edge, name in zip(found.circuit.edges, named(found.circuit.edges), strict=True):
        assert edge.score == pytest.approx(true.score(name), rel=5.1e-3, abs=1e-12)


def test_curves_and_sizes_are_those_of_direct_calls(easy: TaskPage, gated: Subject, easy_task: str) -> None:
    prompts = prompts_for(gated, easy_task, 64, 0)
    live = {"stream": "ablated", "masks": "live", "progress": False}
    whole = find_circuit(gated.model, prompts.find, prompts.report, "gate", **live)
    found = of(easy, "gate circuit", "ablated")
    assert found.chosen == len(whole.circuit)
    assert set(named(found.circuit.edges[: found.chosen])) == {str(edge) for edge in whole.circuit}
    true = faithfulness(gated.model, prompts.report, whole.ranking, order="absolute", **live)
    assert found.curve is not None
    (line,) = found.curve.lines
    points = [point for point in true.points if point.edges > 0]
    assert line.x == tuple(float(point.edges) for point in points)
    assert line.y == pytest.approx([point.f.mean for point in points], rel=1e-6)


def test_an_unable_stream_has_no_circuit_and_the_note_says_why(report: Report) -> None:
    for model in report.models:
        page = model.tasks[0]
        unable = [row[0] for row in page.skill.rows if row[4] == "no"]
        assert unable, "eight steps do not teach IOI"
        named_streams = " and ".join(f"the {stream} stream" for stream in unable)
        shares = " and ".join(f"{float(row[1].split()[0]):.0%}" for row in page.skill.rows if row[4] == "no")
        assert f"No circuit, as {named_streams} cannot do this task: pair accuracy {shares}, and below 80%" in page.note
        for stream in unable:
            assert not [one for one in page.rankings if one.stream == stream]


def test_order_is_that_of_keep() -> None:
    graph = Graph(2, 2)
    generator = torch.Generator().manual_seed(0)
    scores = (torch.randn(graph.exists.shape, generator=generator, dtype=torch.float64) * 2).round() / 2
    circuit = Circuit(graph, graph.exists.clone(), scores)
    for absolute in (True, False):
        order = named(order_edges(circuit, absolute=absolute))
        for n in range(len(graph) + 1):
            assert set(order[:n]) == {str(edge) for edge in circuit.keep(n, absolute=absolute)}


def test_long_rankings_are_cut_and_say_so(gated: Subject, easy_task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_pages, "MOST_EDGES", 5)
    page, _ = task_page(gated, prompts_for(gated, easy_task, 64, 0), ["eap-ig"], 0)
    assert [one.method for one in page.rankings] == ["EAP-IG"] * len(page.rankings)
    assert page.note.endswith("Not searched by ACDC and gate circuit.")
    for one in page.rankings:
        assert len(one.circuit.edges) == max(5, one.chosen)
        assert f"Shown are the first {len(one.circuit.edges)} of {one.circuit.n_edges} edges" in one.circuit.note


def test_a_very_large_circuit_is_cut_as_well(gated: Subject, easy_task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_pages, "MOST_EDGES", 2)
    monkeypatch.setattr(task_pages, "MOST_OF_CIRCUIT", 3)
    page, _ = task_page(gated, prompts_for(gated, easy_task, 64, 0), ["eap-ig"], 0)
    assert [len(one.circuit.edges) for one in page.rankings] == [min(3, max(2, one.chosen)) for one in page.rankings]
    assert any(one.chosen > 3 for one in page.rankings)


def test_prompts_that_cannot_be_made_are_a_note(gated: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(*_: object, **__: object) -> None:
        raise ValueError("names are cut in pieces")

    monkeypatch.setattr(task_pages, "make_unseen", make)
    page, cells = task_page(gated, prompts_for(gated, "ioi", 64, 0), CHOSEN, 0)
    assert page.rankings == ()
    assert page.skill.rows == ()
    assert page.note == "No prompts of this task can be made for this model: names are cut in pieces."
    assert {cell for rows in cells.values() for cell in rows.values()} == {"n/a"}
