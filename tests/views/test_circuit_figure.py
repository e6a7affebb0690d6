"""A figure of a circuit shows its nodes and edges, in few traces, with the scores of the table."""

import math

import pandas as pd
import pytest
import torch

from sa_lens.circuits.find_and_judge import FoundCircuit
from sa_lens.circuits.graph import Circuit, Graph
from sa_lens.views import circuit_map, draw, save, side_by_side
from sa_lens.views.circuit_layout import BINS, ScoreScale, arc, places_of
from sa_lens.views.records import CircuitEdge, CircuitMap, from_json, to_json
from sa_lens.views.theme import palette

ABOUT = {
    **{"method": "acdc", "task": "ioi", "n": 128, "tau": 0.01, "metric": "kl", "ablation": "resample"},
    **{"stream": "ablated", "masks": "frozen"},
}
EDGES = {"embed->a0.h1.q": 0.5, "a0.h1->m0": 0.1, "m0->a1.h0.v": 0.02, "embed->logits": 0.01, "a1.h0->logits": 1.0}


@pytest.fixture
def circuit():
    return Circuit.of(Graph(2, 3), EDGES, ABOUT)


def random_circuit(n, *, signed=True, graph=None, seed=0):
    graph = graph or Graph(8, 16)
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(graph.exists.shape, generator=generator, dtype=torch.float64)
    return Circuit.top(graph, scores if signed else scores.abs(), n, {**ABOUT, "method": "eap"})


def traces(figure, name):
    return [trace for trace in figure.data if trace.name == name]


def strokes(figure):
    """Number of separate lines."""
    return sum(sum(x is None for x in trace.x) for trace in traces(figure, "edges"))


def test_record_has_the_edges_and_scores_of_the_circuit(circuit):
    record = circuit_map(circuit)
    found = {f"{e.source}->{e.destination}" + (f".{e.port}" if e.port else ""): e.score for e in record.edges}
    assert found == EDGES
    assert (record.n_layers, record.n_heads, record.n_edges) == (2, 3, len(Graph(2, 3)))
    assert from_json(to_json(record)) == record


def test_title_and_note_say_what_it_is(circuit):
    record = circuit_map(circuit, skill=0.93)
    assert record.title == "IOI, ablated stream, ACDC, 5 edges"
    assert record.scale == "rise of KL, nats"
    for part in ("tau 0.01", "frozen masks", "resample ablation", "128 pairs", "pair accuracy 0.93", "2 of 6 heads"):
        assert part in record.note
    assert record.warnings == (
        "the frozen masks of the clean prompt bring a part of the answer, which no edge has to carry; live masks bring "
        "nothing",
    )
    low = circuit_map(circuit, skill=0.6)
    assert low.warnings[0].startswith("pair accuracy 0.60 is below 0.8: the model cannot do this task")
    assert from_json(to_json(low)) == low
    for text in (draw(low).fragment(), draw(low).figure().layout.title.text.replace("<br>", " ")):
        assert "Warning: pair accuracy 0.60 is below 0.8" in text
    clean = Circuit.of(Graph(2, 3), EDGES, {**ABOUT, "stream": "clean", "masks": "none"})
    assert circuit_map(clean, skill=0.8).warnings == ()
    assert circuit_map(circuit, title="Mine").title == "Mine"
    table = pd.DataFrame(
        {
            "stream": ["clean", "ablated"],
            "pair_accuracy": [0.99, 0.9],
            "pair_accuracy_low": [0.9, 0.8],
            "pair_accuracy_high": [1.0, 0.95],
        }
    )
    assert "pair accuracy 0.90 (0.80 to 0.95)" in circuit_map(circuit, skill=table).note
    with pytest.raises(ValueError, match="no row of the circuit's stream 'ablated'"):
        circuit_map(circuit, skill=table[:1])
    with pytest.raises(ValueError, match=r"skill=93\.0 must be a pair accuracy"):
        circuit_map(circuit, skill=93)


def test_figure_has_a_node_for_each_used_node_and_a_line_for_each_edge(circuit):
    figure = draw(circuit, skill=0.9).figure()
    (nodes,) = traces(figure, "nodes")
    assert list(nodes.text) == ["embed", "0.1", "m0", "1.0", "logits"]
    assert strokes(figure) == len(EDGES)
    (hover,) = traces(figure, "edge values")
    assert len(hover.x) == 3 * len(EDGES)
    for edge, score in EDGES.items():
        source, destination = edge.split("->")
        assert any(
            f"<b>{source} → {destination}</b>" in text and f"{score:.4g} rise of KL" in text for text in hover.text
        )
    assert "3 of" not in nodes.customdata[0]
    assert "0 edges in, 2 out" in nodes.customdata[0]
    assert "0.51 out" in nodes.customdata[0]
    assert "pair accuracy 0.90" in figure.layout.title.text


