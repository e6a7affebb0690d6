"""Compare small models with controls and seeds (notebook 04 as a script).

python examples/scripts/compare.py --steps 600 --seeds 3 --out runs/compare-small
"""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path

import tyro

warnings.filterwarnings("ignore", message="HookedTransformer is deprecated")

from sa_lens import compare  # noqa: E402


def small_grid(steps: int, stories: int, tokens: int) -> compare.Grid:
    """The grid `smoke` with larger models, longer training, and fewer variants and columns."""
    small = compare.GRIDS["smoke"]()
    run = dataclasses.replace(
        small.run,
        model=dataclasses.replace(small.run.model, d_model=32, n_heads=4, n_ctx=64),
        data=dataclasses.replace(small.run.data, n_stories=stories),
        train=dataclasses.replace(small.run.train, steps=steps, batch_size=8, eval_every=steps, save_every=steps),
    )
    measurements = (
        compare.Losses(tokens),
        compare.Weights(),
        compare.Skill(64, task="object"),
        compare.Units(tokens, tokens),
        compare.Leakage(tokens, probe_tokens=max(256, tokens // 5)),
    )
    variants = tuple(v for v in small.variants if v.name not in ("frozen-base", "random-init"))
    return dataclasses.replace(small, name="small", run=run, variants=variants, measurements=measurements)


def main(
    out: Path = Path("runs/compare-small"),
    steps: int = 600,
    seeds: int = 3,
    stories: int = 6000,
    tokens: int = 10_000,
    device: str = "auto",
) -> None:
    """Train a baseline, self-ablating models and controls on the same tokens, measure all of them, and print verdicts.

    Args:
        out: Folder for models, tables and figure; models and values that it contains are not made again.
        steps: Training steps of each model.
        seeds: Number of seeds of each variant.
        stories: Number of generated stories.
        tokens: Number of validation tokens of each measurement.
        device: Device, such as cpu or cuda.
    """
    grid = small_grid(steps, stories, tokens)
    left = compare.plan(grid, out, seeds=seeds, device=device)["seconds"].sum()
    print(f"about {left / 60:.1f} minutes; after Ctrl-C the same command continues")
    comparison = compare(grid, out, seeds=seeds, device=device)
    print(f"\nClaims against the dense baseline\n\n{compare.verdict_text(comparison)}\n")
    for name in ("table.md", "summary.csv", "figure.html"):
        print("wrote", out / name)


if __name__ == "__main__":
    tyro.cli(main)
