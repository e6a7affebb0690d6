"""Sparsity against the formulas on all weights or values at once."""

import numpy as np
import pytest
import torch

from sa_lens.core.unit import unit_counts
from sa_lens.statistics import gini, hoyer
from sa_lens.units.sparsity_tables import activation_sparsity, effective_connections, sparsity
from sa_lens.units.unit_tables import specialization


def test_weights_row_by_row_and_in_all(gated):
    table = sparsity(gated, eps=0.1).set_index("weight")
    weights = {
        name: x.detach()
        for name, x in gated.named_parameters()
        if "_gate." not in name and name not in gated.zero_biases
    }
    weights["unembed.W_U"] = gated.W_U
    matrices = {name: x for name, x in weights.items() if name.rsplit(".", 1)[-1].startswith("W_")}
    assert set(table.index[:-4]) == set(matrices)
    for name, x in matrices.items():
        row = table.loc[name]
        assert row.mean_abs == pytest.approx(float(x.abs().mean()), rel=1e-5)
        assert row.hoyer == pytest.approx(float(hoyer(x.flatten())))
        assert row.gini == pytest.approx(float(gini(x.flatten())))
        layer = [m for other, m in matrices.items() if other.split(".")[:2] == name.split(".")[:2] and "blocks" in name]
        scale = torch.cat([m.flatten() for m in layer or [x]]).square().mean().sqrt()
        assert row.share_small == pytest.approx(float((x.abs() < 0.1 * scale).float().mean()))
    everything = torch.cat([x.flatten() for x in weights.values()])
    assert table.loc["all parameters"].n == len(everything)
    assert table.loc["all parameters"].mean_abs == pytest.approx(float(everything.abs().mean()), rel=1e-5)
    inner = torch.cat([x.flatten() for name, x in weights.items() if "embed" not in name])
    row = table.loc["all parameters without embeddings"]
    assert (row.n, row.mean_abs) == (len(inner), pytest.approx(float(inner.abs().mean()), rel=1e-5))
    sizes = {name: x.numel() for name, x in matrices.items() if "embed" not in name}
    for measure in ("hoyer", "gini", "share_small"):
        mean = sum(n * table.loc[name][measure] for name, n in sizes.items()) / sum(sizes.values())
        assert table.loc["matrices without embeddings"][measure] == pytest.approx(mean)


def test_only_the_papers_measure_depends_on_scale(gated):
    import copy

    scaled = copy.deepcopy(gated)
    with torch.no_grad():
        for parameter in scaled.parameters():
            parameter.mul_(3)
    one, other = sparsity(gated), sparsity(scaled)
    np.testing.assert_allclose(other.mean_abs, 3 * one.mean_abs, rtol=1e-5)
    for column in ("hoyer", "gini", "share_small"):
        np.testing.assert_allclose(other[column], one[column], rtol=1e-4, atol=1e-6)


def test_matrices_rescaled_against_one_another_leave_function_hoyer_and_gini(gated, text):
    import copy

    scaled = copy.deepcopy(gated)
    with torch.no_grad():
        for block in scaled.blocks:
            for name, factor in (("W_V", 4), ("b_V", 4), ("W_O", 1 / 4), ("W_Q", 3), ("b_Q", 3), ("W_K", 1 / 3)):
                getattr(block.attn, name).mul_(factor)
        torch.testing.assert_close(scaled(text), gated(text), atol=1e-5, rtol=1e-4)
    one, other = sparsity(gated), sparsity(scaled)
    for column in ("hoyer", "gini"):
        np.testing.assert_allclose(other[column], one[column], rtol=1e-4)
    assert not np.allclose(other.mean_abs, one.mean_abs, rtol=1e-2)


def test_activations_token_by_token(gated, text):
    table = activation_sparsity(gated, text, eps=0.2, progress=False).set_index(["stream", "layer", "site"])
    with torch.no_grad():
        caches = {"clean": gated.run_with_cache(text)[1]}
        with gated.ablated():
            caches["ablated"] = gated.run_with_cache(text)[1]
    for stream, cache in caches.items():
        for sublayer in unit_counts(gated):
            tokens = cache[sublayer.value_hook].flatten(2).flatten(0, 1)
            row = table.loc[(stream, sublayer.layer, sublayer.site)]
            assert row.hoyer == pytest.approx(np.mean([float(hoyer(x)) for x in tokens]), rel=1e-5)
            assert row.gini == pytest.approx(np.mean([float(gini(x)) for x in tokens]), rel=1e-5)
            # far below 0, gelu is 0 in one of its formulas and next to 0 in another
            assert row.share_zero == pytest.approx(float((tokens == 0).float().mean()), abs=0.005)
            small = [float((x.abs() <= 0.2 * x.square().mean().sqrt()).float().mean()) for x in tokens]
            assert row.share_small == pytest.approx(np.mean(small), rel=1e-5)
    kept = 1 - table.loc["ablated"].share_zero
    # a neuron that stays may be zero itself
    assert 0.3 < kept[0, "mlp"] <= 7 / 20 + 1e-9
    assert kept[0, "attn"] == pytest.approx(6 / 16)


def test_connections_of_live_and_firing_units(planted, even_text):
    record = specialization(planted, even_text, even_text, progress=False)
    table = effective_connections(planted, record.table).set_index("site")
    # the rows that the neurons read: 4, 1, 1, all 26 but of a dead one, 24 and 1; nothing is written out
    rates = record.table.query("site == 'mlp'").firing_rate.to_numpy()
    reads = np.array([4, 1, 1, 26, 24, 1])
    row = table.loc["mlp"]
    assert (row.weights, row.not_small, row.live) == (2 * 26 * 6, reads.sum(), reads.sum() - 26)
    assert row.firing == pytest.approx((reads * rates).sum())
    assert table.loc["attn"].not_small == 0
    assert table.loc["all"].live == row.live
    assert table.loc["all"].live_share == pytest.approx(row.live / (2 * 26 * 6 + 2 * 26 * 4))


def test_bad_input_gets_a_clear_error(gated, planted, text, even_text):
    for call in (
        lambda: sparsity(gated, eps=0),
        lambda: activation_sparsity(gated, text, eps=-1, progress=False),
    ):
        with pytest.raises(ValueError, match="eps="):
            call()
    table = specialization(planted, even_text, even_text, progress=False).table
    with pytest.raises(ValueError, match="the table is that of a model with other weights or gates"):
        effective_connections(gated, table)
    with pytest.raises(ValueError, match="must be 'clean' or 'ablated'"):
        activation_sparsity(gated, text, "dark", progress=False)
