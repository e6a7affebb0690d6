"""What every unit of a model does: figures for all of them, a closer look at the most telling ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sa_lens.config import Stream
from sa_lens.report.contents import UnitPage, UnitStream
from sa_lens.report.measured_text import ModelText
from sa_lens.report.subjects import Subject
from sa_lens.report.unit_details import Look, closer_look
from sa_lens.units.activations import Site, held, unit_counts
from sa_lens.units.firing import Thresholds, calibrate
from sa_lens.units.labels import COVERED, label_stories, selectivity
from sa_lens.units.unit_tables import specialization
from sa_lens.views.gate_raster import promoted_tokens
from sa_lens.views.labels import unit_name
from sa_lens.views.records import number

if TYPE_CHECKING:
    import pandas as pd

CALIBRATION, DESCRIBED = 30_000, 40_000
"""Tokens that set firing thresholds, and tokens that units are described on."""
LABELLED = 600
"""Generated stories whose labels are looked for."""
PROMOTED = 5
"""Tokens named that a unit promotes."""


@dataclass(frozen=True)
class UnitFigures:
    """Means over the live units of a stream, by which models are compared; None: not defined."""

    stream: Stream
    """The stream."""
    live: float
    """Share of units that are live."""
    firing_rate: float | None
    """Mean share of tokens at which they fire."""
    effective_tokens: float | None
    """Mean effective number of different tokens that they fire on."""
    labelled: float | None
    """Share of them that stand for a label: F1 of 0.8 or more."""
    explanation_f1: float | None
    """Mean F1 of the explanations made."""


def unit_pages(
    subject: Subject,
    text: ModelText,
    n_units: int,
    mentioned: Collection[str],
    seed: int,
    begin: Callable[[str], object],
) -> tuple[tuple[UnitPage, ...], str, tuple[UnitFigures, ...]]:
    """A page for every unit that is live in a stream or mentioned, a note on how they were looked at, and figures.

    Args:
        n_units: units to look at more closely.
        mentioned: names of units that stories mention.
        seed: of explanations and labelled stories.
        begin: called with the name of each phase of the work, as `making.SECONDS` names it.
    """
    begin("thresholds")
    model, streams = subject.model, subject.streams
    rules = calibrate(model, text.calibration_blocks, streams, n_tokens=CALIBRATION, progress=False)
    begin("units")
    blocks = held(model, text.held_out_blocks, streams, n_tokens=DESCRIBED, progress=False)
    found = specialization(
        *(model, blocks, rules, streams),
        n_tokens=DESCRIBED,
        coactivation_tokens=0,
        sample_tokens=1,
        progress=False,
    ).table
    chosen = most_telling(found, n_units)
    begin("closer look")
    seen = closer_look(subject, blocks, rules, chosen, DESCRIBED, seed, progress=False)
    del blocks
    begin("labels")
    labels = _labels(subject, rules, seed)
    figures = tuple(_figures(stream, found, labels, seen) for stream in streams)
    pages = _pages(subject, found, labels, seen, mentioned)
    n = found.attrs["n_tokens"]
    total = sum(unit_counts(model).values())
    close = len({(site, unit) for site, unit, _ in seen})
    note = (
        f"{len(pages):,} of {total:,} units are shown: those that are live in a stream, and those that a story "
        f"mentions. Figures are of {n:,} tokens of held-out text; a unit fires above half of its 99.9th percentile on "
        f"{found.attrs['n_calibration_tokens']:,} other tokens. {close} units, spread evenly over layers and kinds, "
        "were looked at more closely: explanation, histogram, snippets"
    )
    if labels is not None:
        note += f". Labels are those of {LABELLED:,} generated stories, of another seed than the training text"
    return pages, note + ".", figures


def most_telling(table: pd.DataFrame, n_units: int) -> dict[Site, list[int]]:
    """Units to look at more closely, spread evenly over layers and kinds, in the order of the sites.

    Of each site come first those whose firing says most about the token: firing rate times the bits between the
    effective number of tokens of the text and that of the tokens the unit fires on; in the ablated stream where there
    is one. Dead units never come.
    """
    stream = "ablated" if "ablated" in set(table["stream"]) else "clean"
    of_text = table.attrs["effective_tokens_of_text"]
    ordered: dict[Site, list[int]] = {}
    own = table[table["stream"] == stream]
    for layer, kind in own[["layer", "kind"]].drop_duplicates().itertuples(index=False):
        live = own[(own["layer"] == layer) & (own["kind"] == kind) & own["live"] & (own["firing_rate"] > 0)]
        bits = [
            rate * math.log2(of_text / number)
            for rate, number in zip(live["firing_rate"], live["effective_tokens"], strict=True)
        ]
        order = sorted(range(len(live)), key=lambda i: (-bits[i], live["unit"].iloc[i]))
        ordered[Site(int(layer), kind)] = [int(live["unit"].iloc[i]) for i in order]
    turns = [
        (site, units[turn])
        for turn in range(max(map(len, ordered.values()), default=0))
        for site, units in ordered.items()
        if turn < len(units)
    ][:n_units]
    chosen = {site: sorted(unit for at, unit in turns if at == site) for site in ordered}
    return {site: units for site, units in chosen.items() if units}


def _labels(subject: Subject, rules: Mapping[Stream, Thresholds], seed: int) -> pd.DataFrame | None:
    """Label of each unit and stream; None for a model that was not trained on generated stories."""
    run = subject.settings
    if run is None or subject.world != "stories":
        return None
    other = run.data.stories_seed + 1 + seed
    stories = label_stories(subject.tokenizer, LABELLED, subject.n_ctx, seed=other)
    # one token: the area under the ROC curve is not shown
    return selectivity(subject.model, stories, rules, subject.streams, sample_tokens=2, progress=False).table


def _pages(
    subject: Subject,
    table: pd.DataFrame,
    labels: pd.DataFrame | None,
    seen: Mapping[tuple[Site, int, Stream], Look],
    mentioned: Collection[str],
) -> tuple[UnitPage, ...]:
    rows, labelled = _by_unit(table), _by_unit(labels) if labels is not None else {}
    pages = []
    for site, count in unit_counts(subject.model).items():
        names = {unit: unit_name(subject.model, site.layer, site.kind, unit) for unit in range(count)}
        shown = [
            unit
            for unit, name in names.items()
            if name in mentioned or any(rows[stream, site, unit]["live"] for stream in subject.streams)
        ]
        promoted = promoted_tokens(subject.model, site, shown, PROMOTED)
        for unit, promotes in zip(shown, promoted, strict=True):
            places = [(stream, site, unit) for stream in subject.streams]
            streams = tuple(
                _stream(place[0], rows[place], labelled.get(place), seen.get((site, unit, place[0])))
                for place in places
            )
            pages.append(UnitPage(names[unit], site.layer, site.kind, unit, promotes, streams))
    return tuple(pages)


def _by_unit(table: pd.DataFrame) -> dict[tuple[Stream, Site, int], dict[str, Any]]:
    """Rows of a table of units by stream, site and unit."""
    rows: list[dict[str, Any]] = table.to_dict("records")  # type: ignore[assignment]
    return {(row["stream"], Site(row["layer"], row["kind"]), row["unit"]): row for row in rows}


def _stream(stream: Stream, row: Mapping[str, Any], label: Mapping[str, Any] | None, look: Look | None) -> UnitStream:
    named = label is not None and isinstance(label["f1_label"], str)
    return UnitStream(
        stream=stream,
        mask_on=number(row["mask_rate"]),
        firing_rate=float(row["firing_rate"]),
        live=bool(row["live"]),
        effective_tokens=number(row["effective_tokens"]) if row["firing_rate"] > 0 else None,
        label=str(label["f1_label"]) if label is not None and named else "",
        label_f1=number(label["f1"]) if label is not None and named else None,
        explanation=look.explanation if look is not None else "",
        explanation_f1=number(look.f1) if look is not None else None,
        histogram=look.histogram if look is not None else None,
        snippets=look.snippets if look is not None else (),
    )


def _figures(
    stream: Stream,
    table: pd.DataFrame,
    labels: pd.DataFrame | None,
    seen: Mapping[tuple[Site, int, Stream], Look],
) -> UnitFigures:
    some = table[table["stream"] == stream]
    live = some[some["live"]]
    scores = [look.f1 for (_, _, of), look in seen.items() if of == stream and look.f1 is not None]
    labelled = None
    if labels is not None:
        of_live = labels[(labels["stream"] == stream) & labels["live"]]
        labelled = _mean((of_live["f1"] >= COVERED).tolist())
    return UnitFigures(
        stream,
        float(some["live"].mean()),
        _mean(live["firing_rate"]),
        _mean(live["effective_tokens"][live["firing_rate"] > 0]),
        labelled,
        _mean(scores),
    )


def _mean(values: Sequence[float] | pd.Series) -> float | None:
    known = [float(value) for value in values if math.isfinite(value)]
    return math.fsum(known) / len(known) if known else None
