"""What a model does at a task, and the circuits behind it: ACDC, EAP-IG, and the gate's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sa_lens.circuits.discovery.acdc import SearchInterrupted
from sa_lens.circuits.find_and_judge import LEVEL, FoundCircuit, Method, find_circuit
from sa_lens.circuits.graph import Circuit, Graph
from sa_lens.circuits.judging.circuit_metric import SharedRuns
from sa_lens.circuits.metrics import SKILL_BAR, skill
from sa_lens.circuits.tasks import TASKS, make_unseen
from sa_lens.circuits.tasks.pairs import PromptPairs
from sa_lens.config import Stream
from sa_lens.report.contents import Ranking, TaskPage
from sa_lens.report.subjects import Subject
from sa_lens.views import comparison_table, faithfulness_chart
from sa_lens.views.labels import TASKS as TITLES
from sa_lens.views.records import CircuitEdge, Curves, Table

PAIRS = 64
"""Prompts to find circuits with, and as many others to judge them on."""
MOST_EDGES = 400
"""Edges of a ranking that a page holds, more if its circuit is larger."""
TAU = 0.01
"""ACDC's threshold, nats."""

ABOUT = {
    "ioi": "Two people are named, then one of them gives something: to whom? The answer is the other name.",
    "pronoun": "A girl or a boy is named: which pronoun comes next?",
    "object": "An object is named, and later taken up again: which word comes next?",
    "repeated": "Two names stand together, and later the first comes again: which name follows?",
}
"""What each task asks."""
METHODS: dict[Method, str] = {"acdc": "ACDC", "eap-ig": "EAP-IG", "gate": "gate circuit"}
"""Names of the methods."""
SCALES: dict[Method, str] = {
    "acdc": "rise of KL when the edge goes, nats",
    "eap-ig": "share in the logit difference",
    "gate": "share of units that stay, source times destination",
}
"""What the scores of each method mean."""


@dataclass(frozen=True)
class Prompts:
    """The prompts of a task for one model."""

    task: str
    """Name of the task."""
    find: PromptPairs | None
    """Pairs to find circuits with; None where the tokenizer allows none."""
    report: PromptPairs | None
    """Pairs to judge on."""
    example: str
    """One of them in words, with both answers."""
    missing: str
    """Why there are none."""


@dataclass(frozen=True)
class TaskFigures:
    """The figures of a task by which models are compared."""

    task: str
    """Name of the task."""
    accuracy: Mapping[Stream, str]
    """Pair accuracy with its interval."""
    kept: Mapping[tuple[Stream, Method], int]
    """Edges of each method's circuit."""
    needed: Mapping[tuple[Stream, Method], int | None]
    """Edges that each ranking needs for f >= 0.9; None where faithfulness is not defined."""


def check_tasks(tasks: Sequence[str]) -> None:
    """Refuses names that are neither a task nor a JSON file.

    Raises:
        ValueError: an unknown name.
    """
    for task in tasks:
        if task not in TASKS and not task.endswith(".json"):
            raise ValueError(f"task {task!r} is none of {', '.join(TASKS)}, nor a .json file of prompt pairs")


def prompts_for(subject: Subject, task: str, seed: int) -> Prompts:
    """The prompts of a task, the same for every model with the same tokenizer.

    A task whose words are no single tokens of the tokenizer has none, and says why.

    Raises:
        FileNotFoundError: a JSON file that is not there.
        ValueError: a JSON file that is none of prompts, or holds too few for this model.
    """
    try:
        pairs = make_unseen(task, subject.tokenizer, 2 * PAIRS, seed, world=subject.world)
        find, report = pairs.split(seed)
        longest = int(pairs.lengths.max())
        if longest > subject.model.cfg.n_ctx:
            raise ValueError(f"a prompt has {longest} tokens, more than the {subject.model.cfg.n_ctx} of the context")
    except ValueError as error:
        if task not in TASKS:
            raise ValueError(f"task {task} for {subject.name}: {error}") from error
        return Prompts(task, None, None, "", " ".join(str(error).split()).rstrip("."))
    answer, wrong = (subject.tokenizer.decode([int(x[0])]) for x in (report.answers, report.wrong_answers))
    return Prompts(task, find, report, f"“{report.clean_texts[0]}” → “{answer}”, not “{wrong}”", "")


def able_streams(subject: Subject, prompts: Prompts) -> tuple[Stream, ...]:
    """The streams that do the task, on the prompts that circuits are judged on."""
    if prompts.report is None:
        return ()
    table = skill(subject.model, prompts.report)
    return tuple(stream for stream, able in zip(table["stream"], table["able"], strict=True) if able)


