"""The gate's ranking is what counting its masks by hand gives; agreement is what counting pairs and scipy give."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pandas as pd
import pytest
import torch
from known import random_ranking
from micro import config, gated, noisy, plain, token_pairs

import sa_lens as sa
from sa_lens.circuits.discovery.gate_circuit import gate_circuit, gate_rankings, mask_shares
from sa_lens.circuits.graph import Circuit, Graph, Node
from sa_lens.circuits.judging.agreement import agreement, agreement_table

SCOPES = ["local", "global", "both"]


def by_heads(k: int = 2) -> sa.SelfAblatingTransformer:
    gates = sa.GateConfig(k_attn=k, k_mlp=5, attn_unit="head")
    return noisy(sa.SelfAblatingTransformer(config(), gates))


def counted(model, pairs, variant: str) -> dict[str, torch.Tensor]:
    """Mean mask of every gate, prompt by prompt, from a cache of the ablated stream."""
    totals: dict[str, torch.Tensor] = {}
    for i in range(len(pairs)):
        one = pairs.subset([i])
        with torch.no_grad(), model.ablated():
            _, cache = model.run_with_cache(one.clean)
        for name in cache:
            if name.endswith("hook_mask"):
                mask = cache[name][0].double()
                chosen = mask[-1] if variant == "metric_position" else mask.mean(0)
                totals[name] = totals.get(name, 0) + chosen / len(pairs)
    return totals


@pytest.mark.parametrize("variant", ["metric_position", "all_positions"])
@pytest.mark.parametrize("make", [*(lambda scope=s: gated(scope) for s in (*SCOPES, "ablated")), by_heads])
def test_shares_are_those_counted_one_prompt_at_a_time(make, variant: str) -> None:
    model, pairs = make(), token_pairs(n=7, lengths=(6, 9))
    found = mask_shares(model, pairs, variant=variant, batch_size=2)
    for name, mask in counted(model, pairs, variant).items():
        layer = int(name.split(".")[1])
        shares = found.attn[layer] if "attn" in name else found.mlp[layer]
        assert torch.allclose(shares, mask, atol=1e-9)


def test_a_gate_set_by_hand() -> None:
    model, pairs = gated(k=3), token_pairs()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_gate.W" in name:
                parameter.zero_()
            if "_gate.b" in name:
                parameter.zero_()
                # layer 0: two channels of head 1 and one of head 3 (6 channels a head); layer 1: all of head 2
                chosen = {"0.attn": [6, 7, 20], "1.attn": [12, 13, 14], "0.mlp": [0, 5, 9], "1.mlp": [1, 2, 3]}
                parameter[chosen[name.split(".", 1)[1].split("_")[0]]] = 1.0
    circuit = gate_circuit(model, pairs)
    assert len(circuit) == len(circuit.graph)
    a, b, c, m = 2 / 6, 1 / 6, 3 / 6, 3 / 32
    scores = {
        "embed->logits": 1.0,
        "embed->a0.h1.q": a,
        "embed->a0.h0.v": 0.0,
        "a0.h1->m0": a * m,
        "a0.h3->logits": b,
        "a0.h1->a1.h2.k": a * c,
        "m0->a1.h2.v": m * c,
        "m0->m1": m * m,
        "m1->logits": m,
    }
    assert {edge: circuit.score(edge) for edge in scores} == pytest.approx(scores)
    shares = mask_shares(model, pairs)
    units = shares.table()
    assert len(units) == 2 * (24 + 32)
    stays = units[units["stays"] == 1]
    assert stays.query("site == 'mlp' and layer == 0")["unit"].tolist() == ["L0.mlp.0", "L0.mlp.5", "L0.mlp.9"]
    attn = stays.query("site == 'attn' and layer == 0")
    assert attn["unit"].tolist() == [f"L0.attn.{head * model.cfg.d_head + i}" for head, i in ((1, 0), (1, 1), (3, 2))]
    assert (units["stays"].isin([0.0, 1.0])).all()
    assert set(units["variant"]) == {"metric_position"}
    nodes = shares.node_table().set_index("node")["score"]
    assert (nodes["a0.h1"], nodes["a1.h2"], nodes["m0"]) == pytest.approx((a, c, m))
    # relative to the mean share of a layer's heads, 3 / 24, and of its neurons
    relative = mask_shares(model, pairs, scale="relative")
    assert [relative.score(n) for n in (Node("head", 0, 1), Node("head", 1, 2), Node("mlp", 0))] == pytest.approx(
        [a * 8, c * 8, 1.0]
    )
    assert torch.equal(relative.attn, shares.attn)


def test_only_the_metric_position_counts_unless_told() -> None:
    model, pairs = gated(), token_pairs(n=5)
    changed = replace(pairs, clean=pairs.clean.clone())
    changed.clean[:, 2] = (pairs.clean[:, 2] + 1) % 61
    # local gates of layer 0 read the token itself
    for variant, same in (("metric_position", True), ("all_positions", False)):
        first, second = (mask_shares(model, p, variant=variant).attn[0] for p in (pairs, changed))
        assert torch.equal(first, second) == same


def test_whole_heads_stay_or_go() -> None:
    found = mask_shares(by_heads(2), token_pairs(n=5))
    assert found.attn.shape == (2, 4, 1)
    assert found.attn.sum((1, 2)).tolist() == pytest.approx([2, 2])
    assert found.table().query("site == 'attn'")["unit"].tolist()[:5] == ["a0.h0", "a0.h1", "a0.h2", "a0.h3", "a1.h0"]


def test_soft_masks_count_with_their_value() -> None:
    gates = sa.GateConfig(k_attn=5, k_mlp=5, kind="soft")
    model, pairs = noisy(sa.SelfAblatingTransformer(config(), gates)), token_pairs()
    found = mask_shares(model, pairs)
    expected = counted(model, pairs, "metric_position")
    assert torch.allclose(found.attn[1], expected["blocks.1.attn_gate.hook_mask"], atol=1e-6)
    assert torch.allclose(found.attn.sum((1, 2)), torch.full((2,), 5.0, dtype=torch.float64), atol=1e-4)


def test_attention_only_models() -> None:
    model = gated(attn_only=True)
    found = mask_shares(model, token_pairs())
    assert len(found.mlp) == 0
    assert not found.circuit().scores[found.graph.exists].isnan().any()
    assert len(found.table()) == 2 * 24
    assert mask_shares(model, token_pairs(), masks_from="shuffled_units").mlp.shape == found.mlp.shape


# ----------------------------------------------------------------------------------------------------- comparisons


@pytest.mark.parametrize("variant", ["metric_position", "all_positions"])
@pytest.mark.parametrize("make", [gated, by_heads])
def test_top_activation_takes_the_largest_values_of_the_clean_stream(make, variant: str) -> None:
    model, pairs = make(), token_pairs(n=4)
    found = mask_shares(model, pairs, variant=variant, masks_from="top_activation")
    _, cache = model.run_with_cache(pairs.clean)
    positions = [6] if variant == "metric_position" else range(7)
    for layer in range(2):
        heads = torch.zeros(4, found.attn.shape[-1])
        neurons = torch.zeros(32)
        for row, pos in itertools.product(range(4), positions):
            z = cache["z", layer][row, pos]
            size = z.norm(dim=-1) if make is by_heads else z.abs().flatten()
            for unit in size.argsort(descending=True)[: model.gates.k_attn].tolist():
                heads.view(-1)[unit] += 1 / (4 * len(positions))
            for unit in cache["post", layer][row, pos].abs().argsort(descending=True)[:5].tolist():
                neurons[unit] += 1 / (4 * len(positions))
        assert torch.allclose(found.attn[layer], heads.double(), atol=1e-6)
        assert torch.allclose(found.mlp[layer], neurons.double(), atol=1e-6)


def test_random_masks_are_as_large_and_differ_by_seed_alone() -> None:
    model, pairs = gated(), token_pairs(n=9, lengths=(6, 8))
    found = mask_shares(model, pairs, masks_from="random", seed=3)
    assert found.attn.sum((1, 2)).tolist() == pytest.approx([5, 5])
    assert found.mlp.sum(1).tolist() == pytest.approx([5, 5])
    again = mask_shares(model, pairs, masks_from="random", seed=3, batch_size=2)
    assert torch.equal(found.attn, again.attn)
    assert torch.equal(found.mlp, again.mlp)
    assert not torch.equal(found.attn, mask_shares(model, pairs, masks_from="random", seed=4).attn)


def test_shuffled_units_keep_the_shares_of_each_layer() -> None:
    model, pairs = gated(), token_pairs(n=9)
    own, dealt = (mask_shares(model, pairs, masks_from=m, seed=2) for m in ("gate", "shuffled_units"))
    for name in ("attn", "mlp"):
        mine, theirs = (getattr(x, name).flatten(1) for x in (own, dealt))
        assert torch.equal(mine.sort(1).values, theirs.sort(1).values)
        assert not torch.equal(mine, theirs)


def test_shuffled_text_keeps_the_tokens_and_the_first_in_its_place() -> None:
    model, pairs = gated(), token_pairs(n=9, lengths=(6, 8))
    seen = []
    handle = model.hook_dict["hook_embed"]
    handle.add_hook(lambda x, hook: seen.append(x.clone()))
    found = mask_shares(model, pairs, masks_from="shuffled_text", seed=1, batch_size=3)
    handle.remove_hooks()
    texts = [text for _, group in pairs.by_length() for text in group.clean]
    rows = [row for batch in seen for row in batch]
    orders = [[int((x == model.W_E).all(1).nonzero()) for x in row] for row in rows]
    assert all(order[0] == 0 for order in orders)
    assert [sorted(order) for order in orders] == [sorted(text.tolist()) for text in texts]
    assert orders != [text.tolist() for text in texts]
    again = mask_shares(model, pairs, masks_from="shuffled_text", seed=1)
    assert torch.equal(found.attn, again.attn)
    assert not torch.equal(found.attn, mask_shares(model, pairs).attn)


def test_the_rankings_to_compare() -> None:
    model, pairs, other = gated(), token_pairs(n=5), token_pairs(n=6, seed=8)
    found = gate_rankings(model, pairs, other=other, draws=2, variant="all_positions", seed=4)
    assert list(found) == [
        *("gate", "other prompts", "top activation"),
        *("random 0", "shuffled units 0", "random 1", "shuffled units 1"),
    ]
    alone = gate_circuit(model, other, variant="all_positions")
    assert torch.equal(found["other prompts"].scores.nan_to_num(-1), alone.scores.nan_to_num(-1))
    assert found["random 1"].about["seed"] == 5
    assert {c.about["variant"] for c in found.values()} == {"all_positions"}
    assert "shuffled text" in gate_rankings(model, pairs, draws=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "last"}, "variant='last' is not one of"),
        ({"masks_from": "best"}, "masks_from='best' is not one of"),
        ({"scale": "log"}, "scale='log' is not one of"),
        ({"batch_size": 0}, "at least 1"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gate_circuit(gated(), token_pairs(), **options)


def test_models_without_gates_and_pairs_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="needs gates"):
        gate_circuit(plain(), token_pairs())
    dense = sa.SelfAblatingTransformer(config(), sa.GateConfig(scope="none"))
    with pytest.raises(ValueError, match="needs gates"):
        mask_shares(dense, token_pairs())
    with pytest.raises(ValueError, match="vocabulary"):
        gate_circuit(gated(), token_pairs(d_vocab=99))
    with pytest.raises(ValueError, match="draws=0"):
        gate_rankings(gated(), token_pairs(), draws=0)


# ------------------------------------------------------------------------------------------------------- agreement


def tied(graph: Graph, seed: int, values: int = 4) -> Circuit:
    """A ranking with few different scores."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-values, values, graph.exists.shape, generator=generator).double()
    return Circuit(graph, graph.exists.clone(), scores.masked_fill(~graph.exists, torch.nan))


