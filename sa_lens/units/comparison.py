"""Summaries of one model's units, and comparisons of two models' units at equal layer and activity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from sa_lens.config import Stream
from sa_lens.statistics import bootstrap_means, column_means, percentile_interval, resampled_means

if TYPE_CHECKING:
    import pandas as pd

NOT_MEASURES = frozenset(("stream", "layer", "site", "unit", "top_token", "threshold", "mean", "std"))
"""Columns of a table of units whose means have no meaning or depend on the scale of the model."""
BINS_PER_DECADE = 8
"""Bins of the firing rate per factor of ten; within wider bins the activity of two models can differ."""


def measures_of(table: pd.DataFrame) -> list[str]:
    """Returns the columns of a table of units that can be averaged."""
    numbers = table.select_dtypes(include=["number", "bool"]).columns
    return [str(name) for name in numbers if name not in NOT_MEASURES]


def summary(
    table: pd.DataFrame,
    columns: Sequence[str] | None = None,
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """Returns means over a model's units, with 95 % bootstrap intervals over units.

    In a table of `specialization`, dead units count only in the mean of `live`. Units without a value are left out;
    `n` is the number of units in the mean.

    Args:
        table: table from `specialization` or `selectivity`.
        columns: columns to average; None averages all measures.
        resamples: number of bootstrap samples.
        seed: seed of the bootstrap.

    Returns:
        One row per stream, site (`all` first) and column: stream, site, column, n, mean, low, high.

    Raises:
        ValueError: an unknown column or an empty table.
    """
    import pandas as pd

    columns = _checked_columns(table, columns)
    if not len(table):
        raise ValueError("the table has no rows, so there are no units to average")
    rows = []
    for stream in table["stream"].unique():
        of_stream = table[table["stream"] == stream]
        for site in ("all", *of_stream["site"].unique()):
            of_site = of_stream if site == "all" else of_stream[of_stream["site"] == site]
            values = of_site[columns].to_numpy(dtype=float, na_value=np.nan)
            if "live" in of_site:
                values[np.ix_(~of_site["live"].to_numpy(dtype=bool), [name != "live" for name in columns])] = np.nan
            intervals = bootstrap_means(values, resamples=resamples, seed=seed)
            known = np.isfinite(values).sum(0)
            rows += [
                {"stream": stream, "site": site, "column": column, "n": int(n), "mean": mean, "low": low, "high": high}
                for column, n, (mean, low, high) in zip(columns, known, intervals.T, strict=True)
            ]
    return pd.DataFrame(rows)


def compare(
    first: pd.DataFrame,
    second: pd.DataFrame,
    columns: Sequence[str] | None = None,
    *,
    streams: tuple[Stream, Stream] = ("clean", "clean"),
    resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """Compares two models' units at equal layer, site and activity; differences are second minus first.

    Live units are grouped into cells: one sublayer and an eighth of a decade of the firing rate. The difference of the
    two means in each cell is averaged over cells, weighted by the smaller of the two numbers of units. Cells in which
    one model has no unit are left out. The 95 % interval comes from resampling units within each cell.

    Args:
        first: table of the first model from `specialization`; columns of `selectivity` may be merged in.
        second: table of the second model.
        columns: columns to compare; None compares all measures that both tables have.
        streams: stream of the first and of the second model.
        resamples: number of bootstrap samples.
        seed: seed of the bootstrap.

    Returns:
        One row per column: means of all live units (`first`, `second`), means after matching (`first_matched`,
        `second_matched`), `difference` with its interval `low` to `high`, `share_matched` (share of the live units that
        are in cells of both models), and `n_cells`.

    Raises:
        ValueError: different numbers of layers, an unknown column or stream, or no cell with units of both models.
    """
    import pandas as pd

    sides = [_side(table, stream) for table, stream in zip((first, second), streams, strict=True)]
    depths = [int(table["layer"].max()) + 1 for table in (first, second)]
    if depths[0] != depths[1]:
        raise ValueError(f"the models have {depths[0]} and {depths[1]} layers, but must have equally many")
    if columns is None:
        columns = [name for name in measures_of(first) if name in measures_of(second) and name != "live"]
    columns = [name for side in sides for name in _checked_columns(side, columns)][: len(columns)]
    cells = [_cells(side) for side in sides]
    common = sorted(set(cells[0]) & set(cells[1]))
    if not common:
        raise ValueError("no layer has live units of equal activity in both models, so there is nothing to compare")
    values = [
        [side[columns].to_numpy(dtype=float, na_value=np.nan)[index[cell]] for cell in common]
        for side, index in zip(sides, cells, strict=True)
    ]
    rng = np.random.default_rng(seed)
    means = [np.stack([column_means(x) for x in side]) for side in values]
    draws = [np.stack([resampled_means(x, resamples, rng) for x in side]) for side in values]
    weight = np.minimum(*(np.stack([np.isfinite(x).sum(0) for x in side]) for side in values)).astype(float)
    matched = [_weighted_mean(m[:, None], weight)[0] for m in means]
    differences = _weighted_mean(draws[1] - draws[0], weight)
    low, high = percentile_interval(differences)
    unmatched = [column_means(side[columns].to_numpy(dtype=float, na_value=np.nan)) for side in sides]
    share = sum(len(x) for side in values for x in side) / sum(map(len, sides))
    return pd.DataFrame(
        {
            "column": columns,
            "first": unmatched[0],
            "second": unmatched[1],
            "first_matched": matched[0],
            "second_matched": matched[1],
            "difference": matched[1] - matched[0],
            "low": low,
            "high": high,
            "share_matched": share,
            "n_cells": len(common),
        }
    )


def _checked_columns(table: pd.DataFrame, columns: Sequence[str] | None) -> list[str]:
    known = measures_of(table)
    if columns is None:
        return known
    for name in columns:
        if name not in known:
            raise ValueError(f"columns={name!r} is not a measure of this table; choose from {', '.join(known)}")
    return list(columns)


def _side(table: pd.DataFrame, stream: Stream) -> pd.DataFrame:
    live = table[(table["stream"] == stream) & table["live"] & (table["firing_rate"] > 0)]
    if not len(live):
        streams = ", ".join(table["stream"].unique())
        raise ValueError(f"the table has no live unit in the {stream!r} stream; its streams are {streams}")
    return live


def _cells(side: pd.DataFrame) -> dict[tuple[int, str, int], list[int]]:
    """Returns the rows of each cell."""
    bins = np.floor(BINS_PER_DECADE * np.log10(side["firing_rate"].to_numpy())).astype(int)
    cells: dict[tuple[int, str, int], list[int]] = {}
    for row, cell in enumerate(zip(side["layer"], side["site"], bins.tolist(), strict=True)):
        cells.setdefault(cell, []).append(row)
    return cells


def _weighted_mean(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Returns the mean over cells of `x [cell, sample, column]`, weighted by `[cell, column]`, without NaN."""
    known = np.isfinite(x)
    weights = known * weight[:, None]
    with np.errstate(invalid="ignore", divide="ignore"):
        return (np.where(known, x, 0) * weights).sum(0) / weights.sum(0)
