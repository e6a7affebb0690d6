"""Figures of several models as tables for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd


def loss_table(figures: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """Losses, one row per model and one column per stream.

    Args:
        figures: of each model, as `about.json` has them.
    """
    import pandas as pd

    return pd.DataFrame({name: known["losses"] for name, known in figures.items()}).T.rename_axis("model")


def skill_table(figures: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """Pair accuracies, one row per task and one column per model and stream."""
    import pandas as pd

    columns: dict[str, dict[str, float]] = {}
    for name, known in figures.items():
        for row in known["skills"]:
            columns.setdefault(f"{name}, {row['stream']}", {})[row["task"]] = row["pair_accuracy"]
    return pd.DataFrame(columns).rename_axis("task")


def show(title: str, table: pd.DataFrame) -> None:
    """Prints a table under its title."""
    print(f"\n{title}\n{table.to_string(float_format=lambda x: f'{x:.3f}', na_rep='', index_names=False)}", flush=True)
