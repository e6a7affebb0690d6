"""The columns of the table: labels, the direction that the paper claims, and the paper's published figures.

The directions of the claims are stated here and nowhere else. They are those of the paper (arXiv 2505.00509, abstract
and section 4), carried over to the columns that measure the same thing under like conditions.

The values are measured in `model_measurements`, `task_measurements` and `unit_measurements`; a new column needs an
entry there and here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

WEIGHTS = ""
"""Stream of columns about the weights, which belong to neither stream."""

TASKS = {"ioi": "IOI", "object": "object recall"}
"""Tasks of the comparison, with their names in print."""

OTHER = "Other columns"
"""Theme of the columns that are not in `COLUMNS`."""


@dataclass(frozen=True)
class Column:
    """A column of the table."""

    name: str
    """Name in tables of numbers."""
    label: str
    """Name in print, with its unit where it has one."""
    digits: int
    """Digits after the decimal point, in print."""
    direction: int = 0
    """Claimed direction of a self-ablating model against the dense baseline: +1 higher, -1 lower, 0 no claim."""
    claim: str = ""
    """The claim in words."""
    paper: str = ""
    """Its name in the paper's published figures (`PAPER`); empty: it has none."""
    streams: tuple[str, ...] = ("clean", "ablated")
    """Streams in which it has a value."""
    tasks: tuple[str, ...] = ("",)
    """Tasks that it is measured on, and claimed of; the empty string: it is not about a task."""
    theme: str = OTHER
    """Title of the table that it stands in, with other columns of the same theme."""
    drawn: bool = False
    """Whether the figure shows it by default."""


_MORE_LOCAL = "circuits are smaller"
_MORE_FAITHFUL = "small circuits are more faithful"
_CONCENTRATED = "features are more concentrated"
_SPECIALIZED = "units are more specialized"
_LESS_SPARSE = "weights are less sparse"

_MATCHED = "effective tokens minus the baseline's, at equal layer and activity"

_THEMES: dict[str, tuple[Column, ...]] = {
    "Language modelling": (
        Column("loss", "loss, nats per token", 3, drawn=True),
        Column("perplexity", "perplexity", 2, -1, "no loss in language modelling", "perplexity"),
        Column("units_used", "share of units that the gates ever keep", 2, streams=("ablated",)),
    ),
    "Weights": (
        Column(
            *("mean_abs_weight", "mean absolute weight, all parameters", 3, +1, _LESS_SPARSE, "mean_abs_weight"),
            drawn=True,
        ),
        Column("mean_abs_weight_inner", "mean absolute weight without embeddings", 4),
        Column("hoyer", "Hoyer sparsity of the matrices", 3),
        Column("hoyer_inner", "Hoyer sparsity without embeddings", 3, -1, _LESS_SPARSE, drawn=True),
        Column("gini_inner", "Gini coefficient of weights without embeddings", 3, -1, _LESS_SPARSE),
        Column("small_inner", "share of weights below 1 % of the layer's RMS, without embeddings", 4),
    ),
    "Skill": (
        Column("pair_accuracy", "pair accuracy", 3, drawn=True),
        Column("top1_accuracy", "top-1 accuracy", 3),
        Column("logit_difference", "logit difference", 2),
        Column("steps_to_skill", "steps until pair accuracy first reaches 80 %", 0),
    ),
    "Circuits by ACDC": (
        Column("corrupt_kl", "KL(clean prompt || corrupt prompt), nats", 2),
        Column("acdc_edges_0.003", "edges kept by ACDC, tau 0.003, frozen masks", 0),
        Column(
            "acdc_edges_0.01",
            "edges kept by ACDC, tau 0.01, frozen masks",
            0,
            -1,
            _MORE_LOCAL,
            "acdc_edges",
            drawn=True,
        ),
        Column("acdc_edges_0.03", "edges kept by ACDC, tau 0.03, frozen masks", 0),
        Column(
            "acdc_edges_own",
            "edges kept by ACDC, tau 1 % of the model's own KL, frozen masks",
            0,
            -1,
            _MORE_LOCAL,
            drawn=True,
        ),
        Column("acdc_order_spread", "standard deviation of ACDC's edges over random orders, tau 0.01, frozen masks", 1),
    ),
    "Faithfulness": (
        Column("edges_0.9", "edges needed for f >= 0.9", 0, -1, _MORE_LOCAL, drawn=True),
        Column("edges_0.9_low", "lower end of their interval over prompts", 0),
        Column("edges_0.9_high", "upper end of their interval over prompts", 0),
        Column("cpr", "CPR", 3, +1, _MORE_FAITHFUL, drawn=True),
        Column("cmd", "CMD", 3, -1, _MORE_FAITHFUL),
        Column("edges_0.9_frozen", "edges needed for f >= 0.9, frozen masks", 0, streams=("ablated",)),
        Column("masks_alone", "f of frozen masks alone", 2, streams=("ablated",)),
    ),
    "Units": (
        Column("live_units", "share of live units", 3, drawn=True),
        Column("firing_rate", "firing rate of live units", 4),
        Column("effective_tokens", "effective tokens of live units", 1),
        Column("effective_tokens_matched", _MATCHED, 2, -1, _SPECIALIZED, drawn=True),
        Column("effective_tokens_matched_0.3", "effective tokens minus the baseline's, firing level 0.3", 2),
        Column("effective_tokens_matched_0.7", "effective tokens minus the baseline's, firing level 0.7", 2),
        Column("share_matched", "share of live units matched with the baseline", 2),
        Column("label_coverage", "share of labels that a unit follows (F1 >= 0.8)", 3, +1, _SPECIALIZED, drawn=True),
    ),
    "Explanations": (
        Column("explanation_f1", "F1 of explanations", 3, +1, _SPECIALIZED, drawn=True),
        Column("explanation_coverage", "share of live units with an explanation", 3, +1, _SPECIALIZED),
        Column("token_list_f1", "F1 of token lists", 3),
    ),
    "What masks carry": (
        Column("mask_share", "share of context information that is in the masks", 3, streams=("ablated",), drawn=True),
        Column("probe_mask_nats", "nats that a linear probe reads from the masks", 3, streams=("ablated",)),
        Column("self_read_cost", "loss added by gates that read the ablated stream, nats", 3, streams=("ablated",)),
    ),
    "Sparse autoencoders": (
        Column("sae_l0", "SAE L0", 2, -1, _CONCENTRATED, "sae_l0", drawn=True),
        Column("sae_ce_score", "SAE CE score", 3, +1, _CONCENTRATED, "sae_ce_score", drawn=True),
        Column("sae_ce_span", "loss added by zeroing the SAE's hook, nats", 3),
        Column("sae_explained_variance", "SAE explained variance", 3),
        Column("sae_dead", "share of dead SAE latents", 3),
    ),
}

