"""Our decoder against TransformerLens's HookedTransformer with the same weights, hook by hook."""

from __future__ import annotations

import copy
import dataclasses
import typing
import warnings

import pytest
import torch

pytest.importorskip("transformer_lens.HookedTransformer", reason="TransformerLens 4 has no HookedTransformer")
from both_decoders import (
    ARCHITECTURES,
    TOKENS,
    TransformerLensConfig,
    TransformerLensModel,
    assert_near,
    dictionary,
    set_flags,
    twins,
)
from small_models import BASE, random_tokens
from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

from sa_lens.core.decoder import HookedTransformer, HookedTransformerConfig

EDITED = (
    *("attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_rot_q", "attn.hook_rot_k", "attn.hook_attn_scores"),
    *("attn.hook_pattern", "attn.hook_z", "attn.hook_result", "hook_resid_pre", "hook_resid_mid", "hook_resid_post"),
    *("hook_attn_in", "hook_q_input", "hook_k_input", "hook_v_input", "hook_mlp_in", "hook_attn_out", "hook_mlp_out"),
    *("mlp.hook_pre", "mlp.hook_pre_linear", "mlp.hook_mid", "mlp.hook_post", "ln1.hook_scale", "ln2.hook_normalized"),
)

every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


def record(model, **options):
    """Every hook point that fires with its value, in order, and the output."""
    fired = []
    out = model.run_with_hooks(
        TOKENS, fwd_hooks=[(lambda name: True, lambda x, hook: fired.append((hook.name, x.clone())))], **options
    )
    return fired, out


@every_architecture
def test_state_dicts_have_the_same_keys_in_the_same_order(name):
    theirs, ours = twins(name)
    described = [(key, value.shape, value.dtype) for key, value in theirs.state_dict().items()]
    assert [(key, value.shape, value.dtype) for key, value in ours.state_dict().items()] == described
    assert [key for key, _ in ours.named_parameters()] == [key for key, _ in theirs.named_parameters()]
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert list(ours.hook_dict) == list(theirs.hook_dict)


@pytest.mark.parametrize("mode", ["gpt2", "xavier_uniform", "xavier_normal", "kaiming_uniform", "kaiming_normal"])
def test_initial_weights_are_those_of_the_seed(mode):
    for name in ("gpt2", "llama", "solu-ln") if mode == "gpt2" else ("gpt2",):
        fields = {**BASE, **ARCHITECTURES[name], "init_mode": mode, "seed": 3}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            theirs = TransformerLensModel(TransformerLensConfig(**fields))
        before = torch.random.get_rng_state()
        ours = HookedTransformer(fields)
        assert torch.equal(torch.random.get_rng_state(), before)
        for key, value in theirs.state_dict().items():
            assert torch.equal(ours.state_dict()[key], value), key


@pytest.mark.parametrize(("dtype", "all_points"), [(torch.float32, False), (torch.float64, True)], ids=str)
@every_architecture
def test_hook_points_fire_in_the_same_order_with_the_same_values(name, dtype, all_points):
    theirs, ours = twins(name, dtype)
    if all_points:
        set_flags(theirs)
        set_flags(ours)
    with torch.no_grad():
        (expected, their_logits), (fired, logits) = record(theirs), record(ours)
    assert [hook for hook, _ in fired] == [hook for hook, _ in expected]
    for (hook, value), (_, wanted) in zip(fired, expected, strict=True):
        assert_near(value, wanted, hook)
    assert_near(logits, their_logits)


@every_architecture
def test_gradients_of_every_parameter_and_activation(name):
    theirs, ours = twins(name)
    caches = []
    for model in (theirs, ours):
        set_flags(model)
        caches.append(model.run_with_cache(TOKENS % 7, return_type="loss", incl_bwd=True, return_cache_object=False)[1])
    assert list(caches[1]) == list(caches[0])
    for key, value in caches[0].items():
        assert_near(caches[1][key], value, key)
    for (key, expected), (_, parameter) in zip(theirs.named_parameters(), ours.named_parameters(), strict=True):
        assert (expected.grad is None) == (parameter.grad is None), key
        if expected.grad is not None:
            assert_near(parameter.grad, expected.grad, key)


