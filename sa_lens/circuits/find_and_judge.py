"""`find_circuit` finds a circuit by any method and judges it on other pairs, for the command line and comparisons.

Every method gives a ranking of all edges. ACDC decides on a set as well; a ranking alone is cut at the fewest edges
that are faithful on the pairs it was made with. Skill, faithfulness and the metrics of the circuit are those of pairs
that played no part in finding it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sa_lens.circuits.discovery.acdc import ACDCResult, acdc
from sa_lens.circuits.discovery.eap import eap, eap_ig
from sa_lens.circuits.discovery.exact_effects import exact_effects
from sa_lens.circuits.discovery.gate_circuit import gate_circuit
from sa_lens.circuits.discovery.relp import relp
from sa_lens.circuits.experiment import Experiment, analysis
from sa_lens.circuits.graph import Circuit
from sa_lens.circuits.judging.circuit_metric import GapTooSmall
from sa_lens.circuits.judging.faithfulness import Order, faithfulness
from sa_lens.circuits.judging.faithfulness_curve import FaithfulnessCurve
from sa_lens.circuits.metrics import SKILL_BAR, kl
from sa_lens.circuits.tasks.pairs import PromptPairs
from sa_lens.config import Method, check_choice
from sa_lens.data.whole_files import staged_folder
from sa_lens.statistics import Interval
from sa_lens.stopping import Interrupted

if TYPE_CHECKING:
    import pandas as pd

LEVEL = 0.9
"""Faithfulness at which circuits of several models are compared."""


@dataclass(frozen=True)
class FoundCircuit:
    """A circuit with its ranking, judged on pairs other than those of the search; from `find_circuit`."""

    circuit: Circuit
    """The edges that ACDC keeps. For other methods: as many edges as asked for, or the smallest tried number that gives
    f >= 0.9 on the pairs of the search."""
    ranking: Circuit
    """All edges with their scores."""
    skill: Mapping[str, Any]
    """The row of `Experiment.skill`."""
    corrupt_kl: float
    """KL(clean prompt || corrupt prompt) of the model itself, nats, mean over pairs: the scale of ACDC's tau."""
    curve: FaithfulnessCurve | None
    """Faithfulness of the ranking by size; None if clean and corrupt prompts have almost the same score."""
    own: FaithfulnessCurve | None
    """Faithfulness of the circuit itself."""
    seconds: float
    """Seconds that ACDC's search took, or the ranking of all edges."""
    choices: Mapping[str, Any]
    """Settings of the search: `masks` (`none` in the clean stream), `ablation`, `tau` of ACDC, `steps` of EAP-IG; empty
    if the method has no such setting."""
    warnings: tuple[str, ...] = field(default=())
    """Reasons not to trust this circuit."""

    def row(self) -> dict[str, Any]:
        """Returns a row of a table: skill, edges, faithfulness, areas, edges needed and seconds."""
        about = self.circuit.about
        row: dict[str, Any] = {
            "task": self.skill["task"],
            "stream": self.skill["stream"],
            "method": about["method"],
            **self.choices,
            **{name: self.skill[name] for name in ("pair_accuracy", "top1_accuracy", "logit_difference", "able")},
            "corrupt_kl": self.corrupt_kl,
            "edges": len(self.circuit),
            "connected": len(self.circuit.prune_dangling()),
        }
        point = self.own.points[0] if self.own is not None else None
        row |= {"f": point.f.mean if point else math.nan, "kl": point.kl.mean if point else math.nan}
        row["masks_alone"] = self.own.about["masks_alone"] if self.own is not None else math.nan
        row["edges_0.9"] = self.curve.edges_for(LEVEL).edges if self.curve is not None else math.nan
        missing = Interval(math.nan, math.nan, math.nan)
        cpr, cmd = (self.curve.cpr, self.curve.cmd) if self.curve is not None else (missing, missing)
        row |= cpr.columns("cpr") | cmd.columns("cmd")
        return row | {"seconds": self.seconds, "warnings": "; ".join(self.warnings)}

    def summary(self) -> str:
        """Returns skill, circuit and faithfulness as text, followed by the warnings."""
        row, about = self.row(), self.circuit.about
        skilled = self.skill

        def interval(name: str) -> str:
            return f"{skilled[name]:.3f} [{skilled[f'{name}_low']:.3f}, {skilled[f'{name}_high']:.3f}]"

        lines = [
            f"{row['task']}, {row['stream']} stream, {skilled['n']} prompts, 95 % intervals",
            f"  pair accuracy     {interval('pair_accuracy')}",
            f"  top-1 accuracy    {interval('top1_accuracy')}",
            f"  logit difference  {interval('logit_difference')}",
            f"  KL(clean prompt || corrupt prompt)  {row['corrupt_kl']:.3f} nats",
            "",
            f"{about['method']}: {row['edges']:,} of {len(self.circuit.graph):,} edges ({row['connected']:,} on a "
            f"path from embedding to logits), {row['seconds']:.1f} s",
            "  " + ", ".join(f"{name} {value}" for name, value in self.choices.items() if value not in ("none", "")),
        ]
        if self.own is not None:
            lines.append(f"  faithfulness f    {row['f']:.3f}, KL {row['kl']:.3f} nats")
            if row["masks"] == "frozen":
                lines.append(f"  masks alone       {row['masks_alone']:.3f}, f without any edge out of the embedding")
        if self.curve is not None:
            lines.append(f"  edges for f >= {LEVEL:g}  {row['edges_0.9']:,} along the ranking")
            lines.append(f"  CPR {row['cpr']:.3f} (area under f), CMD {row['cmd']:.3f} (area of |1 - f|)")
        return "\n".join(lines + [f"\nwarning: {warning}" for warning in self.warnings])

    def save(self, folder: str | Path) -> Path:
        """Writes circuit.json, ranking.json, edges.csv, curve.csv and summary.csv into a folder, all or none."""
        import pandas as pd

        tables = {"edges": self.circuit.table(), "summary": pd.DataFrame([self.row()])}
        if self.curve is not None:
            tables["curve"] = self.curve.table()
        with staged_folder(folder) as staged:
            self.circuit.save(staged / "circuit.json")
            self.ranking.save(staged / "ranking.json")
            for name, table in tables.items():
                (staged / f"{name}.csv").write_text(table.to_csv(index=False), encoding="utf-8")
        return Path(folder)


