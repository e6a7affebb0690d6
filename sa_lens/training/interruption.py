"""What a run that was asked to stop raises when it has saved its state."""

from __future__ import annotations

from pathlib import Path


class Interrupted(KeyboardInterrupt):
    """A run was asked to stop, saved its state and did so."""

    def __init__(self, folder: Path, step: int) -> None:
        self.folder = folder
        self.step = step
        super().__init__(
            f"stopped after step {step}; everything is saved. Go on with: sa-lens train --out {folder} --resume"
        )