@torch.no_grad()
@every_architecture
def test_edits_at_every_hook_point_have_the_same_effect(name):
    models = twins(name)
    for model in models:
        set_flags(model)
    unedited = models[1](TOKENS)

    def edit(x, hook):
        """Another factor for each head or channel."""
        return x * torch.linspace(0.5, 1.5, x.shape[2]).view(1, 1, -1, *[1] * (x.ndim - 3))

    edits = 0
    for point in EDITED:
        hook_name = f"blocks.1.{point}"
        if hook_name not in models[0].hook_dict:
            continue
        for model in models:
            model.set_use_split_qkv_input(point in ("hook_q_input", "hook_k_input", "hook_v_input"))
        theirs, ours = (model.run_with_hooks(TOKENS, fwd_hooks=[(hook_name, edit)]) for model in models)
        assert_near(ours, theirs, point)
        edits += not torch.allclose(ours, unedited)
    assert edits >= 10


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2", "llama", "shortformer", "no-norm"])
def test_edits_in_place_have_the_same_effect_and_leave_the_weights_alone(name):
    models = twins(name)
    before = copy.deepcopy(models[1].state_dict())

    def edit(x, hook):
        x[:, 1] *= 0.5

    for point in models[0].hook_dict:
        if point.endswith(("_input", "_in", "hook_result")) and "unembed" not in point:
            continue
        theirs, ours = (model.run_with_hooks(TOKENS, fwd_hooks=[(point, edit)]) for model in models)
        assert_near(ours, theirs, point)
    for key, value in models[1].state_dict().items():
        assert torch.equal(value, before[key]), key


@torch.no_grad()
def test_a_row_without_any_key_attends_to_nothing():
    models = twins()
    hidden = [
        ("blocks.0.attn.hook_attn_scores", lambda x, hook: x.masked_fill(torch.arange(7)[:, None] == 3, -torch.inf))
    ]
    theirs, ours = (model.run_with_hooks(TOKENS, fwd_hooks=hidden) for model in models)
    assert ours.isfinite().all()
    assert_near(ours, theirs)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@every_architecture
def test_padded_batches(name, side, tokenizer):
    models = twins(name)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    mask = mask if side == "left" else mask.flip(1)
    theirs, ours = (model.run_with_cache(TOKENS, attention_mask=mask)[1] for model in models)
    for key, value in theirs.items():
        assert_near(ours[key], value, key)
    for model in models:
        model.set_tokenizer(tokenizer, default_padding_side=side)
    texts = ["w1 w2", "w3 w1 w2 w4"]
    for options in ({}, {"prepend_bos": False}, {"padding_side": "left"}):
        theirs, ours = (model(texts, **options) for model in models)
        assert_near(ours, theirs)
    if models[0].cfg.d_vocab_out == models[0].cfg.d_vocab:
        for per_token in (False, True):
            theirs, ours = (model(texts, return_type="loss", loss_per_token=per_token) for model in models)
            assert_near(ours, theirs)


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "ungrouped"])
def test_cached_keys_and_values(name, tokenizer):
    models = twins(name)
    caches = []
    for model in models:
        model.set_tokenizer(tokenizer)
        caches.append(TransformerLensKeyValueCache.init_cache(model.cfg, "cpu", 2))
    tokens, mask = TOKENS.clone(), torch.ones_like(TOKENS)
    mask[0, :2] = 0
    for chunk in (slice(0, 3), slice(3, 4), slice(4, 7)):
        outs = [
            model(tokens[:, chunk], attention_mask=mask[:, chunk], past_kv_cache=cache)
            for model, cache in zip(models, caches, strict=True)
        ]
        assert_near(outs[1], outs[0])
        for theirs, ours in zip(*caches, strict=True):
            assert_near(ours.past_keys, theirs.past_keys)
            assert_near(ours.past_values, theirs.past_values)
        assert torch.equal(caches[1].previous_attention_mask, caches[0].previous_attention_mask)
    assert_near(outs[1], models[1](tokens, attention_mask=mask)[:, 4:])
    for cache in caches:
        cache.freeze()
    for more in ("w1 w2", "w3"):
        outs = [
            model(more, prepend_bos=False, past_kv_cache=_first(cache))
            for model, cache in zip(models, caches, strict=True)
        ]
        assert_near(outs[1], outs[0])


def _first(cache):
    """The cache of the first prompt."""
    entries = [type(entry)(entry.past_keys[:1], entry.past_values[:1], entry.frozen) for entry in cache]
    return type(cache)(entries, cache.previous_attention_mask[:1], cache.frozen)


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2", "llama", "bloom", "tokens hooked"])
def test_parts_of_the_pass_and_kinds_of_output(name):
    models = twins(name)
    for options in (
        {"return_type": "loss"},
        {"return_type": "loss", "loss_per_token": True},
        {"stop_at_layer": 0},
        {"stop_at_layer": -1},
        {"return_type": "both", "attention_mask": (TOKENS > 5).long()},
    ):
        theirs, ours = (model(TOKENS, **options) for model in models)
        assert type(ours).__name__ == type(theirs).__name__
        for value, wanted in zip(*((out if isinstance(out, tuple) else (out,)) for out in (ours, theirs)), strict=True):
            assert_near(value, wanted, str(options))
    assert models[1](TOKENS, return_type=None) is None
    theirs, ours = (model.input_to_embed(TOKENS[0]) for model in models)
    assert_near(ours[0], theirs[0])
    for start in (0, 1, -1):
        options = {"start_at_layer": start, "shortformer_pos_embed": theirs[2], "tokens": TOKENS[:1]}
        for kind in ("logits", "loss"):
            wanted, value = (model(theirs[0], return_type=kind, **options) for model in models)
            assert_near(value, wanted)
        wanted, value = (model(theirs[0], stop_at_layer=2, **options) for model in models)
        assert_near(value, wanted)


