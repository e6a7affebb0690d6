"""A model traced by nnsight gives and edits the values of the chosen stream, not those of the preceding clean pass."""

from __future__ import annotations

import pytest
import torch
from small_models import gated_model, random_tokens
from torch import nn

nnsight = pytest.importorskip("nnsight", reason="nnsight is not installed (extra nnsight)")

pytestmark = pytest.mark.skipif(
    nnsight.__version__.split(".")[:2] != ["0", "8"], reason="the extra nnsight asks for version 0.8"
)

STREAMS = ["clean", "all", "one", "given"]


def enter(model, stream, tokens):
    """A context in which the model runs the stream."""
    if stream == "given":
        return model.ablated(position=-1, masks=model.run_streams(tokens).masks)
    return {"clean": model.clean, "all": model.ablated, "one": lambda: model.ablated(position=-1)}[stream]()


@torch.no_grad()
@pytest.mark.parametrize("scope", ["local", "both"])
@pytest.mark.parametrize("stream", STREAMS)
def test_values_of_modules_and_hook_points_are_those_of_the_stream(stream, scope):
    model, tokens = gated_model(scope=scope), random_tokens()
    traced = nnsight.NNsight(model)
    with enter(model, stream, tokens):
        logits, cache = model.run_with_cache(tokens)
        with traced.trace(tokens):
            embed = traced.embed.output.save()
            resid = traced.blocks[1].hook_resid_pre.output.save()
            z = traced.blocks[1].attn.hook_z.output.save()
            attn = traced.blocks[1].attn.output.save()
            post = traced.blocks[1].mlp.hook_post.output.save()
            mlp = traced.blocks[1].mlp.output.save()
            block = traced.blocks[1].output.save()
            final = traced.ln_final.output.save()
            unembed = traced.unembed.output.save()
            output = traced.output.save()
    read = {
        "hook_embed": embed,
        "blocks.1.hook_resid_pre": resid,
        "blocks.1.attn.hook_z": z,
        "blocks.1.hook_attn_out": attn,
        "blocks.1.mlp.hook_post": post,
        "blocks.1.hook_mlp_out": mlp,
        "blocks.1.hook_resid_post": block,
    }
    for name, value in read.items():
        assert torch.equal(value, cache[name]), name
    torch.testing.assert_close(final, model.ln_final(cache["resid_post", 1]))
    assert torch.equal(unembed, logits)
    assert torch.equal(output, logits)


@torch.no_grad()
@pytest.mark.parametrize("stream", STREAMS)
def test_edits_act_as_those_of_hooks(stream):
    model, tokens = gated_model(), random_tokens()
    traced = nnsight.NNsight(model)

    def drop(x, hook):
        x = x.clone()
        x[:, :, 1] = 0
        return x

    with enter(model, stream, tokens):
        plain = model(tokens)
        for name in ("attn", "mlp"):
            with traced.trace(tokens):
                getattr(traced.blocks[0], name).output[:, :, 1] = 0
                output = traced.output.save()
            expected = model.run_with_hooks(tokens, fwd_hooks=[(f"blocks.0.hook_{name}_out", drop)])
            assert torch.equal(output, expected)
            assert not torch.equal(output, plain)
        with traced.trace(tokens):
            traced.blocks[0].attn.hook_z.output[:, :, 1] = 0
            output = traced.output.save()
        assert torch.equal(output, model.run_with_hooks(tokens, fwd_hooks=[("blocks.0.attn.hook_z", drop)]))
        assert torch.equal(model(tokens), plain)


@torch.no_grad()
@pytest.mark.parametrize("point", ["hook_scores", "hook_mask"])
def test_gates_can_be_read_and_edited(point):
    model, tokens = gated_model(), random_tokens()
    traced = nnsight.NNsight(model)
    with model.ablated():
        _, cache = model.run_with_cache(tokens)
        with traced.trace(tokens):
            value = getattr(traced.blocks[0].mlp_gate, point).output.save()
        assert torch.equal(value, cache[f"blocks.0.mlp_gate.{point}"])
        with traced.trace(tokens):
            getattr(traced.blocks[0].mlp_gate, point).output = -value
            output = traced.output.save()
        edited = model.run_with_hooks(tokens, fwd_hooks=[(f"blocks.0.mlp_gate.{point}", lambda x, hook: -x)])
    assert torch.equal(output, edited)


def test_gradients_are_those_of_the_ablated_pass():
    model, tokens = gated_model(), random_tokens()
    traced = nnsight.NNsight(model)
    grads = []
    with model.ablated():
        model.run_with_hooks(
            tokens,
            fwd_hooks=[("blocks.1.hook_resid_post", lambda x, hook: x.register_hook(grads.append) and None)],
        ).logsumexp(-1).sum().backward()
        with traced.trace(tokens):
            block = traced.blocks[1].output.save()
            block.retain_grad()
            total = traced.output.logsumexp(-1).sum().save()
    total.backward()
    torch.testing.assert_close(block.grad, grads[0])


@torch.no_grad()
def test_both_streams_in_one_call_are_traced_in_the_ablated_pass():
    class Both(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, tokens):
            return self.model.run_streams(tokens).ablated_logits

    model, tokens = gated_model(scope="both"), random_tokens()
    traced = nnsight.NNsight(Both(model))
    with traced.trace(tokens):
        block = traced.model.blocks[1].output.save()
        final = traced.model.ln_final.output.save()
        unembed = traced.model.unembed.output.save()
    with model.ablated():
        logits, cache = model.run_with_cache(tokens)
    torch.testing.assert_close(block, cache["resid_post", 1])
    torch.testing.assert_close(final, model.ln_final(cache["resid_post", 1]))
    torch.testing.assert_close(unembed, logits)


@torch.no_grad()
def test_live_masks_are_refused_in_a_trace_and_nothing_is_left_behind():
    model, tokens = gated_model(), random_tokens()
    traced = nnsight.NNsight(model)
    with model.ablated(position=-1, masks="live"):
        logits = model(tokens)
        with pytest.raises(ValueError, match="masks='live' runs your edits in two passes"), traced.trace(tokens):
            traced.blocks[1].output.save()
        assert torch.equal(model(tokens), logits)
    with model.ablated():
        with pytest.raises(IndexError), traced.trace(tokens):
            traced.blocks[0].output[:, 99].save()
        _, cache = model.run_with_cache(tokens)
        with traced.trace(tokens):
            block = traced.blocks[1].output.save()
    assert torch.equal(block, cache["resid_post", 1])


def test_a_version_that_records_its_traces_otherwise_is_refused():
    model, tokens = gated_model(), random_tokens()
    model.__dict__["__nnsight__"] = object()
    model(tokens)
    with pytest.raises(ValueError, match="install nnsight"), model.ablated():
        model(tokens)
