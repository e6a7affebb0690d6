"""The ablated stream against its definition: a plain transformer run token by token with masks put in by hooks."""

from __future__ import annotations

import oracle
import pytest
import torch
from small_models import SHAPES, gated_model, gates_for, plain_model, random_tokens
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from sa_lens.core import SelfAblatingTransformer

GATES = {
    "local": {"scope": "local"},
    "global": {"scope": "global"},
    "both": {"scope": "both"},
    "local-head": {"scope": "local", "attn_unit": "head"},
    "global-head": {"scope": "global", "attn_unit": "head"},
    "local-soft": {"scope": "local", "kind": "soft"},
    "both-soft-softmax": {"scope": "both", "kind": "soft", "surrogate": "softmax", "temperature": 0.5},
    "global-soft-head": {"scope": "global", "kind": "soft", "attn_unit": "head", "temperature": 2.0},
}

LAYER_EDITS = ["attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_attn_scores", "attn.hook_pattern", "attn.hook_z"]


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gates", GATES.values(), ids=GATES)
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_both_forms_equal_the_token_by_token_definition(shape, gates):
    # soft weights amplify rounding by 1 / (T D), so they are compared in float64
    plain = plain_model(shape, dtype=torch.float64 if gates.get("kind") == "soft" else torch.float32)
    model = SelfAblatingTransformer.from_hooked(plain, gates_for(shape, **gates), seed=3)
    tokens = random_tokens(length=5)
    expected = oracle.ablated_logits(plain, model, tokens)
    with model.ablated():
        assert_close(model(tokens), expected)
    for position in (0, 3, -1):
        with model.ablated(position=position):
            assert_close(model(tokens)[:, position], expected[:, position])
    with model.ablated(position=[1, 3]):
        assert_close(model(tokens)[[0, 1], [1, 3]], expected[[0, 1], [1, 3]])
    assert_close(model.run_streams(tokens).ablated_logits, expected)
    assert (expected - plain(tokens)).abs().max() > 0.05, "the gates must change something for this to test anything"


@pytest.mark.parametrize("shape", ["gpt2", "gpt-neo", "pythia", "llama", "alibi", "shortformer", "attention-only"])
@pytest.mark.parametrize("scope", ["local", "global"])
@torch.no_grad()
def test_left_padded_batches(shape, scope):
    plain = plain_model(shape)
    model = SelfAblatingTransformer.from_hooked(plain, gates_for(shape, scope), seed=3)
    tokens, attention_mask = random_tokens(3, 7), torch.ones(3, 7, dtype=torch.long)
    pads = [0, 2, 5]
    for row, pad in enumerate(pads):
        tokens[row, :pad], attention_mask[row, :pad] = 0, 0
    with model.ablated():
        everywhere = model(tokens, attention_mask=attention_mask)
    with model.ablated(position=-1):
        last = model(tokens, attention_mask=attention_mask)[:, -1]
    streams = model.run_streams(tokens, attention_mask=attention_mask)
    for row, pad in enumerate(pads):
        expected = oracle.ablated_logits(plain, model, tokens[row : row + 1, pad:])[0]
        assert_close(everywhere[row, pad:], expected)
        assert_close(streams.ablated_logits[row, pad:], expected)
        assert_close(last[row], expected[-1])


def noise(hook: HookPoint, shape: torch.Size) -> Tensor:
    """Noise [1, ...] that depends on the hook's name and on the last axes, whatever the number of positions."""
    generator = torch.Generator().manual_seed(sum(map(ord, hook.name)))
    return torch.randn(16, *shape, generator=generator)


def edit(x: Tensor, hook: HookPoint, t: int | None) -> Tensor:
    """A different change at every position; at position t alone if one is named.

    Scores and pattern ([batch, head, query, key]) change in the rows of their query.
    """
    length = x.shape[2] if "scores" in hook.name or "pattern" in hook.name else x.shape[1]
    rows = slice(0, length) if t is None else slice(t, t + 1)
    x = x.clone()
    if "scores" in hook.name or "pattern" in hook.name:
        change = noise(hook, torch.Size([x.shape[1], 16])).transpose(0, 1)[:, :length, : x.shape[-1]]
        if "scores" in hook.name:
            x[:, :, rows] = x[:, :, rows] * (1 + change[:, rows].abs()) + change[:, rows]
        else:
            x[:, :, rows] = x[:, :, rows] * change[:, rows].abs()
    else:
        x[:, rows] = x[:, rows] * 1.5 + noise(hook, x.shape[2:])[rows]
    return x


def edit_names(shape: str) -> list[str]:
    names = list(LAYER_EDITS)
    if shape in ("pythia", "llama"):
        names += ["attn.hook_rot_q", "attn.hook_rot_k"]
    if shape != "attention-only":
        names += ["mlp.hook_pre", "mlp.hook_post"]
    return [*names, "hook_resid_pre", "hook_attn_out"]