def test_layers_go_upward_and_edges_end_at_their_nodes(circuit):
    record = circuit_map(circuit)
    places = places_of([record])
    height = {node: y for node, (_, y) in places.nodes.items()}
    assert height["embed"] < height["a0.h1"] < height["m0"] < height["a1.h0"] < height["logits"]
    for edge in record.edges:
        x, y = arc(places, edge, 12)
        assert (x[0], y[0]) == pytest.approx(places.nodes[edge.source], abs=1e-3)
        end = places.nodes[edge.destination]
        assert y[-1] == pytest.approx(end[1], abs=1e-3)
        assert abs(x[-1] - end[0]) <= places.node_size * places.pixel / 2
    q, k, v = (arc(places, CircuitEdge("embed", "a1.h0", port, None), 5)[0][-1] for port in "qkv")
    assert q < k < v


def test_rows_are_ordered_to_cross_less():
    """Two ladders whose heads alternate by index: sorted by what they are connected to, they do not cross."""
    edges = ("a0.h0->a1.h3.q", "a0.h3->a1.h0.q", "a1.h3->a2.h0.q", "a1.h0->a2.h3.q")
    nodes = places_of([circuit_map(Circuit.of(Graph(3, 4), edges))]).nodes
    side = [
        nodes[left][0] < nodes[right][0] for left, right in (("a0.h0", "a0.h3"), ("a1.h3", "a1.h0"), ("a2.h0", "a2.h3"))
    ]
    assert len(set(side)) == 1


@pytest.mark.parametrize(("n", "signed"), [(80, False), (2000, True)])
def test_few_traces_at_any_size(n, signed):
    figure = draw(random_circuit(n, signed=signed)).figure()
    assert strokes(figure) == n
    assert len(traces(figure, "edges")) <= (2 if signed else 1) * BINS
    assert len(figure.data) <= 2 * BINS + 2
    assert len(traces(figure, "edge values")[0].x) == (n if n > 300 else 3 * n)


def test_lines_have_the_colour_of_the_bar():
    """A line's group covers the line's score on the axis that the colour bar shows."""
    scores = [-2.0, -0.1, 0.001, 0.3, 5.0]
    scale = ScoreScale(scores)
    assert scale.signed
    low, high = scale.ends
    for score in scores:
        share = (math.asinh(score / scale.unit) - low) / (high - low)
        assert scale.bin(score) / (2 * BINS) <= share <= (scale.bin(score) + 1) / (2 * BINS)
    assert scale.bin(-0.1) < BINS <= scale.bin(0.001)
    places, texts = scale.ticks().values()
    assert [math.asinh(float(text) / scale.unit) for text in texts] == pytest.approx(places)
    assert "0" in texts
    positive = ScoreScale([0.01, 0.5])
    assert not positive.signed
    assert [positive.bin(0.01), positive.bin(0.5)] == [0, BINS - 1]
    assert positive.weight(0) == 0
    assert positive.weight(BINS - 1) == 1


@pytest.mark.parametrize("edges", [(), {"embed->logits": 0.0}, {"embed->logits": 0.3}, {"embed->logits": -0.3}])
def test_circuits_of_no_or_one_edge_can_be_drawn(edges):
    figure = draw(Circuit.of(Graph(1, 2), edges)).figure()
    assert strokes(figure) == len(edges)


def test_edges_without_scores_are_grey():
    figure = draw(Circuit.of(Graph(2, 3), list(EDGES))).figure()
    (lines,) = traces(figure, "edges")
    assert lines.line.color == palette().faint
    assert "no score" in traces(figure, "edge values")[0].text[0]


def test_large_circuits_show_their_largest_edges():
    circuit = random_circuit(500)
    record = circuit_map(circuit, most=100)
    largest = sorted((abs(circuit.score(edge)) for edge in circuit), reverse=True)[:100]
    assert [abs(edge.score) for edge in record.edges] == largest
    assert "shown are the 100 with the largest scores" in record.note
    with pytest.raises(ValueError, match="show at least 1"):
        circuit_map(circuit, most=0)


