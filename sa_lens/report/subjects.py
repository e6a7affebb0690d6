"""The models of a report: loaded, named apart, and checked before anything takes long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sa_lens.config import RunConfig, Stream, Words
from sa_lens.core import SelfAblatingTransformer
from sa_lens.core.host import streams_of
from sa_lens.training.trained_run import load_run, settings_of

LONGEST = 256
"""Tokens at once of a model whose training is not known; the context of a pretrained model may be far longer."""


@dataclass(frozen=True)
class Subject:
    """A trained model and what is known of its run."""

    name: str
    """Name by which the report calls it."""
    run: str
    """Run folder, name of a shipped model, or Hub id."""
    model: SelfAblatingTransformer
    """The model."""
    settings: RunConfig | None
    """How it was trained; None for a model that was not saved by a training run, and for one from the Hub."""

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer, which every model of a report has."""
        return self.model.tokenizer

    @property
    def streams(self) -> tuple[Stream, ...]:
        """The streams that the model has."""
        return streams_of(self.model)

    @property
    def parameters(self) -> int:
        """How many numbers the model has, gates included."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def n_ctx(self) -> int:
        """Tokens that it reads at once: those of its training, where they are known."""
        known = LONGEST if self.settings is None else self.settings.model.n_ctx
        return min(known, int(self.model.cfg.n_ctx))

    @property
    def words(self) -> Words:
        """Words of the tasks' prompts: those of the text it was trained on."""
        return "stories" if self.settings is not None and self.settings.data.source == "stories" else "tinystories"


def open_subjects(runs: Sequence[str | Path], device: str) -> tuple[Subject, ...]:
    """Loads the models of all runs.

    Raises:
        ValueError: no run, one run twice, a model without a tokenizer, or an unknown device.
        FileNotFoundError: a folder without a model.
    """
    names = distinct_names([str(run) for run in runs])
    subjects = []
    # a path that lost its `./` on the way would be taken for the name of a shipped model
    for name, run in zip(names, (run if isinstance(run, str) else str(run.absolute()) for run in runs), strict=True):
        model = load_run(run, device=device)
        if model.tokenizer is None:
            raise ValueError(
                f"{run} has no tokenizer, so it can read no text: a report shows what a model does with text. Save the "
                "model with its tokenizer (model.set_tokenizer, then save_pretrained)"
            )
        subjects.append(Subject(name, run, model.requires_grad_(False), settings_of(run)))
    return tuple(subjects)


def distinct_names(runs: Sequence[str]) -> tuple[str, ...]:
    """A short name for each run: the last part of its path, with as many parts before it as it takes to be told apart.

    Raises:
        ValueError: no run, or one run twice.
    """
    if not runs:
        raise ValueError("runs is empty: name at least one run folder")
    whole = [Path(run).resolve().parts if Path(run).exists() else Path(run).parts for run in runs]
    for i, parts in enumerate(whole):
        if parts in whole[:i]:
            raise ValueError(f"{runs[i]} is named twice: name each run once")
    for count in range(1, max(map(len, whole)) + 1):
        names = ["/".join(parts[-count:]) for parts in whole]
        if len(set(names)) == len(names):
            break
    return tuple(names)
