"""What a group of columns is measured on, and what a group is."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from sa_lens.circuits.tasks import World
from sa_lens.config import RunConfig, Stream
from sa_lens.core import SelfAblatingTransformer
from sa_lens.core.host import streams_of
from sa_lens.data import PreparedData, validation_blocks

MINIMUM_BLOCKS = 8
"""Blocks of validation text that measurements need."""

Values = dict[str, dict[str, float | None]]
"""Value by column and stream; None: there is none, and a note says why."""


@dataclass(frozen=True)
class Measured:
    """What a group of columns found."""

    values: Values
    """By column and stream."""
    notes: tuple[str, ...] = ()
    """Why a value is missing or to be read with care."""


@dataclass(frozen=True)
class Subject:
    """A trained model with its text."""

    model: SelfAblatingTransformer
    """The model after its last step, on the device of the measurements."""
    data: PreparedData
    """The text it was trained on, and the validation text."""
    run: RunConfig
    """How it was trained."""
    folder: Path
    """Where a group may keep files of its own."""
    baseline: SelfAblatingTransformer | None = None
    """The dense baseline of the same seed; None where this is the baseline itself, or there is none."""
    progress: bool = False
    """Show progress bars."""

    @property
    def seed(self) -> int:
        """Seed of the run."""
        return self.run.train.seed

    @property
    def streams(self) -> tuple[Stream, ...]:
        """The streams that the model has."""
        return streams_of(self.model)

    @property
    def world(self) -> World:
        """Words of the prompts: those of the text it was trained on."""
        return "stories" if self.run.data.source == "stories" else "tinystories"

    @cached_property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.W_E.device

    def texts(self, calibration: int, tokens: int) -> tuple[Int[Tensor, "block pos"], Int[Tensor, "block pos"]]:
        """Blocks of the validation text to calibrate on, and others to measure on.

        A text too short for both is shared out in the same proportion.

        Raises:
            ValueError: a validation text of fewer than `MINIMUM_BLOCKS` blocks.
        """
        n_ctx = self.run.model.n_ctx
        check_validation(self.data, n_ctx)
        blocks = torch.from_numpy(validation_blocks(self.data.validation, n_ctx, calibration + tokens))[:, :n_ctx]
        first = min(len(blocks) - 4, max(4, round(len(blocks) * calibration / (calibration + tokens))))
        return blocks[:first], blocks[first:]


def check_validation(data: PreparedData, n_ctx: int) -> None:
    """Raises ValueError if the validation text is too short to calibrate on a part of it and measure on the rest."""
    blocks = data.validation.n_blocks(n_ctx)
    if blocks < MINIMUM_BLOCKS:
        raise ValueError(
            f"the validation text has {blocks} blocks of {n_ctx} tokens, {MINIMUM_BLOCKS} are needed: raise "
            "data.validation_fraction, or name a longer data.validation"
        )


class Group(ABC):
    """Columns that are measured together: a frozen dataclass whose fields are its settings."""

    name: ClassVar[str]
    """Name by which it is asked for."""
    version: ClassVar[int] = 1
    """Raised whenever the same settings give other numbers, so that older cells are measured again."""
    columns: ClassVar[tuple[str, ...]]
    """Names of its columns."""
    against_baseline: ClassVar[bool] = False
    """Whether it needs the dense baseline of the same seed."""

    @abstractmethod
    def measure(self, subject: Subject) -> Measured:
        """The group's columns of one model."""

    @abstractmethod
    def work(self, run: RunConfig) -> float:
        """Cost of one model in tokens of a forward pass of its clean stream, roughly."""

    def missing(self) -> str | None:
        """Why it cannot be measured on this machine; None if it can."""
        return None


def inputs_of(group: Group) -> dict[str, Any]:
    """All that makes a group's figures what they are, apart from model and text."""
    return {"group": group.name, "version": group.version, "settings": dataclasses.asdict(group)}  # type: ignore[call-overload]


def in_every_stream(columns: Sequence[str], streams: Sequence[Stream]) -> Values:
    """The columns, still without values."""
    return {column: dict.fromkeys(streams) for column in columns}
