"""Measurements of units: which are live, which labels they follow, how well they are explained, what masks carry."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from sa_lens.compare.measurement import Measurement, Result, TrainedModel, Values
from sa_lens.config import RunConfig, Stream
from sa_lens.core import SelfAblatingTransformer
from sa_lens.units import calibrate, explain, label_stories, leakage, selectivity, specialization
from sa_lens.units import compare as compare_units
from sa_lens.units.firing import OTHER_SHARES, SHARE

if TYPE_CHECKING:
    import pandas as pd

MATCHED = {SHARE: "effective_tokens_matched"} | {share: f"effective_tokens_matched_{share:g}" for share in OTHER_SHARES}
"""Columns of matched effective tokens, by the share of the percentile that counts as firing."""


@dataclass(frozen=True)
class Units(Measurement):
    """Live units, how often and on how many tokens they fire, also compared with the baseline at equal activity."""

    tokens: int = 40_000
    """Tokens of the validation text to measure on."""
    calibration: int = 40_000
    """Tokens of the validation text that set the firing thresholds."""

    name: ClassVar[str] = "units"
    version: ClassVar[int] = 2
    columns: ClassVar[tuple[str, ...]] = (
        *("live_units", "firing_rate", "effective_tokens", *MATCHED.values(), "share_matched"),
    )
    against_baseline: ClassVar[bool] = True

    def work(self, run: RunConfig) -> float:
        return 3.0 * (2 * self.calibration + 6 * self.tokens)

    def measure(self, trained: TrainedModel) -> Result:
        calibration, text = trained.texts(self.calibration, self.tokens)

        def describe(model: SelfAblatingTransformer, streams: tuple[Stream, ...]) -> dict[float, pd.DataFrame]:
            thresholds = calibrate(model, calibration, streams, progress=False)
            options: dict[str, Any] = {"sample_tokens": 2, "coactivation_tokens": 0, "progress": False}
            tables = {}
            for share in MATCHED:
                rules = {stream: replace(rule, share=share) for stream, rule in thresholds.items()}
                tables[share] = specialization(model, text, rules, streams, **options).table
            return tables

        ours = describe(trained.model, trained.streams)
        values, notes = trained.no_values(self.columns), []
        for stream in trained.streams:
            table = ours[SHARE][ours[SHARE]["stream"] == stream]
            live = table[table["live"]]
            values["live_units"][stream] = float(table["live"].mean())
            for name in ("firing_rate", "effective_tokens"):
                values[name][stream] = float(live[name].mean())
        if trained.baseline is None:
            same: Values = {name: {"clean": 0.0} for name in MATCHED.values()}
            return Result(values | same | {"share_matched": {"clean": 1.0}})
        reference = describe(trained.baseline, ("clean",))
        for stream in trained.streams:
            for share, name in MATCHED.items():
                options: dict[str, Any] = {"streams": ("clean", stream), "resamples": 1}
                try:
                    row = compare_units(reference[share], ours[share], ["effective_tokens"], **options).iloc[0]
                except ValueError as error:
                    notes.append(f"the {stream} stream against the baseline: {error}")
                    continue
                values[name][stream] = float(row["difference"])
                if share == SHARE:
                    values["share_matched"][stream] = float(row["share_matched"])
        return Result(values, tuple(notes))


@dataclass(frozen=True)
class Labels(Measurement):
    """Share of the labels of generated stories that some unit follows, chosen and scored on different stories."""

    stories: int = 600
    """Stories, of another seed than those that the model was trained on."""
    calibration: int = 40_000
    """Tokens of the validation text that set the firing thresholds."""

    name: ClassVar[str] = "labels"
    columns: ClassVar[tuple[str, ...]] = ("label_coverage",)

    def work(self, run: RunConfig) -> float:
        return 3.0 * (120 * self.stories + self.calibration)

    def measure(self, trained: TrainedModel) -> Result:
        values = trained.no_values(self.columns)
        if trained.words != "stories":
            return Result(values, ("labels are known for generated stories alone",))
        seed = trained.run.data.stories_seed + 1
        text = label_stories(trained.model.tokenizer, self.stories, trained.run.model.n_ctx, seed=seed)
        calibration, _ = trained.texts(self.calibration, self.calibration)
        thresholds = calibrate(trained.model, calibration, trained.streams, progress=False)
        table = selectivity(trained.model, text, thresholds, trained.streams, sample_tokens=2, progress=False).coverage
        for stream in trained.streams:
            values["label_coverage"][stream] = float(table[table["stream"] == stream]["covered"].mean())
        return Result(values)


@dataclass(frozen=True)
class Explanations(Measurement):
    """How well tries of contexts predict firing on held-out text, compared with lists of tokens."""

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

    def measure(self, trained: TrainedModel) -> Result:
        calibration, text = trained.texts(self.calibration, self.tokens)
        thresholds = calibrate(trained.model, calibration, trained.streams, progress=False)
        values = trained.no_values(self.columns)
        for stream in trained.streams:
            options: dict[str, Any] = {"n_tokens": None, "seed": trained.seed, "progress": False}
            summary = explain(trained.model, text, thresholds[stream], self.units, **options).summary
            for column, name in zip(self.columns, ("text_f1", "coverage", "list_text_f1"), strict=True):
                values[column][stream] = float(summary[name])
        return Result(values)


@dataclass(frozen=True)
class Leakage(Measurement):
    """What the masks of the ablated stream tell about the next token."""

    tokens: int = 20_000
    """Tokens of the validation text."""
    probe_tokens: int = 5_000
    """Tokens of each half that the probes read."""

    name: ClassVar[str] = "leakage"
    columns: ClassVar[tuple[str, ...]] = ("mask_share", "probe_mask_nats", "self_read_cost")

    def work(self, run: RunConfig) -> float:
        return 40.0 * self.tokens if run.gates.gated else 0.0

    def measure(self, trained: TrainedModel) -> Result:
        if "ablated" not in trained.streams:
            return Result({})
        _, text = trained.texts(self.tokens, self.tokens)
        options: dict[str, Any] = {"probe_tokens": self.probe_tokens, "seed": trained.seed, "progress": False}
        summary = leakage(trained.model, text, **options).summary
        figures = {name: float(summary.get(name, math.nan)) for name in self.columns}
        missing = [name for name, value in figures.items() if not math.isfinite(value)]
        notes = tuple(f"{name} is not defined for this model" for name in missing)
        return Result({name: {"ablated": value} for name, value in figures.items()}, notes)
