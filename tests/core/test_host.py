"""The protocol by which analyses speak to a model."""

import pytest
import torch

import sa_lens as sa
from sa_lens.core import HookedTransformer, host


@pytest.fixture(scope="module")
def model():
    cfg = sa.ModelConfig(n_layers=2, d_model=8, n_heads=2, d_mlp=16, n_ctx=16, d_vocab=20)
    return sa.SelfAblatingTransformer(cfg, sa.GateConfig(scope="both", k_attn=3, k_mlp=4), seed=1).requires_grad_(False)


TOKENS = torch.tensor([[0, 3, 4, 5], [0, 6, 4, 7]])


def test_both_kinds_of_model_are_hosts(model):
    plain: HookedTransformer = model.to_hooked_transformer()
    assert isinstance(model, host.Host)
    assert isinstance(plain, host.Host)
    assert host.has_ablated_stream(model)
    assert not host.has_ablated_stream(plain)
    assert host.streams_of(model) == ("clean", "ablated")
    assert host.streams_of(plain) == ("clean",)
    assert host.streams_of(model, "ablated") == ("ablated",)
    assert not host.has_ablated_stream(sa.SelfAblatingTransformer(model.cfg, sa.GateConfig(scope="none")))


def test_in_stream_chooses_the_stream(model):
    streams = model.run_streams(TOKENS)
    plain = model.to_hooked_transformer()
    with host.in_stream(plain, "clean"):
        assert torch.equal(plain(TOKENS), model(TOKENS))
    # the clean stream also within the ablated one
    with model.ablated(), host.in_stream(model, "clean"):
        torch.testing.assert_close(model(TOKENS), streams.clean_logits)
    with host.in_stream(model, "ablated"):
        torch.testing.assert_close(model(TOKENS), streams.ablated_logits)
    with host.in_stream(model, "ablated", position=-1, masks=streams.masks):
        torch.testing.assert_close(model(TOKENS)[:, -1], streams.ablated_logits[:, -1])
    with pytest.raises(ValueError, match="needs gates, but this HookedTransformer has none"):
        host.in_stream(plain, "ablated")
    with pytest.raises(ValueError, match="stream='both'"):
        host.in_stream(model, "both")


@pytest.mark.parametrize("stream", ["clean", "ablated"])
def test_run_to_last_is_the_last_position(stream, model):
    with host.in_stream(model, stream, position=-1):
        torch.testing.assert_close(host.run_to_last(model, TOKENS), model(TOKENS)[:, -1])
        hook = ("blocks.1.hook_resid_pre", lambda x, hook: x + 0.3)
        edited = model.run_with_hooks(TOKENS, fwd_hooks=[hook])[:, -1]
        torch.testing.assert_close(host.run_to_last(model, TOKENS, [hook]), edited)
    assert model(TOKENS).shape == (2, 4, 20)


def test_names(model):
    assert host.gate_hook_names(model) == [
        f"blocks.{layer}.{gate}.hook_mask" for layer in (0, 1) for gate in ("attn_gate", "mlp_gate")
    ]
    assert host.gate_hook_names(model.to_hooked_transformer()) == []
    assert torch.equal(host.weight(model, "blocks.1.attn.W_O"), model.W_O[1])
    host.require_hooks(model, ["hook_embed"])
    with pytest.raises(ValueError, match="no hook point 'hook_embedding'"):
        host.require_hooks(model, ["hook_embed", "hook_embedding"])
    for bad in ("blocks.7.attn.W_O", "blocks.0.attn"):
        with pytest.raises(ValueError, match=bad):
            host.weight(model, bad)
