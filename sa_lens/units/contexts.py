"""Contexts in which a unit fires: searched by running changed snippets, stored in a trie that predicts activations.

`prune` shortens each snippet in which the unit fires, `substitute` replaces its tokens, and `ContextTrie` stores the
resulting patterns. Each change is tested by running the model on the changed snippet and reading the unit at the
activating token. The result is the mean over several runs with different text before the snippet and different tokens
in place of those left out, so that a pattern does not depend on one text.

A pattern is a sequence of tokens that begins with the activating token and goes backwards in the text; `ANY` stands for
any token. Of all patterns that match at a position, the trie uses the most specific one: the one with most exact
tokens, then the longest, then the one that was added first.

Source: Neuron2Graph (Foote et al., arXiv 2305.19911). Differs: other text precedes the contexts (without it, all
positions would be shifted); left-out tokens are replaced by random tokens instead of padding; substitutes come from the
model's own next-token predictions instead of a second language model; the activating token may be `ANY`;
`ContextTrie.calibrate` averages activations with those on a text, in which shortened patterns match too.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64
from torch import Tensor

from sa_lens.config import Stream
from sa_lens.core.host import Host, device_of, in_stream
from sa_lens.core.last_position import Prompts, embed_prompts, run_to_position, why_not_by_nodes
from sa_lens.core.nodes import NodeFunctions
from sa_lens.core.unit import Unit
from sa_lens.units.firing import unit_scores

ANY = -1
"""Stands for any token in a pattern."""

TOKENS_AT_ONCE = 2048
"""Tokens per batch."""

KEEP = 0.5
"""A change is accepted if this share of the snippet's activation remains and the unit still fires."""

DRAWS = 3
"""Number of runs that are averaged to test a change."""


