"""Patched runs from the layer and position of the patch give what passes of the whole model give."""

from __future__ import annotations

import sys
from typing import Any

import pandas as pd
import pytest
import torch
from micro import gated, plain, token_pairs

from sa_lens.circuits.patching.activation_patching import patch
from sa_lens.circuits.patching.patches_by_nodes import KINDS, PatchedRuns

MODULE = sys.modules["sa_lens.circuits.patching.activation_patching"]
DOUBLE: dict[str, Any] = {"dtype": torch.float64}
MODELS: dict[str, Any] = {
    "plain": lambda: plain(**DOUBLE, n_layers=3),
    "rotary": lambda: plain(**DOUBLE, positional_embedding_type="rotary", rotary_dim=6, normalization_type="RMS"),
    "attention only": lambda: plain(**DOUBLE, attn_only=True),
    "parallel": lambda: plain(**DOUBLE, parallel_attn_mlp=True),
    "local": lambda: gated("local", **DOUBLE),
    "global": lambda: gated("global", **DOUBLE),
    "ablated": lambda: gated("ablated", **DOUBLE),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("what", KINDS)
def test_equals_passes_of_the_whole_model(name: str, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if (name, what) in (("attention only", "resid_mid"), ("attention only", "mlp_out"), ("parallel", "resid_mid")):
        pytest.skip("there is no such activation")
    model, pairs = MODELS[name](), token_pairs(n=5, lengths=(6, 8))
    choices: list[dict[str, Any]] = [{"stream": "clean"}]
    if name in ("local", "global", "ablated"):
        choices += [{"stream": "ablated", "masks": "frozen"}, {"stream": "ablated", "masks": "live"}]
    runs: list[int] = []
    plainly = PatchedRuns.sums
    monkeypatch.setattr(PatchedRuns, "sums", lambda self, *args: (runs.append(1), plainly(self, *args))[1])
    for choice in choices:
        for positions in ("all", [0, 1, -1, -3]):
            for direction in ("noise", "denoise"):
                options: dict[str, Any] = {**choice, "positions": positions, "direction": direction, "progress": False}
                runs.clear()
                found = patch(model, pairs, what, **options)
                assert bool(runs) == ((name, choice.get("masks")) != ("global", "live"))
                with monkeypatch.context() as whole:
                    whole.setattr(MODULE, "why_not_patched_by_nodes", lambda exp, what: "asked for")
                    expected = patch(model, pairs, what, **options)
                pd.testing.assert_frame_equal(found, expected, rtol=0, atol=1e-9)
                unpatched = expected["corrupt" if direction == "denoise" else "clean"]
                assert (expected["value"] - unpatched).abs().max() > 1e-3
