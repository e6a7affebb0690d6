"""ACDC decides as the plain sequential algorithm does, whatever the model, stream, order or interruption."""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from micro import config, gated, noisy, plain, token_pairs
from twins import SlowRuns, slow_acdc

import sa_lens as sa
from sa_lens.circuits.discovery.acdc import AMBIGUOUS, MARGIN, _Search, acdc, visiting_order
from sa_lens.circuits.graph import Circuit, Edge, Graph
from sa_lens.circuits.metrics import logit_difference
from sa_lens.circuits.running import edge_removals
from sa_lens.circuits.running.circuit_by_hooks import run_circuit
from sa_lens.circuits.running.edge_removals import Recomputation
from sa_lens.circuits.tasks.pairs import PromptPairs
from sa_lens.core.products import faster_dtype
from sa_lens.stopping import Interrupted

DOUBLE = {"dtype": torch.float64}
SMALL = {**DOUBLE, "n_heads": 2}


def slow_cost(model: Any, pairs: PromptPairs, **choices: Any) -> Any:
    """Mean KL over pairs of several lengths, by whole passes."""
    groups = [SlowRuns(model, g.clean, g.corrupt, **choices) for _, g in pairs.by_length()]
    return lambda removed: sum(g.kl(removed) * len(g.clean) for g in groups) / len(pairs)


def assert_same(model: Any, pairs: PromptPairs, tau: float, tolerance: float, order: Any = None, **choices: Any) -> Any:
    found = acdc(model, pairs, tau, order=order, progress=False, **choices)
    twin = {name: choice for name, choice in choices.items() if choice is not None}
    edges = visiting_order(found.circuit.graph) if order is None else list(order)
    kept, rises = slow_acdc(edges, slow_cost(model, pairs, **twin), tau)
    close = [e for e in edges if abs(rises[e] - tau) <= AMBIGUOUS]
    assert not close, "choose another seed: the twin's own decision hangs on rounding"
    assert set(found.circuit) == kept
    assert 0 < len(kept) < len(edges)
    assert all(abs(rises[e] - found.circuit.score(e)) < tolerance for e in edges)
    assert found.complete
    assert found.tried + found.untouched == len(edges)
    return found


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"normalization_type": "LNPre"},
        {"normalization_type": "RMS", "positional_embedding_type": "rotary", "rotary_dim": 6},
        {"normalization_type": None, "initializer_range": 0.3},
        {"attn_only": True, "n_layers": 3},
        {"parallel_attn_mlp": True},
        {"n_heads": 4, "n_key_value_heads": 2},
        {"gated_mlp": True, "act_fn": "silu"},
        {"attn_types": ["global", "local"], "window_size": 3, "use_local_attn": True},
        {"use_attn_scale": False, "act_fn": "relu"},
    ],
    ids=str,
)
@pytest.mark.parametrize("tau", [0.1, 0.01])
def test_same_decisions_in_float64(changes: dict[str, Any], tau: float) -> None:
    found = assert_same(plain(**{**SMALL, **changes}), token_pairs(n=3), tau, 1e-9)
    assert found.shortcuts == "on"


@pytest.mark.parametrize("ablation", ["resample", "zero", "mean"])
@pytest.mark.parametrize("scope", ["local", "global"])
def test_same_decisions_in_the_ablated_stream(ablation: str, scope: str) -> None:
    model = gated(scope, **SMALL)
    found = assert_same(model, token_pairs(n=3), 0.05, 1e-9, ablation=ablation, stream="ablated", masks="frozen")
    assert found.shortcuts == "on"
    assert found.circuit.about["masks"] == "frozen"


@pytest.mark.parametrize("stream", ["clean", "ablated"])
def test_same_decisions_in_float32_on_prompts_of_several_lengths(stream: str) -> None:
    model = gated(n_heads=2)
    pairs = token_pairs(n=5, lengths=(6, 8))
    masks = "frozen" if stream == "ablated" else None
    for ablation in ("resample", "mean"):
        found = assert_same(model, pairs, 0.02, 1e-5, stream=stream, ablation=ablation, masks=masks)
        assert found.ambiguous == 0


