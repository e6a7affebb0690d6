"""How well a ranking of edges agrees with a reference circuit from another method."""

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
    """Agreement of a ranking with a reference circuit; edges of equal score count as if in random order."""

    auroc: float
    """Probability that an edge of the reference circuit has a larger score than one outside it, where ties count half;
    NaN if the reference has no edges or all edges."""
    precision: float
    """Expected share of reference edges among the same number of edges with the largest scores; NaN as above."""
    base_rate: float
    """Precision of a random ranking: the share of all edges that are in the reference."""
    spearman: float
    """Rank correlation with the reference's scores, over the edges that have one; NaN for fewer than two edges, or if
    either side is constant."""
    edges: int
    """Number of edges of the reference."""
    scored: int
    """Number of edges with a score in the reference."""


def agreement(ranking: Circuit, reference: Circuit, *, absolute: bool = True) -> Agreement:
    """Compares a ranking with a reference circuit: AUROC, precision and Spearman's correlation.

    Args:
        ranking: a circuit whose edges all have a score; its own set of edges has no effect.
        reference: the circuit to compare with; `ranking.keep(n)` makes one of a ranking.
        absolute: whether to compare absolute values of the scores, on both sides.

    Raises:
        ValueError: the graphs differ, or an edge of the ranking has no score.
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
    """Returns the expected precision; edges tied at the cut count with the share of them that is taken."""
    n = int(wanted.sum())
    if not 0 < n < len(wanted):
        return math.nan
    cut = scores.sort(descending=True).values[n - 1]
    above, tied = scores > cut, scores == cut
    fits = (n - int(above.sum())) / int(tied.sum())
    return (int((above & wanted).sum()) + fits * int((tied & wanted).sum())) / n
