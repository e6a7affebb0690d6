"""Units seen more closely: an explanation, the values that they take, and text that they are most active on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sa_lens.config import Stream
from sa_lens.report.contents import Snippet
from sa_lens.report.subjects import Subject
from sa_lens.units.activations import Site, TextBlocks, stream_units
from sa_lens.units.explanations import explain
from sa_lens.units.firing import Thresholds
from sa_lens.units.windows import snippets
from sa_lens.views import histogram
from sa_lens.views.labels import token_texts, unit_name
from sa_lens.views.records import Histogram

TOP, SAMPLE = 5, 3
"""Snippets of a unit: the most active ones, and a sample over the quantiles of the others."""
WINDOW = 24
"""Tokens of a snippet."""
BINS, COUNTED = 40, 20_000
"""Bins of a histogram, and tokens at which values are counted at most."""
EXPLAINED = 30_000
"""Tokens that explanations are made from and judged on, half each."""
FITTED, SUBSTITUTES = 10, 2
"""Snippets that an explanation is fitted on, and likely tokens that are tried in each of their places."""

Place = tuple[Site, int, Stream]
"""A unit in a stream."""


@dataclass(frozen=True)
class Look:
    """One unit in one stream."""

    explanation: str
    """The main patterns that it fires on; empty where none was found."""
    f1: float | None
    """F1 of its firing on text that the patterns were not made from; None where that is not defined."""
    histogram: Histogram | None
    """Its values; None: in the ablated stream it never stays."""
    snippets: tuple[Snippet, ...]
    """Most active first, then the sample."""


def closer_look(
    subject: Subject,
    blocks: TextBlocks,
    rules: Mapping[Stream, Thresholds],
    chosen: Mapping[Site, Sequence[int]],
    n_tokens: int,
    seed: int,
    progress: bool,
) -> dict[Place, Look]:
    """The chosen units in each stream in which they are live.

    Args:
        blocks: text that the thresholds were not set on.
        chosen: units by site.
        n_tokens: tokens to read at most.
        seed: of the explanations.
    """
    if not chosen:
        return {}
    counted = min(n_tokens, COUNTED)
    values = _values(subject, blocks, chosen, counted, progress)
    found: dict[Place, Look] = {}
    for stream in subject.streams:
        live = {site: rules[stream].live(site).tolist() for site in chosen}
        places = [(site, unit) for site, units in chosen.items() for unit in units if live[site][unit]]
        if not places:
            continue
        texts = _snippets(subject, blocks, stream, places, n_tokens, progress)
        made = explain(
            *(subject.model, blocks, rules[stream], places),
            n_tokens=EXPLAINED,
            snippets=FITTED,
            substitutes=SUBSTITUTES,
            seed=seed,
            progress=progress,
        )
        rows = made.table.to_dict("records")
        for (site, unit), row in zip(places, rows, strict=True):
            f1 = float(row["text_f1"])
            found[site, unit, stream] = Look(
                explanation=str(row["pattern"]) if row["explained"] else "",
                f1=f1 if math.isfinite(f1) else None,
                histogram=_histogram(subject, site, unit, stream, values[site, unit, stream], blocks, counted),
                snippets=texts[site, unit],
            )
    return found


def _values(
    subject: Subject, blocks: TextBlocks, chosen: Mapping[Site, Sequence[int]], n_tokens: int, progress: bool
) -> dict[Place, Float[Tensor, " token"]]:
    """All values of each unit; in the ablated stream those where it stays."""
    parts: dict[Place, list[Tensor]] = {
        (site, unit, stream): [] for site, units in chosen.items() for unit in units for stream in subject.streams
    }
    options = {"sites": list(chosen), "n_tokens": n_tokens, "progress": progress, "name": "values"}
    for batch in stream_units(subject.model, blocks, subject.streams, **options):  # type: ignore[arg-type]
        for site, unit, stream in parts:
            x = batch.values[stream][site][..., unit].flatten()
            if stream == "ablated" and site in batch.masks:
                x = x[batch.masks[site][..., unit].flatten() > 0]
            parts[site, unit, stream].append(x.float().cpu())
    return {place: torch.cat(some) for place, some in parts.items()}


def _histogram(
    subject: Subject,
    site: Site,
    unit: int,
    stream: Stream,
    values: Float[Tensor, " token"],
    blocks: TextBlocks,
    n_tokens: int,
) -> Histogram | None:
    if not len(values):
        return None
    name = unit_name(subject.model, site.layer, site.kind, unit)
    n = min(n_tokens // blocks.length, len(blocks)) * blocks.length
    clean = stream == "clean"
    note = f"{n:,} tokens" if clean else f"stays at {len(values):,} of {n:,} tokens ({len(values) / n:.2%})"
    return histogram(
        {"clean" if clean else "ablated, where it stays": values.numpy()},
        name[0].upper() + name[1:],
        "value of the unit",
        note=note,
        bins=BINS,
    )


def _snippets(
    subject: Subject,
    blocks: TextBlocks,
    stream: Stream,
    places: Sequence[tuple[Site, int]],
    n_tokens: int,
    progress: bool,
) -> dict[tuple[Site, int], tuple[Snippet, ...]]:
    units: dict[Site, list[int]] = {}
    for site, unit in places:
        units.setdefault(site, []).append(unit)
    found = snippets(
        *(subject.model, blocks, stream),
        units=units,
        n_top=TOP,
        n_sample=SAMPLE,
        length=min(WINDOW, blocks.length),
        n_tokens=n_tokens,
        progress=progress,
    )
    made = {}
    for site, some in found.items():
        for row, unit in enumerate(some.units.tolist()):
            made[site, unit] = tuple(
                Snippet(
                    tokens=token_texts(subject.model, tokens),
                    values=tuple(values),
                    focus=peak,
                    kind="top" if i < some.n_top else "sample",
                )
                for i, (tokens, values, peak) in enumerate(
                    zip(some.tokens[row].tolist(), some.values[row].tolist(), some.peaks[row].tolist(), strict=True)
                )
            )
    return made