def use_estimates(patch: pytest.MonkeyPatch, dtype: torch.dtype, error: float = 0.0) -> list[int]:
    """Lets estimates decide in small models too; returns the numbers of edges that they removed together.

    Args:
        dtype: type of their products.
        error: by how much the estimates of a block are off, too low and too high in turns.
    """
    removed: list[int] = []
    estimate, remove = Recomputation.estimate, _Search.remove

    def with_error(engine: Any, rows: Any) -> list[float]:
        return [cost - error * (-1) ** r for r, cost in enumerate(estimate(engine, rows))]

    def counted(search: Any, places: Any, *args: Any) -> bool:
        accepted = remove(search, places, *args)
        removed.append(len(places) if accepted else 0)
        return accepted

    patch.setattr(edge_removals, "faster_dtype", lambda x: dtype)
    patch.setattr(edge_removals, "WIDE", 0)
    patch.setattr(sys.modules[acdc.__module__], "FEW", 1)
    patch.setattr(Recomputation, "estimate", with_error)
    patch.setattr(_Search, "remove", counted)
    return removed


@pytest.mark.parametrize(
    "changes",
    [
        {"normalization_type": "LNPre"},
        {"normalization_type": "RMS", "positional_embedding_type": "rotary", "rotary_dim": 6, "gated_mlp": True},
        {"attn_only": True, "n_layers": 3},
        {"parallel_attn_mlp": True, "act_fn": "relu"},
    ],
    ids=str,
)
def test_estimates_that_are_not_rounded_are_exact(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    removed = use_estimates(monkeypatch, torch.float64)
    for tau in (0.3, 0.05):
        assert_same(plain(**{**SMALL, "n_layers": 3, **changes}), token_pairs(n=3, lengths=(6, 7)), tau, 1e-9)
    assert sum(removed) > 5


@pytest.mark.parametrize("metric", ["kl", "logit_difference"])
def test_estimates_in_the_ablated_stream(metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, pairs = gated(n_layers=3, **SMALL), token_pairs(n=3)
    exact = acdc(model, pairs, 0.2, stream="ablated", masks="frozen", metric=metric, progress=False)
    removed = use_estimates(monkeypatch, torch.float64)
    found = acdc(model, pairs, 0.2, stream="ablated", masks="frozen", metric=metric, progress=False)
    assert set(found.circuit) == set(exact.circuit)
    assert (found.circuit.scores - exact.circuit.scores).nan_to_num(0).abs().max() < 1e-9
    assert sum(removed) > 5


@pytest.mark.skipif(faster_dtype(torch.zeros(1)) is None, reason="this processor has no fast bfloat16")
@pytest.mark.parametrize("seed", range(3))
def test_same_decisions_by_estimates_in_bfloat16(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    removed = use_estimates(monkeypatch, torch.bfloat16)
    model = plain(n_layers=3, n_heads=2, gated_mlp=True, act_fn="silu", seed=seed)
    found = assert_same(model, token_pairs(n=5, lengths=(6, 8)), 0.1, MARGIN * 0.1)
    assert sum(removed) > 5
    exact = acdc(model, token_pairs(n=5, lengths=(6, 8)), 0.1, progress=False)
    assert abs(found.value - exact.value) < 1e-5


@pytest.mark.parametrize("error", [0.5, 1.1, 20.0])
def test_estimates_that_are_off_do_not_decide(error: float, monkeypatch: pytest.MonkeyPatch) -> None:
    tau = 0.1
    removed = use_estimates(monkeypatch, torch.float64, error * MARGIN / 5 * tau)
    assert_same(plain(**SMALL), token_pairs(n=3), tau, 1e-9 if error > 1 else MARGIN * tau)
    assert removed
    assert (max(removed) == 0) == (error > 1)


def test_a_deep_model_in_which_many_edges_are_never_run() -> None:
    found = assert_same(plain(n_layers=4, n_heads=3, d_head=8, **DOUBLE), token_pairs(n=2), 0.3, 1e-9)
    assert found.untouched > 100


@pytest.mark.parametrize("scope", ["global", "ablated"])
def test_live_gates_that_read_all_layers_leave_no_shortcuts(scope: str, caplog: pytest.LogCaptureFixture) -> None:
    model = gated(scope, n_layers=2, n_heads=3, d_head=8, **DOUBLE)
    with caplog.at_level(logging.INFO):
        found = assert_same(model, token_pairs(n=3, lengths=(6, 7)), 0.05, 1e-9, stream="ablated", masks="live")
    assert "live gates that read" in found.shortcuts
    assert "without shortcuts" in caplog.text
    assert found.untouched == 0


LIVE: dict[str, Any] = {"stream": "ablated", "masks": "live"}


@pytest.mark.parametrize(
    "changes",
    [
        {"n_heads": 3, "d_head": 8},
        {"n_layers": 3, "normalization_type": "LNPre"},
        {"n_layers": 3, "normalization_type": "RMS", "positional_embedding_type": "rotary", "rotary_dim": 6},
        {"n_layers": 3, "attn_only": True, "n_heads": 4},
        {"n_layers": 3, "parallel_attn_mlp": True, "act_fn": "relu"},
        {"n_heads": 4, "n_key_value_heads": 2, "gated_mlp": True, "act_fn": "silu"},
    ],
    ids=str,
)
def test_same_decisions_with_live_gates(changes: dict[str, Any]) -> None:
    model = gated(**{**SMALL, **changes})
    for tau in (0.2, 0.02):
        found = assert_same(model, token_pairs(n=3, lengths=(6, 7)), tau, 1e-9, **LIVE)
        assert found.shortcuts == "on"
    assert (
        found.circuit
        != acdc(model, token_pairs(n=3, lengths=(6, 7)), tau, stream="ablated", masks="frozen", progress=False).circuit
    )


@pytest.mark.parametrize("ablation", ["zero", "mean"])
def test_same_decisions_with_live_gates_and_other_ablations(ablation: str) -> None:
    assert assert_same(gated(**SMALL), token_pairs(n=3), 0.05, 1e-9, ablation=ablation, **LIVE).shortcuts == "on"


@pytest.mark.parametrize(
    "gates",
    [
        {"kind": "soft", "k_attn": 5, "k_mlp": 5},
        {"attn_unit": "head", "k_attn": 1, "k_mlp": 5},
        {"rank": 4, "k_attn": 5, "k_mlp": 5},
        {"scores": "random-token", "k_attn": 5, "k_mlp": 5},
    ],
    ids=str,
)
def test_same_decisions_with_live_gates_of_other_kinds(gates: dict[str, Any]) -> None:
    model = noisy(sa.SelfAblatingTransformer(config(**{**SMALL, "n_layers": 2}), sa.GateConfig("local", **gates)))
    assert assert_same(model, token_pairs(n=3), 0.05, 1e-9, **LIVE).shortcuts == "on"


def test_estimates_with_live_gates(monkeypatch: pytest.MonkeyPatch) -> None:
    model, pairs = gated(n_layers=3, **SMALL), token_pairs(n=3, lengths=(6, 7))
    exact = acdc(model, pairs, 0.05, progress=False, **LIVE)
    removed = use_estimates(monkeypatch, torch.float64)
    found = acdc(model, pairs, 0.05, progress=False, **LIVE)
    assert set(found.circuit) == set(exact.circuit)
    assert (found.circuit.scores - exact.circuit.scores).nan_to_num(0).abs().max() < 1e-9
    assert sum(removed) > 5


@pytest.mark.parametrize("seed", [0, 1])
def test_random_orders_within_steps_keep_the_shortcuts(seed: int) -> None:
    model = plain(**DOUBLE)
    order = visiting_order(Graph.from_model(model), seed)
    assert sorted(map(str, order)) == sorted(map(str, visiting_order(Graph.from_model(model))))
    assert assert_same(model, token_pairs(n=3), 0.1, 1e-9, order=order).shortcuts == "on"


def test_an_order_from_the_first_layer_up_switches_the_shortcuts_off() -> None:
    model = plain(n_layers=1, **DOUBLE)
    found = assert_same(model, token_pairs(n=2), 0.1, 1e-9, order=Graph.from_model(model).edges)
    assert "before one of a later step" in found.shortcuts


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"positional_embedding_type": "alibi"}, "alibi"),
        ({"final_rms": True}, "a final RMSNorm"),
        ({"final_rms": True, "normalization_type": "LNPre"}, "a final RMSNorm"),
    ],
    ids=str,
)
def test_models_that_cannot_be_recomputed_are_run_as_a_whole(changes: dict[str, Any], reason: str) -> None:
    found = assert_same(plain(n_layers=1, **changes, **DOUBLE), token_pairs(n=2), 0.1, 1e-9)
    assert reason in found.shortcuts


