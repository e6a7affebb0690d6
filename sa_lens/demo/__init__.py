"""The demo: what the two shipped models of the generated stories do, and a training before the user's eyes.

`tour.py` shows the models and trains a third one for a minute, `pair.py` trains both from scratch, and `printing.py`
has the tables that they print. Everything is seeded and offline.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sa_lens.demo.printing import Clock
from sa_lens.places import output_folder


def demo(out: str | Path = "runs/demo", *, seed: int = 0, device: str = "auto", progress: bool = True) -> Path:
    """Shows what the two shipped models of the generated stories do, and trains a small model for a minute.

    Args:
        out: folder of figures, report and the run.
        seed: of prompts, samples and the training.
        device: auto, cpu, cuda or mps.
        progress: show progress bars.

    Returns:
        The folder.
    """
    folder, clock = output_folder(out), Clock()
    output_folder(folder / "short")
    with clock.part("start of PyTorch and TransformerLens"):
        from sa_lens.demo.tour import tour
    with _one_thread():
        return tour(folder, clock, seed=seed, device=device, progress=progress)


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread: small models take less processor time, and sums are taken in one order on any number of cores."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def train_demo(out: str | Path = "runs/demo", *, seed: int = 0, device: str = "auto", progress: bool = True) -> bool:
    """Trains the two shipped models of the generated stories from scratch, both at once, and measures them.

    Args:
        out: folder of the runs; runs that are there go on.
        seed: of initialisation and data order.
        device: auto, cpu, cuda or mps.
        progress: show progress bars.

    Returns:
        Whether every bar is reached.
    """
    folder, clock = output_folder(out), Clock()
    with clock.part("start of PyTorch and TransformerLens"):
        from sa_lens.demo.pair import pair_run, train_pair
    runs = {"dense": pair_run("none", seed), "local": pair_run("local", seed)}
    for name in runs:
        output_folder(folder / name)
    return train_pair(runs, folder, clock, device=device, progress=progress)
