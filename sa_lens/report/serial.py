"""A report as JSON, and back."""

from __future__ import annotations

import json
import typing

from sa_lens.report.records import Report
from sa_lens.views.records import built


def to_json(report: Report) -> str:
    """The report as JSON, an object for each record with the names of its fields."""
    return json.dumps(report, default=vars, allow_nan=False, ensure_ascii=False, separators=(",", ":"))


def from_json(text: str) -> Report:
    """The report that `to_json` wrote.

    Raises:
        ValueError: not a report.
    """
    try:
        return typing.cast(Report, built(Report, json.loads(text)))
    except (json.JSONDecodeError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"not a report: {type(error).__name__}: {error}; text begins {text[:60]!r}") from error
