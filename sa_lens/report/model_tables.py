"""Models side by side: tables with a column for each model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sa_lens.circuits.find_and_judge import LEVEL
from sa_lens.config import Stream
from sa_lens.report.task_pages import METHODS, TaskFigures
from sa_lens.report.unit_pages import UnitFigures
from sa_lens.training import Evaluation
from sa_lens.views.records import Table
from sa_lens.views.result_tables import MISSING

STREAMS: tuple[Stream, ...] = ("clean", "ablated")


@dataclass(frozen=True)
class Figures:
    """The figures of one model."""

    name: str
    """Name of the model."""
    losses: Evaluation
    """Losses and use of units."""
    tasks: tuple[TaskFigures, ...]
    """Tasks, the same in every model."""
    units: tuple[UnitFigures, ...]
    """A record a stream."""


def comparison(models: Sequence[Figures], text: str) -> tuple[Table, ...]:
    """Tables of losses, skill, circuits and units; none for a single model.

    Args:
        text: what the models were measured on, in words.
    """
    if len(models) < 2:
        return ()
    return (_losses(models, text), _skill(models), *_circuits(models), _units(models))


def _table(
    title: str, note: str, first: str, models: Sequence[Figures], rows: Sequence[tuple[str, list[str]]]
) -> Table:
    """A table without the rows in which no model has a value."""
    kept = tuple((name, *cells) for name, cells in rows if any(cell != MISSING for cell in cells))
    return Table(title, note, (first, *(model.name for model in models)), kept, (False, *(True for _ in models)))


def _losses(models: Sequence[Figures], text: str) -> Table:
    names: dict[str, tuple[Callable[[Evaluation], float | None], str]] = {
        "clean loss, nats per token": (lambda e: e.clean_loss, ".4f"),
        "ablated loss, nats per token": (lambda e: e.ablated_loss, ".4f"),
        "cost of the gates, nats": (
            lambda e: e.ablated_loss - e.clean_loss if e.ablated_loss is not None else None,
            "+.4f",
        ),
        "clean perplexity": (lambda e: e.clean_perplexity, ",.2f"),
        "ablated perplexity": (lambda e: e.ablated_perplexity, ",.2f"),
        "clean bits per byte": (lambda e: e.clean_bits_per_byte, ".4f"),
        "ablated bits per byte": (lambda e: e.ablated_bits_per_byte, ".4f"),
        "attention units used": (lambda e: e.attn_units_used, ".1%"),
        "neurons used": (lambda e: e.mlp_units_used, ".1%"),
        "kept units that the next token keeps too": (lambda e: e.mask_overlap, ".1%"),
    }
    rows = [(name, [_cell(of(model.losses), form) for model in models]) for name, (of, form) in names.items()]
    note = f"{text}; with different tokenizers compare bits per byte, not losses"
    return _table("Losses", note, "figure", models, rows)


def _skill(models: Sequence[Figures]) -> Table:
    rows = []
    for i, task in enumerate(models[0].tasks):
        for stream in STREAMS:
            cells = [model.tasks[i].accuracy.get(stream, MISSING) for model in models]
            rows.append((f"{task.task}, {stream}", cells))
    return _table("Skill", "pair accuracy with 95 % intervals", "task and stream", models, rows)


def _circuits(models: Sequence[Figures]) -> tuple[Table, ...]:
    needed, kept = [], []
    for i, task in enumerate(models[0].tasks):
        for stream in STREAMS:
            for method, words in METHODS.items():
                name = f"{task.task}, {stream}, {words}"
                needed.append((name, [_count(model.tasks[i].needed.get((stream, method))) for model in models]))
                if method == "acdc":
                    kept.append(
                        (
                            f"{task.task}, {stream}",
                            [_count(model.tasks[i].kept.get((stream, method))) for model in models],
                        )
                    )
    why = f"{MISSING}: the stream cannot do the task, or has no gates"
    return (
        _table("Edges for f ≥ " + f"{LEVEL:g}", f"along each ranking; {why}", "task, stream, method", models, needed),
        _table("Edges that ACDC keeps", why, "task and stream", models, kept),
    )


def _units(models: Sequence[Figures]) -> Table:
    names: dict[str, tuple[Callable[[UnitFigures], float | None], str]] = {
        "live units": (lambda u: u.live, ".1%"),
        "firing rate": (lambda u: u.firing_rate, ".2%"),
        "effective tokens": (lambda u: u.effective_tokens, ".1f"),
        "units that stand for a label": (lambda u: u.labelled, ".1%"),
        "F1 of explanations": (lambda u: u.explanation_f1, ".3f"),
    }
    rows = []
    for name, (of, form) in names.items():
        for stream in STREAMS:
            found = [next((unit for unit in model.units if unit.stream == stream), None) for model in models]
            rows.append((f"{name}, {stream}", [_cell(of(unit) if unit is not None else None, form) for unit in found]))
    note = "means over live units; explanations: of the units that were looked at more closely"
    return _table("Units", note, "figure and stream", models, rows)


def _cell(value: float | None, form: str) -> str:
    return MISSING if value is None else format(value, form)


def _count(value: int | None) -> str:
    return MISSING if value is None else f"{value:,}"
