"""How much a report measures: less where a model is large, because it reads text more slowly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from sa_lens.config import ReportMethod, check_choice
from sa_lens.report.measured_text import CALIBRATION, HELD_OUT, LEAST_BLOCKS
from sa_lens.report.subjects import Subject

LARGE = 20_000_000
"""Parameters above which a model counts as large."""
FEWEST = 16_000
"""Tokens that even the largest model is measured on."""
CHOSEN: tuple[ReportMethod, ...] = get_args(ReportMethod)
"""Methods that can find circuits."""


@dataclass(frozen=True)
class Effort:
    """How much is measured of each model of a report."""

    n_stories: int
    """Stories to show at most."""
    n_samples: int
    """Prompts that each stream continues."""
    n_tokens: int
    """Tokens (of the first model's tokenizer) to measure on; a third as many set firing thresholds."""
    n_pairs: int
    """Prompts to find circuits with, and as many others to judge them on."""
    methods: tuple[ReportMethod, ...]
    """Methods that find circuits."""
    n_units: int
    """Units of each model to explain."""
    n_snippets: int
    """Snippets that an explanation is fitted on."""
    n_substitutes: int
    """Likely tokens that are tried in each place of a snippet."""


def check_effort(
    n_stories: int | None = None, methods: Sequence[ReportMethod] | None = None, n_units: int | None = None
) -> None:
    """Refuses what no model can be measured with, before one is loaded.

    Raises:
        ValueError: a number out of range, or a method that a report does not show.
    """
    if n_stories is not None and n_stories < 1:
        raise ValueError(f"n_stories={n_stories} must be at least 1")
    if n_units is not None and n_units < 0:
        raise ValueError(f"n_units={n_units} must be 0 or more")
    for method in methods or ():
        check_choice("method", method, ReportMethod)


def effort_for(
    subjects: Sequence[Subject],
    n_stories: int | None = None,
    n_tokens: int | None = None,
    methods: Sequence[ReportMethod] | None = None,
    n_units: int | None = None,
) -> Effort:
    """Returns what is asked for, and what is not, by the size of the largest model.

    Raises:
        ValueError: too few tokens for blocks of the models' context.
    """
    parameters = max(subject.parameters for subject in subjects)
    least = math.ceil(LEAST_BLOCKS * max(subject.n_ctx for subject in subjects) * HELD_OUT / CALIBRATION)
    if n_tokens is None:
        in_proportion = HELD_OUT * LARGE // max(LARGE, parameters)
        n_tokens = min(HELD_OUT, max(FEWEST, least, in_proportion))
    if n_tokens < least:
        raise ValueError(
            f"n_tokens={n_tokens:,} must be at least {least:,}, so that the third of them that sets firing thresholds "
            f"is {LEAST_BLOCKS} blocks of the models' context"
        )
    large = parameters > LARGE
    if methods is None:
        methods = [method for method in CHOSEN if not (large and method == "acdc")]
    return Effort(
        n_stories=n_stories if n_stories is not None else 4 if large else 12,
        n_samples=2 if large else 3,
        n_tokens=n_tokens,
        n_pairs=16 if large else 64,
        methods=tuple(method for method in CHOSEN if method in methods),
        n_units=n_units if n_units is not None else 24 if large else 96,
        n_snippets=4 if large else 10,
        n_substitutes=1 if large else 2,
    )
