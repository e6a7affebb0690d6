"""Single nodes compute what a pass of the whole model does, or `unsupported` says why they do not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import plain_model, random_tokens

from sa_lens.core.nodes import NodeFunctions, unsupported

NORMS = [(norm, final) for norm in ("LN", "LNPre", "RMS", "RMSPre", None) for final in (False, True)]


@pytest.mark.parametrize(("norm", "final_rms"), NORMS)
def test_the_end_of_a_pass_is_exact_or_refused(norm: str | None, final_rms: bool) -> None:
    model = plain_model(normalization_type=norm, final_rms=final_rms, dtype=torch.float64)
    reason = unsupported(model)
    if norm in ("LN", "LNPre") and final_rms:
        assert reason is not None
        assert reason.endswith("for a final RMSNorm after LayerNorms")
        return
    assert reason is None
    tokens = random_tokens()
    with torch.no_grad():
        logits, cache = model.run_with_cache(tokens)
        functions = NodeFunctions(model, tokens.shape[1])
        found = functions.normalise(cache["blocks.1.hook_resid_post"]) @ functions.W_U + functions.b_U
    assert torch.allclose(found, logits, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"positional_embedding_type": "alibi"}, "positions 'alibi'"),
        ({"attn_scores_soft_cap": 5.0}, "a soft cap on attention scores"),
        ({"output_logits_soft_cap": 5.0}, "a soft cap on logits"),
        ({"attention_dir": "bidirectional"}, "bidirectional attention"),
        ({"act_fn": "solu_ln"}, "activation 'solu_ln'"),
        (
            {"normalization_type": "RMS", "use_normalization_before_and_after": True},
            "normalises the outputs of its layers",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_recomputed_is_named(changes: dict[str, Any], reason: str) -> None:
    assert reason in str(unsupported(plain_model(**changes)))
