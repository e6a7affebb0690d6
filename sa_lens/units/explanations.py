"""Explanations of units without a language model: contexts fitted on one half of a text and judged on the other.

`explain` fits a trie of contexts (`contexts.py`) to each unit by running changed snippets, and scores it on text that
it was not fitted on, beside a list of tokens without context. See docs/explanations.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

from sa_lens.config import Stream
from sa_lens.core.host import Host
from sa_lens.core.unit import Sublayer, Unit, checked_unit, unit_counts
from sa_lens.data import TokenFile
from sa_lens.data.blocks import TextBlocks
from sa_lens.data.tokenizers import token_text
from sa_lens.statistics import bootstrap_interval, pearson
from sa_lens.units.activations import stream_units, text_blocks
from sa_lens.units.contexts import ANY, Asking, Context, ContextTrie, Fill, Guess, answer, prune, substitute
from sa_lens.units.firing import Thresholds, unit_scores

if TYPE_CHECKING:
    import pandas as pd


UNITS_AT_ONCE = 256
"""Number of units whose scores on the whole text are in memory at a time."""
JOBS_AT_ONCE = 32
"""Number of units whose snippets run together."""


class Snippet(NamedTuple):
    """A few tokens of the text, with the unit's score at each."""

    tokens: tuple[int, ...]
    """Tokens in the order of the text."""
    scores: tuple[float, ...]
    """Score at each token: the value of a neuron, the absolute value of an attention unit."""


@dataclass(frozen=True)
class Explanation:
    """The explanation of one unit."""

    unit: Unit
    """The explained unit."""
    stream: Stream
    """Stream in which the unit was read."""
    level: float
    """Score above which the unit fires."""
    trie: ContextTrie
    """Contexts in which the unit fires."""
    contexts: tuple[Context, ...]
    """Pruned contexts of the fitted snippets, with the importance of each token."""
    pattern: str
    """The main patterns as text: `[ the| a]` is the activating token with its alternatives, `_` is any token."""
    fitted: tuple[Snippet, ...]
    """Snippets of the first half on which the trie was fitted; each ends with the activating token."""
    firing: tuple[Snippet, ...]
    """Snippets of the second half in which the unit fires."""
    silent: tuple[Snippet, ...]
    """Equally many random snippets of the second half in which the unit does not fire."""


@dataclass(frozen=True)
class Explanations:
    """Explanations of several units, from `explain`."""

    table: pd.DataFrame
    """One row per unit; see `explain`."""
    summary: pd.Series
    """Coverage, mean scores, and the trie's advantage over the token list; see `explain`."""
    units: tuple[Explanation, ...]
    """One explanation per row of the table."""


