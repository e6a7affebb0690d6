"""No analysis holds a tensor of the size edges x prompts x positions x d_model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from micro import gated, token_pairs
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sa_lens.circuits.discovery.acdc import acdc
from sa_lens.circuits.discovery.eap import eap_ig
from sa_lens.circuits.discovery.exact_effects import exact_effects
from sa_lens.circuits.experiment import Experiment
from sa_lens.circuits.judging.faithfulness import faithfulness
from sa_lens.circuits.patching.activation_patching import patch


class Largest(TorchDispatchMode):
    """Notes the bytes of the largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for x in tree_leaves(made):
            if isinstance(x, torch.Tensor):
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return made


def search(exp: Experiment) -> None:
    acdc(exp, 0.05, progress=False)


def curve(exp: Experiment) -> None:
    faithfulness(exp, eap_ig(exp, progress=False), levels=(), progress=False)


def effects(exp: Experiment) -> None:
    exact_effects(exp, eap_ig(exp, progress=False).keep(40), progress=False)


def heads(exp: Experiment) -> None:
    patch(exp, "heads", positions="each", progress=False)


@pytest.mark.parametrize(
    ("analysis", "stream"),
    [
        (search, "clean"),
        pytest.param(search, "ablated", marks=pytest.mark.slow),
        (curve, "ablated"),
        (effects, "clean"),
        (heads, "clean"),
    ],
)
def test_largest_tensor(analysis: Callable[[Experiment], None], stream: Any) -> None:
    model, pairs = gated(n_layers=4, n_heads=6, d_head=4, d_mlp=24), token_pairs(n=4, lengths=(12,))
    exp = Experiment(model, pairs, stream=stream)
    with Largest() as largest:
        analysis(exp)
    of_a_stream = pairs.clean.numel() * model.cfg.d_model * 4
    assert len(exp.graph) == 927
    # there are 29 sources, and up to 64 runs go together
    assert of_a_stream < largest.bytes < len(exp.graph) / 3 * of_a_stream
