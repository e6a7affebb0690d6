"""A report as JSON, and back."""

from __future__ import annotations

import json

from sa_lens.config import from_dict
from sa_lens.data.reading import parse_json
from sa_lens.report.records import Report


def to_json(report: Report) -> str:
    """The report as JSON, an object for each record with the names of its fields."""
    return json.dumps(report, default=vars, allow_nan=False, ensure_ascii=False, separators=(",", ":"))


def from_json(text: str) -> Report:
    """The report that `to_json` wrote.

    Raises:
        ValueError: not a report.
    """
    try:
        return from_dict(Report, parse_json(text))
    except ValueError as error:
        raise ValueError(f"not a report: {error}; text begins {text[:60]!r}") from error
