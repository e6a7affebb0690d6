"""The graph's edges are the stated ones, and circuits behave as sets of edges with scores."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from micro import gated, plain

from sa_lens.circuits.graph import Circuit, Edge, Graph, Node, parse_edge
from sa_lens.core.base import TRANSFORMER_LENS


@pytest.mark.parametrize(("layers", "heads", "edges"), [(8, 16, 23_981), (4, 16, 5_327), (2, 8, 310)])
def test_number_of_edges(layers: int, heads: int, edges: int) -> None:
    graph = Graph(layers, heads)
    assert len(graph) == len(graph.edges) == len(set(graph.edges)) == edges
    assert int(graph.exists.sum()) == edges


def _step(node: Node, graph: Graph) -> float:
    """When a node is computed, counted in half layers."""
    if node.kind == "embed":
        return -1
    if node.kind == "logits":
        return 2 * graph.n_layers
    return 2 * node.layer + (node.kind == "mlp" and not graph.parallel)


@pytest.mark.parametrize("graph", [Graph(3, 2), Graph(3, 2, attn_only=True), Graph(2, 3, parallel=True)])
def test_an_edge_wherever_the_source_is_computed_first(graph: Graph) -> None:
    found = set(graph.edges)
    for source in graph.sources:
        for to in graph.inputs:
            assert (Edge(source, *to) in found) == (_step(source, graph) < _step(to.node, graph))


def test_graph_of_a_model_is_that_of_its_shape_and_leaves_it_alone() -> None:
    for model in (plain(n_layers=2), gated(n_layers=2)):
        before = dict(vars(model.cfg))
        assert Graph.from_model(model) == Graph(2, 4)
        assert vars(model.cfg) == before
    assert Graph.from_model(plain(attn_only=True)).attn_only
    assert Graph.from_model(plain(parallel_attn_mlp=True)).parallel


def test_a_model_whose_outputs_do_not_add_up_is_refused() -> None:
    # the decoder that stands in for TransformerLens 4 makes no such model
    reason = "normalisation after the layers" + (": what a head writes" if TRANSFORMER_LENS < 4 else "")
    with pytest.raises(ValueError, match=reason):
        Graph.from_model(plain(use_normalization_before_and_after=True, normalization_type="RMS"))


def test_names_of_edges_read_back() -> None:
    for edge in Graph(2, 3).edges:
        assert parse_edge(str(edge)) == edge


@pytest.mark.parametrize("name", ["a0.h0->a0.h1.q", "m1->m0", "embed->a0.h9.q", "embed", "a0.h0->m0.q", "x->logits"])
def test_an_edge_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"edge|names no node"):
        Graph(2, 2).place(name)


GRAPH = Graph(2, 2)
some_edges = st.sets(st.sampled_from(GRAPH.edges), max_size=25)


def test_set_operations_and_scores() -> None:
    circuit = Circuit.of(GRAPH, {"embed->a0.h1.q": 0.5, "a0.h1->logits": -2.0})
    assert len(circuit) == 2
    assert "embed->a0.h1.q" in circuit
    assert "embed->logits" not in circuit
    assert [str(e) for e in circuit] == ["embed->a0.h1.q", "a0.h1->logits"]
    assert circuit.score("a0.h1->logits") == -2.0
    assert math.isnan(circuit.score("embed->logits"))
    assert [str(n) for n in circuit.nodes] == ["embed", "a0.h1", "logits"]
    assert circuit == Circuit.of(GRAPH, ["embed->a0.h1.q", "a0.h1->logits"])
    table = circuit.table()
    assert table["edge"].tolist() == ["embed->a0.h1.q", "a0.h1->logits"]
    assert len(circuit.table(every=True)) == len(GRAPH)
    nodes = circuit.node_table().set_index("node")
    assert nodes.loc["a0.h1", "edges_in"] == nodes.loc["a0.h1", "edges_out"] == 1
    assert nodes.loc["a0.h1", "score_in"] == 0.5
    assert nodes.loc["a0.h1", "score_out"] == 2.0
    assert nodes["edges_in"].sum() == nodes["edges_out"].sum() == 2


@settings(max_examples=40, deadline=None)
@given(some_edges)
def test_pruning_leaves_exactly_the_edges_on_a_path_from_embed_to_logits(edges: set[Edge]) -> None:
    def paths(node: Node, so_far: tuple[Edge, ...]) -> list[tuple[Edge, ...]]:
        if node.kind == "logits":
            return [so_far]
        return [p for e in edges if e.source == node for p in paths(e.destination, (*so_far, e))]

    on_a_path = {edge for path in paths(Node("embed"), ()) for edge in path}
    assert set(Circuit.of(GRAPH, edges).prune_dangling()) == on_a_path


@settings(max_examples=40, deadline=None)
@given(some_edges, some_edges)
def test_jaccard_is_that_of_the_sets(a: set[Edge], b: set[Edge]) -> None:
    expected = len(a & b) / len(a | b) if a | b else 1.0
    assert Circuit.of(GRAPH, a).jaccard(Circuit.of(GRAPH, b)) == expected


def test_top_takes_the_largest_and_breaks_ties_by_order() -> None:
    scores = torch.zeros(GRAPH.exists.shape)
    scores[GRAPH.place("embed->logits")] = -3
    assert [str(e) for e in Circuit.top(GRAPH, scores, 1)] == ["embed->logits"]
    assert set(Circuit.top(GRAPH, scores, 3)) == {GRAPH.edges[0], GRAPH.edges[1], parse_edge("embed->logits")}
    assert "embed->logits" not in Circuit.top(GRAPH, scores, len(GRAPH) - 1, absolute=False)
    assert Circuit.top(GRAPH, scores, 9).keep(3) == Circuit.top(GRAPH, scores, 3)
    with pytest.raises(ValueError, match="choose from 0"):
        Circuit.top(GRAPH, scores, len(GRAPH) + 1)


def test_json_holds_everything(tmp_path) -> None:
    circuit = Circuit.of(GRAPH, {"embed->a0.h1.q": 0.1, "a0.h1->logits": -2.0}, {"method": "by hand", "tau": 0.01})
    circuit.scores[GRAPH.place("embed->logits")] = 1 / 3
    read = Circuit.load(circuit.save(tmp_path / "circuit.json"))
    assert read == circuit
    assert read.about == circuit.about
    assert torch.equal(read.scores.nan_to_num(9.0), circuit.scores.nan_to_num(9.0))
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="no circuit"):
        Circuit.load(tmp_path / "other.json")
