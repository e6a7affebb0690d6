"""Records and tables of faithfulness curves."""

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
    """`absolute` or `signed` scores, or `given` for circuits that were measured as they are."""
    share: float
    """Share of all edges that was asked for."""
    area: bool
    """Whether the areas use this point; they use sizes given as shares, not as numbers of edges."""
    edges: int
    """Number of edges."""
    connected: int
    """Number of these edges that are on a path from the embedding to the logits."""
    value: Interval
    """The metric."""
    f: Interval
    """Faithfulness."""
    kl: Interval
    """KL(unedited clean prompt || circuit), nats."""


class Needed(NamedTuple):
    """How many edges of a ranking are needed for a given faithfulness."""

    level: float
    """The faithfulness asked for."""
    edges: int
    """Smallest tried number of edges with f >= level. The search tries 1, 2, 4, ... until f reaches the level, and then
    halves the interval between the last two sizes. Because f may fall with size, a smaller size may reach it too."""
    connected: int
    """Number of these edges that are on a path from the embedding to the logits."""
    f: float
    """Faithfulness at this size; a value far above 1 means that the circuit exceeds the model."""
    tried: int
    """Number of sizes that were tried."""
    low: int
    """Lower end of the 95 % interval of `edges` over prompts: the same search for the upper end of the interval of f.
    If f grows with size on every bootstrap sample of the prompts, this is the percentile of the edges needed on it."""
    high: int
    """Upper end: the same search for the lower end of the interval of f; all edges if it never reaches the level."""


@dataclass(frozen=True)
class FaithfulnessCurve:
    """Faithfulness of a ranking at several sizes; intervals are percentiles of a bootstrap over prompts."""

    points: tuple[Point, ...]
    """Points of the curve, by order and number of edges."""
    clean: Interval
    """The metric on the clean prompts."""
    empty: Interval
    """The metric of the empty circuit."""
    gap: Interval
    """`clean` minus `empty`."""
    cpr: Interval
    """Area under f over the shares; NaN for fewer than two shares."""
    cmd: Interval
    """Area under |1 - f| over the shares; NaN for fewer than two shares."""
    needed: tuple[Needed, ...]
    """Edges needed for each level that was asked for."""
    warnings: tuple[str, ...]
    """Reasons not to trust these figures."""
    about: Mapping[str, Any]
    """Task, number of prompts, metric, stream, masks, ablation, order, pruning, pair accuracy on the clean prompts,
    settings of the bootstrap and of the ranking."""

    def edges_for(self, level: float = 0.9) -> Needed:
        """Returns how many edges are needed for f >= level.

        Raises:
            ValueError: `faithfulness` did not search for this level.
        """
        for needed in self.needed:
            if needed.level == level:
                return needed
        levels = ", ".join(f"{n.level:g}" for n in self.needed) or "none"
        raise ValueError(
            f"level={level} was not searched for (searched: {levels}): pass levels=({level},) for a ranking"
        )

    def table(self) -> pd.DataFrame:
        """Returns one row per point.

        Its columns are order, share, edges, connected; value, f and kl, each with `_low` and `_high`; cpr, cmd, gap,
        pair_accuracy, able, the settings, and warnings.
        """
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
    """Returns the rows of all curves, with a first column `ranking`."""
    import pandas as pd

    tables = [curve.table() for curve in curves.values()]
    for name, table in zip(curves, tables, strict=True):
        table.insert(0, "ranking", name)
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def summary_table(curves: Mapping[str, FaithfulnessCurve]) -> pd.DataFrame:
    """Returns one row per ranking: cpr and cmd with `_low` and `_high`, edges needed for each level, gap,
    pair_accuracy, able, settings and warnings."""
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
