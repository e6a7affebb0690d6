"""Measures against scipy or the formula written out."""

import numpy as np
import pytest
import torch
from scipy import stats

from sa_lens.units import measures
from sa_lens.units.tallies import CoActivation, Moments, TokenTally


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
    found = measures.effective_number(counts)
    expected = [np.exp(stats.entropy(c)) if c.sum() else np.nan for c in counts.T.numpy()]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert found[0] == pytest.approx(3)


def test_gini_is_the_mean_difference_over_twice_the_mean(x):
    for i in (0, 1, 3):
        a = x[:, i].abs().double().numpy()
        slow = np.abs(a[:, None] - a[None]).mean() / (2 * a.mean())
        assert float(measures.gini(x)[i]) == pytest.approx(slow, rel=1e-5, abs=1e-9)
    assert measures.gini(x)[2].isnan()


def test_hoyer_is_0_for_equal_and_1_for_single_entries(x):
    assert float(measures.hoyer(torch.full((9,), -2.0))) == pytest.approx(0)
    assert float(measures.hoyer(torch.tensor([0.0, 3, 0, 0]))) == pytest.approx(1)
    a = x[:, 1].double()
    slow = (len(a) ** 0.5 - float(a.abs().sum() / a.norm())) / (len(a) ** 0.5 - 1)
    assert float(measures.hoyer(x)[1]) == pytest.approx(slow)


@pytest.mark.parametrize("batch", [500, 64, 7])
def test_moments_in_batches_agree_with_scipy_on_the_whole(x, batch):
    moments = Moments()
    for part in x.split(batch):
        moments.add(part)
    whole = x.double().numpy()
    np.testing.assert_allclose(moments.mean(), whole.mean(0), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(moments.variance(), whole.var(0), rtol=1e-4, atol=1e-9)
    some = [0, 1, 3]
    np.testing.assert_allclose(moments.kurtosis()[some], stats.kurtosis(whole[:, some]), rtol=1e-3, atol=1e-3)
    assert moments.kurtosis()[2].isnan()
    np.testing.assert_allclose(moments.squares(), (whole**2).sum(0), rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(moments.absolute(), np.abs(whole).sum(0), rtol=1e-5)


def test_token_tally_and_pairs_agree_with_loops():
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randint(0, 5, (60,), generator=generator)
    fired = (torch.rand(60, 4, generator=generator) < 0.3).float()
    fired[:, 3] = 0
    slot_of = torch.tensor([0, 2, 1, 2, 2])
    tally, company = TokenTally(slot_of, 3, 4, exact=True), CoActivation(torch.arange(4))
    for part in (slice(0, 25), slice(25, None)):
        tally.add(tokens[part], fired[part])
        company.add(fired[part])
    for slot in range(3):
        for unit in range(4):
            expected = sum(float(fired[i, unit]) for i in range(60) if slot_of[tokens[i]] == slot)
            assert tally.counts[slot, unit] == expected
    for a in range(4):
        for b in range(4):
            both = sum(bool(fired[i, a]) and bool(fired[i, b]) for i in range(60))
            either = sum(bool(fired[i, a]) or bool(fired[i, b]) for i in range(60))
            assert float(company.jaccard()[a, b]) == pytest.approx(both / either if either else 0)
    values, places = company.partners(2)
    assert (places != torch.arange(4)[:, None]).all()
    assert (values[:, 0] >= values[:, 1]).all()


def test_bootstrap_interval_covers_as_often_as_it_says_and_leaves_nan_out():
    rng = np.random.default_rng(0)
    hits = 0
    for i in range(100):
        values = rng.normal(3.0, 1.0, (60, 1))
        values[:10] = np.nan
        mean, low, high = measures.bootstrap_means(values, resamples=300, seed=i)[:, 0]
        assert mean == pytest.approx(np.nanmean(values))
        hits += low <= 3 <= high
    assert 86 <= hits <= 99
    same = [measures.bootstrap_means(values, resamples=50, seed=7) for _ in range(2)]
    assert np.array_equal(*same)
    with pytest.raises(ValueError, match="level=1"):
        measures.bootstrap_means(values, level=1)
    with pytest.raises(ValueError, match="0 units"):
        measures.bootstrap_means(values[:0])