def test_side_by_side_keeps_places_and_colours(circuit):
    other = Circuit.of(Graph(2, 3), {"a0.h2->logits": 3.0, "embed->a0.h1.q": 0.2}, ABOUT)
    figure = side_by_side([circuit, other], "Two", names=["one", "other"]).figure()
    left, right = (dict(zip(t.text, zip(t.x, t.y, strict=True), strict=True)) for t in traces(figure, "nodes"))
    assert set(left) & set(right) == {"embed", "0.1", "logits"}
    assert all(left[node] == right[node] for node in set(left) & set(right))
    assert {trace.marker.coloraxis for trace in traces(figure, "edge values")} == {"coloraxis"}
    assert strokes(figure) == len(circuit) + len(other)
    with pytest.raises(ValueError, match="transformers of one shape"):
        side_by_side([circuit, Circuit.of(Graph(3, 3), {"embed->logits": 3.0}, ABOUT)])
    with pytest.raises(ValueError, match="one colour scale"):
        side_by_side([circuit, Circuit.of(Graph(2, 3), {"embed->logits": 3.0})])
    with pytest.raises(ValueError, match="two heat maps or circuits, not 1"):
        side_by_side([circuit])


def test_what_was_found_brings_its_skill_and_its_warnings(circuit):
    skill = {"stream": "ablated", "pair_accuracy": 0.4, "pair_accuracy_low": 0.3, "pair_accuracy_high": 0.5}
    found = FoundCircuit(circuit, circuit, skill, 1.0, None, None, 1.0, {}, warnings=("no faithfulness: too small",))
    record = circuit_map(found)
    assert record.edges == circuit_map(circuit).edges
    assert "pair accuracy 0.40 (0.30 to 0.50)" in record.note
    assert record.warnings == ("no faithfulness: too small",)
    assert "no faithfulness" in draw(found).fragment()


def test_a_slider_and_pinned_nodes_on_a_page(circuit, browser, tmp_path):
    opened = browser.open(save(circuit, tmp_path / "circuit.html"), viewport={"width": 390, "height": 800})
    page = opened.page
    strong = page.locator("g.edges path:not(.dim)")
    assert page.locator("g.edges path").count() == len(EDGES)
    page.get_by_role("slider").press("Home")
    page.wait_for_function("document.querySelectorAll('g.edges path').length === 0")
    page.get_by_label("Number of edges, exactly").fill("2")
    page.get_by_label("Number of edges, exactly").press("Enter")
    # the two largest scores, the largest above
    tips = page.locator("g.edges path title").evaluate_all("titles => titles.map((title) => title.textContent)")
    assert [tip.split("\n")[0] for tip in tips] == ["embed → a0.h1.q", "a1.h0 → logits"]
    page.get_by_role("button", name="As found: 5").click()
    node = page.locator("[data-node='a0.h1']")
    node.press("Enter")
    assert strong.count() == 2, "the two edges of the pinned head"
    assert page.locator("details[open] tbody tr").count() == 2
    node.press("Enter")
    assert strong.count() == len(EDGES)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert opened.clean()
    page.close()


@pytest.mark.parametrize("together", [True, False])
def test_sliders_of_two_circuits_move_together(circuit, browser, tmp_path, together):
    other = Circuit.of(Graph(2, 3), {"a0.h2->logits": 3.0, "embed->a0.h1.q": 0.2}, ABOUT)
    path = save(side_by_side([circuit, other], names=["one", "other"], dark=True), tmp_path / "two.html")
    opened = browser.open(path, viewport={"width": 1280, "height": 800})
    page = opened.page
    assert page.locator("h4").all_inner_texts() == ["one", "other"]
    assert page.locator(".warning").count() == 1, "what holds for both stands once"
    page.get_by_label("All sliders together").set_checked(together)
    page.get_by_label("Number of edges, exactly").first.fill("1")
    page.get_by_label("Number of edges, exactly").first.press("Enter")
    counts = [page.locator("section").nth(i).locator("g.edges path").count() for i in range(2)]
    assert counts == ([1, 1] if together else [1, 2])
    # the largest of all scores has the widest line in both
    legends = page.locator(".graph-legend").all_inner_texts()
    assert all("3" in legend for legend in legends)
    assert opened.clean()
    page.close()


def test_images_are_drawn_by_plotly(circuit, tmp_path):
    page = draw(circuit)
    with pytest.raises(ValueError, match=r"saved as \.html, \.png"):
        save(page, tmp_path / "circuit.gif")
    assert page.figure().layout.title.text.startswith("<b>IOI, ablated stream, ACDC, 5 edges")


def test_markup_in_a_record_stays_text():
    record = CircuitMap("<script>x</script>", "<b>", 1, 1, False, 5, (CircuitEdge("embed", "logits", "", 1.0),), "<i>")
    page = draw(record)
    text = page.figure().to_json()
    assert "<script>" not in text.replace("\\u003c", "<")
    assert "&lt;i&gt;" in page.figure().data[-2].text[0]
    assert "<script>x" not in page.fragment()
