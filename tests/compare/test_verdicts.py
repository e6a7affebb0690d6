"""Intervals, paired tests, Holm's correction and the rule of verdicts, against scipy and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from sa_lens.compare.verdicts import LEAST_PAIRS, holm, paired_difference, verdict

numbers = st.lists(st.floats(-100, 100), min_size=2, max_size=8).filter(lambda x: np.std(x) > 1e-3)


@given(numbers, st.integers(0, 2**31))
def test_paired_tests_are_those_of_scipy(values, seed):
    reference = np.random.default_rng(seed).normal(size=len(values))
    found = paired_difference(values, reference.tolist())
    twin = stats.ttest_rel(values, reference)
    assert found.mean == pytest.approx(np.mean(np.subtract(values, reference)))
    if len(values) < LEAST_PAIRS:
        assert math.isnan(found.p)
        return
    assert found.p == pytest.approx(twin.pvalue, rel=1e-6, abs=1e-12)
    assert (found.p < 0.05) == (found.low > 0 or found.high < 0)


def test_pairs_with_a_missing_half_are_left_out():
    found = paired_difference([1.0, 5.0, math.nan, 4.0], [0.0, 3.0, 1.0, math.nan])
    assert (found.n, found.mean) == (2, 1.5)
    assert math.isnan(paired_difference([1.0], [0.0]).p)
    assert math.isnan(paired_difference([16.0, 21.0], [10.0, 15.0]).p), "two equal differences are no proof"


def test_equal_differences_have_no_test():
    assert math.isnan(paired_difference([3.0, 3.0, 3.0], [1.0, 1.0, 1.0]).p)
    assert paired_difference([3.0, 3.0, 3.0], [3.0, 3.0, 3.0]).p == 1.0
    with pytest.raises(ValueError, match="argument 2 is longer"):
        paired_difference([1.0], [1.0, 2.0])


def test_holm_by_hand():
    """Of four tests the smallest p is multiplied by 4, the next by 3 ...; none falls below the one before."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_tests_that_could_not_be_made_count_in_the_family():
    adjusted = holm([0.01, math.nan, 0.02])
    assert adjusted[0] == pytest.approx(0.03)
    assert math.isnan(adjusted[1])
    assert adjusted[2] == pytest.approx(0.04)
    assert holm([0.01], family=5) == pytest.approx([0.05])
    with pytest.raises(ValueError, match="family=1"):
        holm([0.1, 0.2], family=1)


def slow_holm(p: list[float], alpha: float) -> list[bool]:
    """Which hypotheses Holm's procedure rejects, step by step."""
    rejected = [False] * len(p)
    left = set(range(len(p)))
    while left:
        smallest = min(left, key=lambda i: p[i])
        if p[smallest] * len(left) >= alpha:
            break
        rejected[smallest] = True
        left.remove(smallest)
    return rejected


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_rejects_what_the_procedure_rejects(p):
    assert [adjusted < 0.05 for adjusted in holm(p)] == slow_holm(p, 0.05)


@pytest.mark.parametrize(
    ("difference", "p", "direction", "expected"),
    [
        (-3.0, 0.01, -1, "holds"),
        (3.0, 0.01, -1, "fails"),
        (3.0, 0.01, 1, "holds"),
        (-3.0, 0.01, 1, "fails"),
        (3.0, 0.05, 1, "undecided"),
        (3.0, 0.2, -1, "undecided"),
        (3.0, math.nan, 1, "undecided"),
    ],
)
def test_the_rule(difference, p, direction, expected):
    assert verdict(difference, p, direction) == expected


def test_a_claim_needs_a_direction():
    with pytest.raises(ValueError, match="direction=0"):
        verdict(1.0, 0.01, 0)
