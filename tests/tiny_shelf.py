"""Tiny models under the names of the shipped ones, for tests of what is done with them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from sa_lens.data.stories import generate
from sa_lens.shipped import make, measuring, recipes


def tiny(name: str, source: str | None = None) -> recipes.Recipe:
    """The recipe at a size that trains in a moment."""
    recipe = recipes.RECIPES[name]
    data = dataclasses.replace(recipe.run.data, n_stories=200, vocab_size=900, keep_whole=None, validation=None)
    run = dataclasses.replace(
        recipe.run,
        model=dataclasses.replace(recipe.run.model, n_layers=1, d_model=16, n_heads=2, n_ctx=64),
        gates=dataclasses.replace(recipe.run.gates, k_attn=4, k_mlp=4),
        data=dataclasses.replace(data, source=source or data.source),
        train=dataclasses.replace(
            recipe.run.train, steps=4, dense_share=0.5, warmup_steps=0, batch_size=2, eval_every=2, eval_tokens=200
        ),
    )
    return dataclasses.replace(recipe, run=run)


def fill(shelf: Path, work: Path, names: tuple[str, ...] = ("stories-local", "stories-dense")) -> None:
    """Trains and packs tiny models; `tinystories-local` reads a file of its own.

    Args:
        shelf: gets a folder for each model.
        work: gets the run folders.
    """
    text = work / "real.jsonl"
    text.write_text("\n".join(json.dumps({"text": story.text}) for story in generate(200, 9)))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(measuring, "PROMPTS", 20)
        for name in names:
            real = not name.startswith("stories")
            recipe = tiny(name, text.name if real else None)
            data = dataclasses.replace(recipe.run.data, source=str(text) if real else "stories")
            run = dataclasses.replace(recipe.run, data=data)
            make.pack(name, recipe, make.train_model(run, work / name, progress=False), shelf)
