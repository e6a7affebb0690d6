"""Models side by side: tables with a column for each model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sa_lens.circuits.find_and_judge import LEVEL
from sa_lens.config import Stream
from sa_lens.views.records import Table
from sa_lens.views.result_tables import MISSING

STREAMS: tuple[Stream, ...] = ("clean", "ablated")
LOSSES, SKILL, UNITS = "Losses", "Skill", "Units"
NEEDED, KEPT = f"Edges for f ≥ {LEVEL:g}", "Edges that ACDC keeps"
"""Titles of the tables."""

Cells = Mapping[str, Mapping[str, str]]
"""The cells of one model, by title of the table and by row; every model has the same rows."""


def comparison_tables(names: Sequence[str], models: Sequence[Cells], text: str) -> tuple[Table, ...]:
    """Returns tables of losses, skill, circuits and units; none for a single model.

    Rows in which no model has a value are left out.

    Args:
        names: of the models.
        models: cells of each.
        text: what the models were measured on, in words.
    """
    why = f"the value is {MISSING} if the stream cannot do the task or the model has no gates"
    about = {
        LOSSES: ("figure", f"{text}; with different tokenizers compare bits per byte, not losses"),
        SKILL: ("task and stream", "pair accuracy with 95 % intervals"),
        NEEDED: ("task, stream, method", f"along each ranking; {why}"),
        KEPT: ("task and stream", why),
        UNITS: ("figure and stream", "means over live units; explanations: of the units with details"),
    }
    tables = []
    for title, (first, note) in about.items() if len(models) > 1 else ():
        rows = ((row, *(cells[title][row] for cells in models)) for row in models[0][title])
        kept = tuple(row for row in rows if any(cell != MISSING for cell in row[1:]))
        tables.append(Table(title, note, (first, *names), kept, (False, *(True for _ in names))))
    return tuple(tables)


def format_cell(value: float | None, form: str) -> str:
    """Returns a number in a format, or what stands for a missing one."""
    return MISSING if value is None else format(value, form)
