"""Units of one model summed up, and of two models set against each other at equal layer and activity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from sa_lens.config import Stream
from sa_lens.statistics import LEVEL, bootstrap_means, column_means, percentile_interval, resampled_means

if TYPE_CHECKING:
    import pandas as pd

NOT_MEASURES = frozenset(("stream", "layer", "site", "unit", "top_token", "threshold", "mean", "std"))
"""Columns of a table of units whose means say nothing, or depend on the scale of the model."""
BINS_PER_DECADE = 8
"""Bins of the firing rate for a factor of ten: wider ones leave a difference of activity within a bin."""


def measures_of(table: pd.DataFrame) -> list[str]:
    """The columns of a table of units that can be averaged."""
    numbers = table.select_dtypes(include=["number", "bool"]).columns
    return [str(name) for name in numbers if name not in NOT_MEASURES]


def summary(
    table: pd.DataFrame,
    columns: Sequence[str] | None = None,
    *,
    level: float = LEVEL,
    resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """Means over a model's units with bootstrap intervals over units.

    Of a table of `specialization` dead units count in the mean of `live` alone. Units without a value are left out of a
    mean, which `n` counts.

    Args:
        table: from `specialization` or `selectivity`.
        columns: which; None: all measures.
        level: coverage of the intervals.
        resamples: draws of the bootstrap.
        seed: of the draws.

    Returns:
        One row per stream, site (`all` first) and column: stream, site, column, n, mean, low, high.

    Raises:
        ValueError: an unknown column, an empty table, a level outside (0, 1).
    """
    import pandas as pd

    columns = _checked_columns(table, columns)
    if not len(table):
        raise ValueError("the table has no unit: there is nothing to sum up")
    rows = []
    for stream in table["stream"].unique():
        of_stream = table[table["stream"] == stream]
        for site in ("all", *of_stream["site"].unique()):
            of_site = of_stream if site == "all" else of_stream[of_stream["site"] == site]
            values = of_site[columns].to_numpy(dtype=float, na_value=np.nan)
            if "live" in of_site:
                values[np.ix_(~of_site["live"].to_numpy(dtype=bool), [name != "live" for name in columns])] = np.nan
            intervals = bootstrap_means(values, level=level, resamples=resamples, seed=seed)
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
    level: float = LEVEL,
    resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """Two models' units at equal layer, site and activity: the difference second minus first, with intervals.

    Live units are put into cells of one sublayer and an eighth of a decade of the firing rate. In each cell the
    difference of the means is taken, and cells are weighted by the smaller of the two numbers of units; a cell that
    one model leaves empty does not count. The interval comes from drawing units with replacement within each cell.

    Args:
        first: table of one model, from `specialization` (with the columns of `selectivity` merged in, if wanted).
        second: table of the other.
        columns: which; None: the measures that both have.
        streams: the stream of each.
        level: coverage of the intervals.
        resamples: draws of the bootstrap.
        seed: of the draws.

    Returns:
        One row per column: means of all live units of each (`first`, `second`), means after matching (`first_matched`,
        `second_matched`), `difference` with `low` and `high`, `share_matched` of the live units that are in cells of
        both models, and `n_cells`.

    Raises:
        ValueError: other numbers of layers, an unknown column or stream, no live unit in common.
    """
    import pandas as pd

    sides = [_side(table, stream) for table, stream in zip((first, second), streams, strict=True)]
    depths = [int(table["layer"].max()) + 1 for table in (first, second)]
    if depths[0] != depths[1]:
        raise ValueError(f"layers are matched one by one, but the models have {depths[0]} and {depths[1]}")
    if columns is None:
        columns = [name for name in measures_of(first) if name in measures_of(second) and name != "live"]
    columns = [name for side in sides for name in _checked_columns(side, columns)][: len(columns)]
    cells = [_cells(side) for side in sides]
    common = sorted(set(cells[0]) & set(cells[1]))
    if not common:
        raise ValueError("no layer holds live units of equal activity in both models: nothing can be compared")
    values = [
        [side[columns].to_numpy(dtype=float, na_value=np.nan)[index[cell]] for cell in common]
        for side, index in zip(sides, cells, strict=True)
    ]
    rng = np.random.default_rng(seed)
    means = [np.stack([column_means(x) for x in side]) for side in values]
    draws = [np.stack([resampled_means(x, resamples, rng) for x in side]) for side in values]
    weight = np.minimum(*(np.stack([np.isfinite(x).sum(0) for x in side]) for side in values)).astype(float)
    matched = [_weighted(m[:, None], weight)[0] for m in means]
    differences = _weighted(draws[1] - draws[0], weight)
    low, high = percentile_interval(differences, level)
    whole = [column_means(side[columns].to_numpy(dtype=float, na_value=np.nan)) for side in sides]
    share = sum(len(x) for side in values for x in side) / sum(map(len, sides))
    return pd.DataFrame(
        {
            "column": columns,
            "first": whole[0],
            "second": whole[1],
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
            raise ValueError(f"columns: {name!r} is no measure of this table: {', '.join(known)}")
    return list(columns)


def _side(table: pd.DataFrame, stream: Stream) -> pd.DataFrame:
    live = table[(table["stream"] == stream) & table["live"] & (table["firing_rate"] > 0)]
    if not len(live):
        raise ValueError(f"the table has no live unit in the {stream!r} stream; its streams: {set(table['stream'])}")
    return live


def _cells(side: pd.DataFrame) -> dict[tuple[int, str, int], list[int]]:
    """Rows of each cell."""
    bins = np.floor(BINS_PER_DECADE * np.log10(side["firing_rate"].to_numpy())).astype(int)
    cells: dict[tuple[int, str, int], list[int]] = {}
    for row, cell in enumerate(zip(side["layer"], side["site"], bins.tolist(), strict=True)):
        cells.setdefault(cell, []).append(row)
    return cells


def _weighted(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Mean over cells of `[cell, draw, column]` by weights `[cell, column]`; cells without a value are left out."""
    known = np.isfinite(x)
    weights = known * weight[:, None]
    with np.errstate(invalid="ignore", divide="ignore"):
        return (np.where(known, x, 0) * weights).sum(0) / weights.sum(0)
