"""What every unit of a model does: figures for all of them, details for the most telling ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sa_lens.config import Stream
from sa_lens.core.unit import Sublayer, Unit, unit_counts
from sa_lens.data.blocks import TextBlocks
from sa_lens.report.contents import Snippet, UnitPage, UnitStream
from sa_lens.report.effort import Effort
from sa_lens.report.measured_text import ModelText
from sa_lens.report.model_tables import STREAMS, format_cell
from sa_lens.report.subjects import Subject
from sa_lens.units import Thresholds, calibrate, explain, label_stories, selectivity, snippets, specialization
from sa_lens.units.activations import hold_units
from sa_lens.units.labels import COVERED
from sa_lens.views import histogram
from sa_lens.views.charts import unit_values
from sa_lens.views.raster import promoted_tokens
from sa_lens.views.records import number
from sa_lens.views.wording import token_texts

if TYPE_CHECKING:
    import pandas as pd

CALIBRATION, DESCRIBED = 30_000, 40_000
"""Tokens that set firing thresholds, and tokens that units are described on."""
LABELLED = 600
"""Generated stories on which labels are compared with the units' firing."""
MOST_LISTED = 5_000
"""Live units to list, and besides them those that stories mention."""
PROMOTED = 5
"""Tokens named that a unit promotes."""
TOP, SAMPLE = 5, 3
"""Snippets of a unit: the most active ones, and a sample over the quantiles of the others."""
WINDOW = 24
"""Tokens of a snippet."""
BINS, COUNTED = 40, 20_000
"""Bins of a histogram, and tokens at which values are counted at most."""
EXPLAINED = 30_000
"""Tokens that explanations are made from and judged on, half each."""


def unit_pages(
    subject: Subject,
    text: ModelText,
    effort: Effort,
    mentioned: Collection[str],
    seed: int,
    begin: Callable[[str], object],
) -> tuple[tuple[UnitPage, ...], str, dict[str, str]]:
    """Returns a page for every unit that is live or mentioned, a note on how they were measured, and the model's cells.

    Args:
        effort: how many units to describe in detail, and how closely.
        mentioned: names of units that stories mention.
        seed: of explanations and labelled stories.
        begin: called with the name of each phase of the work.
    """
    begin("thresholds")
    model, streams = subject.model, subject.streams
    rules = calibrate(model, text.calibration_blocks, streams, n_tokens=CALIBRATION, progress=False)
    begin("units")
    blocks = hold_units(model, text.held_out_blocks, streams, n_tokens=DESCRIBED, progress=False)
    sizes: dict[str, Any] = {"n_tokens": DESCRIBED, "coactivation_tokens": 0, "sample_tokens": 1}
    table = specialization(model, blocks, rules, streams, **sizes, progress=False).table
    chosen = choose_units(table, effort.n_units)
    begin("closer look")
    if chosen:
        # all units of a large model do not fit into memory, but these do
        blocks = hold_units(model, blocks, streams, units=chosen, progress=False)
    details = details_of(subject, blocks, rules, chosen, effort, DESCRIBED, seed)
    del blocks
    begin("labels")
    labels = _labels(subject, rules, seed)
    pages = _pages(subject, table, labels, details, mentioned)
    n_live = len(table[table["live"]].drop_duplicates(["layer", "site", "unit"]))
    which = "those that are live in a stream"
    if n_live > MOST_LISTED:
        which = f"{MOST_LISTED:,} of the {n_live:,} live ones, whose firing says most about the token"
    note = (
        f"{len(pages):,} of {sum(unit_counts(model).values()):,} units are shown: {which}, and "
        f"those in a story. Figures are of {table.attrs['n_tokens']:,} tokens of held-out text; a unit fires "
        f"above half of its 99.9th percentile on {table.attrs['n_calibration_tokens']:,} other tokens. "
        f"{len({unit for unit, _ in details})} units, spread evenly over sublayers, have details: "
        "explanation, histogram, snippets"
    )
    if labels is not None:
        note += f". Labels are those of {LABELLED:,} generated stories, of another seed than the training text"
    return pages, note + ".", _cells(table, labels, details)


