"""What an SAE is and how long it learns. Plain data, no torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class SAESettings:
    """Size and training of a standard SAE: ReLU, an L1 penalty weighted by the decoder's norms, Adam.

    Raises:
        ValueError: a value outside its range.
    """

    expansion: float = 16
    """Latents for each dimension of the hook; `d_sae` comes before it."""
    d_sae: int | None = None
    """Latents, at least 1; None: `expansion` times the hook's width."""
    l1_coefficient: float = 5.0
    """Weight of the L1 penalty against the squared error."""
    l1_warm_up: float = 0.05
    """Share of the steps over which the penalty grows from 0, linearly."""
    lr: float = 1e-5
    """Learning rate of Adam."""
    lr_decay: float = 0.2
    """Share of the steps, the last ones, over which the learning rate falls to 0, linearly."""
    normalize: bool = True
    """Scale activations so that their mean L2 norm is the root of their width; folded into the weights at the end."""
    batch_tokens: int = 4096
    """Activations a step."""
    steps: int = 100_000
    """Steps of Adam."""
    buffer_tokens: int = 524_288
    """Activations that are shuffled together, at least one batch; at most one pass over the text."""

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
        """`d_sae` for a hook of width `d_in`.

        Raises:
            ValueError: `expansion` leaves no latent.
        """
        latents = self.d_sae if self.d_sae is not None else round(self.expansion * d_in)
        if latents < 1:
            raise ValueError(f"expansion={self.expansion} of a hook of width {d_in} leaves no latent; set d_sae")
        return latents


PRESETS: dict[str, SAESettings] = {
    "paper": SAESettings(),
    "laptop": SAESettings(
        expansion=8, l1_coefficient=5.0, lr=1e-3, batch_tokens=1024, steps=1500, buffer_tokens=65_536
    ),
}
"""`paper`: the paper's SAE, 410 million tokens. `laptop`: 1.5 million tokens, minutes on two cores."""


def resolve(preset: str | SAESettings, changes: dict[str, Any]) -> SAESettings:
    """A preset with changes.

    Raises:
        ValueError: an unknown preset or setting, or a value outside its range.
    """
    if isinstance(preset, str):
        if preset not in PRESETS:
            raise ValueError(f"preset={preset!r} must be one of {', '.join(PRESETS)}, or an SAESettings")
        preset = PRESETS[preset]
    known = [field.name for field in dataclasses.fields(SAESettings)]
    for name in changes:
        if name not in known:
            raise ValueError(f"{name!r} is no setting of an SAE: choose from {', '.join(known)}")
    return dataclasses.replace(preset, **changes)