@pytest.mark.parametrize(
    ("shape", "name"), [(s, n) for s in ("gpt2", "gpt-neo", "pythia", "llama", "alibi") for n in edit_names(s)]
)
@torch.no_grad()
def test_user_edits_at_all_positions(shape, name):
    plain = plain_model(shape)
    model = SelfAblatingTransformer.from_hooked(plain, gates_for(shape, "local"), seed=3)
    tokens = random_tokens(length=5)
    names = [f"blocks.{layer}.{name}" for layer in range(2)]
    expected = oracle.ablated_logits(plain, model, tokens, [(n, edit) for n in names])
    with model.ablated():
        found = model.run_with_hooks(tokens, fwd_hooks=[(n, lambda x, hook: edit(x, hook, None)) for n in names])
        unedited = model(tokens)
    assert_close(found, expected)
    assert (unedited - expected).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("shape", "name"), [(s, n) for s in ("gpt2", "pythia", "llama", "attention-only") for n in edit_names(s)]
)
@torch.no_grad()
def test_user_edits_with_one_position(shape, name):
    """The position form is an ordinary pass: masks of the unedited clean pass at p, edits everywhere, all logits."""
    plain = plain_model(shape)
    model = SelfAblatingTransformer.from_hooked(plain, gates_for(shape, "both"), seed=3)
    tokens, p = random_tokens(), 4
    edits = [(f"blocks.{layer}.{name}", lambda x, hook: edit(x, hook, None)) for layer in range(2)]
    masking = oracle.masking_hooks(oracle.slow_masks(plain, model, tokens), p)
    expected = plain.run_with_hooks(tokens, fwd_hooks=[*masking, *edits])
    with model.ablated(position=p):
        assert_close(model.run_with_hooks(tokens, fwd_hooks=edits), expected)
    live = oracle.masking_hooks(live_masks(plain, model, tokens, edits), p)
    with model.ablated(position=p, masks="live"):
        assert_close(
            model.run_with_hooks(tokens, fwd_hooks=edits), plain.run_with_hooks(tokens, fwd_hooks=[*live, *edits])
        )


def live_masks(plain, model, tokens, edits):
    """Masks of a clean pass in which the edits act."""
    with plain.hooks(fwd_hooks=edits):
        return oracle.slow_masks(plain, model, tokens)


@torch.no_grad()
def test_the_user_sees_masked_values_and_may_undo_the_mask():
    model, tokens = gated_model(), random_tokens()
    seen = {}

    def undo(x, hook):
        seen["z"] = x.clone()
        return seen["in"]

    hooks = [
        ("blocks.0.attn_gate.hook_in", lambda x, hook: seen.__setitem__("in", x)),
        ("blocks.0.attn_gate.hook_mask", lambda x, hook: seen.__setitem__("mask", x)),
        ("blocks.0.attn.hook_z", undo),
    ]
    with model.ablated():
        _, cache = model.run_with_cache(tokens)
        model.run_with_hooks(tokens, fwd_hooks=hooks)
        undone = model.run_with_hooks(tokens, fwd_hooks=hooks, stop_at_layer=1)
    assert torch.equal(seen["z"], seen["in"] * seen["mask"])
    assert torch.equal(cache["z", 0], seen["z"])
    assert not torch.equal(undone, cache["resid_post", 0])


@pytest.mark.parametrize(
    ("shape", "flags"),
    [
        *(("gpt2", flag) for flag in ("attn_result", "split_qkv_input", "attn_in", "hook_mlp_in")),
        *(("llama", flag) for flag in ("attn_result", "split_qkv_input", "hook_mlp_in")),
    ],
)
@torch.no_grad()
def test_switches_of_transformer_lens_leave_the_ablated_stream_as_it_is(shape, flags):
    plain = plain_model(shape)
    model = SelfAblatingTransformer.from_hooked(plain, gates_for(shape, "both"), seed=3)
    tokens = random_tokens()
    expected = oracle.ablated_logits(plain, model, tokens)
    getattr(model, f"set_use_{flags}")(True)
    with model.ablated():
        assert_close(model(tokens), expected)


@torch.no_grad()
def test_grouped_heads_may_be_ungrouped():
    plain = plain_model("llama")
    model = SelfAblatingTransformer.from_hooked(plain, gates_for("llama"), seed=3)
    tokens = random_tokens()
    expected = oracle.ablated_logits(plain, model, tokens)
    model.set_ungroup_grouped_query_attention(True)
    model.set_use_split_qkv_input(True)
    with model.ablated():
        assert_close(model(tokens), expected)
