"""Figures of units in every precision: those that float64 gives for the values that the model's own hooks hold."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from sa_lens.core.unit import Sublayer, Unit
from sa_lens.units import activation_sparsity, calibrate, leakage, snippets, sparsity, specialization

PRECISIONS = [torch.bfloat16, torch.float16, torch.float64]
MLP = Sublayer(1, "mlp")


@pytest.fixture(params=PRECISIONS, ids=str)
def narrow(request, gated):
    return copy.deepcopy(gated).to(request.param)


@pytest.mark.parametrize("stream", ["clean", "ablated"])
def test_units_of_a_narrow_model(narrow, stream, text, calibration):
    def values_on(tokens):
        context = narrow.ablated() if stream == "ablated" else narrow.clean()
        with torch.no_grad(), context:
            _, cache = narrow.run_with_cache(tokens)
        assert cache[MLP.value_hook].dtype == narrow.W_E.dtype
        return cache[MLP.value_hook].flatten(0, 1).double().numpy()

    rules = calibrate(narrow, calibration, stream, progress=False)
    peaks = np.quantile(values_on(calibration), 0.999, axis=0)
    np.testing.assert_allclose(rules[stream].peaks[MLP], peaks, rtol=1e-5)
    table = specialization(narrow, text, rules, stream, progress=False).table
    rows = table[(table["layer"] == 1) & (table["site"] == "mlp")]
    values = values_on(text)
    np.testing.assert_allclose(rows["mean"], values.mean(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(rows["std"], values.std(0), rtol=1e-4)
    np.testing.assert_allclose(rows["firing_rate"], (values > 0.5 * peaks).mean(0), atol=1e-12)
    sizes = np.sort(np.abs(values), 0)
    weights = 2 * np.arange(1, len(values) + 1) - len(values) - 1
    with np.errstate(invalid="ignore"):
        gini = weights @ sizes / (len(values) * sizes.sum(0))
    np.testing.assert_allclose(rows["gini"], gini, rtol=1e-4)
    largest = values.reshape(len(text), -1, values.shape[-1]).max(1)
    shown = snippets(narrow, text, stream, units=[Unit(*MLP, 3)], n_top=4, length=8, n_sample=0, progress=False)[MLP]
    np.testing.assert_allclose(shown.values.amax(-1)[0], np.sort(largest[:, 3])[::-1][:4], rtol=1e-6)
    share = activation_sparsity(narrow, text, stream, progress=False).query("layer == 1 and site == 'mlp'")
    small = np.abs(values) <= 0.01 * np.sqrt((values**2).mean(1, keepdims=True))
    assert share["share_small"].item() == pytest.approx(small.mean(), abs=1e-3)


def test_weights_of_a_narrow_model(narrow):
    table = sparsity(narrow, eps=0.3).set_index("weight")
    layer = [narrow.get_parameter(f"blocks.0.{name}").detach().double() for name in ("mlp.W_in", "mlp.W_out")]
    layer += [narrow.get_parameter(f"blocks.0.attn.W_{name}").detach().double() for name in "QKVO"]
    scale = np.sqrt(sum(float(x.square().sum()) for x in layer) / sum(x.numel() for x in layer))
    row = table.loc["blocks.0.mlp.W_in"]
    assert row["mean_abs"] == pytest.approx(float(layer[0].abs().mean()), rel=1e-6)
    assert row["share_small"] == float((layer[0].abs() < 0.3 * scale).double().mean())


def test_losses_of_a_narrow_model(narrow, text):
    losses = leakage(narrow, text, probe_tokens=0, progress=False).losses.set_index("condition")
    held_out = text[6:]
    for stream in ("clean", "ablated"):
        with torch.no_grad(), narrow.ablated() if stream == "ablated" else narrow.clean():
            log_p = narrow(held_out).double().log_softmax(-1)
        nats = -log_p[:, :-1].gather(-1, held_out[:, 1:, None])
        assert losses.loc[stream, "loss"] == pytest.approx(float(nats.mean()), rel=1e-5)
