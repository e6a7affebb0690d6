"""Masks are put where they should: on another occurrence of the same token, or on other units."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from sa_lens.units.swaps import other_occurrences, permuted_units


@given(st.lists(st.lists(st.integers(0, 5), min_size=3, max_size=3), min_size=1, max_size=6), st.integers(0, 9))
def test_another_occurrence_of_the_same_token(rows, seed):
    tokens = torch.tensor(rows)
    flat = tokens.flatten().tolist()
    permutation = other_occurrences(tokens, tokens, torch.Generator().manual_seed(seed)).flatten().tolist()
    for i, donor in enumerate(permutation):
        if flat.count(flat[i]) == 1:
            assert donor == -1
        else:
            assert donor != i
            assert flat[donor] == flat[i]
    used = [donor for donor in permutation if donor >= 0]
    assert sorted(used) == [i for i, token in enumerate(flat) if flat.count(token) > 1]
    among = tokens[:1].clone()
    drawn = other_occurrences(tokens, among, torch.Generator().manual_seed(seed)).flatten().tolist()
    for token, donor in zip(flat, drawn, strict=True):
        assert (donor == -1) == (token not in rows[0])
        assert donor == -1 or rows[0][donor] == token


def test_donors_are_drawn_evenly():
    tokens, among = torch.zeros(1, 4000, dtype=torch.long), torch.tensor([[0, 1, 0, 0, 1]])
    drawn = other_occurrences(tokens, among, torch.Generator().manual_seed(0)).flatten()
    counts = torch.bincount(drawn, minlength=5)
    assert counts[1] == counts[4] == 0
    assert counts[[0, 2, 3]].min() > 1200


def test_permuted_masks_are_as_large_and_elsewhere():
    generator = torch.Generator().manual_seed(0)
    masks = {"a": torch.rand(3, 4, 2, 5), "b": (torch.rand(3, 4, 7) > 0.5)}
    permuted = permuted_units(masks, generator)
    for name, mask in masks.items():
        assert permuted[name].shape == mask.shape
        assert torch.equal(permuted[name].flatten(2).sort(-1).values, mask.flatten(2).sort(-1).values)
        assert not torch.equal(permuted[name], mask)