def choose_units(table: pd.DataFrame, n_units: int) -> list[Unit]:
    """Returns the units to describe in detail, spread evenly over the sublayers, in the order of the table.

    Of each sublayer come first those whose firing says most about the token: firing rate times the bits between the
    effective number of tokens of the text and that of the tokens the unit fires on; in the ablated stream where there
    is one. Dead units never come.
    """
    stream = "ablated" if "ablated" in set(table["stream"]) else "clean"
    of_text = table.attrs["effective_tokens_of_text"]
    ordered: dict[Sublayer, list[Unit]] = {}
    own = table[table["stream"] == stream]
    for layer, site in own[["layer", "site"]].drop_duplicates().itertuples(index=False):
        live = own[(own["layer"] == layer) & (own["site"] == site) & own["live"] & (own["firing_rate"] > 0)]
        bits = [
            rate * math.log2(of_text / effective)
            for rate, effective in zip(live["firing_rate"], live["effective_tokens"], strict=True)
        ]
        order = sorted(range(len(live)), key=lambda i: (-bits[i], live["unit"].iloc[i]))
        ordered[Sublayer(int(layer), site)] = [Unit(int(layer), site, int(live["unit"].iloc[i])) for i in order]
    chosen: list[Unit] = []
    for turn in range(max(map(len, ordered.values()), default=0)):
        units = [of_sublayer[turn] for of_sublayer in ordered.values() if turn < len(of_sublayer)]
        room = min(n_units - len(chosen), len(units))
        chosen += [units[i * len(units) // room] for i in range(room)]
    return sorted(chosen)


def _labels(subject: Subject, rules: Mapping[Stream, Thresholds], seed: int) -> pd.DataFrame | None:
    """Label of each unit and stream; None for a model that was not trained on generated stories."""
    run = subject.settings
    if run is None or subject.words != "stories":
        return None
    stories = label_stories(subject.tokenizer, LABELLED, subject.n_ctx, seed=run.data.stories_seed + 1 + seed)
    # one token: the area under the ROC curve is not shown
    return selectivity(subject.model, stories, rules, subject.streams, sample_tokens=2, progress=False).table


def _pages(
    subject: Subject,
    table: pd.DataFrame,
    labels: pd.DataFrame | None,
    details: Mapping[tuple[Unit, Stream], dict[str, Any]],
    mentioned: Collection[str],
) -> tuple[UnitPage, ...]:
    rows, labelled = _by_unit(table), _by_unit(labels) if labels is not None else {}
    listed = {unit for (unit, _), row in rows.items() if row["live"]}
    if len(listed) > MOST_LISTED:
        listed = {*choose_units(table, MOST_LISTED), *(unit for unit, _ in details)}
    shown = sorted(listed | {Unit.parse(name) for name in mentioned})
    pages = []
    for unit, promotes in zip(shown, promoted_tokens(subject.model, shown, PROMOTED), strict=True):
        places = [(unit, stream) for stream in subject.streams]
        streams = tuple(_stream(rows[place], labelled.get(place, {}), details.get(place, {})) for place in places)
        pages.append(UnitPage(str(unit), *unit, promotes, streams, unit.place_in_heads(subject.model.cfg.d_head)))
    return tuple(pages)


def _by_unit(table: pd.DataFrame) -> dict[tuple[Unit, Stream], dict[str, Any]]:
    """Rows of a table of units by unit and stream."""
    rows: list[dict[str, Any]] = table.to_dict("records")  # type: ignore[assignment]
    return {(Unit(row["layer"], row["site"], row["unit"]), row["stream"]): row for row in rows}


def _stream(row: Mapping[str, Any], label: Mapping[str, Any], details: Mapping[str, Any]) -> UnitStream:
    named = isinstance(label.get("f1_label"), str)
    return UnitStream(
        stream=row["stream"],
        mask_on=number(row["mask_rate"]),
        firing_rate=float(row["firing_rate"]),
        live=bool(row["live"]),
        effective_tokens=number(row["effective_tokens"]) if row["firing_rate"] > 0 else None,
        label=label["f1_label"] if named else "",
        label_f1=number(label["f1"]) if named else None,
        **details,
    )


def _cells(
    table: pd.DataFrame, labels: pd.DataFrame | None, details: Mapping[tuple[Unit, Stream], dict[str, Any]]
) -> dict[str, str]:
    """Means over the live units of each stream, by which models are compared."""
    by_stream = {}
    for stream in STREAMS:
        units = table[table["stream"] == stream]
        live = units[units["live"]]
        of_live = labels[(labels["stream"] == stream) & labels["live"]]["f1"] if labels is not None else ()
        scores = [of_unit["explanation_f1"] for (_, of), of_unit in details.items() if of == stream]
        figures: dict[str, tuple[Any, str]] = {
            "live units": (units["live"], ".1%"),
            "firing rate": (live["firing_rate"], ".2%"),
            "effective tokens": (live["effective_tokens"][live["firing_rate"] > 0], ".1f"),
            "units that stand for a label": ([f1 >= COVERED for f1 in of_live], ".1%"),
            "F1 of explanations": (scores, ".3f"),
        }
        by_stream[stream] = {name: format_cell(_mean(values), form) for name, (values, form) in figures.items()}
    return {f"{name}, {stream}": by_stream[stream][name] for name in by_stream["clean"] for stream in STREAMS}


def _mean(values: Any) -> float | None:
    known = [float(value) for value in values if number(value) is not None]
    return math.fsum(known) / len(known) if known else None


# ------------------------------------------------------------------------------------------------------------- details


def details_of(
    subject: Subject,
    blocks: TextBlocks,
    rules: Mapping[Stream, Thresholds],
    units: Sequence[Unit],
    effort: Effort,
    n_tokens: int,
    seed: int,
) -> dict[tuple[Unit, Stream], dict[str, Any]]:
    """Returns explanation, histogram and snippets of units in each stream in which they are live, as `UnitStream` has
    them.

    Args:
        blocks: text that the thresholds were not set on.
        units: which.
        effort: how closely to look for explanations.
        n_tokens: tokens to read at most.
        seed: of the explanations.
    """
    details: dict[tuple[Unit, Stream], dict[str, Any]] = {}
    values, n = unit_values(subject.model, blocks, units, min(n_tokens, COUNTED)) if units else ({}, 0)
    for stream in subject.streams:
        chosen = [unit for unit in units if rules[stream].live(unit.sublayer)[unit.index]]
        if not chosen:
            continue
        texts = _snippets(subject, blocks, stream, chosen, n_tokens)
        rows = explain(
            *(subject.model, blocks, rules[stream], chosen),
            n_tokens=EXPLAINED,
            snippets=effort.n_snippets,
            substitutes=effort.n_substitutes,
            seed=seed,
            progress=False,
        ).table.to_dict("records")
        for unit, row in zip(chosen, rows, strict=True):
            of_unit = values[unit][stream]
            clean = stream == "clean"
            note = f"{n:,} tokens" if clean else f"stays at {len(of_unit):,} of {n:,} tokens ({len(of_unit) / n:.2%})"
            counted = {"clean" if clean else "ablated, where it stays": of_unit}
            sizes = histogram(counted, str(unit), "value of the unit", note=note, bins=BINS) if len(of_unit) else None
            details[unit, stream] = {
                "explanation": str(row["pattern"]) if row["explained"] else "",
                "explanation_f1": number(row["text_f1"]),
                "histogram": sizes,
                "snippets": texts[unit],
            }
    return details


def _snippets(
    subject: Subject, blocks: TextBlocks, stream: Stream, units: Sequence[Unit], n_tokens: int
) -> dict[Unit, tuple[Snippet, ...]]:
    length = min(WINDOW, blocks.length)
    sizes: dict[str, Any] = {"n_top": TOP, "n_sample": SAMPLE, "length": length, "n_tokens": n_tokens}
    by_sublayer = snippets(subject.model, blocks, stream, units=units, **sizes, progress=False)
    texts = {}
    for sublayer, record in by_sublayer.items():
        for row, index in enumerate(record.units.tolist()):
            columns = (record.tokens[row].tolist(), record.values[row].tolist(), record.peaks[row].tolist())
            texts[Unit(*sublayer, index)] = tuple(
                Snippet(
                    tokens=token_texts(subject.model, tokens),
                    values=tuple(values),
                    focus=peak,
                    kind="top" if i < record.n_top else "sample",
                )
                for i, (tokens, values, peak) in enumerate(zip(*columns, strict=True))
            )
    return texts
