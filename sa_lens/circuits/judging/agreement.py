"""How well a ranking of edges agrees with a reference circuit found in another way."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from jaxtyping import Bool, Float
from torch import Tensor

from sa_lens.circuits.graph import Circuit
from sa_lens.statistics import auroc, spearman

if TYPE_CHECKING:
    import pandas as pd


class Agreement(NamedTuple):
    """Agreement of a ranking with a reference; edges of equal score count as in a random order among them."""

    auroc: float
    """Chance that an edge of the reference circuit outranks one outside it, ties half; NaN if the reference holds no
    edge or every edge."""
    precision: float
    """Expected share of the reference's edges among as many of the ranking's largest; NaN as above."""
    base_rate: float
    """The precision of a ranking at random: the reference's share of all edges."""
    spearman: float
    """Rank correlation with the reference's scores, over the edges that have one; NaN with fewer than two, or where
    either side does not vary."""
    edges: int
    """Edges of the reference."""
    scored: int
    """Edges with a score in the reference."""


def agreement(ranking: Circuit, reference: Circuit, *, absolute: bool = True) -> Agreement:
    """AUROC, precision and Spearman's correlation of a ranking against a reference.

    Args:
        ranking: a circuit whose every edge has a score; its own set of edges does not matter.
        reference: the circuit to find. A ranking becomes one by `reference.keep(n)`.
        absolute: compare absolute values of the scores, on both sides.

    Raises:
        ValueError: different graphs, or an edge without a score in the ranking.
    """
    if ranking.graph != reference.graph:
        raise ValueError(f"circuits of different graphs cannot be compared: {ranking.graph} and {reference.graph}")
    exists = ranking.graph.exists
    scores, theirs = ranking.scores[exists], reference.scores[exists]
    if bool(scores.isnan().any()):
        raise ValueError(f"{int(scores.isnan().sum())} edges have no score: a ranking needs one for every edge")
    if absolute:
        scores, theirs = scores.abs(), theirs.abs()
    wanted = reference.mask[exists]
    known = ~theirs.isnan()
    edges = int(wanted.sum())
    return Agreement(
        auroc=float(auroc(scores[:, None], wanted[:, None])),
        precision=_precision(scores, wanted),
        base_rate=edges / len(scores),
        spearman=spearman(scores[known].numpy(), theirs[known].numpy()),
        edges=edges,
        scored=int(known.sum()),
    )


def agreement_table(rankings: Mapping[str, Circuit], references: Mapping[str, Circuit]) -> pd.DataFrame:
    """Compares every ranking with every reference: one row each, with their names and the fields of `Agreement`."""
    import pandas as pd

    return pd.DataFrame(
        [
            {"ranking": name, "reference": other, **agreement(ranking, reference)._asdict()}
            for name, ranking in rankings.items()
            for other, reference in references.items()
        ]
    )


def _precision(scores: Float[Tensor, " edge"], wanted: Bool[Tensor, " edge"]) -> float:
    """Edges tied at the cut each count with the share of them that still fits in."""
    n = int(wanted.sum())
    if not 0 < n < len(wanted):
        return math.nan
    cut = scores.sort(descending=True).values[n - 1]
    above, tied = scores > cut, scores == cut
    fits = (n - int(above.sum())) / int(tied.sum())
    return (int((above & wanted).sum()) + fits * int((tied & wanted).sum())) / n
