"""A circuit's run is what plain TransformerLens hooks on the inputs of its destinations give, in both streams."""

from __future__ import annotations

import pytest
import torch
from micro import gated, plain, token_pairs
from twins import SlowRuns

from sa_lens.circuits.experiment import Experiment
from sa_lens.circuits.graph import Circuit, Graph
from sa_lens.circuits.running.circuit_by_hooks import run_circuit
from sa_lens.circuits.running.recorded_passes import last_logits

MODELS = {
    "layernorm": lambda: plain(),
    "folded": lambda: plain(normalization_type="LNPre"),
    "attention only": lambda: plain(attn_only=True),
    "parallel": lambda: plain(parallel_attn_mlp=True),
    "rotary": lambda: plain(positional_embedding_type="rotary", rotary_dim=6, normalization_type="RMS"),
    "grouped": lambda: plain(n_key_value_heads=2),
    "gated mlp": lambda: plain(gated_mlp=True),
    "local gates": lambda: gated("local"),
    "global gates": lambda: gated("global"),
    "both gates": lambda: gated("both"),
}


def random_circuit(graph: Graph, share: float, seed: int = 0) -> Circuit:
    generator = torch.Generator().manual_seed(seed)
    return Circuit.of(graph, [e for e in graph.edges if float(torch.rand((), generator=generator)) < share])


def compare(model, ablation: str, stream: str, masks: str | None) -> None:
    pairs = token_pairs()
    slow = SlowRuns(model, pairs.clean, pairs.corrupt, ablation=ablation, stream=stream, masks=masks or "frozen")
    graph = Graph.from_model(model)
    for share in (0.2, 0.7):
        circuit = random_circuit(graph, share)
        exp = Experiment(model, pairs, ablation=ablation, stream=stream, masks=masks)
        logits = run_circuit(exp, circuit)
        assert exp.about["masks"] == ("none" if stream == "clean" else masks)
        expected = slow.logits(set(graph.edges) - set(circuit))
        assert (logits - expected).abs().max() < 1e-5 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("ablation", ["resample", "zero", "mean"])
def test_equals_plain_hooks_in_the_clean_stream(name: str, ablation: str) -> None:
    compare(MODELS[name](), ablation, "clean", None)


@pytest.mark.parametrize("scope", ["local", "global", "both", "ablated"])
@pytest.mark.parametrize("masks", ["frozen", "live"])
@pytest.mark.parametrize("ablation", ["resample", "zero", "mean"])
def test_equals_plain_hooks_in_the_ablated_stream(scope: str, masks: str, ablation: str) -> None:
    compare(gated(scope), ablation, "ablated", masks)


def test_frozen_and_live_gates_differ_for_a_part_but_not_for_the_whole() -> None:
    model, pairs = gated(), token_pairs()
    graph = Graph.from_model(model)
    some = random_circuit(graph, 0.5)
    frozen, live = (run_circuit(model, pairs, some, stream="ablated", masks=g) for g in ("frozen", "live"))
    assert (frozen - live).abs().max() > 1e-3
    whole = [run_circuit(model, pairs, Circuit.full(graph), stream="ablated", masks=g) for g in ("frozen", "live")]
    assert torch.allclose(*whole, atol=1e-6)


@pytest.mark.parametrize(("stream", "masks"), [("clean", None), ("ablated", "frozen"), ("ablated", "live")])
def test_full_is_the_clean_run_and_empty_the_corrupt_run(stream: str, masks: str | None) -> None:
    model, pairs = gated(dtype=torch.float64), token_pairs(n=7, lengths=(6, 9))
    graph = Graph.from_model(model)
    full = run_circuit(model, pairs, Circuit.full(graph), stream=stream, masks=masks, batch_size=3)
    assert torch.allclose(full, last_logits(model, pairs, stream), atol=1e-10)
    empty = run_circuit(model, pairs, Circuit.of(graph), stream=stream, masks=masks, batch_size=3)
    assert torch.allclose(empty, last_logits(model, pairs, stream, "corrupt"), atol=1e-10)


def test_batches_and_lengths_do_not_matter() -> None:
    model, pairs = gated(), token_pairs(n=9, lengths=(6, 8, 9))
    circuit = random_circuit(Graph.from_model(model), 0.5)
    for ablation in ("resample", "mean"):
        whole = run_circuit(model, pairs, circuit, ablation=ablation, stream="ablated")
        parts = run_circuit(model, pairs, circuit, ablation=ablation, stream="ablated", batch_size=2)
        assert torch.allclose(whole, parts, atol=1e-5)
    alone = torch.cat([run_circuit(model, pairs.subset([i]), circuit, stream="ablated") for i in range(9)])
    assert torch.allclose(run_circuit(model, pairs, circuit, stream="ablated"), alone, atol=1e-5)


def test_switches_are_put_back_also_after_an_error() -> None:
    model, pairs = gated(), token_pairs()
    before = dict(vars(model.cfg))
    run_circuit(model, pairs, Circuit.full(Graph.from_model(model)))
    assert vars(model.cfg) == before
    model.add_hook("blocks.1.hook_mlp_out", lambda x, hook: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_circuit(model, pairs, Circuit.full(Graph.from_model(model)))
    assert vars(model.cfg) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ablation": "noise"}, "is not one of"),
        ({"stream": "both"}, "must be 'clean' or 'ablated'"),
        ({"masks": "live"}, "needs stream='ablated'"),
        ({"stream": "ablated", "masks": "thawed"}, "is not one of 'frozen', 'live'"),
    ],
)
def test_bad_choices_are_refused(arguments: dict, message: str) -> None:
    model = gated()
    with pytest.raises(ValueError, match=message):
        run_circuit(model, token_pairs(), Circuit.full(Graph.from_model(model)), **arguments)


def test_circuits_and_pairs_that_do_not_fit_are_refused() -> None:
    model = plain()
    with pytest.raises(ValueError, match="does not fit this model"):
        run_circuit(model, token_pairs(), Circuit.full(Graph(3, 4)))
    with pytest.raises(ValueError, match="vocabulary"):
        run_circuit(model, token_pairs(d_vocab=99), Circuit.full(Graph(2, 4)))
    with pytest.raises(ValueError, match="needs gates"):
        run_circuit(model, token_pairs(), Circuit.full(Graph(2, 4)), stream="ablated")