def both_sides(seed: int, absolute: bool):
    """A ranking with ties, a reference, their agreement, and the bare numbers."""
    graph = Graph(2, 3)
    scores, reference = tied(graph, seed), tied(graph, seed + 50).keep(12 + seed)
    mine, theirs, wanted = (x[graph.exists].numpy() for x in (scores.scores, reference.scores, reference.mask))
    if absolute:
        mine, theirs = abs(mine), abs(theirs)
    return agreement(scores, reference, absolute=absolute), mine, theirs, wanted


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("absolute", [True, False])
def test_agreement_equals_counting_by_hand(seed: int, absolute: bool) -> None:
    found, mine, theirs, wanted = both_sides(seed, absolute)
    wins = [(a > b) + (a == b) / 2 for a in mine[wanted] for b in mine[~wanted]]
    assert found.auroc == pytest.approx(sum(wins) / len(wins))
    ranks = pd.DataFrame({"mine": mine, "theirs": theirs}).rank(method="average")
    assert found.spearman == pytest.approx(ranks["mine"].corr(ranks["theirs"]))
    assert (found.edges, found.scored) == (12 + seed, len(mine))
    assert found.base_rate == pytest.approx((12 + seed) / len(mine))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("absolute", [True, False])
def test_agreement_equals_scipy(seed: int, absolute: bool) -> None:
    stats = pytest.importorskip("scipy.stats")
    found, mine, theirs, wanted = both_sides(seed, absolute)
    u = stats.mannwhitneyu(mine[wanted], mine[~wanted]).statistic
    assert found.auroc == pytest.approx(u / (wanted.sum() * (~wanted).sum()))
    assert found.spearman == pytest.approx(stats.spearmanr(mine, theirs).statistic)