_OF_THEME: dict[str, dict[str, tuple[str, ...]]] = {
    "Weights": {"streams": (WEIGHTS,)},
    **{theme: {"tasks": tuple(TASKS)} for theme in ("Skill", "Circuits by ACDC", "Faithfulness")},
}
"""Fields that all columns of a theme share."""

COLUMNS: dict[str, Column] = {
    column.name: dataclasses.replace(column, theme=theme, **_OF_THEME.get(theme, {}))  # type: ignore[arg-type]
    for theme, columns in _THEMES.items()
    for column in columns
}
"""Columns by name, in the order of the tables."""


def sort_columns(places: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Sorts pairs of task and column in the order of the tables: theme, then task, then column; each appears once.

    Columns that are not in `COLUMNS` come last.
    """
    scales: tuple[list[str], ...] = ([*_THEMES, OTHER], ["", *TASKS], list(COLUMNS))

    def order(place: tuple[str, str]) -> list[int]:
        task, name = place
        values = (column_named(name).theme, task, name)
        return [s.index(v) if v in s else len(s) for s, v in zip(scales, values, strict=True)]

    return sorted(dict.fromkeys(places), key=order)


def column_named(name: str) -> Column:
    """Returns the column of this name; one without label and claim if `COLUMNS` does not have it."""
    return COLUMNS.get(name) or Column(name, name, 3)


def task_title(title: str, task: str) -> str:
    """Returns the title of a table or panel with the name of its task."""
    return f"{title}: {TASKS.get(task, task)}" if task else title


def claimed_direction(task: str, name: str) -> int:
    """Returns the direction that is claimed for a column in a task, or 0 without a claim."""
    column = column_named(name)
    return column.direction if task in column.tasks else 0


def claims_of(stream: str) -> list[tuple[str, str]]:
    """Tasks and columns whose claims are decided together: those of the clean stream and the weights, or of the
    ablated stream. They are those of `COLUMNS`, whatever of it is measured.
    """
    streams = {"ablated"} if stream == "ablated" else {"clean", WEIGHTS}
    claims = [column for column in COLUMNS.values() if column.direction and streams & {*column.streams}]
    return sort_columns((task, column.name) for column in claims for task in column.tasks)


PAPER: dict[str, dict[str, float]] = {
    "baseline": {"acdc_edges": 79, "sae_l0": 7.22, "sae_ce_score": 0.63, "perplexity": 5.73, "mean_abs_weight": 0.44},
    "global-8": {"acdc_edges": 70, "sae_l0": 5.22, "sae_ce_score": 0.65, "perplexity": 6.97, "mean_abs_weight": 0.74},
    "global-4": {"acdc_edges": 41, "sae_l0": 4.90, "sae_ce_score": 0.67, "perplexity": 6.73, "mean_abs_weight": 0.72},
    "global-2": {"acdc_edges": 30, "sae_l0": 4.57, "sae_ce_score": 0.71, "perplexity": 6.66, "mean_abs_weight": 0.73},
    "global-1": {"acdc_edges": 38, "sae_l0": 5.48, "sae_ce_score": 0.66, "perplexity": 6.49, "mean_abs_weight": 0.62},
    "local-8": {"acdc_edges": 36, "sae_l0": 5.00, "sae_ce_score": 0.72, "perplexity": 6.47, "mean_abs_weight": 0.67},
    "local-4": {"acdc_edges": 30, "sae_l0": 4.01, "sae_ce_score": 0.65, "perplexity": 6.58, "mean_abs_weight": 0.76},
    "local-2": {"acdc_edges": 54, "sae_l0": 4.90, "sae_ce_score": 0.70, "perplexity": 6.55, "mean_abs_weight": 0.71},
    "local-1": {"acdc_edges": 36, "sae_l0": 5.33, "sae_ce_score": 0.69, "perplexity": 6.58, "mean_abs_weight": 0.70},
}
"""The paper's published figures by variant: clean stream, one run each, no seeds (the authors' results notebook)."""


def published_value(variant: str, task: str, name: str) -> float | None:
    """Returns the paper's figure for a column of a variant, or None. The paper's task is IOI."""
    return PAPER.get(variant, {}).get(column_named(name).paper) if task in ("", "ioi") else None
