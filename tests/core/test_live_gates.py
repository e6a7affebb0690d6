"""Gates as functions choose what the gates of a pass choose."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import gated_model, random_tokens

from sa_lens.core.gate import top_k_mask
from sa_lens.core.live_gates import LocalGates, why_not_local_gates


def test_scores_and_masks_are_those_of_a_pass() -> None:
    model: Any = gated_model()
    tokens = random_tokens()
    with torch.no_grad(), model.ablated(position=-1):
        _, ablated = model.run_with_cache(tokens)
    gates = LocalGates(model)
    with torch.no_grad():
        _, clean = model.run_with_cache(tokens)
        for layer in range(model.cfg.n_layers):
            for kind, name in enumerate(("attn_gate", "mlp_gate")):
                local = clean["resid_pre", layer][:, -1]
                scores = gates.scores(layer, kind, local)
                expected = ablated[f"blocks.{layer}.{name}.hook_scores"][:, -1].flatten(1)
                assert (scores - expected).abs().max() < 1e-5
                mask = ablated[f"blocks.{layer}.{name}.hook_mask"][:, -1].flatten(1)
                assert torch.equal(gates.select(layer, kind, scores), mask)
                change = torch.randn(3, *local.shape, generator=torch.Generator().manual_seed(layer))
                moved = torch.stack([gates.scores(layer, kind, local + x) for x in change]) - scores
                assert (gates.score_changes(layer, kind, change) - moved).abs().max() < 1e-4


@pytest.mark.parametrize("range_of_scores", [3, 1000])
def test_masks_of_changed_scores_with_and_without_ties(range_of_scores: int) -> None:
    model: Any = gated_model()
    gates, k = LocalGates(model), model.gates.k_mlp
    generator = torch.Generator().manual_seed(1)
    before = torch.randint(range_of_scores, (5, model.cfg.d_mlp), generator=generator).float()
    masks = gates.select(0, 1, before)
    changed = before + torch.randint(-range_of_scores, range_of_scores, (40, *before.shape), generator=generator)
    again = gates.select_again(0, 1, changed, masks)
    assert again is not None
    assert torch.equal(again.bool(), top_k_mask(changed, k))
    assert not torch.equal(again[0], masks)
    apart = before + range_of_scores * masks
    assert gates.select_again(0, 1, apart.expand(2, -1, -1), masks) is None


@pytest.mark.parametrize(("scope", "reason"), [("local", None), ("global", "end of the clean"), ("both", "end of the")])
def test_reason_against(scope: str, reason: str | None) -> None:
    said = why_not_local_gates(gated_model(scope=scope))
    assert said is None if reason is None else reason in str(said)
