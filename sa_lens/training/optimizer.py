"""The choice of trained parameters, and AdamW over them."""

from __future__ import annotations

import torch
from torch import nn

from sa_lens.config import Freeze, TrainConfig
from sa_lens.core import SelfAblatingTransformer
from sa_lens.core.gate import Gate, belongs_to_gate


def choose_trained(model: SelfAblatingTransformer, freeze: Freeze) -> list[str]:
    """Marks the parameters that are trained (`requires_grad`) and returns their names.

    Left out are the biases that the model does not have, gates that keep every unit (their mask is constant) or whose
    scores are random, and with `freeze="base"` everything but the gates.

    Raises:
        ValueError: nothing is left to train.
    """
    model.freeze_base(freeze == "base")
    for gate in model.modules():
        if isinstance(gate, Gate):
            gate.requires_grad_(gate.k < gate.n_units and gate.cfg.learned)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not trained:
        reason = "it has no gates" if not model.gates.gated else "its gates keep every unit, or are random"
        raise ValueError(f"train.freeze='base' leaves nothing to train on this model: {reason}")
    return trained


def gate_names(model: nn.Module) -> frozenset[str]:
    """Returns the names of the gates' parameters."""
    return frozenset(name for name, _ in model.named_parameters() if belongs_to_gate(name))


def decays(name: str) -> bool:
    """Returns whether a parameter has weight decay: matrices outside the gates have it, biases and LayerNorm do not."""
    return name.rsplit(".", 1)[-1].lstrip("_").startswith("W_") and not belongs_to_gate(name)


def adamw(model: nn.Module, cfg: TrainConfig, *, fused: bool) -> torch.optim.AdamW:
    """Makes AdamW over the trained parameters of `model`, in two groups: with and without weight decay.

    Args:
        fused: one kernel for all parameters, where the device has it.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in trained if decays(name) == decayed], "weight_decay": decay}
        for decayed, decay in ((True, cfg.weight_decay), (False, 0.0))
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=cfg.lr,
        betas=cfg.betas,
        eps=cfg.adam_eps,
        fused=fused,
    )


def allocate_averages(optimizer: torch.optim.Optimizer) -> None:
    """Makes the averages of a fused AdamW, which it would make in its first step.

    On a CPU the activations and gradients of the first step would leave gaps between them, which later steps cannot
    fill.
    """
    for group in optimizer.param_groups:
        for p in group["params"]:
            averages = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
            optimizer.state[p] = {"step": torch.zeros((), dtype=torch.float32), **averages}