SAMPLING = {
    "greedy": {"do_sample": False},
    "drawn": {},
    "top k": {"top_k": 3, "temperature": 0.7},
    "top p": {"top_p": 0.8, "freq_penalty": 0.5},
    "without a cache": {"use_past_kv_cache": False},
}


@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize("name", ["gpt2", "gpt-neo", "gpt-j", "qwen2", "bloom", "shortformer"])
def test_generation(name, sampling, tokenizer):
    models = twins(name)
    options = {"max_new_tokens": 5, "verbose": False, **SAMPLING[sampling]}

    def both(input, stop_at_eos, **more):
        outs = []
        for model in models:
            torch.manual_seed(1)
            outs.append(model.generate(input, stop_at_eos=stop_at_eos, **options, **more))
        return outs

    for model in models:
        model.set_tokenizer(tokenizer)
    for input in ("w1 w2", ["w1 w2", "w3 w4 w5"], TOKENS):
        theirs, ours = both(input, True, return_type="tokens")
        assert torch.equal(ours, theirs)
        theirs, ours = both(input, True, eos_token_id=[5, 6, 7, 8, 9], return_type="str")
        assert ours == theirs
    theirs, ours = both(TOKENS, False, output_logits=True)
    assert_near(torch.stack(ours.logits), torch.stack(theirs.logits))
    pieces = []
    for model in models:
        torch.manual_seed(1)
        pieces.append(list(model.generate_stream("w1 w2", stop_at_eos=False, max_tokens_per_yield=2, **options)))
    # TransformerLens does not look back at padding that it has generated itself, when it streams
    assert torch.equal(torch.cat(pieces[1], dim=1), both("w1 w2", False, return_type="tokens")[1])
    assert [piece.shape for piece in pieces[1]] == [piece.shape for piece in pieces[0]]


