"""A report's records as the parts that its page reads one by one, small enough to travel in a file.

Figures on a page are read to three or four digits, and are stored so: that halves what compression leaves of them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection
from itertools import zip_longest
from typing import Any

from sa_lens.report.contents import Looks, ModelPage, Report, Snippet, StoryPage, UnitPage
from sa_lens.views.records import GateRaster

__all__ = ["pack"]

DIGITS = 4
"""Significant digits of a figure."""
STEPS = 100
"""Steps from 0 to a snippet's largest value, in which its values are stored."""
DETAILS = ("histogram", "snippets")
"""Fields of a unit that the page reads when it opens the unit."""


def pack(report: Report) -> dict[str, Any]:
    """Returns the parts of a report by name, as values for JSON.

    `front` holds what the page shows first, and every unit without its snippets and histogram; `stories-0` and
    `units-0` hold the stories and the rest of the units of model 0, and so on.
    """
    parts: dict[str, Any] = {
        "front": {
            "title": report.title,
            "version": report.version,
            "models": [_front(model) for model in report.models],
            "training": to_plain(report.training),
            "comparison": to_plain(report.comparison),
        }
    }
    for i, model in enumerate(report.models):
        parts[f"stories-{i}"] = _stories(model)
        parts[f"units-{i}"] = [_unit_details(unit) for unit in model.units]
    return parts


def to_plain(value: Any, digits: int = DIGITS, without: Collection[str] = ()) -> Any:
    """Returns a record as dictionaries and lists, its floats to a few significant digits; not finite ones are None.

    Args:
        without: fields of the record to leave out.
    """
    if dataclasses.is_dataclass(value):
        return {name: to_plain(part, digits) for name, part in vars(value).items() if name not in without}
    if isinstance(value, tuple | list):
        return [to_plain(part, digits) for part in value]
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
        **to_plain(model, without=("stories", "units")),
        "titles": [story.title for story in model.stories],
        "units": [
            {
                **to_plain(unit, without=("streams",)),
                "streams": [to_plain(stream, 3, DETAILS) for stream in unit.streams],
            }
            for unit in model.units
        ],
    }


def _unit_details(unit: UnitPage) -> list[dict[str, Any]]:
    return [
        {"histogram": to_plain(stream.histogram, 3), "snippets": [_snippet(snippet) for snippet in stream.snippets]}
        for stream in unit.streams
    ]


def _snippet(snippet: Snippet) -> dict[str, Any]:
    """Returns a snippet whose values are whole hundredths of its largest."""
    most = max((abs(value) for value in snippet.values if math.isfinite(value)), default=0.0)
    steps = [round(STEPS * value / most) if most and math.isfinite(value) else 0 for value in snippet.values]
    value = to_plain(snippet.values[snippet.focus]) if snippet.values else None
    return {**to_plain(snippet, without=("values",)), "most": _brief(most, DIGITS), "steps": steps, "value": value}


def _stories(model: ModelPage) -> dict[str, Any]:
    """Returns the stories, and each unit that their gates keep once, in columns."""
    rasters = [story.gates.units for story in model.stories if story.gates is not None]
    units = {(u.name, u.layer, u.site, u.promotes): None for raster in rasters for u in raster}
    place = {unit: i for i, unit in enumerate(units)}
    names = ("name", "layer", "site", "promotes")
    columns = zip(*units, strict=True) if units else ((), (), (), ())
    return {
        "units": {name: to_plain(tuple(column)) for name, column in zip(names, columns, strict=True)},
        "stories": [_story(story, place) for story in model.stories],
    }


def _story(story: StoryPage, place: dict[tuple[Any, ...], int]) -> dict[str, Any]:
    """Returns a story in which its tokens occur once.

    Args:
        place: of each unit among those of all stories.
    """
    return {
        "title": story.title,
        "tokens": list(story.tokens),
        "note": story.tracks.note,
        "tracks": to_plain(story.tracks.tracks, 3),
        "predictions": to_plain(story.predictions.streams, 3),
        "predictions_note": story.predictions.note,
        "gates": None if story.gates is None else _gates(story.gates, place),
        "looks": [_looks(looks) for looks in story.looks],
    }


def _gates(gates: GateRaster, place: dict[tuple[Any, ...], int]) -> dict[str, Any]:
    """Returns the units that stay, in columns: `counts` is the number of positions of each, `gaps` their distances."""
    gaps = [
        [position - before for before, position in zip((0, *unit.positions), unit.positions, strict=False)]
        for unit in gates.units
    ]
    return {
        "note": gates.note,
        "scale": gates.scale,
        "left_out": gates.left_out,
        "units": [place[unit.name, unit.layer, unit.site, unit.promotes] for unit in gates.units],
        "counts": [len(unit.positions) for unit in gates.units],
        "gaps": [gap for row in gaps for gap in row],
        "values": [_brief(value, 3) for unit in gates.units for value in unit.values],
    }


def _looks(looks: Looks) -> dict[str, Any]:
    """Returns attention in columns, which compress better: the most attended positions, the next ones, and so on.

    `back`: how many tokens back; `percent`: shares. None where a token attends to fewer.
    """
    back = [[at - position for position in row] for at, row in enumerate(looks.positions)]
    percent = [[round(100 * share) for share in row] for row in looks.shares]
    return {
        **to_plain(looks, without=("positions", "shares")),
        "back": [list(column) for column in zip_longest(*back)],
        "percent": [list(column) for column in zip_longest(*percent)],
    }