def test_precision_is_the_mean_over_all_orders_of_equal_edges() -> None:
    graph = Graph(1, 1)
    assert len(graph) == 8
    scores = [3.0, 2, 2, 2, 2, 1, 1, 0]
    circuit = Circuit.of(graph, dict(zip(map(str, graph.edges), scores, strict=True)))
    reference = Circuit.of(graph, [graph.edges[i] for i in (0, 2, 6)])
    # the first edge, and two of the four edges of score 2, of which one is wanted
    expected = sum(1 + (2 in pick) for pick in itertools.combinations((1, 2, 3, 4), 2)) / 6 / 3
    assert agreement(circuit, reference).precision == pytest.approx(expected)


def test_agreement_with_itself_and_with_its_opposite() -> None:
    scores = random_ranking(Graph(2, 2))
    size = {edge: abs(scores.score(edge)) for edge in scores.graph.edges}
    positive = Circuit.of(scores.graph, size)
    same = agreement(positive, positive.keep(10))
    assert (same.auroc, same.precision) == (1.0, 1.0)
    assert same.spearman == pytest.approx(1)
    opposite = Circuit.of(scores.graph, {edge: -x for edge, x in size.items()})
    assert agreement(opposite, positive.keep(10), absolute=False).auroc == 0.0
    assert agreement(opposite, positive.keep(10), absolute=True).auroc == 1.0