@analysis
def find_circuit(
    exp: Experiment,
    report: PromptPairs | Experiment,
    method: Method = "acdc",
    *,
    tau: float = 0.01,
    edges: int | None = None,
    resume: Circuit | None = None,
    progress: bool = True,
) -> FoundCircuit:
    """Finds a circuit on the pairs of the experiment and judges it on other pairs.

    Args:
        report: pairs to judge on, none of which is in the experiment; or an experiment on them (`exp.on(pairs)`), which
            keeps its runs for the next method.
        method: ACDC decides edge by edge; the other methods rank all edges.
        tau: threshold of ACDC; other methods do not use it.
        edges: size of the circuit for methods that rank; None takes the smallest tried size with f >= 0.9 on the pairs
            of the experiment.
        resume: the circuit of an interrupted search by ACDC, which is continued.
        progress: whether to show progress bars for what takes more than a few seconds.

    Raises:
        ValueError: the method is unknown, `edges` is given for ACDC, a pair is in both sets, the gate circuit is asked
            of a model without gates, or `resume` belongs to another method or search.
        Interrupted: Ctrl-C during ACDC's search, or while its circuit is judged; the exception's `result` can be
            resumed.
    """
    check_choice("method", method, Method)
    if method == "acdc" and edges is not None:
        raise ValueError(f"edges={edges} has no meaning for ACDC, whose size follows from tau: give tau, or a ranking")
    if method != "acdc" and resume is not None:
        raise ValueError(f"method={method!r} cannot be resumed, only ACDC can: leave resume out")
    judge = report if isinstance(report, Experiment) else exp.on(report)
    shared = _prompts(exp.pairs) & _prompts(judge.pairs)
    if shared:
        raise ValueError(
            f"{len(shared)} clean prompts are in `find` and in `report`: a circuit is judged on other pairs than those "
            "it was found with. Make both by pairs.split(seed)"
        )
    if method == "relp":
        exp, judge = exp.fill_in(masks="frozen"), judge.fill_in(masks="frozen")
    began = time.perf_counter()
    result: ACDCResult | None = None
    if method == "acdc":
        result = acdc(exp, tau, resume=resume, progress=progress)
    ranking = result.circuit if result is not None else _rank(exp, method, progress)
    seconds = time.perf_counter() - began
    with _keep_if_stopped(result):
        circuit, warnings = ranking, []
        order: Order = "mib" if result is None else "signed"
        judged: dict[str, Any] = {"order": order, "progress": progress}
        if result is None:
            try:
                if edges is None:
                    edges = faithfulness(exp, ranking, sizes=[1.0], **judged).edges_for(LEVEL).edges
            except GapTooSmall as error:
                edges = 0
                warnings.append(f"no faithful size was found: {error}")
            circuit = ranking.keep(edges)
        ability = {str(k): v for k, v in judge.skill().to_dict("records")[0].items()}
        if not ability["able"]:
            warnings.append(
                f"the {exp.stream} stream does not do {judge.pairs.task}: pair accuracy "
                f"{ability['pair_accuracy']:.0%} is below {SKILL_BAR:.0%}, so a circuit for it explains little"
            )
        curve = own = None
        try:
            curve = faithfulness(judge, ranking, **judged)
            own = faithfulness(judge, [circuit], **judged)
            warnings += [warning for warning in own.warnings if "masks" in warning]
        except GapTooSmall as error:
            warnings.append(f"no faithfulness: {error}")
        divergence = float(kl(judge.logits("corrupt"), judge.logits()).double().mean())
    settings = {name: ranking.about.get(name, "") for name in ("tau", "steps")}
    choices = {"masks": exp.masks, "ablation": exp.ablation, **settings}
    return FoundCircuit(circuit, ranking, ability, divergence, curve, own, seconds, choices, warnings=tuple(warnings))


