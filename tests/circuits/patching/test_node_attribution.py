"""Estimates for nodes and units agree with those of their edges; effects agree with patching."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from linear import linear
from micro import gated, plain, token_pairs

from sa_lens.circuits.discovery.eap import eap
from sa_lens.circuits.graph import Node
from sa_lens.circuits.metrics import logit_difference
from sa_lens.circuits.patching.activation_patching import patch
from sa_lens.circuits.patching.node_attribution import COLUMNS, NODES, attribute_nodes
from sa_lens.core.host import in_stream
from sa_lens.core.unit import Unit

DOUBLE = {"dtype": torch.float64}
QUIET = {"progress": False}
STREAMS = ["clean", "ablated"]


def close(found: Any, expected: Any, tolerance: float = 1e-9) -> None:
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("what", NODES)
@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("ablation", ["resample", "zero", "mean"])
def test_estimates_are_the_effects_on_a_linear_model(what: str, stream: str, ablation: str) -> None:
    model, pairs = linear(stream), token_pairs(n=4, lengths=(5, 6))
    found = attribute_nodes(model, pairs, what, exact="all", ablation=ablation, stream=stream, **QUIET)
    assert tuple(found.columns) == COLUMNS
    assert found["estimate"].abs().max() > 1e-3
    close(found["estimate"], found["effect"])


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("ablation", ["resample", "zero", "mean"])
def test_estimate_of_a_node_is_the_sum_over_its_edges(stream: str, ablation: str) -> None:
    """Up to the sign: edges score the fall of the metric, nodes its change."""
    model, pairs = gated(**DOUBLE), token_pairs(n=5, lengths=(6, 7))
    choices: dict[str, Any] = {"stream": stream, "ablation": ablation, "progress": False}
    choices["masks"] = "frozen" if stream == "ablated" else None
    by_edge = eap(model, pairs, **choices)
    sums = -by_edge.scores.nan_to_num().sum(0)
    for row in attribute_nodes(model, pairs, "heads", **choices).itertuples():
        close(row.estimate, float(sums[by_edge.graph.source_index[Node("head", row.layer, row.head)]]))
    for row in attribute_nodes(model, pairs, "mlps", **choices).itertuples():
        close(row.estimate, float(sums[by_edge.graph.source_index[Node("mlp", row.layer)]]))


@pytest.mark.parametrize("stream", STREAMS)
def test_units_add_up_to_their_node_and_positions_to_all(stream: str) -> None:
    model, pairs = gated(**DOUBLE), token_pairs(n=3)
    heads = attribute_nodes(model, pairs, "heads", stream=stream, **QUIET)
    units = attribute_nodes(model, pairs, "attn_units", stream=stream, **QUIET)
    close(units.groupby(["layer", "head"])["estimate"].sum(), heads["estimate"])
    mlps = attribute_nodes(model, pairs, "mlps", stream=stream, **QUIET)
    neurons = attribute_nodes(model, pairs, "neurons", stream=stream, **QUIET)
    close(neurons.groupby("layer")["estimate"].sum(), mlps["estimate"])
    each = attribute_nodes(model, pairs, "heads", stream=stream, by_position=True, **QUIET)
    close(each.groupby(["layer", "head"])["estimate"].sum(), heads["estimate"])
    assert sorted(each["position"].unique()) == list(range(7))


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize(("what", "theirs"), [("heads", "heads"), ("mlps", "mlp_out"), ("neurons", "neurons")])
def test_effects_are_those_of_patching(what: str, theirs: str, stream: str) -> None:
    model, pairs = gated(**DOUBLE), token_pairs(n=3, lengths=(6, 7))
    found = attribute_nodes(model, pairs, what, exact="all", stream=stream, batch_size=5, **QUIET)
    top: dict[str, Any] = {"top_n": "all"} if what == "neurons" else {}
    top["masks"] = "frozen" if stream == "ablated" else None
    expected = patch(model, pairs, theirs, stream=stream, direction="noise", positions="all", **top, **QUIET)
    close(found["effect"], expected["value"] - expected["clean"])
    close(found["value"], expected["clean"])


@pytest.mark.parametrize("stream", STREAMS)
def test_effects_of_single_units_at_single_positions(stream: str) -> None:
    """One prompt, one channel, one position, by one hook."""
    model, pairs = gated(**DOUBLE), token_pairs(n=2, lengths=(5,))
    table = attribute_nodes(model, pairs, "attn_units", by_position=True, exact="all", stream=stream, **QUIET)
    for row in table.sample(12, random_state=0).itertuples():
        changes = []
        for i in range(2):
            one = pairs.subset([i])
            with torch.no_grad(), in_stream(model, stream, position=-1):
                _, carried = model.run_with_cache(one.corrupt)

                def put(z: Any, hook: Any, carried: Any = carried, row: Any = row) -> Any:
                    z = z.clone()
                    where = (0, row.position, row.head, Unit.parse(row.unit).index % model.cfg.d_head)
                    z[where] = carried[hook.name][where]
                    return z

                base = model(one.clean)[:, -1]
                edited = model.run_with_hooks(one.clean, fwd_hooks=[(f"blocks.{row.layer}.attn.hook_z", put)])[:, -1]
            changes.append(float(logit_difference(edited, one) - logit_difference(base, one)))
        close(row.effect, sum(changes) / 2)
        unit = Unit.parse(row.unit)
        assert (unit.layer, unit.site, unit.index // model.cfg.d_head) == (row.layer, "attn", row.head)


def test_exact_effects_go_to_the_largest_estimates() -> None:
    model, pairs = plain(), token_pairs()
    found = attribute_nodes(model, pairs, "neurons", exact=5, **QUIET)
    tried = found[found["effect"].notna()]
    assert len(tried) == 5
    assert tried["estimate"].abs().min() >= found.drop(tried.index)["estimate"].abs().max()
    assert attribute_nodes(model, pairs, "neurons", **QUIET)["effect"].isna().all()


@pytest.mark.parametrize("stream", STREAMS)
def test_leaves_the_model_as_it_was(stream: str) -> None:
    model, pairs = gated(), token_pairs()
    before = dict(vars(model.cfg))
    first = attribute_nodes(model, pairs, "neurons", exact=2, stream=stream, **QUIET)
    with torch.inference_mode():
        second = attribute_nodes(model, pairs, "neurons", exact=2, stream=stream, **QUIET)
    assert first.equals(second)
    assert vars(model.cfg) == before
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"what": "edges"}, "what='edges' is none of heads, mlps, attn_units, neurons"),
        ({"metric": "kl"}, "metric='kl' has no gradient at the clean prompt"),
        ({"metric": "pair_accuracy"}, "'pair_accuracy' has no gradient"),
        ({"exact": -1}, "exact=-1 must be a whole number of at least ."),
        ({"exact": "some"}, "exact='some' must be a whole number of at least ."),
        ({"stream": "ablated", "masks": "live"}, r"masks='live' has no first-order estimate.*patch"),
        ({"by_position": True}, "by_position=True needs prompts of one length, these have 6, 7 tokens"),
        ({"batch_size": 0}, "batch_size=0 must be a whole number of at least 1"),
        ({"ablation": "noise"}, "ablation='noise' is not one of"),
    ],
)
def test_bad_input_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attribute_nodes(gated(), token_pairs(lengths=(6, 7)), **arguments, **QUIET)


def test_a_model_without_mlps_has_no_neurons() -> None:
    with pytest.raises(ValueError, match="belongs to an MLP, but this model has attention layers alone"):
        attribute_nodes(plain(attn_only=True), token_pairs(), "neurons", **QUIET)
