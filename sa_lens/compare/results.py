"""The table: values of all cells, intervals over seeds, paired differences, verdicts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sa_lens.compare.cells import Cell
from sa_lens.compare.columns import WHOLE, column_named, family, in_order
from sa_lens.compare.grids import BASELINE
from sa_lens.compare.subject import Group
from sa_lens.compare.verdicts import holm, paired, verdict
from sa_lens.statistics import t_interval

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Comparison:
    """What a comparison found; `sa_lens.compare.report` writes it."""

    name: str
    """Name of the grid."""
    variants: tuple[str, ...]
    """Rows of the table, the baseline first."""
    seeds: tuple[int, ...]
    """All seeds asked for."""
    values: pd.DataFrame
    """A row a value: variant, seed, column, stream (empty: of the weights), value (NaN: none)."""
    notes: pd.DataFrame
    """A row a note on a cell: variant, seed, group, note."""
    unfinished: int
    """Cells and groups that are not measured yet."""

    def summary(self, against: str = BASELINE) -> pd.DataFrame:
        """Means over seeds, paired differences and verdicts.

        The ablated stream of a gated model is compared with the clean stream of the dense baseline, which has no other;
        with a gated variant, streams are compared with their like.

        Args:
            against: the variant that differences are taken from; verdicts are on the claims of `columns`, which are
                about the baseline, and tell with another variant whether the effect goes beyond that one's.

        Returns:
            A row for each variant, column and stream: `n`, `mean`, `low`, `high` (95 % t interval over seeds);
            `n_pairs`, `difference`, `difference_low`, `difference_high`, `p` (paired t test), `p_holm` (corrected over
            the claims of the variant in the stream); `direction` claimed, `verdict` (empty without a claim), `claim`.

        Raises:
            ValueError: no such variant.
        """
        import pandas as pd

        if against not in self.variants:
            raise ValueError(f"against={against!r} is no variant of this comparison: {', '.join(self.variants)}")
        series = self._series()
        rows = []
        for variant in self.variants:
            of_variant = [_row(series, variant, against, key[1], key[2]) for key in series if key[0] == variant]
            if variant != against:
                _decide(of_variant)
            rows += of_variant
        order = in_order(key[1] for key in series)
        rows.sort(key=lambda row: (self.variants.index(row["variant"]), order.index(row["column"])))
        return pd.DataFrame(rows, columns=_COLUMNS)

    def _series(self) -> dict[tuple[str, str, str], dict[int, float]]:
        """Values by seed, for each variant, column and stream."""
        found: dict[tuple[str, str, str], dict[int, float]] = {}
        for row in self.values.to_dict("records"):
            key = (row["variant"], row["column"], row["stream"])
            found.setdefault(key, {})[int(row["seed"])] = float(row["value"])
        return found


_COLUMNS = [
    *("variant", "column", "stream", "n", "mean", "low", "high"),
    *("n_pairs", "difference", "difference_low", "difference_high", "p", "p_holm"),
    *("direction", "verdict", "claim"),
]


def _row(
    series: dict[tuple[str, str, str], dict[int, float]], variant: str, against: str, column: str, stream: str
) -> dict[str, Any]:
    own = series[variant, column, stream]
    reference = series.get((against, column, stream)) or series.get((against, column, "clean"), {})
    row: dict[str, Any] = {"variant": variant, "column": column, "stream": stream}
    row["n"] = sum(map(math.isfinite, own.values()))
    row |= t_interval([*own.values()])._asdict()
    about = column_named(column)
    row |= {"direction": about.direction, "verdict": "", "claim": about.claim, "p_holm": math.nan}
    if variant == against:
        missing = ("difference", "difference_low", "difference_high", "p")
        return row | {"n_pairs": 0} | dict.fromkeys(missing, math.nan)
    common = [seed for seed in own if seed in reference]
    found = paired([own[seed] for seed in common], [reference[seed] for seed in common])
    names = ("n_pairs", "difference", "difference_low", "difference_high", "p")
    return row | dict(zip(names, found, strict=True))


def _decide(rows: list[dict[str, Any]]) -> None:
    """Fills in corrected p-values and verdicts of one variant, family by family."""
    for streams in (("clean", WHOLE), ("ablated",)):
        claims = [row for row in rows if row["direction"] and row["stream"] in streams]
        adjusted = holm([row["p"] for row in claims], len(family(streams[0])))
        for row, p in zip(claims, adjusted, strict=True):
            row["p_holm"] = p
            row["verdict"] = verdict(row["difference"], p, row["direction"])


def collect(name: str, cells: Sequence[Cell], groups: Sequence[Group]) -> Comparison:
    """The comparison of all cells that are on disk."""
    import pandas as pd

    values, notes, unfinished = [], [], 0
    for cell in cells:
        place = {"variant": cell.variant.name, "seed": cell.seed}
        for group in groups:
            measured = cell.measured(group)
            if measured is None:
                why = group.missing()
                unfinished += why is None
                notes.append({**place, "group": group.name, "note": why or "not measured yet"})
                continue
            notes += [{**place, "group": group.name, "note": note} for note in measured.notes]
            values += [
                {**place, "column": column, "stream": stream, "value": math.nan if value is None else value}
                for column, of_stream in measured.values.items()
                for stream, value in of_stream.items()
            ]
    return Comparison(
        name=name,
        variants=tuple(dict.fromkeys(cell.variant.name for cell in cells)),
        seeds=tuple(dict.fromkeys(cell.seed for cell in cells)),
        values=pd.DataFrame(values, columns=["variant", "seed", "column", "stream", "value"]),
        notes=pd.DataFrame(notes, columns=["variant", "seed", "group", "note"]),
        unfinished=unfinished,
    )
