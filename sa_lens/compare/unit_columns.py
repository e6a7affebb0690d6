"""Columns of units: which are live, what they stand for, how well they are explained, what the masks carry."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from sa_lens.compare.subject import Group, Measured, Subject, Values, in_every_stream
from sa_lens.config import RunConfig, Stream
from sa_lens.core import SelfAblatingTransformer
from sa_lens.core.host import has_ablated_stream
from sa_lens.units.comparison import compare as compare_units
from sa_lens.units.explanations import explain
from sa_lens.units.firing import OTHER_SHARES, SHARE, calibrate
from sa_lens.units.labels import label_stories, selectivity
from sa_lens.units.mask_leakage import leakage
from sa_lens.units.unit_tables import specialization

if TYPE_CHECKING:
    import pandas as pd


def finite(value: float) -> float | None:
    """The value, or None if it is not a finite number."""
    return float(value) if math.isfinite(value) else None


@dataclass(frozen=True)
class Units(Group):
    """Live units, how often they fire and on how many tokens; the last also against the baseline, like for like."""

    tokens: int = 40_000
    """Tokens of the validation text to measure on."""
    calibration: int = 40_000
    """Tokens of the validation text that set the firing thresholds."""

    name: ClassVar[str] = "units"
    version: ClassVar[int] = 2
    columns: ClassVar[tuple[str, ...]] = (
        *("live_units", "firing_rate", "effective_tokens", "effective_tokens_matched"),
        *(f"effective_tokens_matched_{share:g}" for share in OTHER_SHARES),
        "share_matched",
    )
    against_baseline: ClassVar[bool] = True

    def work(self, run: RunConfig) -> float:
        return 3.0 * (2 * self.calibration + 6 * self.tokens)

    def measure(self, subject: Subject) -> Measured:
        calibration, text = subject.texts(self.calibration, self.tokens)

        def tables(model: SelfAblatingTransformer, streams: tuple[Stream, ...]) -> dict[float, pd.DataFrame]:
            rules = calibrate(model, calibration, streams, progress=subject.progress)
            options: dict[str, Any] = {"sample_tokens": 2, "coactivation_tokens": 0, "progress": subject.progress}
            return {
                share: specialization(model, text, rules, streams, share=share, **options).table
                for share in (SHARE, *OTHER_SHARES)
            }

        found = tables(subject.model, subject.streams)
        table = found[SHARE]
        values, notes = in_every_stream(self.columns, subject.streams), []
        for stream in subject.streams:
            some = table[table["stream"] == stream]
            live = some[some["live"]]
            values["live_units"][stream] = float(some["live"].mean())
            for name in ("firing_rate", "effective_tokens"):
                values[name][stream] = finite(live[name].mean())
        matched = {share: "effective_tokens_matched" + ("" if share == SHARE else f"_{share:g}") for share in found}
        if subject.baseline is None:
            return Measured(
                values | {name: {"clean": 0.0} for name in matched.values()} | {"share_matched": {"clean": 1.0}}
            )
        reference = tables(subject.baseline, ("clean",))
        for stream in subject.streams:
            for share, name in matched.items():
                options: dict[str, Any] = {"streams": ("clean", stream), "resamples": 1}
                try:
                    row = compare_units(reference[share], found[share], ["effective_tokens"], **options).iloc[0]
                except ValueError as error:
                    notes.append(f"the {stream} stream against the baseline: {error}")
                    continue
                values[name][stream] = finite(row["difference"])
                if share == SHARE:
                    values["share_matched"][stream] = float(row["share_matched"])
        return Measured(values, tuple(notes))


@dataclass(frozen=True)
class Labels(Group):
    """Share of the labels of generated stories for which some unit stands, chosen and scored on different stories."""

    stories: int = 600
    """Stories, of another seed than those that the model was trained on."""
    calibration: int = 40_000
    """Tokens of the validation text that set the firing thresholds."""

    name: ClassVar[str] = "labels"
    columns: ClassVar[tuple[str, ...]] = ("label_coverage",)

    def work(self, run: RunConfig) -> float:
        return 3.0 * (120 * self.stories + self.calibration)

    def measure(self, subject: Subject) -> Measured:
        values = in_every_stream(self.columns, subject.streams)
        if subject.world != "stories":
            return Measured(values, ("labels are known for generated stories alone",))
        seed = subject.run.data.stories_seed + 1
        text = label_stories(subject.model.tokenizer, self.stories, subject.run.model.n_ctx, seed=seed)
        rules = calibrate(
            subject.model,
            subject.texts(self.calibration, self.calibration)[0],
            subject.streams,
            progress=subject.progress,
        )
        found = selectivity(subject.model, text, rules, subject.streams, sample_tokens=2, progress=subject.progress)
        for stream in subject.streams:
            covered = found.coverage[found.coverage["stream"] == stream]["covered"]
            values["label_coverage"][stream] = float(covered.mean())
        return Measured(values)


@dataclass(frozen=True)
class Explanations(Group):
    """How well tries of contexts predict firing on text they have not seen, beside lists of tokens."""

    units: int = 32
    """Live units that are explained, drawn evenly over sites."""
    tokens: int = 40_000
    """Tokens of the validation text to fit and to judge on."""
    calibration: int = 40_000
    """Tokens of the validation text that set the firing thresholds."""

    name: ClassVar[str] = "explanations"
    columns: ClassVar[tuple[str, ...]] = ("explanation_f1", "explanation_coverage", "token_list_f1")

    def work(self, run: RunConfig) -> float:
        return 2.0 * (3.0 * (self.tokens + self.calibration) + self.units * 24_000.0)

    def measure(self, subject: Subject) -> Measured:
        calibration, text = subject.texts(self.calibration, self.tokens)
        rules = calibrate(subject.model, calibration, subject.streams, progress=subject.progress)
        values = in_every_stream(self.columns, subject.streams)
        for stream in subject.streams:
            options = {"n_tokens": None, "seed": subject.seed, "progress": subject.progress}
            found = explain(subject.model, text, rules[stream], self.units, **options).summary  # type: ignore[arg-type]
            values["explanation_f1"][stream] = finite(found["text_f1"])
            values["explanation_coverage"][stream] = finite(found["coverage"])
            values["token_list_f1"][stream] = finite(found["list_text_f1"])
        return Measured(values)


@dataclass(frozen=True)
class Leakage(Group):
    """What the masks tell of the next token; the ablated stream alone."""

    tokens: int = 20_000
    """Tokens of the validation text."""
    probe_tokens: int = 5_000
    """Tokens of each half that the probes read."""

    name: ClassVar[str] = "leakage"
    columns: ClassVar[tuple[str, ...]] = ("mask_share", "probe_mask_nats", "self_read_cost")

    def work(self, run: RunConfig) -> float:
        return 40.0 * self.tokens if run.gates.gated else 0.0

    def measure(self, subject: Subject) -> Measured:
        if not has_ablated_stream(subject.model):
            return Measured({})
        text = subject.texts(self.tokens, self.tokens)[1]
        found: Mapping[str, float] = leakage(  # type: ignore[assignment]
            subject.model, text, probe_tokens=self.probe_tokens, seed=subject.seed, progress=subject.progress
        ).summary
        values: Values = {name: {"ablated": finite(found.get(name, math.nan))} for name in self.columns}
        missing = [name for name, of_stream in values.items() if of_stream["ablated"] is None]
        return Measured(values, tuple(f"{name} is not defined for this model" for name in missing))
