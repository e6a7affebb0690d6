"""Measurements of a comparison, with their input and result."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from sa_lens.config import RunConfig, Stream, Words
from sa_lens.core import SelfAblatingTransformer
from sa_lens.core.host import streams_of
from sa_lens.data import PreparedData, validation_blocks

MINIMUM_BLOCKS = 8
"""Blocks of validation text that measurements need."""

Values = dict[str, dict[str, float | None]]
"""Value by column and stream. None or NaN: there is no value, and a note says why."""


@dataclass(frozen=True)
class Result:
    """The result of a measurement on one model."""

    values: Values
    """Values by column and stream; the stream of columns about the weights is the empty string."""
    notes: tuple[str, ...] = ()
    """Reasons why a value is missing, or must be read with care."""


@dataclass(frozen=True)
class TrainedModel:
    """A trained model with its text."""

    model: SelfAblatingTransformer
    """The model after its last step, on the device of the measurements."""
    data: PreparedData
    """The text it was trained on, and the validation text."""
    run: RunConfig
    """Settings with which the model was trained."""
    folder: Path
    """Where a measurement may keep files of its own."""
    baseline: SelfAblatingTransformer | None = None
    """The dense baseline of the same seed; None for the baseline itself, or if no measurement asks for it."""

    @property
    def seed(self) -> int:
        """Seed of the run."""
        return self.run.train.seed

    @property
    def streams(self) -> tuple[Stream, ...]:
        """The streams that the model has."""
        return streams_of(self.model)

    @property
    def words(self) -> Words:
        """Vocabulary of the prompts, which is that of the text on which the model was trained."""
        return words_of(self.run)

    def no_values(self, columns: Sequence[str]) -> Values:
        """Returns the columns in every stream of the model, without values."""
        return {column: dict.fromkeys(self.streams) for column in columns}

    def texts(self, calibration: int, tokens: int) -> tuple[Int[Tensor, "block pos"], Int[Tensor, "block pos"]]:
        """Returns blocks of the validation text for calibration, and other blocks for measurement.

        A text that is too short for both is divided in the same proportion.

        Raises:
            ValueError: a validation text of fewer than `MINIMUM_BLOCKS` blocks.
        """
        n_ctx = self.run.model.n_ctx
        check_validation(self.data, n_ctx)
        blocks = torch.from_numpy(validation_blocks(self.data.validation, n_ctx, calibration + tokens))[:, :n_ctx]
        first = min(len(blocks) - 4, max(4, round(len(blocks) * calibration / (calibration + tokens))))
        return blocks[:first], blocks[first:]


def words_of(run: RunConfig) -> Words:
    """Returns the vocabulary of the prompts that fit the text of a run."""
    return "stories" if run.data.source == "stories" else "tinystories"


def check_validation(data: PreparedData, n_ctx: int) -> None:
    """Raises ValueError if the validation text is too short to calibrate on a part of it and measure on the rest."""
    blocks = data.validation.n_blocks(n_ctx)
    if blocks < MINIMUM_BLOCKS:
        raise ValueError(
            f"the validation text has {blocks} blocks of {n_ctx} tokens, {MINIMUM_BLOCKS} are needed: raise "
            "data.validation_fraction, or name a longer data.validation"
        )


class Measurement(ABC):
    """Columns that are measured together; its fields are the settings."""

    name: ClassVar[str]
    """Name of the kind of measurement."""
    version: ClassVar[int] = 1
    """Raised whenever the same settings give other numbers, so that every model is measured again."""
    columns: ClassVar[tuple[str, ...]]
    """Names of its columns."""
    against_baseline: ClassVar[bool] = False
    """Whether it needs the dense baseline of the same seed."""
    task: str = ""
    """The task that it is about; empty: none. A measurement of a task has a field of this name."""

    @property
    def label(self) -> str:
        """Name by which `compare` is asked for it: with the task in front, unless that is IOI."""
        return self.name if self.task in ("", "ioi") else f"{self.task}-{self.name}"

    @property
    def inputs(self) -> dict[str, Any]:
        """Everything on which its values depend, except model and text."""
        settings = dataclasses.asdict(self)  # type: ignore[call-overload]
        settings.pop("task", None)  # part of the label
        return {"group": self.label, "version": self.version, "settings": settings}

    @abstractmethod
    def measure(self, trained: TrainedModel) -> Result:
        """Measures one model."""

    @abstractmethod
    def work(self, run: RunConfig) -> float:
        """Returns the approximate cost for one model, in tokens of a forward pass of its clean stream."""

    def missing(self) -> str | None:
        """Returns why it cannot be measured on this machine, or None."""
        return None