PROCESSING = {
    "all": {},
    "no folded norms": {"fold_ln": False},
    "folded norms": {"center_writing_weights": False, "center_unembed": False, "fold_value_biases": False},
    "centred logits": {"fold_ln": False, "center_writing_weights": False, "fold_value_biases": False},
}
PROCESSED = ["gpt2", "gpt-neo", "pythia", "opt", "bloom", "llama", "solu-ln", "final RMSNorm", "no-norm"]


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, options) for name in PROCESSED for options in PROCESSING.values()),
        # TransformerLens does not refactor models with rotary positions
        *((name, {"refactor_factored_attn_matrices": True}) for name in ("gpt2", "opt")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_weight_processing(name, options):
    # TransformerLens processes in float32
    models = twins(name, torch.float32)
    for model in models:
        model.load_and_process_state_dict(model.state_dict(), **options)
    theirs, ours = (model.state_dict() for model in models)
    assert list(ours) == list(theirs)
    for key, value in theirs.items():
        assert torch.equal(ours[key], value), key
    assert list(models[1].hook_dict) == list(models[0].hook_dict)
    assert models[1].cfg.normalization_type == models[0].cfg.normalization_type
    assert_near(models[1](TOKENS), models[0](TOKENS))


@torch.no_grad()
@every_architecture
def test_weights_of_all_layers(name):
    theirs, ours = twins(name)
    names = ["W_E", "W_U", "b_U", "W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O"]
    if not theirs.cfg.attn_only:
        names += ["W_in", "W_out", "b_in", "b_out"]
    if theirs.cfg.gated_mlp:
        names += ["W_gate"]
    if theirs.cfg.positional_embedding_type != "rotary":
        names += ["W_pos", "W_E_pos"]
    for weight in names:
        assert torch.equal(getattr(ours, weight), getattr(theirs, weight)), weight
    for product in ("QK", "OV"):
        assert_near(getattr(ours, product).AB, getattr(theirs, product).AB)
        assert_near(getattr(ours.blocks[0].attn, product).AB, getattr(theirs.blocks[0].attn, product).AB)
    for layer, options in (
        (0, {}),
        (2, {"include_mlp_biases": False}),
        (1, {"mlp_input": True, "include_mlp_biases": False}),
    ):
        expected = theirs.double().accumulated_bias(layer, **options).double()
        torch.testing.assert_close(ours.accumulated_bias(layer, **options), expected, rtol=1e-6, atol=1e-6)
    assert ours.all_head_labels() == theirs.all_head_labels()
    assert ours.tokens_to_residual_directions(TOKENS % 7).shape == (2, 7, 16)
    for tokens in (TOKENS[0] % 7, 3, torch.tensor(4), torch.tensor([5])):
        assert torch.equal(ours.tokens_to_residual_directions(tokens), theirs.tokens_to_residual_directions(tokens))


@pytest.mark.parametrize("side", ["left", "right"])
def test_text(side, tokenizer):
    models = twins()
    for model in models:
        model.set_tokenizer(tokenizer, default_padding_side=side)
    text, texts = "w1 w2 w9", ["w1", "w3 w2 w1"]

    def same(call):
        theirs, ours = call(models[0]), call(models[1])
        assert type(ours) is type(theirs)
        assert torch.equal(ours, theirs) if isinstance(theirs, torch.Tensor) else ours == theirs

    for options in (
        {},
        {"prepend_bos": False},
        {"prepend_bos": True, "padding_side": "left"},
        {"padding_side": "right"},
    ):
        for input in (text, texts, "w1 " * 30):
            same(lambda model, i=input, o=options: model.to_tokens(i, **o))
            same(lambda model, i=input, o=options: model.to_str_tokens(i, **o))
    same(lambda model: model.to_tokens("w1 " * 30, truncate=False))
    for tokens in (TOKENS, TOKENS[0], TOKENS[0].tolist(), TOKENS.numpy()):
        same(lambda model, t=tokens: model.to_string(t))
    for tokens in (TOKENS[0], TOKENS[:1], TOKENS[0, 0], TOKENS[0].numpy(), [TOKENS[0], TOKENS[1]]):
        same(lambda model, t=tokens: model.to_str_tokens(t))
    same(lambda model: model.to_single_token("w4"))
    same(lambda model: model.to_single_str_token(7))
    same(lambda model: model.tokens_to_residual_directions("w4"))
    same(lambda model: model.tokenizer.padding_side)
    same(lambda model: model.cfg.tokenizer_prepends_bos)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["gpt2", "llama", "bloom"])
@torch.no_grad()
def test_half_precision(name, dtype):
    theirs, ours = twins(name, dtype)
    values, wanted = ours.run_with_cache(TOKENS), theirs.run_with_cache(TOKENS)
    assert {key: value.dtype for key, value in values[1].items()} == {
        key: value.dtype for key, value in wanted[1].items()
    }
    torch.testing.assert_close(values[0], wanted[0], rtol=0.05, atol=0.2)


def test_longer_inputs_extend_rotary_tables(monkeypatch):
    for module in (
        "sa_lens.core.decoder.attention.ROTARY_ROWS",
        "transformer_lens.components.AbstractAttention.ROTARY_INITIAL_CACHE_SIZE",
    ):
        monkeypatch.setattr(module, 4)
    theirs, ours = twins("pythia", n_ctx=32)
    for length in (3, 7, 20, 32):
        tokens = random_tokens(1, length)
        with torch.no_grad():
            assert_near(ours(tokens), theirs(tokens))
    fresh, _ = twins("pythia", n_ctx=32)
    fresh.load_state_dict(ours.state_dict())
    twins("pythia", n_ctx=32)[1].load_state_dict(theirs.state_dict())


def test_configurations_have_the_same_fields_defaults_and_derived_values():
    fields = {field.name: field.default for field in dataclasses.fields(HookedTransformerConfig)}
    theirs = {field.name: field.default for field in dataclasses.fields(TransformerLensConfig)}
    assert fields == theirs
    hints, their_hints = (typing.get_type_hints(kind) for kind in (HookedTransformerConfig, TransformerLensConfig))
    for name, hint in their_hints.items():
        # lists of anything, and float for whole numbers too
        kinds = {typing.get_origin(kind) or kind for kind in typing.get_args(hint) or (hint,)}
        own = set(typing.get_args(hints[name]) or (hints[name],))
        assert own == (kinds - {int} if float in kinds else kinds), name
    for name in ARCHITECTURES:
        models = twins(name)
        assert dictionary(models[1].cfg) == dictionary(models[0].cfg)
    small = {"d_model": 8, "d_head": 4, "n_layers": 1, "n_ctx": 3, "d_vocab": 5}
    assert dictionary(HookedTransformerConfig(**small)) == dictionary(TransformerLensConfig(**small))
