"""Units have one name, which reads back, and a model says which it has."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

import sa_lens as sa
from sa_lens.core.unit import Sublayer, Unit, checked_unit, unit_counts

SHAPE = sa.ModelConfig(n_layers=2, d_model=8, n_heads=2, d_mlp=12, n_ctx=4, d_vocab=5)


@given(st.integers(0, 99), st.sampled_from(["attn", "mlp"]), st.integers(0, 10**6))
def test_a_unit_reads_back_from_its_name(layer, site, index):
    unit = Unit(layer, site, index)
    assert Unit.parse(str(unit)) == unit
    assert str(unit) == f"{unit.sublayer}.{index}"
    assert unit.sublayer == (layer, site)


@pytest.mark.parametrize("text", ["", "L1.mlp", "L1.head.3", "l1.mlp.3", "L1.mlp.3 ", "L-1.mlp.3", "layer 1 neuron 3"])
def test_another_spelling_is_refused(text):
    with pytest.raises(ValueError, match="names no unit"):
        Unit.parse(text)


def test_a_model_has_units_layer_by_layer():
    model = sa.SelfAblatingTransformer(SHAPE, device="cpu")
    counts = unit_counts(model)
    assert {str(sublayer): n for sublayer, n in counts.items()} == {
        "L0.attn": 8, "L0.mlp": 12, "L1.attn": 8, "L1.mlp": 12
    }  # fmt: skip
    assert list(counts)[1] == Sublayer(0, "mlp")
    assert checked_unit(model, "L1.mlp.11") == checked_unit(model, (1, "mlp", 11)) == Unit(1, "mlp", 11)
    for wrong in ("L1.mlp.12", "L2.attn.0", Unit(0, "attn", -1)):
        with pytest.raises(ValueError, match=r"no unit .*L0\.attn\.0 to L1\.attn\.7 and L0\.mlp\.0 to L1\.mlp\.11"):
            checked_unit(model, wrong)


def test_an_attention_unit_is_a_channel_of_a_head():
    assert Unit(1, "attn", 17).place_in_heads(8) == "head 2, channel 1"
    assert Unit(1, "mlp", 17).place_in_heads(8) == ""