def task_page(subject: Subject, prompts: Prompts, seed: int, progress: bool) -> tuple[TaskPage, TaskFigures]:
    """Skill and circuits of a task.

    Args:
        seed: of the intervals.
    """
    cfg = subject.model.cfg
    title = TITLES.get(prompts.task, Path(prompts.task).stem)
    notes, rankings = [], []
    accuracy: dict[Stream, str] = {}
    kept: dict[tuple[Stream, Method], int] = {}
    needed: dict[tuple[Stream, Method], int | None] = {}
    try:
        n_edges = len(Graph.from_model(subject.model))
    except ValueError as error:
        n_edges = 0
        notes.append(str(error))
    if prompts.find is None or prompts.report is None:
        table = Table("Skill", "", ("stream",), (), (False,))
        notes.append(f"No prompts of this task can be made for this model: {prompts.missing}.")
    else:
        runs = SharedRuns()
        rows = skill(subject.model, prompts.report, seed=seed)
        table = _skill_table(rows)
        accuracy = dict(zip(rows["stream"], (row[1] for row in table.rows), strict=True))
        for stream, able, share in zip(rows["stream"], rows["able"], rows["pair_accuracy"], strict=True):
            if not able:
                notes.append(
                    f"No circuit of the {stream} stream: its pair accuracy of {share:.0%} is below {SKILL_BAR:.0%}, so "
                    "it cannot do the task, and a circuit for it would explain nothing."
                )
                continue
            for method in _methods(subject, stream) if n_edges else ():
                try:
                    found = find_circuit(
                        *(subject.model, prompts.find, prompts.report, method),
                        tau=TAU,
                        stream=stream,
                        # frozen masks of the clean prompt would bring a ranking's circuit what no edge of it carries
                        gates="live" if stream == "ablated" and method != "acdc" else None,
                        runs=runs,
                        progress=progress,
                        seed=seed,
                    )
                except SearchInterrupted as stop:
                    # a report keeps nothing that could be resumed
                    raise KeyboardInterrupt from stop
                rankings.append(ranking(found, method, stream, len(prompts.find), len(prompts.report)))
                kept[stream, method] = len(found.circuit)
                needed[stream, method] = found.curve.edges_for(LEVEL).edges if found.curve is not None else None
    page = TaskPage(
        task=title,
        about=_about(prompts),
        skill=table,
        n_layers=cfg.n_layers,
        n_heads=cfg.n_heads,
        attn_only=bool(cfg.attn_only),
        n_edges=n_edges,
        rankings=tuple(rankings),
        note=" ".join(notes),
    )
    return page, TaskFigures(title, accuracy, kept, needed)


def _methods(subject: Subject, stream: Stream) -> tuple[Method, ...]:
    return ("acdc", "eap-ig", "gate") if stream == "ablated" else ("acdc", "eap-ig")


def _about(prompts: Prompts) -> str:
    asked = ABOUT.get(prompts.task, f"Prompts of {Path(prompts.task).name}.")
    return f"{asked} Example: {prompts.example}." if prompts.example else asked


def _skill_table(rows: Any) -> Table:
    columns = ["stream", "pair_accuracy", "top1_accuracy", "logit_difference", "able"]
    note = f"{int(rows['n'].iloc[0])} prompts, 95 % intervals; able: pair accuracy of {SKILL_BAR:.0%} or more"
    return comparison_table(rows, "Skill", note=note, columns=columns)


def ranking(found: FoundCircuit, method: Method, stream: Stream, n_find: int, n_report: int) -> Ranking:
    """A found circuit as a ranking, its edges in the order in which they join it."""
    order = in_order(found.ranking, absolute=method != "acdc")
    kept = order[: max(MOST_EDGES, len(found.circuit))]
    return Ranking(
        method=METHODS[method],
        stream=stream,
        note=_note(found, method, n_find, n_report, len(kept)),
        scale=SCALES[method],
        edges=tuple(kept),
        chosen=len(found.circuit),
        curve=_curve(found, method),
    )


def in_order(circuit: Circuit, *, absolute: bool) -> list[CircuitEdge]:
    """Every edge, the largest score first and equals in the order of the graph, as `Circuit.keep` takes them."""
    graph = circuit.graph
    values = circuit.scores[graph.exists]
    places: list[int] = (values.abs() if absolute else values).sort(descending=True, stable=True).indices.tolist()
    edges = graph.edges
    return [
        CircuitEdge(str(edges[i].source), str(edges[i].destination), edges[i].port, float(values[i])) for i in places
    ]


def _note(found: FoundCircuit, method: Method, n_find: int, n_report: int, shown: int) -> str:
    how = {
        "acdc": f"Edge by edge, an edge goes if KL rises by less than tau = {TAU:g} nats without it",
        "eap-ig": f"Integrated gradients of the logit difference; the fewest edges tried with f ≥ {LEVEL:g}",
        "gate": f"Which units the gates keep at the last token; the fewest edges tried with f ≥ {LEVEL:g}",
    }[method]
    parts = [f"{how}. Found with {n_find} prompts, judged on {n_report} others"]
    parts[0] += f"; other edges carry what they carry in the corrupt prompt ({found.choices['ablation']})"
    if found.choices["gates"] != "none":
        parts[0] += f"; {found.choices['gates']} gates"
    if found.own is not None:
        point = found.own.points[0]
        parts.append(
            f"The circuit of {len(found.circuit):,} edges has f = {point.f.mean:.2f}, KL {point.kl.mean:.3f} nats"
        )
    if shown < len(found.ranking.graph):
        parts.append(f"Shown are the first {shown:,} of {len(found.ranking.graph):,} edges")
    return ". ".join([*parts, *found.warnings]) + "."


def _curve(found: FoundCircuit, method: Method) -> Curves | None:
    """Faithfulness along the order of the ranking; None where it is not defined."""
    if found.curve is None:
        return None
    table = found.curve.table()
    table = table[table["order"] == ("signed" if method == "acdc" else "absolute")]
    return faithfulness_chart({METHODS[method]: table})
