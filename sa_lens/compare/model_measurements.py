"""Measurements of whole models: losses, sparsity of the weights, sparse autoencoders."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from typing import Any, ClassVar

from sa_lens.compare.columns import WEIGHTS
from sa_lens.compare.measurement import Measurement, Result, TrainedModel, Values
from sa_lens.config import RunConfig
from sa_lens.data import validation_blocks
from sa_lens.data.cache import key_of
from sa_lens.sae import SAESettings, evaluate_sae, train_sae
from sa_lens.training import bytes_per_token, evaluate
from sa_lens.units import sparsity


@dataclass(frozen=True)
class Losses(Measurement):
    """Validation loss and perplexity of both streams."""

    tokens: int = 100_000
    """Predicted tokens, the same for every model."""

    name: ClassVar[str] = "losses"
    columns: ClassVar[tuple[str, ...]] = ("loss", "perplexity", "units_used")

    def work(self, run: RunConfig) -> float:
        return 4.0 * self.tokens

    def measure(self, trained: TrainedModel) -> Result:
        file = trained.data.validation
        blocks = validation_blocks(file, trained.run.model.n_ctx, self.tokens)
        losses = evaluate(trained.model, blocks, bytes_per_token=bytes_per_token(file))
        values: Values = {"loss": {"clean": losses.clean_loss}, "perplexity": {"clean": losses.clean_perplexity}}
        if losses.ablated_loss is not None:
            values["loss"]["ablated"] = losses.ablated_loss
            values["perplexity"]["ablated"] = losses.ablated_perplexity
            values["units_used"] = {"ablated": losses.units_used}
        return Result(values)


@dataclass(frozen=True)
class Weights(Measurement):
    """Sparsity of the weights of the plain transformer, by the paper's measure and by measures without a scale."""

    eps: float = 0.01
    """A weight is small below this share of its layer's root mean square."""

    name: ClassVar[str] = "weights"
    version: ClassVar[int] = 2
    rows: ClassVar[dict[str, tuple[str, str]]] = {
        "mean_abs_weight": ("all parameters", "mean_abs"),
        "mean_abs_weight_inner": ("all parameters without embeddings", "mean_abs"),
        "hoyer": ("matrices", "hoyer"),
        "hoyer_inner": ("matrices without embeddings", "hoyer"),
        "gini_inner": ("matrices without embeddings", "gini"),
        "small_inner": ("matrices without embeddings", "share_small"),
    }
    columns: ClassVar[tuple[str, ...]] = tuple(rows)

    def work(self, run: RunConfig) -> float:
        return 1000.0

    def measure(self, trained: TrainedModel) -> Result:
        table = sparsity(trained.model, self.eps).set_index("weight").to_dict("index")
        return Result({name: {WEIGHTS: table[row][column]} for name, (row, column) in self.rows.items()})


@dataclass(frozen=True)
class SAE(Measurement):
    """A sparse autoencoder of the paper's kind on the output of the MLP three quarters of the way up.

    It is not available where SAELens is not installed.
    """

    settings: SAESettings = field(default_factory=SAESettings)
    """Size and training."""
    tokens: int = 40_000
    """Tokens of the validation text to evaluate on."""

    name: ClassVar[str] = "sae"
    columns: ClassVar[tuple[str, ...]] = ("sae_l0", "sae_ce_score", "sae_ce_span", "sae_explained_variance", "sae_dead")

    def missing(self) -> str | None:
        if importlib.util.find_spec("sae_lens") is None:
            return "SAELens is not installed: pip install 'sa-lens[sae]'"
        return None

    def work(self, run: RunConfig) -> float:
        return 2.0 * 3.5 * (self.settings.steps * self.settings.batch_tokens + self.tokens)

    def measure(self, trained: TrainedModel) -> Result:
        values, notes = trained.no_values(self.columns), []
        for stream in trained.streams:
            common: dict[str, Any] = {"stream": stream, "progress": False}
            sae = train_sae(
                trained.model,
                sae_hook(trained.model.cfg.n_layers),
                trained.data.train,
                preset=self.settings,
                seed=trained.seed,
                output=trained.folder / f"sae-{stream}-{key_of(self.inputs)[:10]}",
                resume=True,
                **common,
            )
            try:
                quality = evaluate_sae(trained.model, sae, trained.data.validation, n_tokens=self.tokens, **common)
            except ValueError as error:
                notes.append(f"the {stream} stream: {error}")
                continue
            values["sae_l0"][stream] = quality.l0
            values["sae_ce_score"][stream] = quality.ce_score
            values["sae_ce_span"][stream] = quality.ce_zero - quality.ce
            values["sae_explained_variance"][stream] = quality.explained_variance
            values["sae_dead"][stream] = quality.dead_latents / quality.n_latents
        return Result(values, tuple(notes))


def sae_hook(n_layers: int) -> str:
    """Returns the hook of the MLP output three quarters of the way up: layer 6 of 8, as in the paper."""
    return f"blocks.{min(n_layers - 1, round(0.75 * n_layers))}.hook_mlp_out"
