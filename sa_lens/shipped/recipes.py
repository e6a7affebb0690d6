"""How the shipped models are trained. The numbers to change are here and nowhere else."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sa_lens.config import DataConfig, GateConfig, ModelConfig, RunConfig, TrainConfig, Words

GATES = GateConfig(scope="local", k_attn=32, k_mlp=32, temperature=0.1)
DENSE = dataclasses.replace(GATES, scope="none")

STORIES = RunConfig(
    model=ModelConfig(n_layers=3, d_model=128, n_heads=4, d_mlp=256, n_ctx=128, attn_scale=True, init="gpt2"),
    gates=GATES,
    data=DataConfig(source="stories", n_stories=40_000, vocab_size=1024),
    train=TrainConfig(
        steps=14_000,
        dense_share=0.35,
        batch_size=8,
        dense_lr=3e-3,
        lr=2e-3,
        betas=(0.9, 0.98),
        warmup_steps=100,
        eval_every=1_000,
        eval_tokens=40_000,
        save_every=500,
        precision="bf16",
        sample_tokens=0,
    ),
)

SHORT = dataclasses.replace(STORIES, train=dataclasses.replace(STORIES.train, steps=6_500, dense_share=0.6))
"""The same in less than half the steps, for `sa-lens demo --train`: seven to nine minutes of one core."""

TINYSTORIES = RunConfig(
    model=ModelConfig(n_layers=4, d_model=128, n_heads=4, n_ctx=256, attn_scale=True, init="gpt2"),
    gates=GATES,
    data=DataConfig(
        source="tinystories-train.parquet",
        validation="tinystories-valid.parquet",
        keep_whole="ioi-tinystories.json",
        vocab_size=2048,
    ),
    train=TrainConfig(
        steps=12_000,
        dense_share=0.65,
        batch_size=4,
        dense_lr=3e-3,
        lr=1.5e-3,
        betas=(0.9, 0.98),
        warmup_steps=100,
        eval_every=1_000,
        eval_tokens=100_000,
        save_every=500,
        precision="bf16",
        sample_tokens=0,
    ),
)

GENERATED = {"name": "generated children's stories", "licence": "MIT, as sa_lens"}
REAL = {
    "name": "TinyStories",
    "licence": "CDLA-Sharing-1.0",
    "attribution": "Ronen Eldan and Yuanzhi Li, TinyStories (arXiv 2305.07759), roneneldan/TinyStories on the Hub",
    "part": "22,525 stories for training, 2,953 for validation, the latter from the official validation files",
}


@dataclass(frozen=True)
class Recipe:
    """How a shipped model is made."""

    description: str
    """One line on what it is."""
    run: RunConfig
    """The whole configuration; files of `data` are names in the folder that the command is given."""
    text: dict[str, str]
    """Name, licence and attribution of the text."""
    words: Words
    """Words of its tasks' prompts."""

    def located(self, folder: Path | None) -> RunConfig:
        """The configuration with the files of its text in a folder.

        Raises:
            ValueError: text from files, and no folder.
        """
        data = self.run.data
        if data.source == "stories":
            return self.run
        if folder is None:
            raise ValueError(
                f"this model is trained on {self.text['name']}: give the folder that holds {data.source}, "
                f"{data.validation} and {data.keep_whole} with --text"
            )
        files: dict[str, Any] = {
            key: str(folder / str(getattr(data, key))) for key in ("source", "validation", "keep_whole")
        }
        return dataclasses.replace(self.run, data=dataclasses.replace(data, **files))


def _pair(name: str, run: RunConfig, text: dict[str, str], words: Words) -> dict[str, Recipe]:
    """The self-ablating model, and the dense one of the same shape and training."""
    kept = f"{run.gates.k_attn} attention units and {run.gates.k_mlp} neurons stay in each layer"
    local = f"{text['name']}: self-ablating model with local gates, {kept}"
    dense = f"{text['name']}: dense model of the same shape and training"
    return {
        f"{name}-local": Recipe(local, run, text, words),
        f"{name}-dense": Recipe(dense, dataclasses.replace(run, gates=DENSE), text, words),
    }


RECIPES: dict[str, Recipe] = {
    **_pair("stories", STORIES, GENERATED, "stories"),
    **_pair("tinystories", TINYSTORIES, REAL, "tinystories"),
}
"""The shipped models by name."""
