"""Scores of edges equal derivatives taken edge by edge, and exact effects where the model is linear."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from linear import linear
from micro import gated, plain, token_pairs
from torch import Tensor
from twins import SlowRuns, outputs

from sa_lens.circuits.discovery.eap import Rule, eap, eap_ig
from sa_lens.circuits.discovery.exact_effects import exact_effects
from sa_lens.circuits.discovery.relp import relp
from sa_lens.circuits.experiment import Experiment
from sa_lens.circuits.graph import Circuit, Edge
from sa_lens.circuits.metrics import METRICS, kl, logit_difference
from sa_lens.circuits.running.recorded_passes import last_logits
from sa_lens.circuits.tasks.pairs import PromptPairs

DOUBLE: dict[str, Any] = {"dtype": torch.float64}
SMALL: dict[str, Any] = {**DOUBLE, "n_heads": 2, "d_mlp": 16}
QUIET = {"progress": False}


# ----------------------------------------------------------------------------------------------------- linear models


@pytest.mark.parametrize("stream", ["clean", "ablated"])
@pytest.mark.parametrize("ablation", ["resample", "zero", "mean"])
def test_all_methods_are_exact_on_a_linear_model(stream: str, ablation: str) -> None:
    model, pairs = linear(stream), token_pairs(n=5, lengths=(6, 7))
    choices: dict[str, Any] = {"ablation": ablation, "stream": stream, "progress": False}
    choices["masks"] = "frozen" if stream == "ablated" else None
    exact = exact_effects(model, pairs, **choices)
    exists = exact.graph.exists
    assert float(exact.scores[exists].abs().max()) > 0.01
    found = [
        eap(model, pairs, **choices),
        eap_ig(model, pairs, steps=1, **choices),
        eap_ig(model, pairs, steps=4, **choices),
        relp(model, pairs, **choices),
        relp(model, pairs, fix_attention=True, **choices),
    ]
    for circuit in found:
        assert (circuit.scores[exists] - exact.scores[exists]).abs().max() < 1e-10
        assert circuit.scores[~exists].isnan().all()
        assert len(circuit) == len(circuit.graph)


def test_score_is_the_fall_of_the_metric_when_the_edge_is_ablated() -> None:
    """m0 -> logits of a linear model, by hand: (MLP on the clean prompt - on the corrupt one) . (answer - wrong)."""
    model, pairs = linear(), token_pairs(n=4)
    by_hand = []
    for i in range(4):
        with torch.no_grad():
            _, clean = model.run_with_cache(pairs.clean[i])
            _, corrupt = model.run_with_cache(pairs.corrupt[i])
            change = clean["blocks.0.hook_mlp_out"][0, -1] - corrupt["blocks.0.hook_mlp_out"][0, -1]
            by_hand.append(change @ (model.W_U[:, pairs.answers[i]] - model.W_U[:, pairs.wrong_answers[i]]))
    expected = float(torch.stack(by_hand).mean())
    assert abs(eap(model, pairs, **QUIET).score("m0->logits") - expected) < 1e-10
    assert abs(exact_effects(model, pairs, **QUIET).score("m0->logits") - expected) < 1e-10


# -------------------------------------------------------------------------------------------------------- slow twins


class SlowScores(SlowRuns):
    """Each edge's derivative by a pass of its own: its input gets t times the edge's difference, at t = 0."""

    def differences(self, stream: str, carried: dict[str, Tensor]) -> dict[str, Tensor]:
        with torch.no_grad(), self.context(stream):
            _, cache = self.model.run_with_cache(self.clean)
        return {name: carried[name] - x for name, x in outputs(cache, self.model).items()}

    def hooks(self, edge: Edge, change: Tensor, t: Tensor, embed: Tensor | None) -> list[Any]:
        layer = self.model.cfg.n_layers - 1 if edge.destination.kind == "logits" else edge.destination.layer
        names = {"head": f"hook_{edge.port}_input", "mlp": "hook_mlp_in", "logits": "hook_resid_post"}

        def add(x: Tensor, hook: Any) -> Tensor:
            x = x.clone()
            if edge.destination.kind == "head":
                x[:, :, edge.destination.head] += t * change
            else:
                x += t * change
            return x

        start = [] if embed is None else [("blocks.0.hook_resid_pre", lambda x, hook: embed)]
        return [*start, (f"blocks.{layer}.{names[edge.destination.kind]}", add)]

    def scores(self, metric: Any, embeds: list[Tensor | None]) -> dict[Edge, Tensor]:
        """Sum over pairs, mean over the embeddings, for every edge."""
        live = self.stream == "ablated" and self.masks == "live"
        changes = self.differences(self.stream, self.carried)
        in_clean = self.differences("clean", self.carried_clean) if live else changes
        own = live and self.model.gates.reads_ablated
        masks: Any = "live" if own else "frozen"
        if self.stream == "ablated" and not live:
            with torch.no_grad(), self.model.ablated(position=-1):
                _, cache = self.model.run_with_cache(self.clean)
            masks = {name: cache[name] for name in cache if name.endswith("hook_mask")}
        found = {}
        for edge in self.graph.edges:
            total = torch.zeros((), dtype=torch.float64)
            for embed in embeds:
                t = torch.zeros((), dtype=torch.float64, requires_grad=True)
                hooks = self.hooks(edge, changes[str(edge.source)], t, embed)
                if self.stream == "clean":
                    logits = self.model.run_with_hooks(self.clean, fwd_hooks=hooks)
                else:
                    before = self.hooks(edge, in_clean[str(edge.source)], t, embed) if live and not own else []
                    with self.model.ablated(position=-1, masks=masks, clean_hooks=before):
                        logits = self.model.run_with_hooks(self.clean, fwd_hooks=hooks)
                (derivative,) = torch.autograd.grad(metric(logits[:, -1]).sum(), t)
                total += derivative
            found[edge] = total / len(embeds)
        return found


def points(rule: Rule, steps: int) -> list[float]:
    return {
        "left": [k / steps for k in range(steps)],
        "right": [k / steps for k in range(1, steps + 1)],
        "midpoint": [(2 * k + 1) / (2 * steps) for k in range(steps)],
    }[rule]


def slow(
    model: Any, pairs: PromptPairs, metric: str = "logit_difference", shares: list[float] | None = None, **choices: Any
) -> dict[Edge, float]:
    totals: dict[Edge, float] = {}
    for _, group in pairs.by_length():
        runs = SlowScores(model, group.clean, group.corrupt, **choices)
        end = runs.carried["embed"] - runs.differences(runs.stream, runs.carried)["embed"]
        embeds = [None] if shares is None else [runs.carried["embed"] * (1 - s) + end * s for s in shares]

        def score(logits: Tensor, runs: SlowScores = runs, group: PromptPairs = group) -> Tensor:
            return kl(logits, runs.reference) if metric == "kl" else METRICS[metric](logits, group)

        for edge, value in runs.scores(score, embeds).items():
            worse = 1 if metric == "kl" else -1
            totals[edge] = totals.get(edge, 0.0) + worse * float(value) / len(pairs)
    return totals


def assert_same(circuit: Circuit, expected: dict[Edge, float]) -> None:
    largest = max(abs(value) for value in expected.values())
    assert largest > 1e-3
    for edge, value in expected.items():
        assert abs(circuit.score(edge) - value) < 1e-9 * max(1.0, largest), str(edge)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"normalization_type": "RMS", "positional_embedding_type": "rotary", "rotary_dim": 6},
        {"attn_only": True},
        {"parallel_attn_mlp": True},
        {"n_key_value_heads": 1},
        {"gated_mlp": True, "act_fn": "silu"},
    ],
    ids=str,
)
def test_eap_equals_each_edge_by_itself(changes: dict[str, Any]) -> None:
    model, pairs = plain(**SMALL, **changes), token_pairs(n=3)
    assert_same(eap(model, pairs, **QUIET), slow(model, pairs))


@pytest.mark.parametrize(("rule", "ablation"), [("left", "resample"), ("right", "zero"), ("midpoint", "mean")])
def test_eap_ig_equals_an_explicit_loop_over_edges_and_points(rule: Rule, ablation: str) -> None:
    model, pairs = plain(**SMALL), token_pairs(n=3, lengths=(6, 6, 7))
    found = eap_ig(model, pairs, steps=2, rule=rule, ablation=ablation, batch_size=2, **QUIET)
    assert_same(found, slow(model, pairs, shares=points(rule, 2), ablation=ablation))


@pytest.mark.parametrize("masks", ["frozen", "live"])
@pytest.mark.parametrize("scope", ["local", "global", "ablated"])
def test_both_equal_their_twins_in_the_ablated_stream(scope: str, masks: str) -> None:
    model, pairs = gated(scope, **SMALL), token_pairs(n=3)
    choices: dict[str, Any] = {"stream": "ablated", "masks": masks}
    assert_same(eap(model, pairs, **choices, **QUIET), slow(model, pairs, **choices))
    found = eap_ig(model, pairs, metric="kl", steps=2, **choices, **QUIET)
    assert_same(found, slow(model, pairs, "kl", shares=[0.0, 0.5], **choices))


@pytest.mark.parametrize(
    ("scope", "choices"),
    [
        (None, {"ablation": "resample"}),
        (None, {"ablation": "mean"}),
        ("local", {"stream": "ablated", "masks": "frozen", "ablation": "zero"}),
        ("both", {"stream": "ablated", "masks": "live", "ablation": "resample"}),
        ("ablated", {"stream": "ablated", "masks": "live", "ablation": "resample"}),
        ("ablated", {"stream": "ablated", "masks": "frozen", "ablation": "mean"}),
    ],
    ids=str,
)
def test_passes_by_nodes_equal_passes_under_hooks(
    scope: str | None, choices: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = plain(**DOUBLE) if scope is None else gated(scope, **DOUBLE)
    pairs = token_pairs(n=6, lengths=(6, 7, 9))
    fast = eap_ig(model, pairs, steps=3, batch_size=4, **choices, **QUIET)
    monkeypatch.setattr(Experiment, "why_not_by_nodes", "the slow twin is asked for")
    slow = eap_ig(model, pairs, steps=3, batch_size=4, **choices, **QUIET)
    exists = slow.graph.exists
    assert float(slow.scores[exists].abs().max()) > 1e-3
    torch.testing.assert_close(fast.scores[exists], slow.scores[exists], atol=1e-10, rtol=1e-7)
    assert fast.about == pytest.approx(slow.about)


def test_live_gates_add_what_goes_through_the_surrogates() -> None:
    model, pairs = gated(**DOUBLE), token_pairs(n=3)
    frozen, live = (eap(model, pairs, stream="ablated", masks=g, **QUIET) for g in ("frozen", "live"))
    assert (frozen.scores - live.scores).abs().nan_to_num().max() > 1e-3
    assert (frozen.about["masks"], live.about["masks"]) == ("frozen", "live")


# -------------------------------------------------------------------------------------------------------------- RelP


def linearise(model: Any) -> None:
    """Gives a model's modules the rules of RelP in their own forward passes."""
    norms = [m for m in model.modules() if type(m).__name__ in ("LayerNorm", "Norm")]
    assert norms
    for norm in norms:

        def normalise(x: Tensor, norm: Any = norm) -> Tensor:
            x = x - x.mean(-1, keepdim=True)
            scale = (x.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt().detach()
            return x / scale * norm.w + norm.b

        norm.forward = normalise
    for block in model.blocks:
        act, mlp = block.mlp.act_fn, block.mlp
        block.mlp.act_fn = lambda x, act=act: x * (act(x) / x).detach()
        if model.cfg.gated_mlp:

            def forward(x: Tensor, mlp: Any = mlp) -> Tensor:
                product = mlp.act_fn(x @ mlp.W_gate) * (x @ mlp.W_in)
                post = mlp.hook_post(product / 2 + (product / 2).detach() + mlp.b_in)
                return post @ mlp.W_out + mlp.b_out

            mlp.forward = forward


@pytest.mark.parametrize("changes", [{}, {"gated_mlp": True, "act_fn": "silu"}, {"parallel_attn_mlp": True}], ids=str)
@pytest.mark.parametrize("stream", ["clean", "ablated"])
def test_relp_equals_a_model_whose_modules_follow_the_rules(changes: dict[str, Any], stream: str) -> None:
    make = gated if stream == "ablated" else plain
    model, other, pairs = make(**SMALL, **changes), make(**SMALL, **changes), token_pairs(n=3)
    linearise(other)
    found = relp(model, pairs, stream=stream, **QUIET)
    assert_same(found, slow(other, pairs, stream=stream))
    plain_scores = eap(model, pairs, stream=stream, **QUIET)
    assert (found.scores - plain_scores.scores).abs().nan_to_num().max() > 1e-3
    assert abs(found.about["value"] - plain_scores.about["value"]) < 1e-12


def test_constant_patterns_leave_nothing_to_queries_and_keys() -> None:
    model, pairs = plain(**DOUBLE), token_pairs(n=3)
    free, fixed = (relp(model, pairs, fix_attention=fix, **QUIET).table(every=True) for fix in (False, True))
    into = fixed["port"].isin(["q", "k"])
    assert (fixed.loc[into, "score"] == 0).all()
    assert (free.loc[into, "score"].abs() > 1e-6).mean() > 0.8
    assert (fixed.loc[~into, "score"].abs() > 1e-6).mean() > 0.8


# -------------------------------------------------------------------------------------------------------- properties


def test_integrated_gradients_are_complete() -> None:
    """Edges out of the embedding add up to the way from the corrupt to the clean prompt."""
    model, pairs = plain(**SMALL, initializer_range=0.2), token_pairs(n=4)
    gaps = []
    for steps in (16, 64):
        embed = eap_ig(model, pairs, steps=steps, rule="midpoint", **QUIET).scores[:, 0].nansum()
        ends = [logit_difference(last_logits(model, pairs, "clean", p), pairs).mean() for p in ("corrupt", "clean")]
        gaps.append(abs(float(embed - (ends[1] - ends[0]))))
    assert gaps[1] < 1e-3 * abs(float(ends[1] - ends[0]))
    assert gaps[1] < gaps[0] / 10


@pytest.mark.parametrize("method", [eap, eap_ig, relp])
@pytest.mark.parametrize("ablation", ["resample", "mean"])
def test_batches_do_not_matter(method: Any, ablation: str) -> None:
    model, pairs = gated(**DOUBLE), token_pairs(n=7, lengths=(6, 8))
    choices: dict[str, Any] = {"ablation": ablation, "stream": "ablated", "progress": False}
    whole, parts = (method(model, pairs, batch_size=size, **choices) for size in (64, 2))
    assert torch.allclose(whole.scores, parts.scores, rtol=0, atol=1e-10, equal_nan=True)
    assert abs(whole.about["value"] - parts.about["value"]) < 1e-12
    expected = logit_difference(last_logits(model, pairs, "ablated"), pairs).mean()
    assert abs(whole.about["value"] - float(expected)) < 1e-12


@pytest.mark.parametrize("method", [eap, eap_ig, relp])
@pytest.mark.parametrize("stream", ["clean", "ablated"])
def test_leaves_the_model_as_it_was(method: Any, stream: str) -> None:
    model, pairs = gated(), token_pairs()
    model.blocks[0].mlp.W_in.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    before = dict(vars(model.cfg))
    first = method(model, pairs, stream=stream, **QUIET)
    with torch.inference_mode():
        second = method(model, pairs, stream=stream, **QUIET)
    model.requires_grad_(False)
    third = method(model, pairs, stream=stream, **QUIET)
    for other in (second, third):
        assert torch.equal(first.scores.nan_to_num(), other.scores.nan_to_num())
    assert vars(model.cfg) == before
    assert all(p.grad is None for p in model.parameters())
    model.blocks[0].mlp.W_out.requires_grad_(True)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    method(model, pairs, stream=stream, **QUIET)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert not any(hook for point in model.hook_points() for hook in (*point.fwd_hooks, *point.bwd_hooks))


def test_switches_are_put_back_after_an_error() -> None:
    model, pairs = plain(), token_pairs()
    before = dict(vars(model.cfg))

    def broken(logits: Tensor, pairs: PromptPairs) -> Tensor:
        if len(pairs) > 1:
            raise ArithmeticError("no value")
        return logits[:, 0]

    with pytest.raises(ArithmeticError):
        eap(model, pairs, metric=broken, **QUIET)
    assert vars(model.cfg) == before


def test_result_is_a_circuit_to_choose_from(tmp_path: Any) -> None:
    model, pairs = gated(), token_pairs()
    found = eap_ig(model, pairs, steps=3, stream="ablated", **QUIET)
    assert {
        name: found.about[name] for name in ("method", "steps", "rule", "stream", "masks", "ablation", "metric")
    } == {
        **{"method": "eap-ig", "steps": 3, "rule": "left", "stream": "ablated", "masks": "live"},
        **{"ablation": "resample", "metric": "logit_difference"},
    }
    best = found.keep(5)
    assert len(best) == 5
    scores = found.scores[found.graph.exists].abs()
    assert min(abs(best.score(edge)) for edge in best) >= float(scores.sort(descending=True).values[4])
    read = Circuit.load(found.save(tmp_path / "circuit.json"))
    assert read.about == found.about
    assert torch.equal(read.scores.nan_to_num(), found.scores.nan_to_num())


def test_kl_goes_with_integrated_gradients_alone() -> None:
    model, pairs = plain(), token_pairs()
    assert float(eap_ig(model, pairs, metric="kl", steps=2, **QUIET).scores.nan_to_num().abs().max()) > 1e-3
    assert eap_ig(model, pairs, metric="kl", steps=2, **QUIET).about["value"] == 0
    for refused in (
        lambda: eap(model, pairs, metric="kl"),
        lambda: relp(model, pairs, metric="kl"),
        lambda: eap_ig(model, pairs, metric="kl", steps=1, rule="right"),
    ):
        with pytest.raises(ValueError, match=r"metric='kl' has no gradient at the clean prompt.*logit_difference"):
            refused()


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        (eap_ig, {"steps": 0}, "steps=0 must be a whole number of at least 1"),
        (eap_ig, {"steps": 2.0}, "steps=2.0 must be a whole number"),
        (eap_ig, {"rule": "trapezoid"}, "rule='trapezoid' is not one of 'left', 'right', 'midpoint'"),
        (eap, {"metric": "likelihood"}, "metric='likelihood' is none of logit_difference"),
        (eap, {"metric": "pair_accuracy"}, "'pair_accuracy' has no gradient.*use 'logit_difference'"),
        (eap_ig, {"metric": "answer_rank"}, "'answer_rank' has no gradient"),
        (relp, {"metric": lambda logits, pairs: logits.mean()}, "for 2 pairs: it must give one finite value for each"),
        (eap, {"metric": lambda logits, pairs: logits[:, 0] * torch.nan}, "gave values that are not finite"),
        (eap, {"batch_size": 0}, "batch_size=0 must be a whole number of at least 1"),
        (eap, {"ablation": "noise"}, "ablation='noise' is not one of"),
        (eap, {"masks": "frozen"}, "needs stream='ablated'"),
        (eap, {"stream": "ablated", "masks": "thawed"}, "masks='thawed' is not one of 'frozen', 'live'"),
        (relp, {"stream": "ablated", "masks": "live"}, "masks='live' has no propagation rule"),
    ],
)
def test_bad_input_is_refused(method: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        method(gated(), token_pairs(), **arguments, **QUIET)


def test_models_and_pairs_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="needs gates"):
        eap(plain(), token_pairs(), stream="ablated", **QUIET)
    with pytest.raises(ValueError, match="vocabulary"):
        eap(plain(), token_pairs(d_vocab=99), **QUIET)
