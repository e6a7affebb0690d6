"""The two-stream loss: `c_clean CE(clean) + c_ablated CE(ablated) + c_rec R` (paper, section 3).

The hooked path is the readable definition.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from sa_lens.config import LossConfig
from sa_lens.core.gate import at_least_float32
from sa_lens.core.model import SelfAblatingTransformer


class LossTerms(NamedTuple):
    """Terms of the loss; a term that the model or the coefficients leave out is None."""

    total: Float[Tensor, ""]
    """What is minimised."""
    clean: Float[Tensor, ""]
    """Cross-entropy of the clean stream, nats per predicted token, without its coefficient."""
    ablated: Float[Tensor, ""] | None
    """Cross-entropy of the ablated stream; None without gates."""
    reconstruction: Float[Tensor, ""] | None
    """R; None without gates or if its coefficient is 0."""


def cross_entropy(
    logits: Float[Tensor, "batch pos d_vocab"],
    tokens: Int[Tensor, "batch pos"],
    targets: Int[Tensor, "batch pos"] | None = None,
    attention_mask: Int[Tensor, "batch pos"] | None = None,
) -> Float[Tensor, ""]:
    """Mean cross-entropy in nats per predicted token, in float32 or wider.

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
    clean: list[Float[Tensor, "batch pos d_model"]], ablated: list[Float[Tensor, "batch pos d_model"]]
) -> Float[Tensor, ""]:
    """R: mean over the given outputs of the mean squared difference between the L2-normalised vectors."""
    terms = [
        F.mse_loss(F.normalize(at_least_float32(a), dim=-1), F.normalize(at_least_float32(c), dim=-1))
        for c, a in zip(clean, ablated, strict=True)
    ]
    return torch.stack(terms).mean()


class TwoStreamLoss(nn.Module):
    """Tokens in, loss terms out.

    Args:
        model: the model to train; its parameters are this module's.
        cfg: coefficients; without gates the loss is the clean cross-entropy with coefficient 1.
    """

    def __init__(self, model: SelfAblatingTransformer, cfg: LossConfig | None = None) -> None:
        super().__init__()
        self.model = model
        self.cfg = cfg if cfg is not None else LossConfig()

    def forward(self, tokens: Int[Tensor, "batch pos"], targets: Int[Tensor, "batch pos"] | None = None) -> LossTerms:
        """Terms of the loss on a batch.

        Args:
            targets: the token to predict at each position; None: the next token of `tokens`, T - 1 predictions.
        """
        return hooked_loss(self.model, self.cfg, tokens, targets)


def hooked_loss(
    model: SelfAblatingTransformer,
    cfg: LossConfig,
    tokens: Int[Tensor, "batch pos"],
    targets: Int[Tensor, "batch pos"] | None,
) -> LossTerms:
    """The loss by hooks, on the model's own modules: the definition that faster paths must agree with."""
    both = model.run_both_passes(tokens)
    clean = cross_entropy(both.clean_logits, tokens, targets)
    if both.ablated_logits is None:
        return LossTerms(clean, clean, None, None)
    ablated = cross_entropy(both.ablated_logits, tokens, targets)
    reconstruction = reconstruction_loss(both.clean_outputs, both.ablated_outputs) if cfg.reconstruction else None
    return combine(cfg, clean, ablated, reconstruction)


def combine(
    cfg: LossConfig, clean: Float[Tensor, ""], ablated: Float[Tensor, ""], reconstruction: Float[Tensor, ""] | None
) -> LossTerms:
    """The weighted sum of the terms of a gated model."""
    total = cfg.clean * clean + cfg.ablated * ablated
    if reconstruction is not None:
        total = total + cfg.reconstruction * reconstruction
    return LossTerms(total, clean, ablated, reconstruction)
