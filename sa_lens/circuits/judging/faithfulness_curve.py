"""Faithfulness curves as records, and their tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from sa_lens.circuits.metrics import SKILL_BAR
from sa_lens.statistics import Interval

if TYPE_CHECKING:
    import pandas as pd


class Point(NamedTuple):
    """One size of a curve."""

    order: str
    """`absolute` or `signed` scores, or `given` for circuits measured as they are."""
    share: float
    """Share of all edges, as asked for."""
    area: bool
    """Whether the areas use this point: sizes given as shares do, counts do not."""
    edges: int
    """Edges chosen."""
    connected: int
    """Those of them on a path from the embedding to the logits."""
    value: Interval
    """The metric."""
    f: Interval
    """Faithfulness."""
    kl: Interval
    """KL(unedited clean prompt || circuit), nats."""


class Needed(NamedTuple):
    """Edges that a ranking needs for some faithfulness."""

    level: float
    """The faithfulness asked for."""
    edges: int
    """Smallest size tried with f >= level: sizes 1, 2, 4, ... up to the first that reaches it, then halving of the
    interval between that and the one before. f need not rise with size, so a smaller size may reach it unnoticed."""
    connected: int
    """Those edges on a path from the embedding to the logits."""
    f: float
    """Faithfulness at that size; far above 1 it says that the circuit overshoots."""
    tried: int
    """Sizes tried."""


@dataclass(frozen=True)
class FaithfulnessCurve:
    """Faithfulness of a ranking along its sizes. Intervals: percentiles of a bootstrap over prompts."""

    points: tuple[Point, ...]
    """By order, then by number of edges."""
    clean: Interval
    """The metric on the clean prompts."""
    empty: Interval
    """The metric of the empty circuit."""
    gap: Interval
    """clean - empty."""
    cpr: Interval
    """Area under f over the shares; NaN with fewer than two."""
    cmd: Interval
    """Area under |1 - f| over the shares; NaN with fewer than two."""
    needed: tuple[Needed, ...]
    """Edges needed at each level that was asked for."""
    warnings: tuple[str, ...]
    """What speaks against trusting these figures; empty if nothing does."""
    about: Mapping[str, Any]
    """Task, number of prompts, metric, stream, masks, ablation, order, pruning, pair accuracy on the clean prompts,
    bootstrap, and how the ranking was found."""

    def edges_for(self, level: float = 0.9) -> Needed:
        """Edges needed for f >= level.

        Raises:
            ValueError: a level that was not searched for.
        """
        for needed in self.needed:
            if needed.level == level:
                return needed
        levels = ", ".join(f"{n.level:g}" for n in self.needed) or "none"
        raise ValueError(
            f"level={level} was not searched for (searched: {levels}): pass levels=({level},) for a ranking"
        )

    def table(self) -> pd.DataFrame:
        """One row per point: order, share, edges, connected, then value, f and kl with `_low` and `_high`, then cpr,
        cmd, gap, pair_accuracy, able, the settings, and warnings."""
        import pandas as pd

        able = self.about["pair_accuracy"] >= SKILL_BAR
        rows = []
        for point in self.points:
            row: dict[str, Any] = {name: getattr(point, name) for name in ("order", "share", "edges", "connected")}
            row |= point.value.columns("value") | point.f.columns("f") | point.kl.columns("kl")
            row |= {"cpr": self.cpr.mean, "cmd": self.cmd.mean, "gap": self.gap.mean, "able": able}
            settings = {name: self.about[name] for name in _SETTINGS}
            rows.append(row | settings | {"warnings": "; ".join(self.warnings)})
        return pd.DataFrame(rows)


_SETTINGS = ("pair_accuracy", "task", "n", "metric", "stream", "masks", "ablation", "prune", "masks_alone")


def curves_table(curves: Mapping[str, FaithfulnessCurve]) -> pd.DataFrame:
    """The rows of all curves, with a first column `ranking`."""
    import pandas as pd

    tables = [curve.table() for curve in curves.values()]
    for name, table in zip(curves, tables, strict=True):
        table.insert(0, "ranking", name)
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def summary_table(curves: Mapping[str, FaithfulnessCurve]) -> pd.DataFrame:
    """One row per ranking: cpr and cmd with `_low` and `_high`, edges needed at each level, gap, pair_accuracy, able,
    settings and warnings."""
    import pandas as pd

    rows = []
    for name, curve in curves.items():
        row: dict[str, Any] = {"ranking": name, **curve.cpr.columns("cpr"), **curve.cmd.columns("cmd")}
        for needed in curve.needed:
            row |= {f"edges_{needed.level:g}": needed.edges, f"connected_{needed.level:g}": needed.connected}
        row |= {"gap": curve.gap.mean, "able": curve.about["pair_accuracy"] >= SKILL_BAR}
        row |= {setting: curve.about[setting] for setting in _SETTINGS}
        rows.append(row | {"warnings": "; ".join(curve.warnings)})
    return pd.DataFrame(rows)
