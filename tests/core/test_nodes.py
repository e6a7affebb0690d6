"""Single nodes compute what a pass of the whole model does, or `why_not_single_nodes` says why they do not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import BASE, D_VOCAB, SHAPES, plain_model, random_tokens

from sa_lens.config import GateConfig
from sa_lens.core import HookedTransformerConfig, SelfAblatingTransformer
from sa_lens.core.base import TRANSFORMER_LENS
from sa_lens.core.host import in_stream
from sa_lens.core.last_position import Prompts, embed_prompts, run_to_position
from sa_lens.core.nodes import NodeFunctions, why_not_single_nodes

NORMS = [(norm, final) for norm in ("LN", "LNPre", "RMS", "RMSPre", None) for final in (False, True)]


only_in_3 = pytest.mark.skipif(TRANSFORMER_LENS > 3, reason="the decoder refuses to build this shape")


@pytest.mark.parametrize(("norm", "final_rms"), NORMS)
def test_the_end_of_a_pass_is_exact_or_refused(norm: str | None, final_rms: bool) -> None:
    model = plain_model(normalization_type=norm, final_rms=final_rms, dtype=torch.float64)
    reason = why_not_single_nodes(model)
    if norm in ("LN", "LNPre") and final_rms:
        assert reason is not None
        assert reason.endswith("for a final RMSNorm after LayerNorms")
        return
    assert reason is None
    tokens = random_tokens()
    with torch.no_grad():
        logits, cache = model.run_with_cache(tokens)
        functions = NodeFunctions(model, tokens.shape[1])
        found = functions.logits(cache["blocks.1.hook_resid_post"])
    assert torch.allclose(found, logits, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"positional_embedding_type": "alibi"}, "positions of type 'alibi'"),
        ({"attn_scores_soft_cap": 5.0}, "a soft cap on attention scores"),
        ({"output_logits_soft_cap": 5.0}, "a soft cap on logits"),
        pytest.param({"attention_dir": "bidirectional"}, "bidirectional attention", marks=only_in_3),
        ({"act_fn": "solu_ln"}, "a LayerNorm inside the MLP"),
        pytest.param(
            {"normalization_type": "RMS", "use_normalization_before_and_after": True},
            "normalisation after the layers",
            marks=only_in_3,
        ),
    ],
    ids=str,
)
def test_what_cannot_be_recomputed_is_named(changes: dict[str, Any], reason: str) -> None:
    assert reason in str(why_not_single_nodes(plain_model(**changes)))


@pytest.mark.parametrize("shape", ["gpt2", "gpt-neo", "pythia", "llama", "attention-only", "no-norm"])
@pytest.mark.parametrize("scope", ["local", "global", "both"])
def test_prompts_of_several_lengths_to_their_last_positions(shape: str, scope: str) -> None:
    """All that a pass by nodes gives is what hooks read of each prompt's own pass, in both streams."""
    cfg = HookedTransformerConfig(**{**BASE, **SHAPES[shape], "dtype": torch.float64, "seed": 1})
    model = SelfAblatingTransformer(cfg, GateConfig(scope=scope, k_attn=5, k_mlp=7))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    groups = [torch.randint(1, D_VOCAB, (n, length), generator=generator) for n, length in ((2, 5), (3, 8))]
    prompts = Prompts.of(*embed_prompts(model, groups))
    found = run_to_position(model, NodeFunctions(model, 9), prompts, ablated=True)
    first = 0
    for tokens in groups:
        for stream in ("clean", "ablated"):
            with torch.no_grad(), in_stream(model, stream, position=-1):  # type: ignore[arg-type]
                _, cache = model.run_with_cache(tokens)
            own = slice(first, first + len(tokens))
            for layer in range(cfg.n_layers):
                z, post = (cache.cache_dict.get(f"blocks.{layer}.{name}") for name in ("attn.hook_z", "mlp.hook_post"))
                assert torch.allclose(found.z[stream][layer][own], z[:, -1], rtol=0, atol=1e-10)
                if post is not None:
                    assert torch.allclose(found.post[stream][layer][own], post[:, -1], rtol=0, atol=1e-10)
                if layer < cfg.n_layers - 1:
                    rows = (prompts.prompt >= own.start) & (prompts.prompt < own.stop)
                    earlier = found.z["earlier"][layer][rows]
                    assert torch.allclose(earlier, z[:, :-1].flatten(0, 1), rtol=0, atol=1e-10)
            final = cache[f"blocks.{cfg.n_layers - 1}.hook_resid_post"][:, -1]
            assert torch.allclose(found.final[stream][own], final, rtol=0, atol=1e-10)
        first += len(tokens)


@pytest.mark.parametrize("masked", [False, True])
def test_rounded_estimates_neglect_rows_that_hardly_change(masked: bool) -> None:
    functions = NodeFunctions(plain_model(dtype=torch.float64), 4)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(10, functions.cfg.d_model, dtype=torch.float64, generator=generator)
    change = torch.randn(3, *x.shape, dtype=torch.float64, generator=generator)
    change[:, [1, 4, 5]] *= 1e-4
    # row 8 changes in one of the removals only
    change[:2, 8] = 0
    mask = torch.rand(10, functions.cfg.d_mlp or 0, dtype=torch.float64, generator=generator) if masked else None
    ones = torch.ones_like(mask) if mask is not None else None
    with torch.no_grad():
        before = functions.inside_mlp(1, x)

        def check(again: torch.Tensor | None, dtype: torch.dtype, neglected: list[int], always: list[int]) -> None:
            rows = torch.tensor(always) if always else None
            few = functions.mlp_change(1, before, x + change, (mask, again), dtype, rows)
            every = functions.mlp(1, x + change, again) - functions.mlp(1, x, mask)
            assert every.abs().amax((0, 2)).min() > 1e-7
            assert (~few.any(-1).any(0)).nonzero()[:, 0].tolist() == neglected
            every[:, neglected] = 0
            assert torch.allclose(few, every, rtol=1e-5, atol=1e-6)

        check(mask, torch.float32, [1, 5], always=[4])
        check(mask, torch.float32, [], always=[])
        check(mask, torch.float64, [], always=[4])
        if masked:
            # masks change where the input does not
            check(ones, torch.float32, [], always=[4])
        # one row of ten is not worth it
        change[:, 5] *= 1e4
        check(mask, torch.float32, [], always=[4])
