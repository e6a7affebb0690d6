"""A trie over contexts: which tokens, read backwards from the activating one, make a unit fire, and how strongly.

A pattern is a sequence of tokens that begins with the activating token and goes back in the text; `ANY` stands for any
token. Of all patterns that match at a position the most specific one speaks: most exact tokens, then longest, then the
one added first.

Source: the graph of Neuron2Graph (Foote et al., arXiv 2305.19911). Differs: the activating token may be `ANY`, and
`calibrate` corrects activations by those on a text, where the beginnings of patterns speak too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64

ANY = -1
"""Any token."""


class Pattern(NamedTuple):
    """A context in which a unit is active."""

    tokens: tuple[int, ...]
    """The activating token, then the tokens before it, backwards; `ANY` for any token."""
    activation: float
    """Mean activation."""
    weight: float
    """Number of observations in that mean."""


@dataclass
class _Node:
    exact: int
    """Exact tokens from the root to here."""
    depth: int
    ends_exact: bool = False
    """Whether its own token is exact: a pattern that ends in `ANY` says no more than the one before."""
    children: dict[int, int] = field(default_factory=dict)
    """Number of the child by token, `ANY` included."""
    total: float = 0.0
    weight: float = 0.0


class ContextTrie:
    """Patterns with their activations; empty at first."""

    def __init__(self) -> None:
        self._nodes = [_Node(0, 0)]

    def add(self, tokens: Sequence[int], activation: float) -> None:
        """Adds one observation of a pattern.

        Args:
            tokens: activating token first, then backwards; token ids or `ANY`.
            activation: activation that was seen there.

        Raises:
            ValueError: no token, a token that is neither an id nor `ANY`, or an activation that is not finite.
        """
        if not len(tokens) or min(tokens) < ANY:
            raise ValueError(f"pattern {tuple(tokens)} must hold at least one token; ids are from 0, ANY is {ANY}")
        if not np.isfinite(activation):
            raise ValueError(f"activation {activation} of pattern {tuple(tokens)} is not finite")
        node = self._nodes[self._path(tokens)]
        node.total += float(activation)
        node.weight += 1

    def add_token(self, token: int) -> None:
        """Makes a token known without an observation: it speaks once `calibrate` has seen it."""
        self._path((token,))

    def _path(self, tokens: Sequence[int]) -> int:
        """The node of a pattern, made if need be."""
        at = 0
        for token in map(int, tokens):
            node = self._nodes[at]
            if token not in node.children:
                node.children[token] = len(self._nodes)
                self._nodes.append(_Node(node.exact + (token != ANY), node.depth + 1, token != ANY))
            at = node.children[token]
        return at

    def __len__(self) -> int:
        """Number of different patterns."""
        return sum(node.weight > 0 for node in self._nodes)

    def patterns(self) -> list[Pattern]:
        """All patterns, those with most observations first."""
        return sorted(self._walk(0, ()), key=lambda pattern: -pattern.weight)

    def _walk(self, at: int, tokens: tuple[int, ...]) -> Iterator[Pattern]:
        node = self._nodes[at]
        if node.weight:
            yield Pattern(tokens, node.total / node.weight, node.weight)
        for token, child in node.children.items():
            yield from self._walk(child, (*tokens, token))

    def match(
        self, tokens: Int64[np.ndarray, "block pos"], *, beginnings: bool = False
    ) -> Int64[np.ndarray, "block pos"]:
        """Node of the pattern that speaks at each position, -1 where none matches; blocks are separate texts.

        Args:
            beginnings: beginnings of patterns (the activating token with fewer tokens before it) may speak too, even
                those without an activation of their own.
        """
        blocks, length = tokens.shape
        text = tokens.reshape(-1)
        place = np.tile(np.arange(length), blocks)
        chosen = np.full(len(text), -1, dtype=np.int64)
        exact, depth = np.zeros(len(text), dtype=np.int64), np.zeros(len(text), dtype=np.int64)
        pending = [(0, np.arange(len(text)))]
        while pending:
            at, positions = pending.pop()
            node = self._nodes[at]
            if node.weight or (beginnings and node.ends_exact):
                better = (node.exact > exact[positions]) | (
                    (node.exact == exact[positions])
                    & ((node.depth > depth[positions]) | ((node.depth == depth[positions]) & (chosen[positions] > at)))
                )
                where = positions[better | (chosen[positions] < 0)]
                chosen[where], exact[where], depth[where] = at, node.exact, node.depth
            positions = positions[place[positions] >= node.depth]
            here = text[positions - node.depth]
            for token, child in node.children.items():
                reached = positions if token == ANY else positions[here == token]
                if len(reached):
                    pending.append((child, reached))
        return chosen.reshape(blocks, length)

    def calibrate(self, tokens: Int64[np.ndarray, "block pos"], activations: Float64[np.ndarray, "block pos"]) -> None:
        """Adds the activations of a text to the patterns, and beginnings of patterns, that speak there.

        A context seen before is thus told from its last tokens alone, which may leave the unit silent.
        """
        nodes = self.match(tokens, beginnings=True).reshape(-1)
        seen = nodes >= 0
        totals = np.bincount(nodes[seen], weights=activations.reshape(-1)[seen], minlength=len(self._nodes))
        counts = np.bincount(nodes[seen], minlength=len(self._nodes))
        for node, total, count in zip(self._nodes, totals, counts, strict=True):
            node.total += float(total)
            node.weight += int(count)

    def predict(self, tokens: Int64[np.ndarray, "block pos"]) -> Float64[np.ndarray, "block pos"]:
        """Activation predicted at each position: that of the pattern that speaks, 0 where none matches."""
        means = np.array([node.total / node.weight if node.weight else 0.0 for node in self._nodes])
        nodes = self.match(tokens)
        return np.where(nodes >= 0, means[nodes], 0.0)