def test_a_reference_without_scores_or_without_an_outside() -> None:
    scores = random_ranking(Graph(2, 2))
    bare = agreement(scores, Circuit.of(scores.graph, ["embed->logits"]))
    assert math.isnan(bare.spearman)
    assert bare.scored == 0
    assert 0 <= bare.auroc <= 1
    whole = agreement(scores, scores)
    assert math.isnan(whole.auroc)
    assert math.isnan(whole.precision)
    assert whole.spearman == pytest.approx(1)
    flat = Circuit.of(scores.graph, dict.fromkeys(scores.graph.edges, 0.3))
    constant = agreement(flat, scores.keep(5))
    assert math.isnan(constant.spearman)
    assert constant.auroc == 0.5
    assert constant.precision == pytest.approx(constant.base_rate)


def test_a_table_of_rankings_and_references() -> None:
    graph = Graph(2, 2)
    rankings = {"a": random_ranking(graph, 1), "b": random_ranking(graph, 2)}
    references = {"c": random_ranking(graph, 3).keep(9)}
    table = agreement_table(rankings, references)
    assert table[["ranking", "reference"]].values.tolist() == [["a", "c"], ["b", "c"]]
    assert table["auroc"][1] == agreement(rankings["b"], references["c"]).auroc


def test_circuits_that_cannot_be_compared_are_refused() -> None:
    scores = random_ranking(Graph(2, 2))
    with pytest.raises(ValueError, match="different graphs"):
        agreement(scores, random_ranking(Graph(2, 3)))
    with pytest.raises(ValueError, match="edges have no score"):
        agreement(Circuit.full(scores.graph), scores.keep(3))
