"""The results of a comparison: values, intervals over seeds, paired differences, and verdicts on the claims.

The rule is fixed before anything is run. A claim predicts a direction for one column. It *holds* if the paired
difference over seeds goes that way and its 95 % interval excludes 0 after Holm's correction over the claims about one
variant in one stream. It *fails* if the difference goes the other way on the same terms. Otherwise it is *undecided*.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from sa_lens.compare.columns import WEIGHTS, claimed_direction, claims_of, column_named, sort_columns
from sa_lens.compare.grids import BASELINE
from sa_lens.compare.learning import COLUMNS as LEARNING
from sa_lens.compare.learning import learning_rows
from sa_lens.compare.model_folder import ModelFolder
from sa_lens.statistics import LEVEL, Interval, t_interval

if TYPE_CHECKING:
    import pandas as pd

MATCHED = "matched-loss"
"""Instead of a variant: for each variant, stream and seed, the dense model with the nearest loss."""
LEAST_PAIRS = 3
"""Seeds without which there is no test: counts of edges can differ by the same number twice, and p would be 0."""

Verdict = Literal["holds", "fails", "undecided"]


@dataclass(frozen=True)
class Comparison:
    """The values of a comparison; `summary` decides on the claims, `write` writes the files."""

    name: str
    """Name of the grid."""
    variants: tuple[str, ...]
    """Rows of the table, the baseline first."""
    seeds: tuple[int, ...]
    """All seeds that were asked for."""
    values: pd.DataFrame
    """One row per value: variant, seed, task (empty: not about a task), column, stream (empty: of the weights), value
    (NaN: none)."""
    notes: pd.DataFrame
    """One row per note on a model: variant, seed, measurement, note."""
    unfinished: int
    """Measurements of models that are still to do."""
    dense: tuple[str, ...] = (BASELINE,)
    """The trained variants without gates: the baseline, and those that are trained for fewer steps."""
    learning: pd.DataFrame | None = None
    """Loss and skill during training: variant, seed, step, stream, loss, and the pair accuracy in each task; None or
    without rows if none was measured."""

    def summary(self, against: str = BASELINE) -> pd.DataFrame:
        """Returns means over seeds, paired differences and verdicts.

        The ablated stream of a gated model is compared with the clean stream of the dense baseline, which has no other.
        Against a gated variant, each stream is compared with the same stream.

        Args:
            against: the variant that differences are taken from. The claims are about the baseline; with another
                variant, the verdicts tell whether an effect goes beyond that variant's. With `"matched-loss"`, each
                stream of a model with gates is compared with the dense model of the same seed whose loss is nearest to
                the stream's (values of the weights: nearest to the clean stream's).

        Returns:
            One row per variant, task, column and stream: `n`, `mean`, `low`, `high` (95 % t interval over seeds);
            `n_pairs`, `difference`, `difference_low`, `difference_high`, `p` (paired t test), `p_holm` (corrected over
            the claims about the variant in the stream); `direction` claimed, `verdict` (empty without a claim),
            `claim`.

        Raises:
            ValueError: the variant does not exist.
        """
        import pandas as pd

        if against not in (*self.variants, MATCHED):
            raise ValueError(f"against={against!r} is no variant of this comparison: {', '.join(self.variants)}")
        keys = ["variant", "task", "column", "stream"]
        groups: Any = self.values.groupby(keys, sort=False)
        by_seed: _BySeed = {key: dict(zip(rows["seed"], rows["value"], strict=True)) for key, rows in groups}
        rows = []
        for variant in self.variants:
            if against == MATCHED and variant in self.dense:
                continue
            of_variant = []
            for key in by_seed:
                if key[0] == variant:
                    nearest = against == MATCHED
                    other = _nearest_dense(by_seed, key, self.dense) if nearest else _like(by_seed, key, against)
                    of_variant.append(_row(key, by_seed[key], None if variant == against else other))
            if variant != against:
                _decide(of_variant)
            rows += of_variant
        order = sort_columns((task, column) for _, task, column, _ in by_seed)
        rows.sort(key=lambda row: (self.variants.index(row["variant"]), order.index((row["task"], row["column"]))))
        return pd.DataFrame(rows, columns=_COLUMNS)


_Key = tuple[str, str, str, str]
"""Variant, task, column, stream."""
_BySeed = dict[_Key, dict[int, float]]
"""Values by seed."""
_DIFFERENCE = ("n_pairs", "difference", "difference_low", "difference_high", "p")
_COLUMNS = [
    *("variant", "task", "column", "stream", "n", "mean", "low", "high", *_DIFFERENCE, "p_holm"),
    *("direction", "verdict", "claim"),
]


def _like(by_seed: _BySeed, key: _Key, against: str) -> dict[int, float]:
    """Returns the values of another variant in the same stream, or in its clean stream if it has no other."""
    _, task, column, stream = key
    return by_seed.get((against, task, column, stream), by_seed.get((against, task, column, "clean"), {}))


def _nearest_dense(by_seed: _BySeed, key: _Key, dense: Sequence[str]) -> dict[int, float]:
    """Returns, seed by seed, the value of the dense variant whose loss is nearest to that of the stream."""
    variant, task, column, stream = key
    losses = {name: by_seed.get((name, "", "loss", "clean"), {}) for name in dense}
    values = {}
    for seed, loss in by_seed.get((variant, "", "loss", stream or "clean"), {}).items():
        gaps = {name: abs(of_dense[seed] - loss) for name, of_dense in losses.items() if seed in of_dense}
        if gaps:
            nearest = min(gaps, key=gaps.__getitem__)
            values[seed] = by_seed.get((nearest, task, column, stream and "clean"), {}).get(seed, math.nan)
    return values


def _row(key: _Key, own: dict[int, float], other: dict[int, float] | None) -> dict[str, Any]:
    """Returns a row of the summary without its verdict; without other values there are no differences."""
    variant, task, column, stream = key
    known = [value for value in own.values() if math.isfinite(value)]
    row: dict[str, Any] = {"variant": variant, "task": task, "column": column, "stream": stream, "n": len(known)}
    row |= t_interval(known)._asdict()
    row |= {"direction": claimed_direction(task, column), "verdict": "", "claim": column_named(column).claim}
    if other is None:
        return row | dict.fromkeys(_DIFFERENCE, math.nan) | {"n_pairs": 0, "p_holm": math.nan}
    both = [(value, other[seed]) for seed, value in own.items() if seed in other]
    difference = paired_difference([value for value, _ in both], [value for _, value in both])
    return row | dict(zip(_DIFFERENCE, difference, strict=True)) | {"p_holm": math.nan}


def _decide(rows: list[dict[str, Any]]) -> None:
    """Adds corrected p-values and verdicts of one variant, family by family."""
    for streams in (("clean", WEIGHTS), ("ablated",)):
        claims = [row for row in rows if row["direction"] and row["stream"] in streams]
        adjusted = holm([row["p"] for row in claims], len(claims_of(streams[0])))
        for row, p in zip(claims, adjusted, strict=True):
            row["p_holm"] = p
            row["verdict"] = verdict(row["difference"], p, row["direction"])


class Difference(NamedTuple):
    """A paired difference over seeds."""

    n: int
    """Seeds that have both values."""
    mean: float
    """Mean of variant minus reference; NaN without any."""
    low: float
    """Lower end of the t interval of the differences."""
    high: float
    """Upper end."""
    p: float
    """Two-sided p-value of the paired t test; NaN with fewer than `LEAST_PAIRS` seeds, or if all differences are the
    same number other than 0."""


def paired_difference(values: Sequence[float], reference: Sequence[float]) -> Difference:
    """Returns the mean difference of values that are paired by seed; pairs with a NaN are left out.

    Differences that are all equal have no test, or p = 1 if they are all 0: counts of edges may differ by the same
    number in every seed, which is no certainty.

    Raises:
        ValueError: the sequences have different lengths.
    """
    from scipy.stats import ttest_1samp

    differences = [a - b for a, b in zip(values, reference, strict=True) if math.isfinite(a - b)]
    interval: Interval = t_interval(differences)
    if len(differences) < LEAST_PAIRS:
        p = math.nan
    elif np.ptp(differences) == 0:
        p = 1.0 if interval.mean == 0 else math.nan
    else:
        p = float(ttest_1samp(differences, 0).pvalue)
    return Difference(len(differences), *interval, p)


def holm(p: Sequence[float], family: int | None = None) -> list[float]:
    """Holm's adjusted p-values, in the order given; NaN (no test) stays NaN.

    Args:
        family: number of tests that were planned, those without a value included; None: as many as are given. Fixing
            it beforehand keeps a verdict from changing with what else is measured.

    Raises:
        ValueError: the family is smaller than the number of tests.
    """
    planned = len(p) if family is None else family
    if planned < len(p):
        raise ValueError(f"family={planned} is smaller than the {len(p)} tests given")
    order = sorted((i for i in range(len(p)) if not math.isnan(p[i])), key=lambda i: p[i])
    adjusted, highest = [math.nan] * len(p), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (planned - rank) * p[i]))
        adjusted[i] = highest
    return adjusted


def verdict(difference: float, adjusted_p: float, direction: int) -> Verdict:
    """Returns the verdict on a claim.

    Args:
        difference: mean paired difference, variant minus reference.
        adjusted_p: its p-value after Holm's correction; NaN: no test was possible.
        direction: +1 if the claim predicts a higher value, -1 if a lower one.

    Raises:
        ValueError: the direction is neither 1 nor -1.
    """
    if direction not in (1, -1):
        raise ValueError(f"direction={direction} must be 1 or -1")
    if math.isnan(adjusted_p) or not adjusted_p + LEVEL < 1:
        return "undecided"
    return "holds" if difference * direction > 0 else "fails"


def collect(folders: Sequence[ModelFolder]) -> Comparison:
    """Collects the values of all models of a grid that are on disk."""
    import pandas as pd

    values, notes, learning, unfinished, grid = [], [], [], 0, folders[0].grid
    for folder in folders:
        of_model = {"variant": folder.variant.name, "seed": folder.seed}
        learning += [{**of_model, **row} for row in learning_rows(folder.run)]
        for measurement in folder.grid.measurements:
            note = {**of_model, "measurement": measurement.label}
            result = folder.result(measurement)
            if result is None:
                why = measurement.missing()
                unfinished += why is None
                notes.append({**note, "note": why or "not measured yet"})
                continue
            notes += [{**note, "note": text} for text in result.notes]
            values += [
                {**of_model, "task": measurement.task, "column": column, "stream": stream, "value": value}
                for column, of_stream in result.values.items()
                for stream, value in of_stream.items()
            ]
    return Comparison(
        name=grid.name,
        variants=tuple(variant.name for variant in grid.variants),
        seeds=grid.seeds,
        values=pd.DataFrame(values, columns=["variant", "seed", "task", "column", "stream", "value"]).astype(
            {"value": float}
        ),
        notes=pd.DataFrame(notes, columns=["variant", "seed", "measurement", "note"]),
        unfinished=unfinished,
        dense=tuple(variant.name for variant in grid.variants if variant.dense),
        learning=pd.DataFrame(learning, columns=["variant", "seed", *LEARNING]),
    )
