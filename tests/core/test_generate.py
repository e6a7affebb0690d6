"""Generation from either stream: what is cached, what agrees with the uncached pass, what is left as found."""

from __future__ import annotations

import oracle
import pytest
import torch
from small_models import gates_for, plain_model, random_tokens
from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

from sa_lens.core import SelfAblatingTransformer

SHAPES = ["gpt2", "gpt-neo", "pythia", "llama", "alibi", "shortformer"]
GREEDY = {"do_sample": False, "verbose": False, "stop_at_eos": False}


def two_models(tokenizer, shape="gpt2", scope="local"):
    """(plain, gated) with a tokenizer, which TransformerLens wants for a cache."""
    plain = plain_model(shape)
    plain.set_tokenizer(tokenizer)
    return plain, SelfAblatingTransformer.from_hooked(plain, gates_for(shape, scope), seed=3)


def new_cache(model, batch=2):
    return TransformerLensKeyValueCache.init_cache(model.cfg, model.cfg.device, batch)


def with_logits(model, tokens, **options):
    """(tokens, logits [step, batch, vocab]) of greedy generation."""
    out = model.generate(tokens, max_new_tokens=6, output_logits=True, **GREEDY, **options)
    return out.sequences, torch.stack(out.logits)


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_cached_and_uncached_generation_agree_with_the_definition(shape, scope, tokenizer):
    plain, model = two_models(tokenizer, shape, scope)
    tokens = random_tokens(2, 4)
    with model.ablated():
        cached, cached_logits = with_logits(model, tokens)
        uncached, uncached_logits = with_logits(model, tokens, use_past_kv_cache=False)
    torch.testing.assert_close(cached_logits, uncached_logits, rtol=1e-5, atol=1e-5)
    assert torch.equal(cached, uncached)
    expected = tokens
    for _ in range(6):
        next_token = oracle.ablated_logits(plain, model, expected)[:, -1].argmax(-1)
        expected = torch.cat([expected, next_token[:, None]], dim=1)
    assert torch.equal(cached, expected)
    with model.ablated(position=-1):
        at_the_end, _ = with_logits(model, tokens, use_past_kv_cache=False)
    assert torch.equal(at_the_end, expected)
    assert torch.equal(
        model.generate(tokens, max_new_tokens=6, **GREEDY), plain.generate(tokens, max_new_tokens=6, **GREEDY)
    )


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_the_cache_holds_clean_keys_and_values_only(shape, tokenizer):
    plain, model = two_models(tokenizer, shape, "both")
    tokens, caches = random_tokens(2, 9), (new_cache(plain), new_cache(model))
    plain(tokens)  # TransformerLens keeps ALiBi's bias at the longest length seen, which shows in the last bit
    with model.ablated():
        whole = model(tokens)
        for chunk in (slice(0, 3), slice(3, 4), slice(4, 7), slice(7, 9)):
            plain(tokens[:, chunk], past_kv_cache=caches[0])
            found = model(tokens[:, chunk], past_kv_cache=caches[1])
            torch.testing.assert_close(found, whole[:, chunk], rtol=1e-5, atol=1e-5)
            for expected, entry in zip(caches[0], caches[1], strict=True):
                assert torch.equal(entry.past_keys, expected.past_keys)
                assert torch.equal(entry.past_values, expected.past_values)
            assert torch.equal(caches[1].previous_attention_mask, caches[0].previous_attention_mask)
    assert caches[1][0].past_keys.shape[1] == 9


@torch.no_grad()
def test_a_frozen_cache_stays_as_it_is(tokenizer):
    (_, model), tokens = two_models(tokenizer), random_tokens(2, 6)
    cache = new_cache(model)
    with model.ablated():
        model(tokens[:, :4], past_kv_cache=cache)
        cache.freeze()
        before = cache[0].past_keys.clone()
        first, second = (model(tokens[:, 4:], past_kv_cache=cache) for _ in range(2))
        torch.testing.assert_close(first, model(tokens)[:, 4:], rtol=1e-5, atol=1e-5)
    assert torch.equal(first, second)
    assert torch.equal(cache[0].past_keys, before)


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("shape", ["gpt2", "gpt-neo", "pythia", "alibi"])
@torch.no_grad()
def test_prompts_of_different_length_in_one_batch(shape, scope, tokenizer):
    _, model = two_models(tokenizer, shape, scope)
    prompts = ["w1 w2 w3 w4", "w5", "w6 w7"]
    options = {"max_new_tokens": 5, "return_type": "tokens", **GREEDY}
    with model.ablated():
        cached = model.generate(prompts, **options)
        uncached = model.generate(prompts, use_past_kv_cache=False, **options)
        single = [model.generate(prompt, **options)[0] for prompt in prompts]
    assert torch.equal(cached, uncached)
    for row, alone in zip(cached, single, strict=True):
        assert torch.equal(row[-len(alone) :], alone)


@pytest.mark.parametrize("stream", ["clean", "ablated"])
def test_train_or_eval_mode_is_left_as_found(stream, tokenizer):
    (_, model), tokens = two_models(tokenizer), random_tokens()
    for mode in (True, False):
        model.train(mode)
        model.blocks[0].train(not mode)
        with model.ablated() if stream == "ablated" else model.clean():
            model.generate(tokens, max_new_tokens=1, **GREEDY)
            list(model.generate_stream(tokens, max_new_tokens=1, **GREEDY))
        assert model.training is mode
        assert model.blocks[0].attn.training is not mode
        assert model.blocks[1].attn.training is mode
    with model.ablated(position=-1), pytest.raises(ValueError, match=r"past_kv_cache.*run without a cache"):
        model.generate(tokens, max_new_tokens=1, **GREEDY)
    assert not model.training


@torch.no_grad()
def test_a_stream_of_tokens_is_that_of_generate(tokenizer):
    (_, model), tokens = two_models(tokenizer), random_tokens(1, 4)
    with model.ablated():
        expected = model.generate(tokens, max_new_tokens=6, **GREEDY)
        pieces = list(model.generate_stream(tokens, max_new_tokens=6, max_tokens_per_yield=2, **GREEDY))
    assert torch.equal(torch.cat(pieces, dim=1), expected)
    assert not torch.equal(expected, model.generate(tokens, max_new_tokens=6, **GREEDY)), "the streams must differ here"


@torch.no_grad()
def test_sampling_is_repeatable_by_seed(tokenizer):
    (_, model), tokens = two_models(tokenizer), random_tokens()
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        with model.ablated():
            found.append(model.generate(tokens, max_new_tokens=6, verbose=False, stop_at_eos=False))
    assert torch.equal(*found)


@torch.no_grad()
def test_a_stream_of_tokens_belongs_to_the_context_it_was_asked_for_in(tokenizer):
    _, model = two_models(tokenizer)
    tokens, options = random_tokens(1, 4), {"max_new_tokens": 4, "max_tokens_per_yield": 1, **GREEDY}
    with model.ablated():
        expected = [part.tolist() for part in model.generate_stream(tokens, **options)]
        later = model.generate_stream(tokens, **options)
    assert [part.tolist() for part in later] == expected
    clean = model.generate_stream(tokens, **options)
    with model.ablated():
        next(clean)
        inside = model(tokens)
        assert [part.tolist() for part in clean] != expected[1:]
        assert torch.equal(model(tokens), inside)
