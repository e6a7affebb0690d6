"""The terms of the two-stream loss, by their definitions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from sa_lens.core.host import at_least_float32


def cross_entropy(
    logits: Float[Tensor, "batch pos d_vocab"],
    tokens: Int[Tensor, "batch pos"],
    targets: Int[Tensor, "batch pos"] | None = None,
    attention_mask: Int[Tensor, "batch pos"] | None = None,
) -> Float[Tensor, ""]:
    """Returns the mean cross-entropy in nats per predicted token, in float32 or wider.

    Without targets the next token is predicted (T - 1 predictions); pairs that touch padding are left out.
    """
    logits = at_least_float32(logits)
    if targets is None:
        logits, targets = logits[:, :-1], tokens[:, 1:]
        keep = None if attention_mask is None else (attention_mask[:, :-1] & attention_mask[:, 1:]).bool()
    else:
        keep = None if attention_mask is None else attention_mask.bool()
    if keep is not None:
        return F.cross_entropy(logits[keep], targets[keep])
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def reconstruction_loss(
    clean: list[Float[Tensor, "batch pos d_model"]],
    ablated: list[Float[Tensor, "batch pos d_model"]],
    attention_mask: Int[Tensor, "batch pos"] | None = None,
) -> Float[Tensor, ""]:
    """Returns R: the mean over the given outputs of the mean squared difference between L2-normalised vectors.

    Padding is left out.
    """

    def direction(x: Tensor) -> Tensor:
        kept = x if attention_mask is None else x[attention_mask.bool()]
        return F.normalize(at_least_float32(kept), dim=-1)

    terms = [F.mse_loss(direction(a), direction(c)) for c, a in zip(clean, ablated, strict=True)]
    return torch.stack(terms).mean()
