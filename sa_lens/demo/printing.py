"""What the demo prints: figures of several models as tables, and where the time went."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd


class Clock:
    """Seconds of the clock and of the processor for each part of a longer piece of work."""

    def __init__(self) -> None:
        self.parts: dict[str, tuple[float, float]] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Adds the time spent inside to a part."""
        start, used = time.perf_counter(), _processor_seconds()
        try:
            yield
        finally:
            seconds, processor = self.parts.get(name, (0.0, 0.0))
            self.parts[name] = (seconds + time.perf_counter() - start, processor + _processor_seconds() - used)

    def table(self) -> str:
        """One line per part, then their sum."""
        total = tuple(map(sum, zip((0.0, 0.0), *self.parts.values(), strict=True)))
        width = max(map(len, [*self.parts, "together"]))
        lines = [f"{'':<{width}}  {'seconds':>8}  {'of processor':>12}"]
        for name, (seconds, processor) in [*self.parts.items(), ("together", total)]:
            lines.append(f"{name:<{width}}  {seconds:>8.1f}  {processor:>12.1f}")
        return "\n".join(lines)


def _processor_seconds() -> float:
    """Processor time of this process and of the child processes that have ended."""
    return sum(os.times()[:4])


def loss_table(figures: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """Losses, one row per model and one column per stream.

    Args:
        figures: of each model, as in the file `about.json` of a shipped model.
    """
    import pandas as pd

    return pd.DataFrame({name: of_model["losses"] for name, of_model in figures.items()}).T.rename_axis("model")


def skill_table(figures: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """Pair accuracies, one row per task and one column per model and stream."""
    import pandas as pd

    rows = pd.DataFrame([{"model": name, **row} for name, of_model in figures.items() for row in of_model["skills"]])
    rows["column"] = rows["model"] + ", " + rows["stream"]
    table = rows.pivot(index="task", columns="column", values="pair_accuracy")
    return table.reindex(index=rows["task"].unique(), columns=rows["column"].unique())


def print_table(title: str, table: pd.DataFrame) -> None:
    """Prints a table under its title."""
    text = table.rename_axis(columns=None).to_string(float_format=lambda x: f"{x:.3f}", na_rep="", index_names=False)
    print(f"\n{title}\n{text}", flush=True)
