"""TransformerLens's tools that go by a hook's name: caches with every argument at every hook point, those of gates too,
and activation patching on both streams, against a loop of ordinary hooks on a plain transformer."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from small_models import gated_model, gates_for, plain_model, random_tokens
from transformer_lens import ActivationCache, SVDInterpreter, patching
from transformer_lens.head_detector import detect_head
from transformer_lens.utilities import composition_scores

from sa_lens.core import SelfAblatingTransformer
from sa_lens.core.base import TRANSFORMER_LENS

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
    model = SelfAblatingTransformer.from_hooked(plain, gates_for("gpt2", scope), seed=3).eval()
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


# ---------------------------------------------------------------------------------------------------------- caches

BATCH, POSITIONS = 2, 7
TOKENS = random_tokens(BATCH, POSITIONS)
"""No other axis of the small models is 7 long, so that the axis of positions is known by its length."""

GATED = [
    (scope, unit, stream)
    for scope in ("local", "both")
    for unit in ("channel", "head")
    for stream in ("ablated", "at the end")
]


def in_stream(model, stream):
    return model.ablated() if stream == "ablated" else model.ablated(position=-1)


def everything(model, tokens=TOKENS, **options):
    with torch.no_grad():
        return model.run_with_cache(tokens, return_cache_object=False, **options)[1]


@pytest.mark.parametrize("positions", [-1, 2, (1, 4), [0, 3, 5], np.array([6, 0]), slice(1, 6, 2)])
@pytest.mark.parametrize(("scope", "unit", "stream"), GATED)
def test_positions_are_cut_at_every_hook_point(scope, unit, stream, positions):
    model = gated_model(scope=scope, attn_unit=unit)
    # TransformerLens keeps the axis of a single position
    chosen = {int: lambda: [positions], tuple: lambda: slice(*positions)}.get(type(positions), lambda: positions)()
    with in_stream(model, stream):
        whole, cut = everything(model), everything(model, pos_slice=positions)
    assert list(cut) == list(whole)
    assert sum("_gate." in name for name in whole) == 2 * 2 * 3
    for name, value in whole.items():
        axis = value.shape.index(POSITIONS)
        assert torch.equal(cut[name], value[(slice(None),) * axis + (chosen,)]), name


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("shape", ["gpt2", "pythia", "llama"])
def test_positions_are_cut_at_hooks_that_transformer_lens_does_not_know_either(shape, split):
    """Rotated queries and keys, and inputs split by head."""
    model = gated_model(shape)
    model.set_use_split_qkv_input(split)
    model.set_use_attn_result(True)
    whole, cut = everything(model), everything(model, pos_slice=(2, 5))
    for name, value in whole.items():
        axis = value.shape.index(POSITIONS)
        assert torch.equal(cut[name], value[(slice(None),) * axis + (slice(2, 5),)]), name


def test_positions_and_batch_axis_together():
    model = gated_model()
    with model.ablated():
        whole = everything(model, TOKENS[:1])
        cut = everything(model, TOKENS[:1], pos_slice=-1, remove_batch_dim=True)
        one = everything(model, TOKENS[:1], remove_batch_dim=True)
    for name, value in whole.items():
        axis = value.shape.index(POSITIONS)
        assert torch.equal(one[name], value[0]), name
        assert torch.equal(cut[name], value[0].narrow(axis - 1, POSITIONS - 1, 1)), name


def test_other_arguments_of_caching():
    model = gated_model()
    name = "blocks.1.attn_gate.hook_scores"
    with model.ablated():
        whole = everything(model)
        for names in (name, [name], lambda n: n == name):
            assert list(everything(model, names_filter=names)) == [name]
            assert torch.equal(everything(model, names_filter=names)[name], whole[name])
        assert {value.device.type for value in everything(model, device="meta").values()} == {"meta"}
        added = model.add_caching_hooks(lambda n: "_gate." in n)
        with torch.no_grad():
            model(TOKENS)
        model.reset_hooks()
        assert all(torch.equal(added[n], whole[n]) for n in whole if "_gate." in n)
        model.blocks[0].mlp_gate.hook_mask.ctx["kept"] = 1
        everything(model, clear_contexts=True)
        assert not model.blocks[0].mlp_gate.hook_mask.ctx
        kept = everything(model, reset_hooks_end=False, names_filter=name)
        with torch.no_grad():
            model(TOKENS.flip(1))
        assert not torch.equal(kept[name], whole[name])
        model.reset_hooks()
    assert not model.list_hooks()
    assert list(everything(model, names_filter=name)) == []


@pytest.mark.filterwarnings("ignore:the loss in ablated")
@pytest.mark.parametrize(("scope", "unit", "stream"), GATED)
def test_gradients_in_the_cache_are_those_of_autograd(scope, unit, stream):
    model = gated_model(scope=scope, attn_unit=unit)
    values = {}
    names = [n for n in model.hook_dict if "_gate." in n or n.endswith(("hook_z", "hook_post", "hook_resid_mid"))]
    with in_stream(model, stream):
        _, cache = model.run_with_cache(TOKENS, return_type="loss", incl_bwd=True, return_cache_object=False)
        loss = model.run_with_hooks(
            TOKENS,
            return_type="loss",
            fwd_hooks=[(lambda n: n in names, lambda x, hook: values.update({hook.name: x}))],
        )
    wanted = torch.autograd.grad(loss, [values[name] for name in names])
    for name, gradient in zip(names, wanted, strict=True):
        torch.testing.assert_close(cache[f"{name}_grad"], gradient, msg=name)


@pytest.mark.parametrize("unit", ["channel", "head"])
@pytest.mark.parametrize("stream", ["ablated", "at the end"])
def test_activation_caches_of_an_ablated_pass(unit, stream):
    model = gated_model(attn_unit=unit)
    with in_stream(model, stream), torch.no_grad():
        _, cache = model.run_with_cache(TOKENS)
        _, cut = model.run_with_cache(TOKENS, pos_slice=(2, 5))
    assert isinstance(cache, ActivationCache)
    for layer in (0, -1):
        for gate in ("attn_gate", "mlp_gate"):
            for what in ("in", "scores", "mask"):
                wanted = cache[f"blocks.{layer % 2}.{gate}.hook_{what}"]
                assert torch.equal(cache[what, layer, gate], wanted)
                assert torch.equal(cache.stack_activation(what, sublayer_type=gate)[layer], wanted)
                assert torch.equal(cut[what, layer, gate], wanted[:, 2:5])
                assert torch.equal(cache.apply_slice_to_batch_dim(1)[what, layer, gate], wanted[1])
    final = cache["resid_post", -1]
    parts = {
        "decompose_resid": cache.decompose_resid(),
        "get_full_resid_decomposition": cache.get_full_resid_decomposition(),
        "stack_head_results": cache.stack_head_results(incl_remainder=True),
        "stack_neuron_results": cache.stack_neuron_results(-1, incl_remainder=True),
    }
    for name, stack in parts.items():
        torch.testing.assert_close(stack.sum(0), final, rtol=1e-5, atol=1e-5, msg=name)
    cut_parts = cut.stack_head_results(), cut.stack_neuron_results(-1), cut.decompose_resid()
    for stack, name in zip(cut_parts, ("stack_head_results", "stack_neuron_results", "decompose_resid"), strict=True):
        whole = parts[name][: len(stack), :, 2:5]
        torch.testing.assert_close(stack, whole, rtol=1e-5, atol=1e-5, msg=name)
    torch.testing.assert_close(
        cache.accumulated_resid(apply_ln=True)[-1] @ model.W_U + model.b_U, model_logits(model, stream)
    )
    with in_stream(model, stream), torch.no_grad():
        _, one = model.run_with_cache(TOKENS[:1])
    mask = one["mask", 1, "attn_gate"]
    assert torch.equal(one.remove_batch_dim()["mask", 1, "attn_gate"], mask[0])
    assert {value.device.type for value in one.to("meta").values()} == {"meta"}


@torch.no_grad()
def model_logits(model, stream):
    with in_stream(model, stream):
        return model(TOKENS)


def test_detected_heads_are_those_of_the_stream(tokenizer):
    """Scores by hand: the share of attention on the previous token, in the ablated pass."""
    model = gated_model()
    model.set_tokenizer(tokenizer)
    text = "w1 w5 w2 w9 w3"
    with model.ablated():
        found = detect_head(model, text, "previous_token_head", error_measure="mul", exclude_bos=False)
        with torch.no_grad():
            _, cache = model.run_with_cache(model.to_tokens(text), remove_batch_dim=True)
    for layer in range(2):
        pattern = cache["pattern", layer]
        share = pattern.diagonal(-1, dim1=-2, dim2=-1).sum(-1) / pattern.sum((-1, -2))
        torch.testing.assert_close(found[layer], share, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------ tools that read a model


@pytest.mark.parametrize("stream", ["clean", "ablated", "ablated at the last position"])
@torch.no_grad()
def test_the_parts_of_the_residual_stream_add_up(stream):
    model = gated_model().eval()
    position = -1 if "last" in stream else None
    with model.clean() if stream == "clean" else model.ablated(position=position):
        _, cache = model.run_with_cache(random_tokens(2, LENGTH))
    final = cache["resid_post", -1]
    torch.testing.assert_close(cache.decompose_resid().sum(0), final, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(cache.stack_head_results(incl_remainder=True).sum(0), final, rtol=1e-4, atol=1e-5)
    neurons = cache.stack_neuron_results(layer=1, pos_slice=-1, incl_remainder=True)
    torch.testing.assert_close(neurons.sum(0), cache["resid_pre", 1][:, -1], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_singular_vectors_of_a_head_are_read_in_the_vocabulary():
    model = gated_model()
    readings = SVDInterpreter(model).get_singular_vectors("OV", 0, num_vectors=2, head_index=1)
    assert readings.shape == (model.cfg.d_vocab, 1, 2)
    _, _, right = torch.linalg.svd(model.W_V[0, 1] @ model.W_O[0, 1])
    expected = (right[:2] @ model.W_U).T
    torch.testing.assert_close(readings[:, 0].abs(), expected.abs(), rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_the_composition_scores_are_those_of_the_weights():
    model = gated_model()
    QK, OV = model.W_Q @ model.W_K.transpose(-2, -1), model.W_V @ model.W_O
    scores = composition_scores(model.OV, model.QK, broadcast_dims=True)
    reader, writer = QK[1, 2], OV[0, 3]
    expected = (writer @ reader).norm() / (writer.norm() * reader.norm())
    torch.testing.assert_close(scores[0, 3, 1, 2], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(TRANSFORMER_LENS < 4, reason="TransformerLens 3 has no logit_lens")
@torch.no_grad()
def test_logit_lens():
    from transformer_lens.tools.analysis import logit_lens

    model, tokens = gated_model().eval(), random_tokens(2, LENGTH)
    for context in (model.clean(), model.ablated(), model.ablated(position=-1)):
        with context:
            logits = model(tokens)[:, -1]
            lens = logit_lens(model, tokens).values
        torch.testing.assert_close(lens[-1], logits, rtol=1e-4, atol=1e-4)
