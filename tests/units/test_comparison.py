"""Summaries and matched comparisons of tables of units."""

import numpy as np
import pandas as pd
import pytest

from sa_lens.units.comparison import compare, summary
from sa_lens.units.unit_tables import specialization


def table_of(rates, values, layer=0, site="mlp", stream="clean"):
    n = len(rates)
    return pd.DataFrame(
        {"stream": stream, "layer": layer, "site": site, "unit": range(n), "live": np.array(rates) > 0,
         "firing_rate": rates, "gini": values}
    )  # fmt: skip


def test_dead_units_count_in_the_share_of_live_ones_alone():
    found = summary(table_of([0.2, 0.0, 0.4, 0.0], [0.5, 0.9, 0.7, 0.9]), resamples=20).set_index(["site", "column"])
    assert found.loc[("all", "live")]["mean"] == 0.5
    assert found.loc[("all", "firing_rate")]["mean"] == pytest.approx(0.3)
    assert found.loc[("all", "gini")]["mean"] == pytest.approx(0.6)
    assert found.loc[("all", "gini")]["n"] == 2


def test_summary_gives_means_counts_and_intervals(gated, text, calibration):
    table = specialization(gated, text, calibration, progress=False).table
    found = summary(table, ["live", "firing_rate", "effective_tokens"], resamples=200).set_index(
        ["stream", "site", "column"]
    )
    for stream in ("clean", "ablated"):
        some = table[table.stream == stream]
        row = found.loc[(stream, "all", "effective_tokens")]
        assert row["mean"] == pytest.approx(some.effective_tokens.mean())
        assert row.n == some.effective_tokens.notna().sum()
        assert row.low <= row["mean"] <= row.high
        neurons = some[some.site == "mlp"]
        assert found.loc[(stream, "mlp", "live")]["mean"] == pytest.approx(neurons.live.mean())
        assert found.loc[(stream, "mlp", "firing_rate")]["mean"] == pytest.approx(
            neurons[neurons.live].firing_rate.mean()
        )
    assert set(summary(table, resamples=5).column) >= {"kurtosis", "gini", "hoyer", "mask_rate", "partner_jaccard"}
    with pytest.raises(ValueError, match="'colour' is not a measure"):
        summary(table, ["colour"])


def test_units_of_equal_activity_are_compared():
    """Rare units have 0.9, busy ones 0.3 in both models; one has more rare ones, which is no difference."""
    first = table_of([0.002] * 20 + [0.2] * 80, [0.9] * 20 + [0.3] * 80)
    second = table_of([0.002] * 80 + [0.2] * 20, [0.9] * 80 + [0.3] * 20)
    row = compare(first, second, ["gini"], resamples=50).iloc[0]
    assert row.second - row["first"] == pytest.approx(0.36)
    assert row.difference == pytest.approx(0)
    assert (row.n_cells, row.share_matched) == (2, 1)


def test_a_true_difference_is_found_with_its_interval():
    rng = np.random.default_rng(0)
    first = table_of(np.full(100, 0.01), rng.normal(0.5, 0.1, 100))
    second = table_of(np.full(80, 0.01), rng.normal(0.6, 0.1, 80))
    row = compare(first, second, ["gini"]).iloc[0]
    assert row.difference == pytest.approx(second.gini.mean() - first.gini.mean())
    half = 1.96 * (first.gini.var() / 100 + second.gini.var() / 80) ** 0.5
    assert row.high - row.low == pytest.approx(2 * half, rel=0.15)
    assert row.low > 0
    assert compare(second, first, ["gini"]).iloc[0].high < 0


def test_layers_and_kinds_are_kept_apart_and_dead_units_left_out():
    first = pd.concat([table_of([0.01, 0.01], [1.0, 1.0]), table_of([0.01, 0.0], [5.0, np.nan], layer=1)])
    second = pd.concat([table_of([0.01], [2.0]), table_of([0.01], [9.0], layer=1, site="attn")])
    row = compare(first, second, ["gini"], resamples=20).iloc[0]
    assert (row.first_matched, row.second_matched, row.n_cells) == (1, 2, 1)
    assert row.share_matched == pytest.approx(3 / 5)


def test_a_model_equals_itself_and_bad_input_is_refused(gated, text, calibration):
    table = specialization(gated, text, calibration, progress=False).table
    same = compare(table, table, resamples=30, streams=("ablated", "ablated"))
    known = same[same["first"].notna()]
    assert len(known) > 10
    assert (known.difference == 0).all()
    assert (known.low <= 0).all()
    assert (known.high >= 0).all()
    with pytest.raises(ValueError, match="the table has no rows"):
        summary(table[:0])
    with pytest.raises(ValueError, match="have 1 and 2"):
        compare(table[table.layer == 0], table)
    with pytest.raises(ValueError, match="no live unit in the 'ablated'"):
        compare(table[table.stream == "clean"], table, streams=("ablated", "clean"))
    with pytest.raises(ValueError, match="nothing to compare"):
        compare(table_of([0.01], [1.0]), table_of([0.5], [1.0]), ["gini"])
