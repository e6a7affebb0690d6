"""The two-stream loss: `c_clean CE(clean) + c_ablated CE(ablated) + c_rec R` (paper, section 3).

The hooked path is the readable definition; `TwoStreamLoss` takes the fused one (`fused/`) where it can.
"""

from __future__ import annotations

import logging
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sa_lens.config import LossConfig, LossPath
from sa_lens.core.fused import fused_loss, why_not_fused
from sa_lens.core.fused.eligible_models import has_user_hooks
from sa_lens.core.loss_terms import cross_entropy, reconstruction_loss
from sa_lens.core.model import SelfAblatingTransformer

log = logging.getLogger(__name__)


class LossTerms(NamedTuple):
    """The terms of the loss; a term that the model or the coefficients leave out is None."""

    total: Float[Tensor, ""]
    """The loss that is minimised."""
    clean: Float[Tensor, ""]
    """Cross-entropy of the clean stream, nats per predicted token, without its coefficient."""
    ablated: Float[Tensor, ""] | None
    """Cross-entropy of the ablated stream; None without gates, or if the ablated pass was left out."""
    reconstruction: Float[Tensor, ""] | None
    """R; None without gates, if its coefficient is 0, or if the ablated pass was left out."""


class TwoStreamLoss(nn.Module):
    """The two-stream loss as a module that maps tokens to loss terms.

    The fused path computes the same function as the hooked one, on the same parameters, without hooks. Wrap this
    module, not the model, in DDP, FSDP (as one unit) or `torch.compile`.

    Args:
        model: the model to train; its parameters are this module's.
        cfg: coefficients; without gates the loss is the clean cross-entropy with coefficient 1.
        path: `fused`, `hooked`, or `auto`: fused where it can, which it says once where it cannot. With `auto` a model
            that carries user hooks takes the hooked path, so that they fire (in the ablated pass).
        dtype: of the matrix products; None: autocast's where autocast is on, else the parameters'. Losses, scores,
            top-k, surrogate and softmax stay in float32 or wider.
        checkpoint_activations: keep each layer's input only and compute the layer again in the backward pass. Fused
            path only.

    Raises:
        ValueError: an unknown path, a dtype that is no floating type, or a choice that this model's path cannot honour,
            with the reason.
    """

    def __init__(
        self,
        model: SelfAblatingTransformer,
        cfg: LossConfig | None = None,
        *,
        path: LossPath = "auto",
        dtype: torch.dtype | None = None,
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__()
        if path not in get_args(LossPath):
            raise ValueError(f"path={path!r} must be 'auto', 'fused' or 'hooked'")
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"dtype={dtype} must be a floating type, such as torch.bfloat16")
        reason = why_not_fused(model)
        if path == "fused" and reason is not None:
            raise ValueError(f"path='fused' cannot run this model: {reason}. Use path='auto' or path='hooked'")
        hooked = path == "hooked" or reason is not None
        if checkpoint_activations and hooked:
            raise ValueError(
                "checkpoint_activations=True needs the fused path, but "
                + (f"it cannot run this model: {reason}" if reason else "path='hooked' was asked for")
            )
        if hooked and path == "auto":
            log.warning("training takes the slower hooked path, because the fused one does not cover %s", reason)
        self.model = model
        self.cfg = cfg if cfg is not None else LossConfig()
        self.requested_path = path
        self.path: Literal["fused", "hooked"] = "hooked" if hooked else "fused"
        self.dtype = dtype
        self.checkpoint_activations = checkpoint_activations
        self._said_hooks = False

    def forward(
        self,
        tokens: Int[Tensor, "batch pos"],
        targets: Int[Tensor, "batch pos"] | None = None,
        *,
        clean_alone: bool = False,
    ) -> LossTerms:
        """Returns the terms of the loss on a batch.

        Args:
            targets: the token to predict at each position, -100 where none is; None: the next token of `tokens`,
                T - 1 predictions.
            clean_alone: train the clean stream alone. The loss is CE(clean) with coefficient 1 as without gates, the
                ablated pass is not computed and the gates get no gradient.
        """
        device = self.model.embed.W_E.device.type
        dtype = self._matmul_dtype(device)
        if self.path == "hooked" or self._must_fire_hooks():
            with torch.autocast(device, dtype=dtype, enabled=dtype in (torch.bfloat16, torch.float16)):
                if clean_alone:
                    return clean_loss(self.model, tokens, targets)
                return hooked_loss(self.model, self.cfg, tokens, targets)
        with torch.autocast(device, enabled=False):
            losses = fused_loss(
                self.model,
                self.cfg,
                tokens,
                targets,
                dtype=dtype,
                recompute=self.checkpoint_activations,
                clean_alone=clean_alone,
            )
        return LossTerms(*losses)

    def _matmul_dtype(self, device: str) -> torch.dtype:
        if self.dtype is not None:
            return self.dtype
        if torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
        return self.model.cfg.dtype

    def _must_fire_hooks(self) -> bool:
        if self.requested_path == "fused" or torch.compiler.is_compiling() or not has_user_hooks(self.model):
            return False
        if not self._said_hooks:
            log.warning("training takes the slower hooked path while hooks are attached to the model")
            self._said_hooks = True
        return True


def hooked_loss(
    model: SelfAblatingTransformer,
    cfg: LossConfig,
    tokens: Int[Tensor, "batch pos"],
    targets: Int[Tensor, "batch pos"] | None,
) -> LossTerms:
    """Returns the loss by hooks on the model's own modules, which is the definition for faster paths."""
    both = model.run_both_passes(tokens)
    clean = cross_entropy(both.clean_logits, tokens, targets)
    if both.ablated_logits is None:
        return LossTerms(clean, clean, None, None)
    ablated = cross_entropy(both.ablated_logits, tokens, targets)
    reconstruction = reconstruction_loss(both.clean_outputs, both.ablated_outputs) if cfg.reconstruction else None
    return combine(cfg, clean, ablated, reconstruction)


def clean_loss(
    model: SelfAblatingTransformer, tokens: Int[Tensor, "batch pos"], targets: Int[Tensor, "batch pos"] | None
) -> LossTerms:
    """Returns the loss of the clean stream alone, by hooks."""
    with model.clean():
        clean = cross_entropy(model(tokens), tokens, targets)
    return LossTerms(clean, clean, None, None)


def combine(
    cfg: LossConfig, clean: Float[Tensor, ""], ablated: Float[Tensor, ""], reconstruction: Float[Tensor, ""] | None
) -> LossTerms:
    """Returns the weighted sum of the terms of a gated model."""
    total = cfg.clean * clean + cfg.ablated * ablated
    if reconstruction is not None:
        total = total + cfg.reconstruction * reconstruction
    return LossTerms(total, clean, ablated, reconstruction)
