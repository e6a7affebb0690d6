"""The gate raster has exactly the units that the masks keep."""

import pytest
import torch
from characters import EVIL, TOKENS, caches

import sa_lens as sa
from sa_lens.core.unit import Unit
from sa_lens.views import draw, gate_raster
from sa_lens.views.raster import _shares
from sa_lens.views.records import from_json, to_json


@pytest.mark.parametrize("stream", ["clean", "ablated"])
def test_units_that_stay(model, stream):
    record = gate_raster(model, TOKENS, stream=stream, top=2)
    cache = caches(model)
    expected = []
    for layer in range(2):
        for gate, site in (("attn_gate", "attn"), ("mlp_gate", "mlp")):
            mask = cache["ablated"]["mask", layer, gate][0].flatten(1)
            values = (cache[stream]["z", layer] if site == "attn" else cache[stream]["post", layer])[0].flatten(1)
            for unit in range(mask.shape[1]):
                at = [t for t in range(len(TOKENS)) if mask[t, unit]]
                if at:
                    expected.append((layer, site, at, values[at, unit].tolist()))
    assert [(u.layer, u.site, list(u.positions)) for u in record.units] == [e[:3] for e in expected]
    for unit, (_, _, _, values) in zip(record.units, expected, strict=True):
        assert unit.values == pytest.approx(values, rel=1e-5)
    assert sum(len(unit.positions) for unit in record.units) == 14 * len(TOKENS)
    assert from_json(to_json(record)) == record


def test_promoted_tokens_are_those_of_the_output_weights(model):
    record = gate_raster(model, TOKENS, top=2)
    w_u = model.W_U - model.W_U.mean(1, keepdim=True)
    found = {unit.name: unit.promotes for unit in record.units}
    checked = 0
    for name, promotes in found.items():
        unit = Unit.parse(name)
        out = model.W_out[unit.layer] if unit.site == "mlp" else model.W_O[unit.layer].flatten(0, 1)
        row = out[unit.index]
        logits = (row * model.ln_final.w) @ w_u
        assert promotes == tuple(map(str, logits.topk(2).indices.tolist()))
        checked += 1
    assert checked > 10
    assert gate_raster(model, TOKENS, top=0).units[0].promotes == ()


def test_of_many_units_those_that_add_most_are_shown(model):
    whole = gate_raster(model, TOKENS)
    less = gate_raster(model, TOKENS, most=20)
    assert len(less.units) == 20 < len(whole.units)
    assert (whole.left_out, less.left_out) == (0, len(whole.units) - 20)
    assert f"20 of the {len(whole.units)} that stay at one token or more, which at some token add most" in less.note
    by_sublayer = {}
    for unit in whole.units:
        w_out = model.W_out[unit.layer] if unit.site == "mlp" else model.W_O[unit.layer].flatten(0, 1)
        longest = max(float((value * w_out[Unit.parse(unit.name).index]).norm()) for value in unit.values)
        by_sublayer.setdefault((unit.layer, unit.site), []).append((longest, unit))
    shares = {sublayer: sum((unit.layer, unit.site) == sublayer for unit in less.units) for sublayer in by_sublayer}
    assert max(shares.values()) - min(shares.values()) <= 1
    for sublayer, units in by_sublayer.items():
        largest = sorted(units, key=lambda pair: -pair[0])[: shares[sublayer]]
        shown = [unit for unit in less.units if (unit.layer, unit.site) == sublayer]
        assert shown == [unit for unit in whole.units if unit in [unit for _, unit in largest]]


@pytest.mark.parametrize(
    ("counts", "most", "shares"), [([5, 5], 20, [5, 5]), ([9, 1, 9], 11, [5, 1, 5]), ([3, 0, 8, 2], 7, [2, 0, 3, 2])]
)
def test_a_sublayer_with_few_units_leaves_room_for_the_others(counts, most, shares):
    assert _shares(counts, most) == shares


def test_figure_has_a_cell_for_each_unit_that_stays(reader):
    record = gate_raster(reader, EVIL)
    (trace,) = draw(record).data
    shown = {(row, at) for row, cells in enumerate(trace.z) for at, value in enumerate(cells) if value is not None}
    assert shown == {(row, at) for row, unit in enumerate(record.units) for at in unit.positions}
    row, at = next(iter(shown))
    hover = trace.text[row][at]
    assert record.units[row].name in hover
    assert record.units[row].place in hover
    assert all(unit.place.startswith("head ") == (unit.site == "attn") for unit in record.units)
    assert "promotes" in hover
    assert all("<script>" not in cell for cells in trace.text for cell in cells)
    labels = draw(record).layout.yaxis.ticktext
    assert [label.split(" (")[0] for label in labels] == [
        "layer 0 attention",
        "layer 0 neurons",
        "layer 1 attention",
        "layer 1 neurons",
    ]


def test_refusals(plain_model):
    with pytest.raises(ValueError, match="has none"):
        gate_raster(plain_model, TOKENS)
    cfg = sa.ModelConfig(n_layers=1, d_model=8, n_heads=2, d_mlp=16, n_ctx=16, d_vocab=20)
    soft = sa.SelfAblatingTransformer(cfg, sa.GateConfig(kind="soft", k_attn=2, k_mlp=2))
    with pytest.raises(ValueError, match="hard gates"):
        gate_raster(soft, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="top=-1"):
        gate_raster(sa.SelfAblatingTransformer(cfg, sa.GateConfig(k_attn=2, k_mlp=2)), torch.tensor([0, 1]), top=-1)
    with pytest.raises(ValueError, match="most=1 units: give at least 2"):
        gate_raster(sa.SelfAblatingTransformer(cfg, sa.GateConfig(k_attn=2, k_mlp=2)), torch.tensor([0, 1]), most=1)
