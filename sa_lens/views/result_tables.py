"""Tables of results, such as a comparison of models, as pages of HTML that can be read and copied."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from pandas.api.types import is_bool_dtype, is_numeric_dtype

from sa_lens.views.drawing import draw
from sa_lens.views.html_page import Page
from sa_lens.views.records import Table

MISSING = "n/a"
"""A cell without a value."""


def comparison_table(
    table: pd.DataFrame,
    title: str,
    *,
    note: str = "",
    columns: Sequence[str] | None = None,
    digits: int = 3,
) -> Table:
    """Returns a table of results; a column `x` with `x_low` and `x_high` becomes one, `x (low to high)`.

    Args:
        table: the results, with one row per model, run or method.
        title: heading.
        note: a line below the heading.
        columns: which to show, in order; None: all.
        digits: significant digits of numbers that are not whole.

    Raises:
        ValueError: no rows, a column that is not there, or fewer than one digit.
    """
    if not len(table):
        raise ValueError("the table is empty: there is nothing to show")
    if digits < 1:
        raise ValueError(f"digits={digits} must be at least 1")
    ends = {f"{name}_{end}" for name in table for end in ("low", "high") if {f"{name}_low", f"{name}_high"} <= {*table}}
    chosen = [str(name) for name in table if name not in ends] if columns is None else list(columns)
    missing = [name for name in chosen if name not in table]
    if missing:
        raise ValueError(f"no column {missing} in the table: it has {list(table)}")
    cells = []
    for name in chosen:
        shown = [_cell(value, digits) for value in table[name]]
        if f"{name}_low" in ends:
            shown = [
                f"{value} ({_cell(low, digits)} to {_cell(high, digits)})" if value != MISSING else MISSING
                for value, low, high in zip(shown, table[f"{name}_low"], table[f"{name}_high"], strict=True)
            ]
        cells.append(shown)
    return Table(
        title,
        note,
        tuple(name.replace("_", " ") for name in chosen),
        tuple(zip(*cells, strict=True)),
        tuple(is_numeric_dtype(table[name]) and not is_bool_dtype(table[name]) for name in chosen),
    )


def _cell(value: Any, digits: int) -> str:
    if value is None or value is pd.NA or (isinstance(value, float | np.floating) and np.isnan(value)):
        return MISSING
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, int | np.integer):
        return f"{value:,}"
    if isinstance(value, float | np.floating):
        return f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"
    return str(value)


@draw.register
def _(record: Table, *, dark: bool = False) -> Page:
    return Page(record, lambda: _html(record), dark=dark)


def _html(record: Table) -> str:
    sides = [" class='right'" if numeric else "" for numeric in record.numeric]

    def row(tag: str, cells: Sequence[str]) -> str:
        parts = [f"<{tag}{side}>{html.escape(cell)}</{tag}>" for cell, side in zip(cells, sides, strict=True)]
        return f"<tr>{''.join(parts)}</tr>"

    rows = "".join(row("td", cells) for cells in record.rows)
    return f"<table><thead>{row('th', record.columns)}</thead><tbody>{rows}</tbody></table>"
