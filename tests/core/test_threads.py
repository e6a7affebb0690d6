"""Several threads on one model: each has its own stream, hooks and cache, and none waits for another."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from small_models import gated_model, random_tokens

WAIT = 60
"""Seconds after which a thread counts as stuck."""
TOKENS, OTHERS = random_tokens(2, 7), random_tokens(1, 5, seed=1)


def in_thread(function: Callable[[], object]) -> Callable[[], object]:
    """Starts the function in a thread; the result waits for what it returns, and raises what it raised."""
    result: list[object] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            result.append(function())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def finish() -> object:
        thread.join(WAIT)
        assert not thread.is_alive(), "the thread is stuck"
        if failure:
            raise failure[0]
        return result[0]

    return finish


@torch.no_grad()
def run_all(model, tokens):
    """Every kind of run on the streams, as comparable values."""
    clean, clean_cache = model.run_with_cache(tokens, return_cache_object=False)
    with model.ablated():
        ablated, ablated_cache = model.run_with_cache(tokens, return_cache_object=False)
    with model.ablated(position=-1):
        at_end = model(tokens)
    edited = model.run_with_hooks(tokens, fwd_hooks=[("blocks.0.hook_resid_pre", lambda x, hook: x * 0)])
    streams = model.run_streams(tokens)
    assert list(clean_cache) == [name for name in ablated_cache if "_gate." not in name]
    values = [clean, ablated, at_end, edited, streams.clean_logits, streams.ablated_logits]
    return [*values, *clean_cache.values(), *ablated_cache.values()]


def assert_same(values, expected):
    assert len(values) == len(expected)
    for value, wanted in zip(values, expected, strict=True):
        assert torch.equal(value, wanted)


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("stream", ["clean", "ablated", "position", "live"])
def test_a_pass_held_in_the_middle_does_not_touch_those_of_other_threads(scope, stream):
    """One thread stands in a hook of its cached pass while this one runs everything."""
    model = gated_model(scope=scope)
    expected = run_all(model, TOKENS)
    contexts = {
        "clean": model.clean,
        "ablated": model.ablated,
        "position": lambda: model.ablated(position=-1),
        "live": lambda: model.ablated(position=-1, masks="live"),
    }

    @torch.no_grad()
    def cached(hold):
        with contexts[stream](), model.hooks(fwd_hooks=[("blocks.1.attn.hook_z", hold)]):
            return model.run_with_cache(OTHERS, return_cache_object=False)

    logits, cache = cached(lambda x, hook: x * 2)
    reached, released = threading.Event(), threading.Event()

    def hold(x, hook):
        reached.set()
        assert released.wait(WAIT)
        return x * 2

    finish = in_thread(lambda: cached(hold))
    assert reached.wait(WAIT)
    assert_same(run_all(model, TOKENS), expected)
    released.set()
    other_logits, other_cache = finish()
    assert list(other_cache) == list(cache)
    assert_same([other_logits, *other_cache.values()], [logits, *cache.values()])
    assert not model.list_hooks()
    assert model.context_level == 0


def test_a_hook_may_wait_for_another_thread_that_runs_the_same_model():
    model = gated_model()
    expected = run_all(model, OTHERS)

    def wait(x, hook):
        assert_same(in_thread(lambda: run_all(model, OTHERS))(), expected)

    with torch.no_grad(), model.ablated():
        logits = model(TOKENS)
        assert torch.equal(model.run_with_hooks(TOKENS, fwd_hooks=[("blocks.0.mlp_gate.hook_mask", wait)]), logits)


def test_a_hook_may_run_the_same_model():
    """In either stream, in the middle of a pass in either stream."""
    model = gated_model()
    expected = run_all(model, OTHERS)
    inside = False

    def run(x, hook):
        nonlocal inside
        if not inside:
            inside = True
            with model.clean():
                assert_same(run_all(model, OTHERS), expected)
            inside = False

    for context in (model.clean, model.ablated, lambda: model.ablated(position=-1, masks="live")):
        with torch.no_grad(), context():
            logits = model(TOKENS)
            assert torch.equal(model.run_with_hooks(TOKENS, fwd_hooks=[("blocks.1.hook_resid_mid", run)]), logits)


def test_gradients_are_those_of_the_own_pass():
    model = gated_model()

    def gradients(tokens):
        with model.ablated():
            _, cache = model.run_with_cache(tokens, return_type="loss", incl_bwd=True, return_cache_object=False)
        return {name: value for name, value in cache.items() if name.endswith("_grad")}

    expected, expected_others = gradients(TOKENS), gradients(OTHERS)
    results = []

    def interrupt(gradient, hook):
        results.append(in_thread(lambda: gradients(OTHERS))())

    with model.hooks(bwd_hooks=[("blocks.1.hook_resid_mid", interrupt)]):
        actual = gradients(TOKENS)
    assert len(results) == 1
    for values, wanted in ((actual, expected), (results[0], expected_others)):
        assert values.keys() == wanted.keys()
        assert all(torch.equal(values[name], wanted[name]) for name in wanted)


def test_many_threads_at_once():
    model = gated_model()
    inputs = [random_tokens(1, 4 + seed, seed=seed) for seed in range(6)]
    expected = [run_all(model, tokens) for tokens in inputs]
    barrier = threading.Barrier(len(inputs))

    def together(index):
        barrier.wait(WAIT)
        for _ in range(3):
            assert_same(run_all(model, inputs[index]), expected[index])

    for finish in [in_thread(lambda index=index: together(index)) for index in range(len(inputs))]:
        finish()
    assert not model.list_hooks()


@torch.no_grad()
def test_hooks_that_are_left_behind_are_everybodys():
    """As `model.add_hook`: only the hooks of a context are a thread's own."""
    model = gated_model()
    zero = ("blocks.0.hook_resid_pre", lambda x, hook: x * 0)
    wanted = model.run_with_hooks(TOKENS, fwd_hooks=[zero])
    model.run_with_hooks(TOKENS, fwd_hooks=[zero], reset_hooks_end=False)
    assert torch.equal(in_thread(lambda: run_all(model, TOKENS))()[0], wanted)
    assert [handle.user_hook for handle in model.list_hooks()[zero[0]]] == [zero[1]]
    model.reset_hooks()
    model.add_hook(*zero)
    assert torch.equal(in_thread(lambda: run_all(model, TOKENS))()[0], wanted)