def _rank(exp: Experiment, method: Method, progress: bool) -> Circuit:
    if method == "gate":
        return gate_circuit(exp)
    rank = {"eap": eap, "eap-ig": eap_ig, "relp": relp, "exact": exact_effects}[method]
    return rank(exp, progress=progress)


@contextmanager
def _keep_if_stopped(result: ACDCResult | None) -> Iterator[None]:
    """Keeps a finished search if Ctrl-C interrupts the context; after `resume` the circuit only has to be judged."""
    try:
        yield
    except KeyboardInterrupt as stop:
        if result is None:
            raise
        raise Interrupted(
            "stopped after the search, before the circuit was judged; the exception's `result` holds it. Go on with "
            "find_circuit(..., resume=result.circuit)",
            result=result,
        ) from stop


def _prompts(pairs: PromptPairs) -> set[tuple[int, ...]]:
    rows = zip(pairs.clean.tolist(), pairs.lengths.tolist(), strict=True)
    return {tuple(row[-length:]) for row, length in rows}


def circuit_table(circuits: Mapping[Any, FoundCircuit], names: Sequence[str] = ("model",)) -> pd.DataFrame:
    """Returns a table with one row per circuit.

    Args:
        names: names of the parts of the keys, which are the first columns.

    Raises:
        ValueError: the number of names is not the number of parts of the keys.
    """
    import pandas as pd

    rows = []
    for key, item in circuits.items():
        parts = key if isinstance(key, tuple) else (key,)
        rows.append({**dict(zip(names, parts, strict=True)), **item.row()})
    return pd.DataFrame(rows)
