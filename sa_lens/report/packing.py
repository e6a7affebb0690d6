"""A report's records as the parts that its page reads one by one, small enough to travel in a file.

Figures on a page are read to three or four digits, and are stored so: that halves what compression leaves of them.
"""

from __future__ import annotations

import dataclasses
import math
from itertools import zip_longest
from typing import Any

from sa_lens.report.records import Looks, ModelPage, Report, Snippet, StoryPage, UnitPage

__all__ = ["packed"]

DIGITS = 4
"""Significant digits of a figure."""
STEPS = 100
"""Steps from 0 to a snippet's largest value, in which its values are stored."""


def packed(report: Report) -> dict[str, Any]:
    """The parts of a report by name, as values for JSON.

    `front` holds what the page shows first, and every unit without its snippets and histogram; `stories-0` and
    `units-0` hold the stories and the rest of the units of model 0, and so on.
    """
    parts: dict[str, Any] = {
        "front": {
            "title": report.title,
            "version": report.version,
            "models": [_front(model) for model in report.models],
            "comparison": plain(report.comparison),
        }
    }
    for i, model in enumerate(report.models):
        parts[f"stories-{i}"] = [_story(story) for story in model.stories]
        parts[f"units-{i}"] = [_unit_details(unit) for unit in model.units]
    return parts


def plain(value: Any, digits: int = DIGITS) -> Any:
    """A record as dictionaries and lists, its floats to a few significant digits; what is not finite is None."""
    if dataclasses.is_dataclass(value):
        return {field.name: plain(getattr(value, field.name), digits) for field in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [plain(part, digits) for part in value]
    if isinstance(value, float):
        return _brief(value, digits)
    return value


def _brief(value: float, digits: int) -> float | int | None:
    if not math.isfinite(value):
        return None
    short = float(f"{value:.{digits}g}")
    return int(short) if short.is_integer() and abs(short) < 1e9 else short


def _front(model: ModelPage) -> dict[str, Any]:
    return {
        "name": model.name,
        "streams": list(model.streams),
        "overview": plain(model.overview),
        "tasks": plain(model.tasks),
        "titles": [story.title for story in model.stories],
        "units": [_unit(unit) for unit in model.units],
        "units_note": model.units_note,
    }


def _unit(unit: UnitPage) -> dict[str, Any]:
    """A unit as the table shows it."""
    row = {name: plain(getattr(unit, name)) for name in ("name", "layer", "kind", "index", "promotes")}
    row["streams"] = [
        {
            field.name: plain(getattr(stream, field.name), 3)
            for field in dataclasses.fields(stream)
            if field.name not in ("histogram", "snippets")
        }
        for stream in unit.streams
    ]
    return row


def _unit_details(unit: UnitPage) -> list[dict[str, Any]]:
    return [
        {
            "histogram": plain(stream.histogram, 3),
            "snippets": [_snippet(snippet) for snippet in stream.snippets],
        }
        for stream in unit.streams
    ]


def _snippet(snippet: Snippet) -> dict[str, Any]:
    """A snippet with its values in whole steps of its largest."""
    most = max((abs(value) for value in snippet.values if math.isfinite(value)), default=0.0)
    steps = [round(STEPS * value / most) if most and math.isfinite(value) else 0 for value in snippet.values]
    return {
        "tokens": list(snippet.tokens),
        "most": _brief(most, DIGITS),
        "steps": steps,
        "value": plain(snippet.values[snippet.focus]) if snippet.values else None,
        "focus": snippet.focus,
        "kind": snippet.kind,
    }


def _story(story: StoryPage) -> dict[str, Any]:
    """A story, its tokens told once."""
    return {
        "title": story.title,
        "tokens": list(story.tokens),
        "note": story.tracks.note,
        "tracks": plain(story.tracks.tracks, 3),
        "predictions": plain(story.predictions.streams, 3),
        "predictions_note": story.predictions.note,
        "gates": None
        if story.gates is None
        else {"note": story.gates.note, "scale": story.gates.scale, "units": plain(story.gates.units, 3)},
        "looks": [_looks(looks) for looks in story.looks],
    }


def _looks(looks: Looks) -> dict[str, Any]:
    """Attention in columns, one for the most attended positions, one for the next, and so on, which compress better.

    `back`: how many tokens back; `percent`: shares. None where a token attends to fewer.
    """
    back = [[at - position for position in row] for at, row in enumerate(looks.positions)]
    percent = [[round(100 * share) for share in row] for row in looks.shares]
    return {
        "stream": looks.stream,
        "layer": looks.layer,
        "head": looks.head,
        "back": [list(column) for column in zip_longest(*back)],
        "percent": [list(column) for column in zip_longest(*percent)],
    }
