"""The trie agrees with a plain list of patterns tried one by one at every position."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sa_lens.units.contexts import ANY, ContextTrie, Pattern

patterns = st.lists(st.tuples(st.lists(st.integers(-1, 3), min_size=1, max_size=4), st.floats(-5, 5)), max_size=12)
texts = st.lists(st.lists(st.integers(0, 3), min_size=6, max_size=6), min_size=1, max_size=4)


def trie_of(added):
    trie = ContextTrie()
    for tokens, activation in added:
        trie.add(tokens, activation)
    return trie


def by_list(added, row, t):
    """The most specific of the patterns that match at position t: most exact tokens, longest, added first."""
    best = None
    for order, (tokens, _) in enumerate(added):
        back = [row[t - i] if t - i >= 0 else None for i in range(len(tokens))]
        if all(a is not None and b in (ANY, a) for a, b in zip(back, tokens, strict=True)):
            rank = (sum(token != ANY for token in tokens), len(tokens), -order)
            if best is None or rank > best[0]:
                best = (rank, tuple(tokens))
    if best is None:
        return None
    return next(tokens for tokens, _ in added if tuple(tokens) == best[1])


def node_order(added):
    """Patterns in the order in which the trie makes their nodes, which a pattern inside a longer one precedes."""
    made = {}
    for tokens, _ in added:
        for i in range(1, len(tokens) + 1):
            made.setdefault(tuple(tokens[:i]), len(made))
    return sorted(added, key=lambda one: made[tuple(one[0])])


@given(patterns, texts)
def test_predictions_are_those_of_the_most_specific_pattern(added, rows):
    found = trie_of(added).predict(np.array(rows))
    ordered = node_order(added)
    for row, line in zip(rows, found, strict=True):
        for t, value in enumerate(line):
            speaks = by_list(ordered, row, t)
            expected = 0.0 if speaks is None else np.mean([a for tokens, a in added if tokens == speaks])
            assert value == pytest.approx(expected)


@given(patterns, texts, st.integers(0, 5))
def test_calibration_adds_what_is_seen(added, rows, seed):
    """Each position counts for the most specific of the patterns and their beginnings that end in an exact token."""
    trie, text = trie_of(added), np.array(rows)
    activations = np.random.default_rng(seed).normal(size=text.shape)
    before = {pattern.tokens: pattern for pattern in trie.patterns()}
    trie.calibrate(text, activations)
    after = {pattern.tokens: pattern for pattern in trie.patterns()}
    assert after.keys() >= before.keys()
    beginnings = [(tokens[:i], 0.0) for tokens, _ in added for i in range(1, len(tokens) + 1) if tokens[i - 1] != ANY]
    ordered = node_order(added + beginnings)
    for tokens in {tuple(tokens) for tokens, _ in ordered}:
        pattern = after.get(tokens, Pattern(tokens, 0.0, 0))
        here = [
            activations[i, t]
            for i, row in enumerate(rows)
            for t in range(len(row))
            if (speaks := by_list(ordered, row, t)) is not None and tuple(speaks) == tokens
        ]
        old = before.get(tokens, Pattern(tokens, 0.0, 0))
        assert pattern.weight == old.weight + len(here)
        if pattern.weight:
            assert pattern.activation == pytest.approx((old.activation * old.weight + sum(here)) / pattern.weight)


def test_patterns_are_counted_and_listed():
    trie = trie_of([([3, 1], 2.0), ([3, 1], 4.0), ([3], 1.0), ([ANY, 2], 5.0)])
    assert len(trie) == 3
    assert trie.patterns() == [Pattern((3, 1), 3.0, 2), Pattern((3,), 1.0, 1), Pattern((ANY, 2), 5.0, 1)] or set(
        trie.patterns()
    ) == {Pattern((3, 1), 3.0, 2), Pattern((3,), 1.0, 1), Pattern((ANY, 2), 5.0, 1)}
    assert trie.patterns()[0].tokens == (3, 1)
    assert trie.predict(np.array([[1, 3, 2, 0]])).tolist() == [[0.0, 3.0, 0.0, 5.0]]


def test_a_known_token_speaks_once_it_is_seen():
    trie = trie_of([([3, 1], 2.0)])
    trie.add_token(5)
    assert len(trie) == 1
    trie.calibrate(np.array([[5, 1, 3, 5]]), np.array([[4.0, 0.0, 2.0, 6.0]]))
    assert set(trie.patterns()) == {Pattern((3, 1), 2.0, 2), Pattern((5,), 5.0, 2)}


def test_a_context_does_not_cross_a_block():
    trie = trie_of([([1, 0], 7.0)])
    assert trie.predict(np.array([[0, 1], [1, 0], [1, 1]])).tolist() == [[0.0, 7.0], [0.0, 0.0], [0.0, 0.0]]


def test_an_empty_trie_predicts_nothing():
    trie = ContextTrie()
    assert len(trie) == 0
    assert not trie.predict(np.zeros((2, 3), dtype=np.int64)).any()


@pytest.mark.parametrize(("tokens", "activation"), [([], 1.0), ([-2], 1.0), ([1], float("nan"))])
def test_what_is_no_pattern_is_refused(tokens, activation):
    with pytest.raises(ValueError, match="pattern"):
        ContextTrie().add(tokens, activation)
