"""TransformerLens's activation patching on both streams, against a loop of ordinary hooks on a plain transformer."""

from __future__ import annotations

import oracle
import pytest
import torch
from small_models import gates_for, plain_model, random_tokens
from transformer_lens import patching

from sa_lens.core import SelfAblatingTransformer

LENGTH = 5
TOOLS = {
    "resid_pre": (patching.get_act_patch_resid_pre, "hook_resid_pre"),
    "attn_out": (patching.get_act_patch_attn_out, "hook_attn_out"),
    "mlp_out": (patching.get_act_patch_mlp_out, "hook_mlp_out"),
    "attn_head_out_by_pos": (patching.get_act_patch_attn_head_out_by_pos, "attn.hook_z"),
    "attn_head_out_all_pos": (patching.get_act_patch_attn_head_out_all_pos, "attn.hook_z"),
}


def metric(logits):
    return (logits[:, -1, 3] - logits[:, -1, 7]).mean()


def expected_results(plain, masks, clean, corrupt, name, tool):
    """Metric for every (layer, position, head) patched, by loops over ordinary hooks."""

    def masking(tokens):
        return oracle.masking_hooks(masks(tokens), LENGTH - 1)

    with plain.hooks(fwd_hooks=masking(clean)):
        _, source = plain.run_with_cache(clean)
    by_pos, by_head = "all_pos" not in tool, "head" in tool
    shape = (2, *([LENGTH] if by_pos else []), *([4] if by_head else []))
    results = torch.zeros(shape)
    for index in torch.cartesian_prod(*map(torch.arange, shape)).tolist():
        point = f"blocks.{index[0]}.{name}"

        def put(x, hook, where=(slice(None), index[1] if by_pos else slice(None), *([index[-1]] if by_head else []))):
            x = x.clone()
            x[where] = source[hook.name][where]
            return x

        results[tuple(index)] = metric(plain.run_with_hooks(corrupt, fwd_hooks=[*masking(corrupt), (point, put)]))
    return results


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("tool", TOOLS)
@torch.no_grad()
def test_activation_patching(tool, scope):
    function, name = TOOLS[tool]
    plain = plain_model()
    model = SelfAblatingTransformer.from_hooked(plain, gates_for("gpt2", scope), seed=3)
    clean, corrupt = random_tokens(2, LENGTH), random_tokens(2, LENGTH, seed=1)

    def patched():
        _, cache = model.run_with_cache(clean)
        return function(model, corrupt, cache, metric)

    on_clean = patched()
    with model.ablated(position=-1):
        on_ablated = patched()
    expected = expected_results(plain, lambda tokens: {}, clean, corrupt, name, tool)
    torch.testing.assert_close(on_clean, expected, rtol=1e-5, atol=1e-5)
    expected = expected_results(
        plain, lambda tokens: oracle.slow_masks(plain, model, tokens), clean, corrupt, name, tool
    )
    torch.testing.assert_close(on_ablated, expected, rtol=1e-5, atol=1e-5)
    assert (on_clean - on_ablated).abs().max() > 0.01
