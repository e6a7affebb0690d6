"""Patch both streams of a self-ablating model (notebook 01 as a script). Figures are HTML files that open from disk.

python examples/scripts/two_streams.py --run stories-local --out runs/patching
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Literal

import tyro

warnings.filterwarnings("ignore", message="HookedTransformer is deprecated")

import sa_lens as sa  # noqa: E402
from sa_lens import circuits, views  # noqa: E402


def main(
    run: str = "stories-local",
    out: Path = Path("runs/patching"),
    task: str = "ioi",
    words: Literal["stories", "tinystories"] = "stories",
    pairs: int = 64,
) -> None:
    """Patch the residual stream, the heads and the masks of both streams of a model.

    Args:
        run: Self-ablating model: a shipped one, a run folder or a Hub id.
        out: Folder for the figures.
        task: ioi, pronoun, object, repeated, or a JSON file.
        words: Vocabulary of the prompts.
        pairs: Number of pairs.
    """
    model = sa.SelfAblatingTransformer.from_pretrained(run)

    prompts = circuits.tasks.make(task, model.tokenizer, pairs, seed=0, words=words)
    print(prompts.report(), "-", prompts.clean_texts[0])
    skill = circuits.skill(model, prompts)[["stream", "n", "pair_accuracy", "logit_difference", "able"]]
    print(skill.to_string(index=False))

    for what in ("resid_pre", "heads"):
        tables = [circuits.patch(model, prompts, what, stream=stream) for stream in ("clean", "ablated")]
        figure = views.side_by_side(tables, f"{task}: {what}", names=["clean", "ablated"])
        print("wrote", views.save(figure, out / f"{what}.html"))
    for what in ("mask_attn", "mask_mlp"):
        print("wrote", views.save(circuits.patch(model, prompts, what, stream="ablated"), out / f"{what}.html"))
    heads = views.attention(model, prompts.clean_texts[0], layer=model.cfg.n_layers - 1)
    print("wrote", views.save(heads, out / "attention.html"))


if __name__ == "__main__":
    tyro.cli(main)
