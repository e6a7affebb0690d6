"""The demo: what the two shipped models of the generated stories do, and a training before the user's eyes.

`tour.py` shows the models and trains a third one for a minute; `pair.py` trains both from scratch; `tables.py` and
`clock.py` print what was found and where the time went. Everything is seeded and offline.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from sa_lens.config import RunConfig
from sa_lens.demo.clock import Clock


def demo_run(scope: str = "local", seed: int = 0) -> RunConfig:
    """The configuration of the models that the demo shows; with scope `none`, of the dense one."""
    from sa_lens.shipped.recipes import STORIES

    return dataclasses.replace(
        STORIES,
        gates=dataclasses.replace(STORIES.gates, scope=scope),  # type: ignore[arg-type]
        train=dataclasses.replace(STORIES.train, seed=seed),
    )


def demo(out: str | Path = "runs/demo", *, seed: int = 0, device: str = "auto", progress: bool = True) -> Path:
    """Shows the shipped pair of the generated stories and trains a small model for a minute.

    Args:
        out: folder of figures, report and the run.
        seed: of prompts, samples and the training.
        device: auto, cpu, cuda or mps.
        progress: show progress bars.

    Returns:
        The folder.
    """
    clock = Clock()
    with clock.part("start of PyTorch and TransformerLens"):
        from sa_lens.demo.tour import tour
    return tour(Path(out), clock, seed=seed, device=device, progress=progress)


def train_demo(out: str | Path = "runs/demo", *, seed: int = 0, device: str = "auto", progress: bool = True) -> bool:
    """Trains the pair of the generated stories from scratch, both models at once, and measures what they reach.

    Args:
        out: folder of the runs; runs that are there go on.
        seed: of initialisation and data order.
        device: auto, cpu, cuda or mps.
        progress: show progress bars.

    Returns:
        Whether every bar is reached.
    """
    clock = Clock()
    with clock.part("start of PyTorch and TransformerLens"):
        from sa_lens.demo.pair import train_pair
    runs = {"dense": demo_run("none", seed), "local": demo_run("local", seed)}
    return train_pair(runs, Path(out), clock, device=device, progress=progress)