def test_default_order_is_the_reverse_of_the_order_of_computation() -> None:
    order = [str(e) for e in visiting_order(Graph(1, 2))]
    assert order[:4] == ["m0->logits", "a0.h1->logits", "a0.h0->logits", "embed->logits"]
    assert order[4:] == [
        *("a0.h1->m0", "a0.h0->m0", "embed->m0"),
        *("embed->a0.h1.v", "embed->a0.h1.k", "embed->a0.h1.q"),
        *("embed->a0.h0.v", "embed->a0.h0.k", "embed->a0.h0.q"),
    ]


@pytest.mark.parametrize("metric", ["logit_difference", "answer_log_probability", "answer_rank", logit_difference])
def test_other_metrics_limit_their_fall(metric: Any) -> None:
    model, pairs = plain(**SMALL), token_pairs(n=3)
    found = acdc(model, pairs, 0.1, metric=metric, progress=False)
    slow = acdc(model, pairs, 0.1, metric=metric, progress=False, order=_up_and_down(found.circuit.graph))
    assert slow.shortcuts != "on"
    from sa_lens.circuits.metrics import METRICS

    function = METRICS[metric] if isinstance(metric, str) else metric
    sign = 1 if metric == "answer_rank" else -1

    def cost(removed: set[Edge]) -> float:
        logits = runs.logits(removed)
        return sign * float(function(logits, pairs).mean())

    runs = SlowRuns(model, pairs.clean, pairs.corrupt)
    kept, _ = slow_acdc(visiting_order(runs.graph), cost, 0.1)
    assert set(found.circuit) == kept
    assert abs(cost(set(runs.graph.edges) - kept) - found.value) < 1e-9
    kept, _ = slow_acdc(_up_and_down(runs.graph), cost, 0.1)
    assert set(slow.circuit) == kept


