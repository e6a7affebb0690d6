"""Intervals, rank statistics and measures of concentration against scipy, by hand, and by coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from sa_lens import statistics
from sa_lens.statistics import auroc, bootstrap_interval, bootstrap_means, pearson, spearman, t_interval

numbers = st.lists(st.floats(-100, 100), min_size=2, max_size=8).filter(lambda x: np.std(x) > 1e-3)


# ----------------------------------------------------------------------------------------------------------- intervals


def test_bootstrap_interval_covers_and_narrows():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)) + 3
    wide, narrow = bootstrap_interval(values[:25]), bootstrap_interval(values)
    assert wide.low < wide.mean < wide.high
    assert narrow.mean == pytest.approx(values.double().mean().item())
    # a normal mean has standard error 1 / sqrt(n)
    assert narrow.high - narrow.low == pytest.approx(2 * 1.96 / 20, rel=0.15)
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)
    assert bootstrap_interval(values) == narrow
    assert bootstrap_interval(values, seed=1) != narrow
    with pytest.raises(ValueError, match="level"):
        bootstrap_interval(values, level=95)
    with pytest.raises(ValueError, match="0 samples"):
        bootstrap_interval(values[:0])


def test_bootstrap_interval_equals_its_definition_draw_by_draw():
    values = np.random.default_rng(5).normal(size=3000)
    drawn = np.random.default_rng(2).integers(3000, size=(700, 3000))
    low, high = np.quantile([values[row].mean() for row in drawn], [0.05, 0.95])
    interval = bootstrap_interval(values, level=0.9, resamples=700, seed=2)
    assert interval == pytest.approx((values.mean(), low, high))


def test_a_weighted_interval_draws_samples_with_all_their_items():
    sums, counts = torch.tensor([1.0, 8.0]), torch.tensor([1.0, 2.0])
    mean, low, high = bootstrap_interval(sums, counts, resamples=1000)
    assert mean == pytest.approx(3.0)
    # two samples: the means of (1, 1), (1, 3, 5) and (3, 5, 3, 5)
    assert (low, high) == (1.0, 4.0)
    assert math.isnan(bootstrap_interval(sums, torch.zeros(2)).mean)


def test_bootstrap_means_cover_as_often_as_they_say_and_leave_nan_out():
    rng = np.random.default_rng(0)
    hits = 0
    for i in range(100):
        values = rng.normal(3.0, 1.0, (60, 1))
        values[:10] = np.nan
        mean, low, high = bootstrap_means(values, resamples=300, seed=i)[:, 0]
        assert mean == pytest.approx(np.nanmean(values))
        hits += low <= 3 <= high
    assert 86 <= hits <= 99
    same = [bootstrap_means(values, resamples=50, seed=7) for _ in range(2)]
    assert np.array_equal(*same)
    with pytest.raises(ValueError, match="level=1"):
        bootstrap_means(values, level=1)
    with pytest.raises(ValueError, match="0 samples"):
        bootstrap_means(values[:0])


def test_a_column_without_values_has_no_mean_and_no_interval():
    table = np.array([[1.0, np.nan, 2.0], [3.0, np.nan, np.nan]])
    means = bootstrap_means(table, resamples=200)
    assert np.isnan(means[:, 1]).all()
    assert means[0, [0, 2]].tolist() == [2.0, 2.0]
    assert means[1:, 2].tolist() == [2.0, 2.0], "draws without the one value are left out"


def test_a_t_interval_by_hand():
    """Mean 4, sd 2, n 3: half width 4.303 * 2 / sqrt(3) = 4.968."""
    interval = t_interval([2.0, 4.0, 6.0])
    assert interval.mean == 4.0
    assert interval.high - 4 == pytest.approx(4.9683, abs=1e-4)
    assert 4 - interval.low == pytest.approx(4.9683, abs=1e-4)


@given(numbers)
def test_t_intervals_are_those_of_scipy(values):
    interval = t_interval(values)
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (interval.low, interval.high) == (pytest.approx(low, abs=1e-9), pytest.approx(high, abs=1e-9))


def test_too_few_values_have_no_t_interval():
    assert all(map(math.isnan, t_interval([])))
    single = t_interval([math.nan, 3.0])
    assert single.mean == 3.0
    assert math.isnan(single.low)
    assert math.isnan(single.high)


@pytest.mark.parametrize("level", [0.0, 1.0, -1.0, 2.0])
def test_a_level_outside_its_range_is_refused(level):
    with pytest.raises(ValueError, match="level"):
        t_interval([1.0, 2.0], level)


# --------------------------------------------------------------------------------------------------------------- ranks


def test_auroc_counts_ties_half_and_is_nan_without_members():
    scores = torch.tensor([[0.0], [0.0], [1.0], [2.0]])
    member = torch.tensor([[1.0, 0, 0], [0, 1, 0], [1, 1, 0], [0, 1, 0]])
    area = auroc(scores, member)
    # label 0: {0, 1} against {0, 2}: half, lost, won, lost
    assert area[0].item() == pytest.approx(1.5 / 4)
    assert area[1].item() == pytest.approx(2.5 / 3)
    assert area[2].isnan().all()


@pytest.mark.parametrize("n_scores", [1, 300])
def test_auroc_equals_the_statistic_of_mann_and_whitney(n_scores):
    generator = torch.Generator().manual_seed(n_scores)
    scores = torch.randint(0, 9, (40, n_scores), generator=generator).float()
    member = torch.rand(40, 3, generator=generator) < 0.4
    area = auroc(scores, member)
    for label in range(3):
        chosen = member[:, label]
        n = int(chosen.sum()) * int((~chosen).sum())
        expected = stats.mannwhitneyu(scores[chosen].numpy(), scores[~chosen].numpy()).statistic / n
        np.testing.assert_allclose(area[label], expected)


def test_correlations_are_those_of_scipy_and_nan_for_constants():
    rng = np.random.default_rng(3)
    x, y = rng.integers(0, 6, 50).astype(float), rng.normal(size=50)
    assert pearson(x, y) == pytest.approx(stats.pearsonr(x, y).statistic)
    assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)
    for correlation in (pearson, spearman):
        assert math.isnan(correlation(x, np.ones(50)))
        assert math.isnan(correlation(np.ones(50), x))
        assert math.isnan(correlation(x[:1], y[:1]))


# ------------------------------------------------------------------------------------------------------- concentration


@pytest.fixture
def x():
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(500, 4, generator=generator)
    x[:, 1] = x[:, 1].relu() ** 3
    x[:, 2] = 0
    x[:, 3] = 1000 + 0.1 * x[:, 3]
    return x


def test_effective_number_is_the_exponential_of_entropy():
    counts = torch.tensor([[5.0, 2, 0, 7], [5, 0, 0, 1], [5, 2, 0, 2]])
    effective = statistics.effective_number(counts)
    expected = [np.exp(stats.entropy(c)) if c.sum() else np.nan for c in counts.T.numpy()]
    np.testing.assert_allclose(effective, expected, rtol=1e-6)
    assert effective[0] == pytest.approx(3)


def test_gini_is_the_mean_difference_over_twice_the_mean(x):
    for i in (0, 1, 3):
        a = x[:, i].abs().double().numpy()
        slow = np.abs(a[:, None] - a[None]).mean() / (2 * a.mean())
        assert float(statistics.gini(x)[i]) == pytest.approx(slow, rel=1e-5, abs=1e-9)
    assert statistics.gini(x)[2].isnan()


def test_hoyer_is_0_for_equal_and_1_for_single_entries(x):
    assert float(statistics.hoyer(torch.full((9,), -2.0))) == pytest.approx(0)
    assert float(statistics.hoyer(torch.tensor([0.0, 3, 0, 0]))) == pytest.approx(1)
    a = x[:, 1].double()
    slow = (len(a) ** 0.5 - float(a.abs().sum() / a.norm())) / (len(a) ** 0.5 - 1)
    assert float(statistics.hoyer(x)[1]) == pytest.approx(slow)
