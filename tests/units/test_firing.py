"""The firing rule is the one of the definition, on the whole text at once."""

import copy
import dataclasses

import numpy as np
import pytest
import torch

from sa_lens.core.unit import Sublayer, unit_counts
from sa_lens.units import effective_connections, explain, specialization
from sa_lens.units.firing import Thresholds, calibrate


def values_of(model, text, stream, sublayer):
    with torch.no_grad():
        if stream == "clean":
            return model.run_with_cache(text)[1][sublayer.value_hook].flatten(2).flatten(0, 1)
        with model.ablated():
            return model.run_with_cache(text)[1][sublayer.value_hook].flatten(2).flatten(0, 1)


@pytest.mark.parametrize("n_blocks", [1, 80])
def test_percentile_and_scale_agree_with_numpy(gated, calibration, n_blocks):
    text = calibration[:n_blocks]
    rules = calibrate(gated, text, ("clean", "ablated"), progress=False)
    for stream, rule in rules.items():
        for sublayer in unit_counts(gated):
            x = values_of(gated, text, stream, sublayer).double().numpy()
            scores = np.abs(x) if sublayer.site == "attn" else x
            np.testing.assert_allclose(rule.peaks[sublayer], np.quantile(scores, 0.999, axis=0), rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(rule.rms[sublayer], np.sqrt((x**2).mean()), rtol=1e-5)


def test_units_fire_above_half_their_percentile():
    sublayer, heads = Sublayer(0, "mlp"), Sublayer(0, "attn")
    rule = Thresholds("clean", {sublayer: torch.tensor([2.0, 4.0, 1e-5, -3.0])} | {heads: torch.tensor([2.0])},
                      {sublayer: 1.0, heads: 1.0}, 10)  # fmt: skip
    assert rule.live(sublayer).tolist() == [True, True, False, False]
    # levels 1, 2, never, never; equal is not above
    fires = rule.fires(sublayer, torch.tensor([[1.0, 2.1, 9.0, 9.0], [1.1, -5.0, 0.0, 0.0]]))
    assert fires.tolist() == [[False, True, False, False], [True, False, False, False]]
    low = dataclasses.replace(rule, share=0.3)
    assert low.fires(sublayer, torch.tensor([0.7, 0.0, 0.0, 0.0])).tolist() == [True, False, False, False]
    assert rule.fires(heads, torch.tensor([[-1.5], [0.9]])).tolist() == [[True], [False]]
    with pytest.raises(ValueError, match=r"share=0 .* above 0"):
        dataclasses.replace(rule, share=0)
    with pytest.raises(ValueError, match=r"share=1\.2 .* at most 1"):
        calibrate(None, None, share=1.2)  # refused before the model and the text are read, which are none here


def test_a_silent_unit_is_dead_and_a_rare_one_below_the_percentile_too(planted, even_text):
    rule = calibrate(planted, even_text, progress=False)["clean"]
    assert rule.live(Sublayer(0, "mlp")).tolist() == [True, True, True, False, True, True]
    assert not rule.live(Sublayer(0, "attn")).any()
    once = torch.full((200, 16), 9)
    once[0, 0] = 7
    assert not calibrate(planted, once, progress=False)["clean"].live(Sublayer(0, "mlp"))[1]


def test_thresholds_of_other_weights_are_refused(gated, text, calibration):
    rules = calibrate(gated, calibration, ("clean", "ablated"), progress=False)
    nudged = copy.deepcopy(gated)
    with torch.no_grad():
        nudged.blocks[0].attn.W_O[1, 2, 3] += 1e-3
    other_gates = copy.deepcopy(gated)
    other_gates.gates = dataclasses.replace(gated.gates, k_mlp=3)
    for stream, rule in rules.items():
        with pytest.raises(ValueError, match="model with other weights or gates: calibrate this one"):
            specialization(nudged, text, rules, stream, progress=False)
        with pytest.raises(ValueError, match="other weights or gates"):
            explain(nudged, text, rule, progress=False)
        rule.check_model(copy.deepcopy(gated))
        table = specialization(gated, text, rules, stream, progress=False).table
        assert len(effective_connections(gated, table)) == 5
        with pytest.raises(ValueError, match="table is that of a model with other weights or gates"):
            effective_connections(nudged, table)
    rules["clean"].check_model(other_gates)
    with pytest.raises(ValueError, match="other weights or gates"):
        rules["ablated"].check_model(other_gates)


def test_no_unit_to_explain_is_refused(gated, text, calibration):
    with pytest.raises(ValueError, match="units is empty"):
        explain(gated, text, calibrate(gated, calibration, progress=False)["clean"], units=[], progress=False)
