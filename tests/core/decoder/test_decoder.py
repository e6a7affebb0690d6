"""What our decoder refuses, what it does beyond TransformerLens 3's class, and TransformerLens's tools on it."""

from __future__ import annotations

import copy
import importlib.util

import pytest
import torch
from small_models import BASE, SHAPES, random_tokens
from transformer_lens import ActivationCache, SVDInterpreter, patching
from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache
from transformer_lens.head_detector import detect_head

from sa_lens.core.decoder import HookedTransformer, HookedTransformerConfig

TOKENS = random_tokens(2, 7)
LLAMA = {
    "positional_embedding_type": "rotary",
    "n_key_value_heads": 2,
    "normalization_type": "RMS",
    "gated_mlp": True,
    "act_fn": "silu",
}
GREEDY = {"do_sample": False, "verbose": False, "stop_at_eos": False}


def decoder(**changes):
    return HookedTransformer({**BASE, "seed": 0, "initializer_range": 0.3, **changes}).eval()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_dir": "bidirectional"}, r"attention_dir='bidirectional'.*install transformer-lens<4"),
        ({"positional_embedding_type": "relative_positional_bias"}, "relative_positional_bias"),
        ({"normalization_type": "batch"}, "normalization_type='batch'"),
        ({"use_normalization_before_and_after": True}, "normalisation after the layers"),
        ({"original_architecture": "Olmo2ForCausalLM"}, "Olmo2ForCausalLM"),
        ({"use_qk_norm": True}, "use_qk_norm"),
        ({"use_attention_sinks": True}, "attention sinks"),
        ({"clip_qkv": 1.0}, "clip_qkv=1.0"),
        ({"use_logn_attn": True}, "log-n"),
        ({"use_dynamic_ntk_rope": True}, "dynamic NTK"),
        ({"use_yarn_rope": True}, "YaRN"),
        ({"num_experts": 4, "experts_per_token": 2}, "num_experts=4"),
        ({"load_in_4bit": True}, "4-bit"),
        ({"n_devices": 2}, "n_devices=2"),
        ({"gated_mlp": True, "act_fn": "solu_ln"}, "solu_ln"),
        ({"n_key_value_heads": 2, "use_attn_in": True}, "use_split_qkv_input"),
        ({"act_fn": "tanh"}, "act_fn='tanh' must be one of relu"),
        ({"act_fn": None}, "attn_only"),
        ({"n_key_value_heads": 3}, "must divide n_heads=4"),
        ({"n_heads": -1, "d_head": 5}, "d_head=5 does not divide"),
        ({"use_local_attn": True}, "window_size"),
        ({"use_local_attn": True, "window_size": 2, "attn_types": ["far", "far"]}, "'far' must be"),
        ({"d_vocab": -1}, "vocabulary size"),
        ({"init_mode": "zeros"}, "init_mode='zeros'"),
        ({"n_layer": 2}, "no field 'n_layer'"),
    ],
)
def test_what_the_decoder_cannot_run_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        decoder(**changes)


def test_calls_that_make_no_sense_are_refused(tokenizer):
    model, resid = decoder(), torch.zeros(2, 7, 16)
    calls = {
        "set_use_attn_result": lambda: model.add_hook("blocks.0.attn.hook_result", print),
        "set_use_split_qkv_input": lambda: model.add_hook("blocks.0.hook_q_input", print),
        "set_use_attn_in": lambda: model.add_hook("blocks.0.hook_attn_in", print),
        "set_use_hook_mlp_in": lambda: model.add_hook("blocks.0.hook_mlp_in", print),
        "return_type='probs'": lambda: model(TOKENS, return_type="probs"),
        "needs a residual stream": lambda: model("w1", start_at_layer=0),
        "needs tokens": lambda: model(resid, start_at_layer=0, return_type="loss"),
        r"attention_mask has shape \(2, 3\)": lambda: model(TOKENS, attention_mask=torch.ones(2, 3)),
        "tokens have 21 positions.*n_ctx=16": lambda: model(TOKENS.repeat(1, 3)),
        "no tokenizer": lambda: model("w1 w2"),
        "end-of-text token": lambda: model.generate(TOKENS, verbose=False),
        "return_type='embeds'": lambda: model.generate(TOKENS, return_type="embeds"),
        "must be a Hugging Face one": lambda: model.set_tokenizer("gpt2"),
        "default_padding_side='up'": lambda: model.set_tokenizer(tokenizer, default_padding_side="up"),
        "attn_only=True": lambda: decoder(attn_only=True).set_use_hook_mlp_in(True),
        "grouped queries": lambda: decoder(**LLAMA).set_use_attn_in(True),
    }
    for message, call in calls.items():
        with pytest.raises(ValueError, match=message):
            call()
    model.set_tokenizer(tokenizer)
    for message, call in {
        "is 2 tokens": lambda: model.to_single_token("w1 w2"),
        "give a list of them": lambda: model.to_str_tokens(TOKENS),
        r"\[batch, pos\]": lambda: model.to_string(TOKENS[None]),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="top_n"):
        model.generate(TOKENS, top_n=3)


