"""Programs made of a model by torch: never the wrong stream's logits without a word."""

from __future__ import annotations

import warnings

import pytest
import torch
from small_models import gated_model, random_tokens

from sa_lens.config import GateConfig, ModelConfig
from sa_lens.core import SelfAblatingTransformer

TOKENS = random_tokens(2, 7)


@pytest.fixture(scope="module")
def model():
    shape = ModelConfig(n_layers=1, d_model=16, n_heads=4, n_ctx=16, d_vocab=23)
    return SelfAblatingTransformer(shape, GateConfig(k_attn=3, k_mlp=5), device="cpu").eval()


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def logits_of_streams(run, model):
    """Logits by stream, the clean one asked for before, between and after the others."""
    results = [("clean", run(TOKENS))]
    with model.ablated():
        results.append(("ablated", run(TOKENS)))
    results.append(("clean", run(TOKENS)))
    with model.ablated(position=-1):
        results.append(("at the end", run(TOKENS)))
        with model.clean():
            results.append(("clean", run(TOKENS)))
    return results


def assert_right(results, model):
    expected = dict(logits_of_streams(model.forward, model))
    assert not torch.allclose(expected["clean"], expected["ablated"], atol=1e-2)
    for stream, logits in results:
        torch.testing.assert_close(logits, expected[stream], msg=stream)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_follows_the_stream(model, backend):
    assert_right(logits_of_streams(torch.compile(model, backend=backend), model), model)


def test_a_model_compiled_in_place_follows_the_stream():
    model = gated_model()
    model.compile(backend="eager")
    assert_right(logits_of_streams(model, model), model)
    _, cache = model.run_with_cache(TOKENS)
    assert "blocks.0.mlp_gate.hook_mask" not in cache
    with model.ablated():
        _, cache = model.run_with_cache(TOKENS)
    assert "blocks.0.mlp_gate.hook_mask" in cache


def test_a_stream_chosen_inside_a_compiled_function(model):
    def both(tokens):
        with model.ablated():
            ablated = model(tokens)
        return ablated, model(tokens), model.run_streams(tokens).ablated_logits

    ablated, clean, again = torch.compile(both, backend="eager")(TOKENS)
    assert_right([("ablated", ablated), ("clean", clean), ("ablated", again)], model)


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")
def test_hooks_inside_a_compiled_function(model):
    def masks(tokens):
        with model.ablated():
            return model.run_with_cache(tokens)[1]["mask", 0, "mlp_gate"]

    assert torch.equal(torch.compile(masks, backend="eager")(TOKENS), masks(TOKENS))


def test_a_graph_of_the_whole_model_is_refused(model):
    with pytest.raises(Exception, match="forward"):
        torch.compile(model, backend="eager", fullgraph=True)(TOKENS)
    with pytest.raises(Exception, match="forward"):
        torch.export.export(model, (TOKENS,), strict=True)


@pytest.mark.parametrize("stream", ["clean", "ablated"])
@pytest.mark.parametrize("record", ["export", "trace"])
def test_a_recorded_program_says_which_stream_it_is(model, record, stream):
    def recorded():
        if record == "export":
            return torch.export.export(model, (TOKENS,), strict=False).module()
        return torch.jit.trace(model, TOKENS, check_trace=False)

    with warnings.catch_warnings(), model.ablated() if stream == "ablated" else model.clean():
        warnings.simplefilter("ignore")
        with pytest.warns(UserWarning, match=f"the recorded program .* runs the {stream} stream, whatever stream"):
            program = recorded()
    assert_right([(stream, program(TOKENS))], model)
