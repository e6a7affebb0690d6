"""What a unit does in detail: an explanation, the values that it takes, and text that it is most active on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sa_lens.config import Stream
from sa_lens.core.unit import Unit
from sa_lens.data.blocks import TextBlocks
from sa_lens.report.contents import Snippet
from sa_lens.report.subjects import Subject
from sa_lens.units.explanations import explain
from sa_lens.units.firing import Thresholds
from sa_lens.units.windows import snippets
from sa_lens.views import histogram
from sa_lens.views.charts import unit_values
from sa_lens.views.labels import token_texts
from sa_lens.views.records import number

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


def details_of(
    subject: Subject,
    blocks: TextBlocks,
    rules: Mapping[Stream, Thresholds],
    units: Sequence[Unit],
    n_tokens: int,
    seed: int,
) -> dict[tuple[Unit, Stream], dict[str, Any]]:
    """Returns explanation, histogram and snippets of units in each stream in which they are live, as `UnitStream` has
    them.

    Args:
        blocks: text that the thresholds were not set on.
        units: which.
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
            snippets=FITTED,
            substitutes=SUBSTITUTES,
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