def _up_and_down(graph: Graph) -> list[Edge]:
    """The default order with its first edge at the end."""
    first, *rest = visiting_order(graph)
    return [*rest, first]


def test_the_value_is_that_of_the_circuit_as_run() -> None:
    model, pairs = gated(**DOUBLE), token_pairs(n=4)
    found = acdc(model, pairs, 0.05, stream="ablated", masks="frozen", progress=False)
    runs = SlowRuns(model, pairs.clean, pairs.corrupt, stream="ablated")
    assert abs(runs.kl(set(runs.graph.edges) - set(found.circuit)) - found.value) < 1e-9
    logits = run_circuit(model, pairs, found.circuit, stream="ablated", masks="frozen")
    p, q = runs.reference.log_softmax(-1), logits.log_softmax(-1)
    assert abs(float((p.exp() * (p - q)).sum(-1).mean()) - found.value) < 1e-9


def stop_after(n: int, patch: pytest.MonkeyPatch) -> list[int]:
    """Lets Ctrl-C come in place of block n; returns a list of the sizes of the blocks that were asked for."""
    asked: list[int] = []
    plainly = Recomputation.try_removals

    def interrupted(self: Recomputation, rows: Any) -> Any:
        asked.append(len(rows))
        if len(asked) > n:
            raise KeyboardInterrupt
        return plainly(self, rows)

    patch.setattr(Recomputation, "try_removals", interrupted)
    return asked


def within_a_step(graph: Graph, decided: torch.Tensor) -> bool:
    """Whether some step is decided in part."""
    steps: dict[int, set[bool]] = {}
    for to, source in graph.exists.nonzero().tolist():
        steps.setdefault(graph.n_sources[to], set()).add(bool(decided[to, source]))
    return any(len(found) == 2 for found in steps.values())


