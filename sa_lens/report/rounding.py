"""Numbers as short as a page needs them: it shows three digits, and characters of numbers are most of its size."""

from __future__ import annotations

from typing import overload

DIGITS = 3
"""Significant digits."""


@overload
def rounded(value: float) -> float: ...
@overload
def rounded(value: None) -> None: ...
@overload
def rounded(value: float | None) -> float | None: ...
def rounded(value: float | None) -> float | None:
    """The number to three significant digits; None stays."""
    return None if value is None else float(f"{value:.{DIGITS}g}")
