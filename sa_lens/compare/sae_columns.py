"""Columns of sparse autoencoders; not available where SAELens is not installed."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from typing import Any, ClassVar

from sa_lens.compare.subject import Group, Measured, Subject, Values, in_every_stream, inputs_of
from sa_lens.config import RunConfig
from sa_lens.data.disk import key_of
from sa_lens.sae import SAESettings, evaluate_sae, train_sae


@dataclass(frozen=True)
class SAE(Group):
    """An SAE of the paper's kind on the output of the MLP three quarters of the way up."""

    settings: SAESettings = field(default_factory=SAESettings)
    """Size and training."""
    tokens: int = 40_000
    """Tokens of the validation text to evaluate on."""

    name: ClassVar[str] = "sae"
    columns: ClassVar[tuple[str, ...]] = (
        "sae_l0",
        "sae_ce_score",
        "sae_ce_span",
        "sae_explained_variance",
        "sae_dead",
    )

    def missing(self) -> str | None:
        if importlib.util.find_spec("sae_lens") is None:
            return "SAELens is not installed: pip install 'sa-lens[sae]'"
        return None

    def work(self, run: RunConfig) -> float:
        return 2.0 * 3.5 * (self.settings.steps * self.settings.batch_tokens + self.tokens)

    def measure(self, subject: Subject) -> Measured:
        values: Values = in_every_stream(self.columns, subject.streams)
        notes = []
        hook = sae_hook(subject.model.cfg.n_layers)
        for stream in subject.streams:
            common: dict[str, Any] = {"stream": stream, "progress": subject.progress}
            sae = train_sae(
                subject.model,
                hook,
                subject.data.train,
                preset=self.settings,
                seed=subject.seed,
                output=subject.folder / f"sae-{stream}-{key_of(inputs_of(self))[:10]}",
                resume=True,
                **common,
            )
            try:
                found = evaluate_sae(subject.model, sae, subject.data.validation, n_tokens=self.tokens, **common)
            except ValueError as error:
                notes.append(f"the {stream} stream: {error}")
                continue
            values["sae_l0"][stream] = found.l0
            values["sae_ce_score"][stream] = found.ce_score
            values["sae_ce_span"][stream] = found.ce_zero - found.ce
            values["sae_explained_variance"][stream] = found.explained_variance
            values["sae_dead"][stream] = found.dead_latents / found.n_latents
        return Measured(values, tuple(notes))


def sae_hook(n_layers: int) -> str:
    """Output of the MLP three quarters of the way up: layer 6 of 8, as in the paper."""
    return f"blocks.{min(n_layers - 1, round(0.75 * n_layers))}.hook_mlp_out"