@pytest.mark.slow
@pytest.mark.parametrize(("stream", "masks"), [("clean", None), ("ablated", "frozen"), ("ablated", "live")])
def test_ctrl_c_before_any_block_keeps_what_is_decided_and_can_go_on(
    stream: Any, masks: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, pairs = (gated if stream == "ablated" else plain)(**DOUBLE), token_pairs(n=3, lengths=(6, 7))

    def search(resume: Any = None) -> Any:
        return acdc(model, pairs, 0.05, stream=stream, masks=masks, progress=False, resume=resume)

    with monkeypatch.context() as patch:
        blocks = stop_after(10**6, patch)
        whole = search()
    exists = whole.circuit.graph.exists
    midway = 0
    for n in range(len(blocks)):
        with monkeypatch.context() as patch:
            stop_after(n, patch)
            with pytest.raises(Interrupted, match=r"stopped after .* edges") as stop:
                search()
        part = stop.value.result
        decided = ~part.circuit.scores.isnan() & exists
        assert not part.complete
        assert torch.equal(part.circuit.mask[decided], whole.circuit.mask[decided])
        assert int(decided.sum()) == part.tried + part.untouched < len(part.circuit.graph)
        midway += within_a_step(part.circuit.graph, decided)
        saved = Circuit.load(part.circuit.save(tmp_path / "part.json"))
        for resumed in (part, saved) if n % 8 == 0 else (saved,):
            rest = search(resumed)
            assert rest.complete
            assert rest.circuit == whole.circuit
            assert rest.start == whole.start
            assert abs(rest.value - whole.value) < 1e-12
            assert torch.allclose(rest.circuit.scores[exists], whole.circuit.scores[exists], atol=1e-10)
    assert midway > 10, "too few interruptions within a step"


@pytest.mark.parametrize("live", [False, True])
def test_a_search_that_is_interrupted_again_and_again_comes_to_the_same_end(
    live: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, pairs = (gated if live else plain)(**DOUBLE), token_pairs(n=3)
    choices = LIVE if live else {}
    whole = acdc(model, pairs, 0.05, progress=False, **choices)
    part, rounds = None, 0
    while part is None or not part.complete:
        with monkeypatch.context() as patch:
            stop_after(1, patch)
            try:
                part = acdc(model, pairs, 0.05, progress=False, resume=part, **choices)
            except Interrupted as stop:
                part = stop.result
        rounds += 1
    assert rounds > 10
    assert part.circuit == whole.circuit
    assert part.tried + part.untouched == len(whole.circuit.graph)


def test_what_is_of_another_search_is_not_resumed(tmp_path: Any) -> None:
    choices: dict[str, Any] = {"tau": 0.05, "stream": "ablated", "masks": "frozen", "progress": False}
    model, pairs = gated(n_layers=1), token_pairs(n=4, lengths=(6, 7))
    done = acdc(model, pairs, **choices)
    saved = Circuit.load(done.circuit.save(tmp_path / "done.json"))
    assert saved.about == done.circuit.about
    # the same search in other objects
    same = pairs.subset(range(len(pairs)))
    assert acdc(gated(n_layers=1), same, **choices, resume=saved).circuit == done.circuit

    def others(**changes: Any) -> PromptPairs:
        return replace(pairs, **changes)

    clean, corrupt = pairs.clean.clone(), pairs.corrupt.clone()
    clean[2, 3] += 1
    corrupt[0, 4] += 1
    for prompts in (
        others(clean=clean),
        others(corrupt=corrupt),
        others(answers=pairs.answers - 1),
        others(wrong_answers=pairs.wrong_answers - 1),
        pairs.subset([1, 0, 2, 3]),
        token_pairs(n=4, lengths=(6, 7), seed=12),
    ):
        with pytest.raises(ValueError, match="with other prompts or answers"):
            acdc(model, prompts, **choices, resume=saved)
    nudged = gated(n_layers=1)
    with torch.no_grad():
        nudged.blocks[0].mlp.W_out[3, 2] += 1e-3
    for other in (nudged, gated(n_layers=1, k=6), gated("global", n_layers=1), gated(n_layers=1, **DOUBLE)):
        with pytest.raises(ValueError, match="with other weights or gates"):
            acdc(other, pairs, **choices, resume=done)
    for changes, message in (
        ({"tau": 0.06}, "its tau is 0.05, here it is 0.06"),
        ({"stream": "clean", "masks": None}, "its stream is 'ablated', here it is 'clean'"),
    ):
        with pytest.raises(ValueError, match=message):
            acdc(model, pairs, **{**choices, **changes}, resume=done)
    with pytest.raises(ValueError, match="its graph is"):
        acdc(gated(n_layers=2), pairs, **choices, resume=done)


def test_a_search_with_another_function_of_the_same_name_is_not_resumed() -> None:
    model, pairs = plain(n_layers=1), token_pairs(n=3)

    def search(share: float, **options: Any) -> Any:
        return acdc(
            *(model, pairs, 0.05),
            metric=lambda logits, p: share * logit_difference(logits, p),
            progress=False,
            **options,
        )

    done = search(1.0)
    assert search(1.0, resume=done).circuit == done.circuit
    with pytest.raises(ValueError, match="another search: its metric of the full graph is"):
        search(1.5, resume=done)


def test_a_model_with_another_activation_does_not_go_on() -> None:
    pairs = token_pairs(n=2)
    done = acdc(plain(n_layers=1), pairs, 0.05, progress=False)
    for changes in ({"act_fn": "relu"}, {"eps": 1e-3}, {"use_attn_scale": False}):
        with pytest.raises(ValueError, match="with other weights or gates"):
            acdc(plain(n_layers=1, **changes), pairs, 0.05, progress=False, resume=done)


def test_a_dense_model_does_not_go_on_from_a_gated_one_of_the_same_shape() -> None:
    pairs = token_pairs(n=2)
    found = acdc(gated(n_layers=1), pairs, 0.05, progress=False)
    with pytest.raises(ValueError, match="weights or gates"):
        acdc(plain(n_layers=1), pairs, 0.05, progress=False, resume=found)


def test_freed_memory_is_returned_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    module, returned = sys.modules[acdc.__module__], []
    monkeypatch.setattr(module, "STEPS_TO_RETURN", 3)
    monkeypatch.setattr(module, "return_freed_memory", lambda: returned.append(None))
    model = plain(n_layers=3)
    acdc(model, token_pairs(n=2), 0.05, progress=False)
    steps = len(set(Graph.from_model(model).n_sources))
    assert steps == 7
    assert len(returned) == 3


def test_ctrl_c_in_passes_of_the_whole_model(monkeypatch: pytest.MonkeyPatch) -> None:
    from sa_lens.circuits.running.many_circuits import CircuitLogits

    model, pairs = plain(n_layers=1, **DOUBLE), token_pairs(n=2)
    order = Graph.from_model(model).edges
    whole = acdc(model, pairs, 0.05, order=order, progress=False)
    plainly, asked = CircuitLogits.finals, []

    def interrupted(self: CircuitLogits, masks: Any) -> Any:
        asked.append(len(masks))
        if len(asked) > 4:
            raise KeyboardInterrupt
        return plainly(self, masks)

    monkeypatch.setattr(CircuitLogits, "finals", interrupted)
    with pytest.raises(Interrupted, match=r"stopped after \d+ of .*acdc\(..., resume=result\)") as stop:
        acdc(model, pairs, 0.05, order=order, progress=False)
    assert isinstance(stop.value, KeyboardInterrupt)
    monkeypatch.undo()
    part = stop.value.result
    assert 3 <= part.tried <= sum(asked[1:4])
    assert 0 < len(whole.circuit) < len(order)
    rest = acdc(model, pairs, 0.05, order=order, progress=False, resume=part)
    assert rest.circuit == whole.circuit


def test_the_model_is_left_alone_and_the_result_is_the_same_again() -> None:
    model, pairs = gated(), token_pairs(n=4)
    before = dict(vars(model.cfg))
    first, second = (acdc(model, pairs, 0.03, progress=False) for _ in range(2))
    assert vars(model.cfg) == before
    assert first.circuit == second.circuit
    assert torch.equal(first.circuit.scores.nan_to_num(7.0), second.circuit.scores.nan_to_num(7.0))


def test_far_off_logits_stay_finite() -> None:
    model = plain(**DOUBLE)
    with torch.no_grad():
        model.unembed.W_U *= 400
    assert_same(model, token_pairs(n=2), 5.0, 1e-6)


def test_bar_shows_edges_left(capsys: pytest.CaptureFixture[str]) -> None:
    model = plain(n_layers=1)
    found = acdc(model, token_pairs(n=2), 0.05)
    shown = capsys.readouterr().err
    assert f"{len(found.circuit.graph)}/{len(found.circuit.graph)}" in shown
    assert "left=0" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tau": -0.1}, "must be 0 or more"),
        ({"tau": float("nan")}, "must be 0 or more"),
        ({"metric": "klm"}, "is none of"),
        ({"ablation": "noise"}, "is not one of"),
        ({"stream": "ablated"}, "needs gates"),
        ({"masks": "live"}, "needs stream='ablated'"),
        ({"order": ["embed->logits"]}, "each of the graph's"),
        ({"order": ["embed->nowhere"]}, "names no node"),
    ],
)
def test_bad_input_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        acdc(plain(), token_pairs(), **{"progress": False, **arguments})