def explain(
    model: Host,
    text: TokenFile | Tensor | TextBlocks,
    thresholds: Thresholds,
    units: int | Sequence[Unit] | Literal["all"] = 32,
    *,
    n_tokens: int | None = 60_000,
    snippets: int = 24,
    context: int = 12,
    substitutes: int = 6,
    seed: int = 0,
    progress: bool = True,
) -> Explanations:
    """Explains units by the contexts in which they fire, fitted on the first half of a text and scored on the second.

    Half of a unit's snippets are those with its largest scores, the others are drawn from the rest of its firing. Each
    snippet is pruned to the shortest context that keeps half the activation (and the firing). Tokens without effect
    become wildcards; each of the others is also replaced by tokens that the model finds likely there. Then the
    activations of the patterns are averaged with those on the whole first half, where shorter contexts and single
    tokens cover what no pattern matches. A pattern predicts firing if its activation exceeds the unit's firing level.

    Args:
        text: a text other than the calibration text.
        thresholds: firing thresholds of one stream, from `calibrate`.
        units: number of live units, drawn evenly from the sublayers; or a list of units; or `all`.
        n_tokens: largest number of tokens to use, for both halves together; None uses all.
        snippets: largest number of snippets per unit in each half.
        context: largest length of a context in tokens, with the activating one.
        substitutes: number of likely tokens that are tried at each place; 0 tries none.
        seed: seed of the choice of units, snippets and substitutes.
        progress: whether to show progress bars.

    Returns:
        `table` has the columns layer, site, unit; `live`; `fires_fit` and `fires_test`, the firing tokens in each half;
        `patterns`, their number; `kept`, the share of snippets that pruning could explain; `explained`, whether any
        pattern predicts firing; and `pattern`. These columns follow for the trie, and with the prefix `list_` for the
        token list: `precision`, `recall`, `f1` of firing on held-out snippets in which the unit fires;
        `text_precision`, `text_recall`, `text_f1` on the whole second half; `detection`, the balanced accuracy of
        distinguishing snippets with firing from those without; `simulation`, the correlation of predicted and true
        scores on all these snippets. Undefined values are NaN. The token list holds every token on which the unit fires
        in the first half, with its mean score there.
        `summary` has the number of `live` units, `coverage` (the share of them that is explained), means over the live
        units that fire in the second half (an empty explanation has F1 0), and the mean advantage in F1 over the token
        list with its 95 % interval over units.

    Raises:
        ValueError: fewer than 4 blocks, thresholds of another model, an unknown unit, or a number outside its range.

    Source: Neuron2Graph (Foote et al., arXiv 2305.19911); see `contexts.py` for the differences.
    """
    import pandas as pd
    from tqdm.auto import tqdm

    blocks = text_blocks(model, text, n_tokens)
    _check(model, blocks, thresholds, snippets, context, substitutes)
    rng = np.random.default_rng(seed)
    chosen = _choose_units(model, thresholds, units, rng)
    tokens = blocks.rows(0, len(blocks)).cpu().numpy()
    rows, explanations = [], []
    before = min((context + 1) // 2, model.cfg.n_ctx - context)
    with tqdm(total=len(chosen), desc="explanations", unit=" units", disable=not progress) as bar:
        for start in range(0, len(chosen), UNITS_AT_ONCE):
            group = chosen[start : start + UNITS_AT_ONCE]
            jobs: list[tuple[Unit, Asking[tuple[dict[str, Any], Explanation]]]] = []
            for unit, scores in _scores(model, blocks, thresholds.stream, group, progress):
                level = float(thresholds.levels(unit.sublayer)[unit.index])
                half = scores.numpy().astype(np.float64)
                job = _Job(model, thresholds.stream, unit, level, tokens, half, snippets, context, substitutes)
                draws = np.random.default_rng([seed, unit.layer, unit.site == "mlp", unit.index])
                jobs.append((unit, job.run(draws, before)))
            for first in range(0, len(jobs), JOBS_AT_ONCE):
                together = jobs[first : first + JOBS_AT_ONCE]
                for row, explanation in answer(model, thresholds.stream, together, before + context):
                    rows.append(row)
                    explanations.append(explanation)
                bar.update(len(together))
    table = pd.DataFrame(rows)
    return Explanations(table, _summary(table, seed), tuple(explanations))


def _check(
    model: Host, blocks: TextBlocks, thresholds: Thresholds, snippets: int, context: int, substitutes: int
) -> None:
    if len(blocks) < 4:
        raise ValueError(f"the text has {len(blocks)} blocks of {blocks.length} tokens: at least 4 are needed")
    thresholds.check_model(model)
    if snippets < 2 or substitutes < 0:
        raise ValueError(f"snippets={snippets} must be at least 2 and substitutes={substitutes} at least 0")
    if not 1 <= context <= blocks.length:
        raise ValueError(f"context={context} must be from 1 to the {blocks.length} tokens of a block")


def _choose_units(
    model: Host, thresholds: Thresholds, units: int | Sequence[Unit] | str, rng: np.random.Generator
) -> list[Unit]:
    counts = unit_counts(model)
    if isinstance(units, str):
        if units != "all":
            raise ValueError(f"units={units!r} must be a number, a list of units, or 'all'")
        return [Unit(*sublayer, index) for sublayer, count in counts.items() for index in range(count)]
    if not isinstance(units, int):
        if not len(units):
            raise ValueError("units is empty: give units, a number, or 'all'")
        return [checked_unit(model, unit) for unit in units]
    if units < 1:
        raise ValueError(f"units={units} must be at least 1")
    live = {s: rng.permutation(np.flatnonzero(thresholds.live(s).cpu().numpy())) for s in counts}
    turns = [
        Unit(*sublayer, int(order[i]))
        for i in range(max(map(len, live.values())))
        for sublayer, order in live.items()
        if i < len(order)
    ]
    if not turns:
        raise ValueError("no unit is live on the calibration text")
    # sorted as tuples: layer by layer, attention first
    return sorted(turns[:units])


def _scores(
    model: Host, blocks: TextBlocks, stream: Stream, units: Sequence[Unit], progress: bool
) -> Iterator[tuple[Unit, Tensor]]:
    """Yields the scores `[block, pos]` of each unit on the whole text."""
    groups: dict[Sublayer, list[Unit]] = {}
    for unit in units:
        groups.setdefault(unit.sublayer, []).append(unit)
    indices = {sublayer: torch.tensor([unit.index for unit in group]) for sublayer, group in groups.items()}
    parts: dict[Sublayer, list[Tensor]] = {sublayer: [] for sublayer in groups}
    for batch in stream_units(model, blocks, stream, sublayers=list(groups), progress=progress, name="scores"):
        for sublayer, values in batch.values[stream].items():
            chosen = values[..., indices[sublayer].to(values.device)]
            parts[sublayer].append(unit_scores(sublayer, chosen).float().cpu())
    for sublayer, group in groups.items():
        scores = torch.cat(parts.pop(sublayer))
        for i, unit in enumerate(group):
            yield unit, scores[..., i]


# ------------------------------------------------------------------------------------------------- a single unit


class _Job(NamedTuple):
    """The explanation of one unit, which asks the model several times."""

    model: Host
    stream: Stream
    unit: Unit
    level: float
    tokens: Int64[np.ndarray, "block pos"]
    scores: Float64[np.ndarray, "block pos"]
    snippets: int
    context: int
    substitutes: int

    def run(self, rng: np.random.Generator, before: int) -> Asking[tuple[dict[str, Any], Explanation]]:
        half = len(self.tokens) // 2
        tokens, scores = self.tokens[half:], self.scores[half:]
        fires = self.scores > self.level
        places = firing_places(self.scores[:half], self.level, self.snippets, self.context, rng)
        contexts: list[Context | None] = []
        trie = ContextTrie()
        if places:
            contexts, trie = yield from self._fit(places, before, rng)
        tested = firing_places(scores, self.level, self.snippets, self.context, rng)
        silent = silent_places(scores > self.level, len(tested), self.context, rng)
        words = token_list(self.tokens[:half], self.scores[:half], self.level)
        row: dict[str, Any] = {
            **self.unit.row(),
            "stream": self.stream,
            "live": bool(np.isfinite(self.level)),
            "fires_fit": int(fires[:half].sum()),
            "fires_test": int(fires[half:].sum()),
            "patterns": len(trie),
            "kept": sum(context is not None for context in contexts) / len(contexts) if contexts else math.nan,
            "explained": any(pattern.activation > self.level for pattern in trie.patterns()),
            "pattern": spell_patterns(trie, self.level, self.model.tokenizer),
        }
        for prefix, predicted in (("", trie.predict(tokens)), ("list_", predict_from_list(words, tokens))):
            judged = judge(predicted, scores, self.level, tested, silent, self.context)
            row |= {prefix + name: value for name, value in judged.items()}
        explanation = Explanation(
            unit=self.unit,
            stream=self.stream,
            level=self.level,
            trie=trie,
            contexts=tuple(context for context in contexts if context is not None),
            pattern=row["pattern"],
            fitted=self._cut(self.tokens[:half], self.scores[:half], places, 0),
            firing=self._cut(tokens, scores, tested, self.context // 4),
            silent=self._cut(tokens, scores, silent, self.context // 4),
        )
        return row, explanation

    def _fit(
        self, places: list[tuple[int, int]], before: int, rng: np.random.Generator
    ) -> Asking[tuple[list[Context | None], ContextTrie]]:
        half = len(self.tokens) // 2
        text = self.tokens[:half]
        fill = Fill(text, before, rng)
        windows = [text[block, max(0, position - self.context + 1) : position + 1][::-1] for block, position in places]
        backwards = [tuple(int(token) for token in window) for window in windows]
        scores = [float(self.scores[place]) for place in places]
        contexts = yield from prune(backwards, scores, self.level, fill)
        trie = ContextTrie()
        for context in contexts:
            if context is not None:
                trie.add(context.tokens, context.activation)
        if self.substitutes:
            likely = yield from self._likely(places, contexts)
            for tokens, activation in (yield from substitute(likely, self.level, fill)):
                trie.add(tokens, activation)
        # a token alone predicts what no context covers, as in the token list
        for token in np.unique(text[self.scores[:half] > self.level]):
            trie.add_token(int(token))
        trie.calibrate(text, self.scores[:half])
        return contexts, trie

    def _likely(
        self, places: list[tuple[int, int]], contexts: list[Context | None]
    ) -> Asking[dict[tuple[int, ...], list[list[int]]]]:
        """Returns likely tokens at each place of each context, by the model's prediction in the original snippet."""
        first: dict[tuple[int, ...], tuple[int, int]] = {}
        for place, context in zip(places, contexts, strict=True):
            if context is not None:
                first.setdefault(context.tokens, place)
        if not first:
            return {}
        # the prediction reads as many tokens before the context as a context may have
        width = 2 * self.context
        starts = [max(0, position + 1 - width) for _, position in first.values()]
        rows = np.zeros((len(first), min(width, self.tokens.shape[1])), dtype=np.int64)
        for i, ((block, position), start) in enumerate(zip(first.values(), starts, strict=True)):
            rows[i, : position + 1 - start] = self.tokens[block, start : position + 1]
        likely = yield Guess(rows, min(self.substitutes, self.model.cfg.d_vocab))
        return {
            context: [likely[i, position - start - back].tolist() for back in range(len(context))]
            for i, ((context, (_, position)), start) in enumerate(zip(first.items(), starts, strict=True))
        }

    def _cut(
        self, tokens: np.ndarray, scores: np.ndarray, places: list[tuple[int, int]], after: int
    ) -> tuple[Snippet, ...]:
        cuts = [(block, window_of(position, self.context, after, tokens.shape[1])) for block, position in places]
        return tuple(Snippet(tuple(tokens[b, w].tolist()), tuple(scores[b, w].tolist())) for b, w in cuts)


def _summary(table: pd.DataFrame, seed: int) -> pd.Series:
    import pandas as pd

    live = table[table["live"]]
    judged = live[live["fires_test"] > 0]
    values: dict[str, float] = {
        "units": len(table),
        "live": len(live),
        "judged": len(judged),
        "coverage": float(live["explained"].mean()) if len(live) else math.nan,
    }
    for name in ("f1", "text_f1", "detection", "simulation"):
        for prefix in ("", "list_"):
            values[prefix + name] = float(judged[prefix + name].mean())
    for name in ("f1", "text_f1"):
        gain = (judged[name] - judged[f"list_{name}"]).to_numpy(dtype=np.float64)
        mean, low, high = bootstrap_interval(gain, np.ones(len(gain)), resamples=1000, seed=seed)
        values |= {f"{name}_gain": mean, f"{name}_gain_low": low, f"{name}_gain_high": high}
    return pd.Series(values, name="explanations")


def spell_patterns(trie: ContextTrie, level: float, tokenizer: Any = None) -> str:
    """Spells the three most observed patterns that predict firing, each with up to four activating tokens.

    For example ` once upon[ a]; [ the| my]`; `_` stands for any token.
    """

    def spell(token: int) -> str:
        if token == ANY:
            return "_"
        return token_text(tokenizer, token).replace("\n", "\\n")

    groups: dict[tuple[int, ...], list[tuple[int, float]]] = {}
    for pattern in trie.patterns():
        if pattern.activation > level:
            groups.setdefault(pattern.tokens[1:], []).append((pattern.tokens[0], pattern.weight))
    space = " " if tokenizer is None else ""
    parts = []
    for before, ends in sorted(groups.items(), key=lambda group: -sum(weight for _, weight in group[1])):
        names = [spell(token) for token, _ in ends[:4]] + (["…"] if len(ends) > 4 else [])
        parts.append("".join(spell(token) + space for token in reversed(before)) + f"[{'|'.join(names)}]")
    return "; ".join(parts[:3])


def window_of(position: int, context: int, after: int, length: int) -> slice:
    """Returns the positions of a snippet: `context` tokens up to the activating one and `after` tokens after it."""
    return slice(max(0, position - context + 1), min(length, position + after + 1))


def firing_places(
    scores: Float64[np.ndarray, "block pos"], level: float, count: int, gap: int, rng: np.random.Generator
) -> list[tuple[int, int]]:
    """Chooses (block, position) of snippets: half with the largest scores, half drawn from all other firing.

    Snippets of one block are at least `gap` tokens apart.
    """
    flat = scores.reshape(-1)
    firing = np.flatnonzero(flat > level)
    strongest = firing[np.argsort(-flat[firing], kind="stable")]
    places: list[tuple[int, int]] = []
    for order, limit in ((strongest, (count + 1) // 2), (rng.permutation(firing), count)):
        for index in order:
            if len(places) >= limit:
                break
            block, position = divmod(int(index), scores.shape[1])
            if all(block != other or abs(position - place) >= gap for other, place in places):
                places.append((block, position))
    return places


def silent_places(
    fires: Bool[np.ndarray, "block pos"], count: int, context: int, rng: np.random.Generator
) -> list[tuple[int, int]]:
    """Draws (block, position) of up to `count` snippets without firing."""
    after = context // 4
    fired_before = np.pad(fires.cumsum(1), ((0, 0), (1, 0)))
    positions = np.arange(fires.shape[1])
    first, last = np.maximum(0, positions - context + 1), np.minimum(fires.shape[1], positions + after + 1)
    silent = (fired_before[:, last] == fired_before[:, first]) & (positions >= min(context, fires.shape[1]) - 1)
    places = np.argwhere(silent)
    drawn = rng.permutation(len(places))[:count]
    return [(int(block), int(pos)) for block, pos in places[drawn]]


def token_list(
    tokens: Int64[np.ndarray, "block pos"], scores: Float64[np.ndarray, "block pos"], level: float
) -> dict[int, float]:
    """Returns the tokens on which a unit fires, most frequent first, each with its mean score over the text."""
    values, index = np.unique(tokens, return_inverse=True)
    index = index.reshape(-1)
    fired = np.bincount(index, weights=(scores > level).reshape(-1), minlength=len(values))
    means = np.bincount(index, weights=scores.reshape(-1), minlength=len(values)) / np.bincount(index)
    order = np.argsort(-fired, kind="stable")
    return {int(values[i]): float(means[i]) for i in order if fired[i] > 0}


def predict_from_list(
    words: dict[int, float], tokens: Int64[np.ndarray, "block pos"]
) -> Float64[np.ndarray, "block pos"]:
    """Returns the scores that a token list predicts: each token's mean score, 0 for tokens outside the list."""
    values, index = np.unique(tokens, return_inverse=True)
    return np.array([words.get(int(value), 0.0) for value in values])[index].reshape(tokens.shape)


def judge(
    predicted: Float64[np.ndarray, "block pos"],
    scores: Float64[np.ndarray, "block pos"],
    level: float,
    firing: list[tuple[int, int]],
    silent: list[tuple[int, int]],
    context: int,
) -> dict[str, float]:
    """Scores predictions on held-out text: precision, recall and F1 of firing, detection and simulation.

    `explain` defines these scores.
    """
    predicts, fires = predicted > level, scores > level
    inside, detected = [], []
    for places in (firing, silent):
        mask, hits = np.zeros_like(fires), []
        for block, position in places:
            window = window_of(position, context, context // 4, scores.shape[1])
            mask[block, window] = True
            hits.append(bool(predicts[block, window].any()))
        inside.append(mask)
        detected.append(hits)
    detection = (np.mean(detected[0]) + 1 - np.mean(detected[1])) / 2 if firing and silent else math.nan
    both = inside[0] | inside[1]
    return {
        **_agreement(predicts[inside[0]], fires[inside[0]]),
        **{f"text_{name}": value for name, value in _agreement(predicts, fires).items()},
        "detection": float(detection),
        "simulation": correlation(predicted[both], scores[both]),
    }


def _agreement(predicts: Bool[np.ndarray, " *any"], fires: Bool[np.ndarray, " *any"]) -> dict[str, float]:
    n_both, n_predicted, n_fires = int((predicts & fires).sum()), int(predicts.sum()), int(fires.sum())
    return {
        "precision": n_both / n_predicted if n_predicted else math.nan,
        "recall": n_both / n_fires if n_fires else math.nan,
        "f1": 2 * n_both / (n_predicted + n_fires) if n_predicted + n_fires else math.nan,
    }


def correlation(predicted: Float64[np.ndarray, " token"], scores: Float64[np.ndarray, " token"]) -> float:
    """Returns Pearson's correlation; 0 if only the prediction is constant, NaN if the scores are constant."""
    value = pearson(predicted, scores)
    return 0.0 if math.isnan(value) and len(scores) > 1 and np.ptp(scores) > 0 else value
