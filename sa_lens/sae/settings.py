"""Size and training of an SAE."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class SAESettings:
    """Size and training of a standard SAE: ReLU, an L1 penalty weighted by the norms of the decoder, Adam.

    Raises:
        ValueError: a value is outside its range.
    """

    expansion: float = 16
    """Number of latents per dimension of the hook; without effect if `d_sae` is given."""
    d_sae: int | None = None
    """Number of latents, at least 1; None: `expansion` times the width of the hook."""
    l1_coefficient: float = 5.0
    """Weight of the L1 penalty relative to the squared error."""
    l1_warm_up: float = 0.05
    """Share of the steps over which the penalty grows linearly from 0."""
    lr: float = 1e-5
    """Learning rate of Adam."""
    lr_decay: float = 0.2
    """Share of the steps, at the end, over which the learning rate falls linearly to 0."""
    normalize: bool = True
    """Whether activations are scaled to a mean L2 norm of the square root of their width; the scale is folded into the
    weights at the end."""
    batch_tokens: int = 4096
    """Activations per step."""
    steps: int = 100_000
    """Number of steps of Adam."""
    buffer_tokens: int = 524_288
    """Number of activations that are shuffled together, at least one batch; at most the whole text and all steps."""

    def __post_init__(self) -> None:
        for name in ("d_sae", "batch_tokens", "steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        for name in ("expansion", "lr"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0")
        if not self.l1_coefficient >= 0:
            raise ValueError(f"l1_coefficient={self.l1_coefficient} must be 0 or more")
        for name in ("l1_warm_up", "lr_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be a share of the steps, from 0 to 1")
        if self.buffer_tokens < self.batch_tokens:
            raise ValueError(
                f"buffer_tokens={self.buffer_tokens} must hold at least one batch, batch_tokens={self.batch_tokens}"
            )

    def latents(self, d_in: int) -> int:
        """Returns the number of latents for a hook of width `d_in`.

        Raises:
            ValueError: `expansion` gives no latent.
        """
        latents = self.d_sae if self.d_sae is not None else round(self.expansion * d_in)
        if latents < 1:
            raise ValueError(f"expansion={self.expansion} of a hook of width {d_in} gives no latent; set d_sae")
        return latents


PRESETS: dict[str, SAESettings] = {
    "paper": SAESettings(),
    "laptop": SAESettings(
        expansion=8, l1_coefficient=5.0, lr=1e-3, batch_tokens=1024, steps=1500, buffer_tokens=65_536
    ),
}
"""`paper`: the paper's SAE, 410 million tokens. `laptop`: 1.5 million tokens, minutes on two cores."""


def resolve(preset: str | SAESettings, changes: dict[str, Any]) -> SAESettings:
    """Returns a preset with changes.

    Raises:
        ValueError: the preset or a setting is unknown, or a value is outside its range.
    """
    if isinstance(preset, str):
        if preset not in PRESETS:
            raise ValueError(f"preset={preset!r} must be one of {', '.join(PRESETS)}, or an SAESettings")
        preset = PRESETS[preset]
    known = [field.name for field in dataclasses.fields(SAESettings)]
    for name in changes:
        if name not in known:
            raise ValueError(f"{name!r} is not a setting of an SAE: choose from {', '.join(known)}")
    return dataclasses.replace(preset, **changes)
