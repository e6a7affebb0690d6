"""Models whose every node is linear in its input: no LayerNorm, fixed attention, neurons that pass on what they get."""

from __future__ import annotations

from typing import Any

import torch
from micro import gated, plain

from sa_lens.core import HookedTransformer


def linear(stream: str = "clean", **changes: Any) -> HookedTransformer:
    """In float64, with gates if the stream is the ablated one (their masks depend on the prompt alone)."""
    settings = {"normalization_type": None, "act_fn": "relu", "dtype": torch.float64, "initializer_range": 0.1}
    model = gated("both", **settings, **changes) if stream == "ablated" else plain(**settings, **changes)
    with torch.no_grad():
        for block in model.blocks:
            for name in ("W_Q", "b_Q", "W_K", "b_K"):
                for parameter in (p for n, p in block.attn.named_parameters() if n.endswith(name)):
                    parameter.zero_()
            block.mlp.act_fn = torch.nn.Identity()
    return model
