"""How well an explanation predicts firing: where it is judged, the token list it must beat, and the scores.

An explanation is a prediction of a unit's score at every token. See docs/explanations.md.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Bool, Float64, Int64

from sa_lens.statistics import pearson


def window_of(at: int, context: int, after: int, length: int) -> slice:
    """Positions of a snippet: `context` tokens up to the activating one, and a few after it."""
    return slice(max(0, at - context + 1), min(length, at + after + 1))


def firing_places(
    scores: Float64[np.ndarray, "block pos"], level: float, count: int, gap: int, rng: np.random.Generator
) -> list[tuple[int, int]]:
    """(block, position) of snippets: half of them the strongest firing, the rest drawn from all other firing; those of
    one block at least `gap` tokens apart."""
    flat = scores.reshape(-1)
    firing = np.flatnonzero(flat > level)
    strongest = firing[np.argsort(-flat[firing], kind="stable")]
    taken: list[tuple[int, int]] = []
    for order, limit in ((strongest, (count + 1) // 2), (rng.permutation(firing), count)):
        for index in order:
            if len(taken) >= limit:
                break
            block, at = divmod(int(index), scores.shape[1])
            if all(block != other or abs(at - place) >= gap for other, place in taken):
                taken.append((block, at))
    return taken


def silent_places(
    fires: Bool[np.ndarray, "block pos"], count: int, context: int, rng: np.random.Generator
) -> list[tuple[int, int]]:
    """(block, position) of `count` random snippets without firing, fewer if there are not so many."""
    after = context // 4
    ran = np.pad(fires.cumsum(1), ((0, 0), (1, 0)))
    at = np.arange(fires.shape[1])
    first, last = np.maximum(0, at - context + 1), np.minimum(fires.shape[1], at + after + 1)
    quiet = (ran[:, last] == ran[:, first]) & (at >= min(context, fires.shape[1]) - 1)
    places = np.argwhere(quiet)
    drawn = rng.permutation(len(places))[:count]
    return [(int(block), int(pos)) for block, pos in places[drawn]]


def token_list(
    tokens: Int64[np.ndarray, "block pos"], scores: Float64[np.ndarray, "block pos"], level: float
) -> dict[int, float]:
    """The tokens that a unit fires on, most frequent first, each with its mean score over all its occurrences."""
    values, which = np.unique(tokens, return_inverse=True)
    which = which.reshape(-1)
    fired = np.bincount(which, weights=(scores > level).reshape(-1), minlength=len(values))
    means = np.bincount(which, weights=scores.reshape(-1), minlength=len(values)) / np.bincount(which)
    order = np.argsort(-fired, kind="stable")
    return {int(values[i]): float(means[i]) for i in order if fired[i] > 0}


def listed(words: dict[int, float], tokens: Int64[np.ndarray, "block pos"]) -> Float64[np.ndarray, "block pos"]:
    """What a token list predicts: a token's mean score wherever it stands, 0 for tokens that it lacks."""
    values, which = np.unique(tokens, return_inverse=True)
    return np.array([words.get(int(value), 0.0) for value in values])[which].reshape(tokens.shape)


def judge(
    predicted: Float64[np.ndarray, "block pos"],
    scores: Float64[np.ndarray, "block pos"],
    level: float,
    firing: list[tuple[int, int]],
    silent: list[tuple[int, int]],
    context: int,
) -> dict[str, float]:
    """Precision, recall and F1 of predicted firing, detection and simulation, on text that was not fitted; see
    `explain`."""
    says, is_so = predicted > level, scores > level
    cuts = {
        True: [(block, window_of(at, context, context // 4, scores.shape[1])) for block, at in firing],
        False: [(block, window_of(at, context, context // 4, scores.shape[1])) for block, at in silent],
    }
    inside = np.zeros_like(is_so)
    for block, window in cuts[True]:
        inside[block, window] = True
    everywhere = inside.copy()
    for block, window in cuts[False]:
        everywhere[block, window] = True
    found = {kind: [bool(says[block, window].any()) for block, window in cuts[kind]] for kind in cuts}
    detection = (np.mean(found[True]) + 1 - np.mean(found[False])) / 2 if firing and silent else float("nan")
    return {
        **_agreement(says[inside], is_so[inside]),
        **{f"text_{name}": value for name, value in _agreement(says, is_so).items()},
        "detection": float(detection),
        "simulation": correlation(predicted[everywhere], scores[everywhere]),
    }


def _agreement(says: Bool[np.ndarray, " *any"], is_so: Bool[np.ndarray, " *any"]) -> dict[str, float]:
    both, said, so = int((says & is_so).sum()), int(says.sum()), int(is_so.sum())
    return {
        "precision": both / said if said else float("nan"),
        "recall": both / so if so else float("nan"),
        "f1": 2 * both / (said + so) if said + so else float("nan"),
    }


def correlation(predicted: Float64[np.ndarray, " token"], scores: Float64[np.ndarray, " token"]) -> float:
    """Pearson's correlation; 0 if the prediction alone is constant, NaN if the scores are."""
    value = pearson(predicted, scores)
    return 0.0 if math.isnan(value) and len(scores) > 1 and np.ptp(scores) > 0 else value
