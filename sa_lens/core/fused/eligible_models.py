"""Which models the fused path can run. An activation function is added in `core.norms_and_activations`."""

from __future__ import annotations

import torch

from sa_lens.core.coverage import Coverage
from sa_lens.core.gated import GatedTransformer
from sa_lens.core.norms_and_activations import ACTIVATIONS

_COVERAGE = Coverage(
    features={
        "windowed attention",
        "grouped keys and values",
        "an attention scale that falls with the layer",
        "attention and MLP in parallel",
        "no MLPs",
        "a gated MLP",
    },
    positions={"standard", "rotary"},
    activations=ACTIVATIONS.keys(),
    dtypes={torch.float32, torch.float64},
)


def why_not_fused(model: GatedTransformer) -> str | None:
    """The reason why this model must train on the hooked path; None if the fused one can run it."""
    reason = _COVERAGE.reason_against(model.cfg)
    biases = [model.get_parameter(name) for name in model.zero_biases]
    if reason is None and any(bool(bias.any()) for bias in biases if not bias.is_meta):
        return "biases that its configuration does not have"
    if reason is None and model.tokenizer is not None and model.tokenizer.padding_side == "left":
        return "a tokenizer that pads on the left"
    return reason


def has_user_hooks(model: GatedTransformer) -> bool:
    """Whether a hook is attached to any hook point; the fused path would not fire it."""
    return any(
        point._forward_hooks or point._forward_pre_hooks or point._backward_hooks or point._backward_pre_hooks
        for point in model.hook_dict.values()
    )
