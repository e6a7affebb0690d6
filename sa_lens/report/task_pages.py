"""What a model does at a task, and the circuits behind it: by ACDC, by EAP-IG, and the gate's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sa_lens.circuits import Circuit, Experiment, Graph, PromptPairs, find_circuit, skill
from sa_lens.circuits.find_and_judge import LEVEL, FoundCircuit
from sa_lens.circuits.metrics import SKILL_BAR
from sa_lens.circuits.tasks import TASKS, make_unseen
from sa_lens.config import ReportMethod, Stream
from sa_lens.report.contents import Ranking, TaskPage
from sa_lens.report.effort import CHOSEN
from sa_lens.report.model_tables import KEPT, NEEDED, SKILL, STREAMS, format_cell
from sa_lens.report.subjects import Subject
from sa_lens.stopping import Interrupted
from sa_lens.views import comparison_table, faithfulness_chart
from sa_lens.views.records import CircuitEdge, CircuitMap, Curves, Table
from sa_lens.views.result_tables import MISSING
from sa_lens.views.wording import METHODS
from sa_lens.views.wording import TASKS as TITLES

MOST_EDGES, MOST_OF_CIRCUIT = 400, 2_000
"""Edges of a ranking that a page holds, and up to so many if its circuit is larger."""
TAU = 0.01
"""ACDC's threshold, nats."""

