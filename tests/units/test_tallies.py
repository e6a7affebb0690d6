"""Counters of specialization against scipy or the formula written out."""

import numpy as np
import pytest
import torch
from scipy import stats

from sa_lens.units.tallies import CoActivation, Moments, TokenTally


@pytest.fixture
def x():
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(500, 4, generator=generator)
    x[:, 1] = x[:, 1].relu() ** 3
    x[:, 2] = 0
    x[:, 3] = 1000 + 0.1 * x[:, 3]
    return x


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