def test_the_vocabulary_is_that_of_the_tokenizer(tokenizer):
    model = HookedTransformer({**BASE, "d_vocab": -1}, tokenizer, default_padding_side="left")
    assert model.W_E.shape == (23, 16)
    assert model.W_U.shape == (16, 23)
    assert model.tokenizer.padding_side == "left"


def test_configuration_as_a_dictionary():
    cfg = HookedTransformerConfig(**BASE)
    assert HookedTransformerConfig.from_dict(cfg.to_dict()) == cfg
    assert cfg.n_params == 2 * 16 * (4 * 16 + 2 * 24)


def test_the_configuration_follows_precision_and_place():
    model = decoder(**LLAMA)
    expected = model(TOKENS)
    wide = copy.deepcopy(model).double()
    assert wide.cfg.dtype == torch.float64
    assert model.cfg.dtype == torch.float32
    torch.testing.assert_close(wide(TOKENS).float(), expected)
    assert wide.to(torch.bfloat16, print_details=False).cfg.dtype == torch.bfloat16
    assert wide(TOKENS).dtype == torch.bfloat16
    assert wide.to("meta").cfg.device == "meta"
    assert wide.ln_final.w.device.type == "meta"
    assert model.cpu().cfg.device == "cpu"


@pytest.mark.parametrize("shape", SHAPES)
def test_everything_is_made_on_the_device_of_the_model(shape):
    """On `meta`, which refuses to mix devices and stands for a GPU here."""
    model = decoder(**SHAPES[shape]).to("meta")
    cache = TransformerLensKeyValueCache.init_cache(model.cfg, "meta", 2)
    for options in ({}, {"attention_mask": torch.ones(2, 7)}, {"past_kv_cache": cache}, {"past_kv_cache": cache}):
        assert model(TOKENS, **options).device.type == "meta"
    assert model.accumulated_bias(1).device.type == "meta"


@pytest.mark.parametrize("changes", [{}, LLAMA, {"positional_embedding_type": "alibi"}], ids=["gpt2", "llama", "alibi"])
@torch.no_grad()
def test_caches_and_generation_without_a_tokenizer(changes):
    model = decoder(**changes)
    cache = TransformerLensKeyValueCache.init_cache(model.cfg, "cpu", 2)
    parts = [model(TOKENS[:, part], past_kv_cache=cache) for part in (slice(0, 4), slice(4, 5), slice(5, 7))]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(TOKENS), rtol=1e-5, atol=1e-5)
    cached = model.generate(TOKENS, max_new_tokens=6, **GREEDY)
    assert torch.equal(cached, model.generate(TOKENS, max_new_tokens=6, use_past_kv_cache=False, **GREEDY))
    for row in cached:
        assert torch.equal(model(row[None, :-1])[0, 6:].argmax(-1), row[7:])


def metric(logits):
    return logits[:, -1, 3].mean()


@pytest.mark.parametrize("changes", [{}, LLAMA], ids=["gpt2", "llama"])
@torch.no_grad()
def test_tools_of_transformer_lens(changes, tokenizer):
    model = decoder(**changes)
    logits, cache = model.run_with_cache(TOKENS)
    assert isinstance(cache, ActivationCache)
    final = cache["resid_post", -1]
    for stack in (
        cache.decompose_resid(),
        cache.stack_head_results(incl_remainder=True),
        cache.stack_neuron_results(-1, incl_remainder=True),
        cache.get_full_resid_decomposition(),
    ):
        torch.testing.assert_close(stack.sum(0), final, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cache.accumulated_resid(apply_ln=True)[-1] @ model.W_U + model.b_U, logits)
    directions = model.tokens_to_residual_directions(TOKENS[:, -1])
    torch.testing.assert_close(
        cache.logit_attrs(cache.decompose_resid(pos_slice=-1), tokens=TOKENS[:, -1], pos_slice=-1),
        (cache.apply_ln_to_stack(cache.decompose_resid(pos_slice=-1), pos_slice=-1) * directions).sum(-1),
    )
    patched = patching.get_act_patch_resid_pre(model, TOKENS.flip(1), cache, metric)
    torch.testing.assert_close(patched[0, 0], metric(model(torch.cat([TOKENS[:, :1], TOKENS.flip(1)[:, 1:]], 1))))
    patched = patching.get_act_patch_attn_head_v_all_pos(model, TOKENS.flip(1), cache, metric)
    assert patched.shape == (2, model.cfg.n_key_value_heads or 4)
    vectors = SVDInterpreter(model).get_singular_vectors("w_in", 0, num_vectors=2)
    assert vectors.shape == (23, 1, 2)
    model.set_tokenizer(tokenizer)
    assert detect_head(model, "w1 w5 w2 w9 w3", "previous_token_head", exclude_bos=False).shape == (2, 4)


@pytest.mark.skipif(
    importlib.util.find_spec("transformer_lens.tools.analysis.logit_lens") is None, reason="TransformerLens 4 only"
)
@torch.no_grad()
def test_logit_lens():
    from transformer_lens.tools.analysis.logit_lens import logit_lens

    model = decoder()
    lens = logit_lens(model, TOKENS)
    torch.testing.assert_close(lens.readout.values[-1], model(TOKENS)[:, -1], rtol=1e-5, atol=1e-5)