ABOUT = {
    "ioi": "Two people are named, then one of them gives something: to whom? The answer is the other name.",
    "pronoun": "A girl or a boy is named: which pronoun comes next?",
    "object": "An object is named, and later mentioned again: which word comes next?",
    "repeated": "Two names stand together, and later the first comes again: which name follows?",
}
"""What each task asks."""
SCALES: dict[ReportMethod, str] = {
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


def check_tasks(tasks: Sequence[str]) -> None:
    """Refuses names that are neither a task nor a JSON file.

    Raises:
        ValueError: an unknown name.
    """
    for task in tasks:
        if task not in TASKS and not task.endswith(".json"):
            raise ValueError(f"task {task!r} is none of {', '.join(TASKS)}, nor a .json file of prompt pairs")


def prompts_for(subject: Subject, task: str, n_pairs: int, seed: int) -> Prompts:
    """Returns the prompts of a task, the same for every model with the same tokenizer.

    A task whose words are no single tokens of the tokenizer has none, and says why.

    Args:
        n_pairs: prompts to find circuits with, and as many to judge them on.

    Raises:
        FileNotFoundError: a JSON file that is not there.
        ValueError: a JSON file that is none of prompts, or holds too few for this model.
    """
    try:
        pairs = make_unseen(task, subject.tokenizer, 2 * n_pairs, seed, words=subject.words)
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
    """Returns the streams that can do the task, on the prompts that circuits are judged on."""
    if prompts.report is None:
        return ()
    table = skill(subject.model, prompts.report)
    return tuple(stream for stream, able in zip(table["stream"], table["able"], strict=True) if able)


def task_page(
    subject: Subject, prompts: Prompts, methods: Sequence[ReportMethod], seed: int
) -> tuple[TaskPage, dict[str, dict[str, str]]]:
    """Returns the page of a task, with skill and circuits, and the model's cells in the tables that compare models.

    Args:
        methods: find circuits; `gate` finds one in the ablated stream alone.
        seed: of the intervals.
    """
    title = TITLES.get(prompts.task, Path(prompts.task).stem)
    notes, rankings = [], []
    table = Table("Skill", "", ("stream",), (), (False,))
    cells = {
        SKILL: {f"{title}, {stream}": MISSING for stream in STREAMS},
        NEEDED: {f"{title}, {stream}, {METHODS[method]}": MISSING for stream in STREAMS for method in CHOSEN},
        KEPT: {f"{title}, {stream}": MISSING for stream in STREAMS},
    }
    try:
        n_edges = len(Graph.from_model(subject.model))
    except ValueError as error:
        n_edges = 0
        notes.append(str(error))
    if prompts.find is None or prompts.report is None:
        notes.append(f"No prompts of this task can be made for this model: {prompts.missing}.")
    else:
        skills = skill(subject.model, prompts.report, seed=seed)
        table = _skill_table(skills)
        for row, stream in zip(table.rows, skills["stream"], strict=True):
            cells[SKILL][f"{title}, {stream}"] = row[1]
        if not skills["able"].all():
            notes.append(_unable(skills[~skills["able"]]))
        left_out = [METHODS[method] for method in CHOSEN if method not in methods]
        if n_edges and left_out and skills["able"].any():
            notes.append(f"Not searched by {' and '.join(left_out)}.")
        for stream in skills[skills["able"]]["stream"]:
            find = Experiment(subject.model, prompts.find, stream=stream, seed=seed)
            judge = find.on(prompts.report)
            for method in methods if n_edges else ():
                if method == "gate" and stream == "clean":
                    continue
                result = _find(find, judge, method)
                rankings.append(ranking(result, method, stream, title, len(prompts.find), len(prompts.report)))
                needed = result.curve.edges_for(LEVEL).edges if result.curve is not None else None
                cells[NEEDED][f"{title}, {stream}, {METHODS[method]}"] = format_cell(needed, ",")
                if method == "acdc":
                    cells[KEPT][f"{title}, {stream}"] = f"{len(result.circuit):,}"
    return TaskPage(title, _about(prompts), table, tuple(rankings), " ".join(notes)), cells


def _unable(rows: Any) -> str:
    """Says which streams cannot do the task, in one line of the page."""
    streams = " and ".join(f"the {stream} stream" for stream in rows["stream"])
    shares = " and ".join(f"{share:.0%}" for share in rows["pair_accuracy"])
    return (
        f"No circuit, as {streams} cannot do this task: pair accuracy {shares}, and below {SKILL_BAR:.0%} a circuit "
        "explains nothing."
    )


def _find(find: Experiment, judge: Experiment, method: ReportMethod) -> FoundCircuit:
    try:
        return find_circuit(find, judge, method, tau=TAU, progress=False)
    except Interrupted as stop:
        # a report keeps nothing that could be resumed
        raise KeyboardInterrupt from stop


def _about(prompts: Prompts) -> str:
    asked = ABOUT.get(prompts.task, f"Prompts of {Path(prompts.task).name}.")
    return f"{asked} Example: {prompts.example}." if prompts.example else asked


def _skill_table(rows: Any) -> Table:
    columns = ["stream", "pair_accuracy", "top1_accuracy", "logit_difference", "able"]
    note = f"{int(rows['n'].iloc[0])} prompts, 95 % intervals; able: pair accuracy of {SKILL_BAR:.0%} or more"
    return comparison_table(rows, "Skill", note=note, columns=columns)


def ranking(
    result: FoundCircuit, method: ReportMethod, stream: Stream, task: str, n_find: int, n_report: int
) -> Ranking:
    """Returns a circuit that was found as a ranking, its edges in the order in which they join it."""
    graph = result.ranking.graph
    edges = order_edges(result.ranking, absolute=method != "acdc")[
        : max(MOST_EDGES, min(MOST_OF_CIRCUIT, len(result.circuit)))
    ]
    circuit = CircuitMap(
        title=f"{task}, {METHODS[method]}, {stream} stream",
        note=_note(result, method, n_find, n_report, len(edges)),
        n_layers=graph.n_layers,
        n_heads=graph.n_heads,
        attn_only=graph.attn_only,
        n_edges=len(graph),
        edges=tuple(edges),
        scale=SCALES[method],
        warnings=result.warnings,
    )
    return Ranking(METHODS[method], stream, circuit, chosen=len(result.circuit), curve=_curve(result, method))


def order_edges(circuit: Circuit, *, absolute: bool) -> list[CircuitEdge]:
    """Returns every edge, the largest score first, equals in the order of the graph, as `Circuit.keep` takes them."""
    graph = circuit.graph
    values = circuit.scores[graph.exists]
    places: list[int] = (values.abs() if absolute else values).sort(descending=True, stable=True).indices.tolist()
    edges = graph.edges
    return [
        CircuitEdge(str(edges[i].source), str(edges[i].destination), edges[i].port, float(values[i])) for i in places
    ]


def _note(result: FoundCircuit, method: ReportMethod, n_find: int, n_report: int, shown: int) -> str:
    how = {
        "acdc": f"Edge by edge, an edge goes if KL rises by less than tau = {TAU:g} nats without it",
        "eap-ig": f"Integrated gradients of the logit difference; the fewest edges tried with f ≥ {LEVEL:g}",
        "gate": f"Which units the gates keep at the last token; the fewest edges tried with f ≥ {LEVEL:g}",
    }[method]
    parts = [f"{how}. Found with {n_find} prompts, judged on {n_report} others"]
    parts[0] += f"; other edges carry what they carry in the corrupt prompt ({result.choices['ablation']})"
    if result.choices["masks"] != "none":
        parts[0] += f"; {result.choices['masks']} masks"
    if result.own is not None:
        point = result.own.points[0]
        parts.append(
            f"The circuit of {len(result.circuit):,} edges has f = {point.f.mean:.2f}, KL {point.kl.mean:.3f} nats"
        )
    if shown < len(result.ranking.graph):
        parts.append(f"Shown are the first {shown:,} of {len(result.ranking.graph):,} edges")
    return ". ".join(parts) + "."


def _curve(result: FoundCircuit, method: ReportMethod) -> Curves | None:
    """Faithfulness along the order of the ranking; None where it is not defined."""
    if result.curve is None:
        return None
    table = result.curve.table()
    table = table[table["order"] == ("signed" if method == "acdc" else "absolute")]
    return faithfulness_chart({METHODS[method]: table})