def read_scores(
    model: Host,
    stream: Stream,
    unit: Unit,
    rows: Int64[np.ndarray, "row pos"],
    positions: Int64[np.ndarray, " row"],
) -> Float32[np.ndarray, " row"]:
    """Returns the score of a unit at one position of each short text; tokens after the position have no effect.

    The score is the value of a neuron or the absolute value of an attention unit.
    """
    device = device_of(model)
    parts = []
    step = max(1, TOKENS_AT_ONCE // rows.shape[1])
    for start in range(0, len(rows), step):
        tokens = torch.from_numpy(rows[start : start + step]).to(device)
        places = torch.from_numpy(positions[start : start + step]).to(device)

        def keep(x: Tensor, hook: Any, places: Tensor = places) -> None:
            parts.append(x.flatten(2)[torch.arange(len(places), device=x.device), places, unit.index])

        with torch.no_grad(), in_stream(model, stream, position=places):
            hooks = [(unit.sublayer.value_hook, keep)]
            model.run_with_hooks(tokens, fwd_hooks=hooks, stop_at_layer=unit.layer + 1)
    return unit_scores(unit, torch.cat(parts)).float().cpu().numpy() if parts else np.zeros(0, np.float32)


class Texts(NamedTuple):
    """Short texts, and the position in each at which a unit is read."""

    rows: Int64[np.ndarray, "row pos"]
    """Tokens; those after the position have no effect."""
    positions: Int64[np.ndarray, " row"]
    """Position in each row."""


class Guess(NamedTuple):
    """A request for likely tokens at each position of texts; see `likely_tokens`."""

    rows: Int64[np.ndarray, "row pos"]
    """Tokens."""
    n_likely: int
    """Number of likely tokens at each position."""


Result = TypeVar("Result")
Asking = Generator[Texts | Guess, np.ndarray, Result]
"""Work on one unit that yields questions to the model: `Texts` are answered by scores `[row]`, a `Guess` by tokens."""


def answer(model: Host, stream: Stream, jobs: Sequence[tuple[Unit, Asking[Result]]], longest: int) -> list[Result]:
    """Runs jobs, each with the unit that it asks about, and returns their results; questions are answered together.

    Args:
        longest: number of tokens of the longest row.
    """
    functions = NodeFunctions(model, longest) if why_not_by_nodes(model) is None else None
    results: dict[int, Result] = {}
    asked: dict[int, Texts | Guess] = {}

    def advance(i: int, reply: np.ndarray | None) -> None:
        try:
            asked[i] = jobs[i][1].send(reply)  # type: ignore[arg-type]
        except StopIteration as end:
            results[i] = end.value

    for i in range(len(jobs)):
        advance(i, None)
    while asked:
        texts = {i: question for i, question in asked.items() if isinstance(question, Texts)}
        guesses = {i: question for i, question in asked.items() if isinstance(question, Guess)}
        asked.clear()
        places = [(jobs[i][0], *question) for i, question in texts.items()]
        answers = dict(zip(texts, _read_together(model, stream, places, functions), strict=True))
        for count in {question.n_likely for question in guesses.values()}:
            alike = {i: question.rows for i, question in guesses.items() if question.n_likely == count}
            likely = likely_tokens(model, np.concatenate(list(alike.values())), count)
            cuts = np.cumsum([len(rows) for rows in alike.values()])[:-1]
            answers |= dict(zip(alike, np.split(likely, cuts), strict=True))
        for i, reply in answers.items():
            advance(i, reply)
    return [results[i] for i in range(len(jobs))]


Places = Sequence[tuple[Unit, np.ndarray, np.ndarray]]
"""Units, each with the rows and positions at which it is read."""


def _read_together(
    model: Host, stream: Stream, places: Places, functions: NodeFunctions | None
) -> list[Float32[np.ndarray, " row"]]:
    """Reads units, all units of a layer in one pass that ends at this layer; without `functions`, one by one."""
    if functions is None:
        return [read_scores(model, stream, unit, rows, positions) for unit, rows, positions in places]
    device, n_attn = device_of(model), model.cfg.n_heads * model.cfg.d_head
    scores: list[Any] = [np.zeros(0, np.float32)] * len(places)
    whole = stream == "ablated" and model.gates.reads_global  # type: ignore[attr-defined]
    for layer in sorted({unit.layer for unit, rows, _ in places if len(rows)}):
        own = [i for i, (unit, rows, _) in enumerate(places) if unit.layer == layer and len(rows)]
        width = max(places[i][1].shape[1] for i in own)
        rows = np.concatenate([np.pad(places[i][1], ((0, 0), (0, width - places[i][1].shape[1]))) for i in own])
        positions = np.concatenate([places[i][2] for i in own])
        # the units of a layer are its attention units, then its neurons
        indices = [unit.index + (n_attn if unit.site == "mlp" else 0) for unit, *_ in places]
        columns = np.concatenate([np.full(len(places[i][1]), indices[i]) for i in own])
        values = np.zeros(len(rows), np.float32)
        # rows of similar length run together, so that there is little padding
        order = np.argsort(positions, kind="stable")
        start = 0
        while start < len(order):
            part = order[start : start + max(1, TOKENS_AT_ONCE // int(positions[order[start]] + 1))]
            start += len(part)
            last = torch.from_numpy(positions[part]).to(device)
            tokens = torch.from_numpy(rows[part, : int(positions[part].max()) + 1]).to(device)
            prompts = Prompts.of(embed_prompts(model, [tokens])[0], last)
            ran = run_to_position(
                model, functions, prompts, ablated=stream == "ablated", layers=None if whole else layer + 1
            )
            x = torch.cat([sites[layer].flatten(1) for sites in (ran.z[stream], ran.post[stream]) if sites], 1)
            column = torch.from_numpy(columns[part]).to(device)
            values[part] = x.gather(1, column[:, None])[:, 0].float().cpu().numpy()
        cuts = np.cumsum([len(places[i][1]) for i in own])[:-1]
        for i, of_unit in zip(own, np.split(values, cuts), strict=True):
            scores[i] = unit_scores(places[i][0], torch.from_numpy(of_unit)).numpy()
    return scores


class Context(NamedTuple):
    """The part of a snippet that makes the unit fire."""

    tokens: tuple[int, ...]
    """The activating token, then the tokens before it, backwards; `ANY` for any token."""
    activation: float
    """Mean score of the unit in this context."""
    importance: tuple[float, ...]
    """Share of the activation that is lost when each token is replaced, from 0 to 1, in the order of `tokens`."""


class Fill:
    """Random text before contexts and random tokens in place of `ANY`, drawn from a text."""

    def __init__(self, text: Int64[np.ndarray, "block pos"], before: int, rng: np.random.Generator) -> None:
        self.text, self.before, self.rng = text, before, rng

    def rows(
        self, contexts: list[tuple[int, ...]], width: int, draws: int = DRAWS
    ) -> tuple[Int64[np.ndarray, "row pos"], Int64[np.ndarray, " row"]]:
        """Returns `draws` rows per context, and the position of the activating token in each row."""
        n = len(contexts) * draws
        rows = self.rng.choice(self.text.reshape(-1), size=(n, self.before + width))
        if self.before:
            block = self.rng.integers(len(self.text), size=n)
            start = self.rng.integers(self.text.shape[1] - self.before + 1, size=n)
            rows[:, : self.before] = self.text[block[:, None], start[:, None] + np.arange(self.before)]
        positions = np.repeat([self.before + len(context) - 1 for context in contexts], draws)
        for i, context in enumerate(contexts):
            for back, token in enumerate(context):
                if token != ANY:
                    rows[i * draws : (i + 1) * draws, self.before + len(context) - 1 - back] = token
        return rows, positions

    def judge(self, contexts: list[tuple[int, ...]], width: int) -> Asking[Float32[np.ndarray, " context"]]:
        """Asks for the mean score of the unit in each context."""
        if not contexts:
            return np.zeros(0, np.float32)
        scores = yield Texts(*self.rows(contexts, width))
        return scores.reshape(len(contexts), -1).mean(1)


def prune(
    snippets: list[tuple[int, ...]], scores: list[float], level: float, fill: Fill
) -> Asking[list[Context | None]]:
    """Finds the shortest context of each snippet that keeps the activation; tokens without effect become `ANY`.

    Args:
        snippets: tokens of each snippet, from the activating one backwards.
        scores: score of the unit in each snippet.
        level: score above which the unit fires.

    Returns:
        One context per snippet; None if even the whole snippet does not keep the activation after other text.
    """
    width = max(len(snippet) for snippet in snippets)
    needs = [max(level, KEEP * score) for score in scores]
    # a few lengths are enough, since the farthest tokens are tried next, one by one
    tried = [(i, length) for i, snippet in enumerate(snippets) for length in lengths_up_to(len(snippet))]
    means = yield from fill.judge([snippets[i][:length] for i, length in tried], width)
    contexts: dict[int, list[int]] = {}
    activation: dict[int, float] = {}
    for (i, length), mean in zip(tried, means, strict=True):
        if i not in contexts and mean > needs[i]:
            contexts[i], activation[i] = list(snippets[i][:length]), float(mean)
    importance = {i: [0.0] * len(context) for i, context in contexts.items()}
    # the farthest token comes first; tokens that are left out stay left out when the next one is tested
    for back in range(width - 1, -1, -1):
        asked = [i for i, context in contexts.items() if back < len(context) and _has_other_tokens(context, back)]
        without = [tuple(ANY if j == back else token for j, token in enumerate(contexts[i])) for i in asked]
        means = yield from fill.judge(without, width)
        for i, context, mean in zip(asked, without, means, strict=True):
            importance[i][back] = min(1.0, max(0.0, 1 - float(mean) / activation[i]))
            if mean > needs[i]:
                contexts[i], activation[i] = list(context), float(mean)
    for kept in contexts.values():
        while kept[-1] == ANY:
            kept.pop()
    return [
        Context(tuple(contexts[i]), activation[i], tuple(importance[i][: len(contexts[i])])) if i in contexts else None
        for i in range(len(snippets))
    ]


def lengths_up_to(longest: int) -> list[int]:
    """Returns 1, 2, 3, 4, 6, 9, 13, ... up to the longest itself."""
    lengths = [1]
    while lengths[-1] < longest:
        lengths.append(min(longest, max(lengths[-1] + 1, lengths[-1] * 3 // 2)))
    return lengths


def _has_other_tokens(context: list[int], back: int) -> bool:
    """Returns whether another token is exact; a context of `ANY` alone would match everywhere."""
    return any(token != ANY for j, token in enumerate(context) if j != back)


def substitute(
    contexts: dict[tuple[int, ...], list[list[int]]], level: float, fill: Fill
) -> Asking[list[tuple[tuple[int, ...], float]]]:
    """Returns contexts with one token replaced in which the unit fires too, and its mean score in each.

    Args:
        contexts: for each context, the substitutes to try at each place, in the order of its tokens.
    """
    tried = list(
        dict.fromkeys(
            (*context[:back], token, *context[back + 1 :])
            for context, places in contexts.items()
            for back, substitutes in enumerate(places)
            if context[back] != ANY
            for token in substitutes
            if token != context[back]
        )
    )
    if not tried:
        return []
    means = yield from fill.judge(tried, max(len(context) for context in tried))
    return [(context, float(mean)) for context, mean in zip(tried, means, strict=True) if mean > level]


def likely_tokens(model: Host, rows: Int64[np.ndarray, "row pos"], count: int) -> Int64[np.ndarray, "row pos count"]:
    """Returns the most likely tokens at each position by the clean stream; at the first position, the token itself."""
    tokens = torch.from_numpy(rows).to(device_of(model))
    step = max(1, TOKENS_AT_ONCE // rows.shape[1])
    with torch.no_grad(), in_stream(model, "clean"):
        top = torch.cat([model(part)[:, :-1].topk(count, -1).indices for part in tokens.split(step)]).cpu().numpy()
    return np.concatenate([np.repeat(rows[:, :1, None], count, -1), top], 1)


class Pattern(NamedTuple):
    """A context in which a unit is active."""

    tokens: tuple[int, ...]
    """The activating token, then the tokens before it, backwards; `ANY` for any token."""
    activation: float
    """Mean activation."""
    weight: float
    """Number of observations of which it is the mean."""


@dataclass
class _Node:
    exact: int
    """Number of exact tokens from the root to here."""
    depth: int
    ends_exact: bool = False
    """Whether its own token is exact; a pattern that ends in `ANY` matches where the shorter one does."""
    children: dict[int, int] = field(default_factory=dict)
    """Index of the child for each token, `ANY` included."""
    total: float = 0.0
    weight: float = 0.0


class ContextTrie:
    """Patterns with their mean activations, which predict activations on a text; empty at first."""

    def __init__(self) -> None:
        self._nodes = [_Node(0, 0)]

    def add(self, tokens: Sequence[int], activation: float) -> None:
        """Adds one observation of a pattern.

        Args:
            tokens: the activating token, then the tokens before it, backwards; token ids or `ANY`.
            activation: observed activation.

        Raises:
            ValueError: no tokens, a token that is neither an id nor `ANY`, or an activation that is not finite.
        """
        if not len(tokens) or min(tokens) < ANY or not np.isfinite(activation):
            raise ValueError(
                f"pattern {tuple(tokens)} with activation {activation} must hold at least one token (an id from 0, or "
                f"{ANY} for any token) and a finite activation"
            )
        node = self._nodes[self._path(tokens)]
        node.total += float(activation)
        node.weight += 1

    def add_token(self, token: int) -> None:
        """Adds a token without an observation; it predicts only after `calibrate` has observed it."""
        self._path((token,))

    def _path(self, tokens: Sequence[int]) -> int:
        """Returns the index of a pattern's node, which is created if it does not exist."""
        index = 0
        for token in map(int, tokens):
            node = self._nodes[index]
            if token not in node.children:
                node.children[token] = len(self._nodes)
                self._nodes.append(_Node(node.exact + (token != ANY), node.depth + 1, token != ANY))
            index = node.children[token]
        return index

    def __len__(self) -> int:
        """Returns the number of different patterns."""
        return sum(node.weight > 0 for node in self._nodes)

    def patterns(self) -> list[Pattern]:
        """Returns all patterns, those with most observations first."""
        return sorted(self._walk(0, ()), key=lambda pattern: -pattern.weight)

    def _walk(self, index: int, tokens: tuple[int, ...]) -> Iterator[Pattern]:
        node = self._nodes[index]
        if node.weight:
            yield Pattern(tokens, node.total / node.weight, node.weight)
        for token, child in node.children.items():
            yield from self._walk(child, (*tokens, token))

    def match(
        self, tokens: Int64[np.ndarray, "block pos"], *, beginnings: bool = False
    ) -> Int64[np.ndarray, "block pos"]:
        """Returns the node of the most specific pattern that matches at each position, -1 without any.

        Args:
            tokens: blocks of a text; a pattern matches within one block.
            beginnings: whether shortened patterns (the activating token with fewer tokens before it) match too, even
                if they have no activation.
        """
        blocks, length = tokens.shape
        text = tokens.reshape(-1)
        place = np.tile(np.arange(length), blocks)
        chosen = np.full(len(text), -1, dtype=np.int64)
        exact, depth = np.zeros(len(text), dtype=np.int64), np.zeros(len(text), dtype=np.int64)
        pending = [(0, np.arange(len(text)))]
        while pending:
            index, positions = pending.pop()
            node = self._nodes[index]
            if node.weight or (beginnings and node.ends_exact):
                better = (node.exact > exact[positions]) | (
                    (node.exact == exact[positions])
                    & (
                        (node.depth > depth[positions])
                        | ((node.depth == depth[positions]) & (chosen[positions] > index))
                    )
                )
                where = positions[better | (chosen[positions] < 0)]
                chosen[where], exact[where], depth[where] = index, node.exact, node.depth
            positions = positions[place[positions] >= node.depth]
            here = text[positions - node.depth]
            for token, child in node.children.items():
                reached = positions if token == ANY else positions[here == token]
                if len(reached):
                    pending.append((child, reached))
        return chosen.reshape(blocks, length)

    def calibrate(self, tokens: Int64[np.ndarray, "block pos"], activations: Float64[np.ndarray, "block pos"]) -> None:
        """Adds the activations of a text to the patterns, and to the shortened patterns, that match there.

        Shortened patterns then predict the activation where the rest of the context is missing, which may be low.
        """
        nodes = self.match(tokens, beginnings=True).reshape(-1)
        matches = nodes >= 0
        totals = np.bincount(nodes[matches], weights=activations.reshape(-1)[matches], minlength=len(self._nodes))
        counts = np.bincount(nodes[matches], minlength=len(self._nodes))
        for node, total, count in zip(self._nodes, totals, counts, strict=True):
            node.total += float(total)
            node.weight += int(count)

    def predict(self, tokens: Int64[np.ndarray, "block pos"]) -> Float64[np.ndarray, "block pos"]:
        """Returns the predicted activation at each position: that of the matching pattern, or 0 without any."""
        means = np.array([node.total / node.weight if node.weight else 0.0 for node in self._nodes])
        nodes = self.match(tokens)
        return np.where(nodes >= 0, means[nodes], 0.0)
