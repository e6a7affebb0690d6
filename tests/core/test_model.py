"""`SelfAblatingTransformer` takes what HookedTransformer takes, on either stream."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from small_models import SHAPES, gated_model, gates_for, plain_model, random_tokens

from sa_lens.config import GateConfig, ModelConfig
from sa_lens.core import Gate, HookedTransformer, SelfAblatingTransformer, Streams, TwoStreamLoss


@pytest.fixture
def with_tokenizer(tokenizer):
    """A gated model that reads strings."""
    plain = plain_model()
    plain.set_tokenizer(tokenizer)
    return SelfAblatingTransformer.from_hooked(plain, gates_for("gpt2", "both"), seed=3)


@pytest.fixture(params=["clean", "all", "one"])
def on_stream(request):
    """Enters a stream of a model."""
    contexts = {
        "clean": lambda model: model.clean(),
        "all": lambda model: model.ablated(),
        "one": lambda model: model.ablated(position=-1),
    }
    return contexts[request.param]


def test_it_is_a_hooked_transformer():
    assert isinstance(gated_model(), HookedTransformer)


@pytest.mark.filterwarnings("ignore:the loss in ablated")
@torch.no_grad()
def test_return_types(on_stream):
    model, tokens = gated_model(scope="both"), random_tokens()
    with on_stream(model):
        logits = model(tokens)
        per_token = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        assert torch.equal(model(tokens, return_type="logits"), logits)
        torch.testing.assert_close(model(tokens, return_type="loss"), per_token.mean())
        both = model(tokens, return_type="both")
        assert torch.equal(both.logits, logits)
        torch.testing.assert_close(both.loss, per_token.mean())
        assert model(tokens, return_type=None) is None
        found = model(tokens, return_type="loss", loss_per_token=True)
        torch.testing.assert_close(found, per_token.reshape(2, 6))
        assert torch.equal(model(tokens, "loss", True), found), "arguments may be positional"
        assert torch.equal(model(tokens[0]), model(tokens[:1]))


@torch.no_grad()
def test_stopping_early(on_stream):
    model, tokens = gated_model(scope="both"), random_tokens()
    with on_stream(model):
        _, cache = model.run_with_cache(tokens)
        assert torch.equal(model(tokens, stop_at_layer=0), cache["resid_pre", 0])
        assert torch.equal(model(tokens, stop_at_layer=1), cache["resid_pre", 1])
        assert torch.equal(model(tokens, stop_at_layer=-1), cache["resid_pre", 1])
        assert torch.equal(model(tokens, stop_at_layer=2), cache["resid_post", 1])
        _, early = model.run_with_cache(tokens, stop_at_layer=1)
    assert "blocks.0.hook_resid_post" in early
    assert not any(name.startswith("blocks.1") for name in early)


@pytest.mark.filterwarnings("ignore:the loss in ablated")
@pytest.mark.parametrize("shape", ["gpt2", "llama", "shortformer"])
@torch.no_grad()
def test_starting_from_a_residual_stream(shape, on_stream):
    model, tokens = gated_model(shape, "both"), random_tokens()
    residual, _, positions, _ = model.input_to_embed(tokens)
    with on_stream(model):
        expected = model(tokens)
        found = model(residual, start_at_layer=0, shortformer_pos_embed=positions)
        torch.testing.assert_close(found, expected)
        loss = model(residual, "loss", start_at_layer=0, tokens=tokens, shortformer_pos_embed=positions)
        torch.testing.assert_close(loss, model(tokens, return_type="loss"))


@pytest.mark.filterwarnings("ignore:the loss in ablated")
@torch.no_grad()
def test_strings_and_begin_of_text(with_tokenizer, on_stream):
    model = with_tokenizer
    with on_stream(model):
        for prepend in (True, False):
            tokens = torch.tensor([[0, 4, 5, 6]] if prepend else [[4, 5, 6]])
            assert torch.equal(model("w1 w2 w3", prepend_bos=prepend), model(tokens))
        assert torch.equal(model("w1 w2 w3"), model(torch.tensor([[0, 4, 5, 6]])))
        loss = model("w1 w2 w3", return_type="loss")
        torch.testing.assert_close(loss, model(torch.tensor([[0, 4, 5, 6]]), return_type="loss"))
        _, cache = model.run_with_cache("w1 w2 w3")
        assert cache["resid_pre", 0].shape == (1, 4, 16)


@torch.no_grad()
def test_strings_padded_on_the_left(with_tokenizer, on_stream):
    model, prompts = with_tokenizer, ["w1 w2 w3", "w4"]
    with on_stream(model):
        padded = model(prompts, padding_side="left")
        for row, prompt in enumerate(prompts):
            alone = model(prompt)[0]
            torch.testing.assert_close(padded[row, -len(alone) :], alone, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_run_streams_on_strings(with_tokenizer):
    model = with_tokenizer
    tokens = torch.tensor([[0, 4, 5, 6]])
    for found, expected in (
        (model.run_streams("w1 w2 w3"), model.run_streams(tokens)),
        (model.run_streams("w1 w2 w3", prepend_bos=False), model.run_streams(tokens[:, 1:])),
        (model.run_streams(tokens[0]), model.run_streams(tokens)),
    ):
        for name, value in found._asdict().items():
            assert torch.equal(value, getattr(expected, name)), name


@pytest.mark.parametrize(
    ("side", "of_tokenizer", "options"),
    [
        ("right", "right", {}),
        ("left", "left", {}),
        ("left", "right", {"padding_side": "left"}),
        ("right", "left", {"padding_side": "right"}),
    ],
)
@torch.no_grad()
def test_run_streams_leaves_padding_out(with_tokenizer, side, of_tokenizer, options):
    model = with_tokenizer
    model.tokenizer.padding_side = of_tokenizer
    texts = ["w1 w2 w3", "w4"]
    padded = model.run_streams(texts, **options)
    assert padded.tokens.tolist() == [[0, 4, 5, 6], [1, 1, 0, 7] if side == "left" else [0, 7, 1, 1]]
    rows = [model.run_streams(text) for text in texts]
    for name in ("clean_loss", "ablated_loss"):  # 3 predictions of the first prompt, 1 of the second
        expected = (3 * getattr(rows[0], name) + getattr(rows[1], name)) / 4
        torch.testing.assert_close(getattr(padded, name), expected)
    expected = (4 * rows[0].reconstruction + 2 * rows[1].reconstruction) / 6
    torch.testing.assert_close(padded.reconstruction, expected)
    place = slice(2, None) if side == "left" else slice(2)
    for name in ("clean_logits", "ablated_logits"):
        torch.testing.assert_close(getattr(padded, name)[1, place], getattr(rows[1], name)[0], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_run_streams_is_what_the_two_streams_give():
    for scope in ("local", "global", "both"):
        model, tokens = gated_model(scope=scope), random_tokens()
        streams = model.run_streams(tokens)
        assert isinstance(streams, Streams)
        with model.ablated():
            ablated, cache = model.run_with_cache(tokens)
        assert torch.equal(streams.tokens, tokens)
        assert torch.equal(streams.clean_logits, model(tokens))
        assert torch.equal(streams.ablated_logits, ablated)
        for name, mask in streams.masks.items():
            assert torch.equal(mask, cache[name])
        assert len(streams.masks) == 4
        torch.testing.assert_close(streams.clean_loss, model(tokens, return_type="loss"))


@torch.no_grad()
def test_run_streams_caps_the_logits_that_are_capped():
    model, tokens = gated_model("capped-logits"), random_tokens()
    streams = model.run_streams(tokens)
    assert torch.equal(streams.clean_logits, model(tokens))
    assert streams.ablated_logits.abs().max() <= 2


def test_narrow_precision_runs_both_streams():
    plain, tokens = plain_model(dtype=torch.bfloat16), random_tokens()
    model = SelfAblatingTransformer.from_hooked(plain, gates_for("gpt2", "both"))
    streams = model.run_streams(tokens)
    assert streams.ablated_logits.dtype == torch.bfloat16
    assert (streams.mask_mlp.sum(-1) == 5).all()
    assert torch.equal(streams.clean_logits, plain(tokens))
    full = SelfAblatingTransformer.from_hooked(plain, GateConfig(scope="both", k_attn=16, k_mlp=24))
    found = full.run_streams(tokens)
    torch.testing.assert_close(found.ablated_logits, found.clean_logits, rtol=0.1, atol=0.3)


def test_autocast_runs_both_streams():
    model, tokens = gated_model(scope="both"), random_tokens()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        streams = model.run_streams(tokens)
        streams.ablated_loss.backward()
    assert streams.ablated_loss.dtype == torch.float32
    assert (streams.mask_mlp.sum(-1) == 5).all()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_from_hooked_copies():
    plain, tokens = plain_model(), random_tokens()
    model = SelfAblatingTransformer.from_hooked(plain, gates_for("gpt2"))
    expected = plain(tokens)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.zero_()
    assert torch.equal(model(tokens), expected)
    out = model.to_hooked_transformer()
    with torch.no_grad():
        for parameter in out.parameters():
            parameter.zero_()
    assert torch.equal(model(tokens), expected)


def test_from_hooked_keeps_dtype_tokenizer_and_seeded_gates(tokenizer):
    plain = plain_model(dtype=torch.float64)
    plain.set_tokenizer(tokenizer)
    first, again, other = (SelfAblatingTransformer.from_hooked(plain, gates_for("gpt2"), seed=s) for s in (0, 0, 1))
    assert first.blocks[0].attn_gate.W_local.dtype == torch.float64
    assert first.to_tokens("w1 w2").tolist() == [[0, 4, 5]]
    assert torch.equal(first.blocks[1].mlp_gate.W_local, again.blocks[1].mlp_gate.W_local)
    assert not torch.equal(first.blocks[1].mlp_gate.W_local, other.blocks[1].mlp_gate.W_local)


def test_gates_may_be_replaced():
    model, tokens = gated_model(), random_tokens()
    other = SelfAblatingTransformer.from_hooked(model, GateConfig(scope="global", k_attn=1, k_mlp=1, attn_unit="head"))
    assert torch.equal(other(tokens), model(tokens))
    assert other.run_streams(tokens).mask_attn.shape == (2, 2, 7, 4, 1)
    assert not any(name.endswith("_local") for name, _ in other.named_parameters())


def test_weights_that_do_not_fit_are_named():
    state = plain_model().state_dict()
    del state["blocks.0.attn.W_Q"]
    with pytest.raises(ValueError, match=r"missing \['blocks.0.attn.W_Q'\]"):
        gated_model().load_base(state)
    with pytest.raises(ValueError, match=r"unknown \['blocks.0.attn.W_X'\]"):
        gated_model().load_base({**plain_model().state_dict(), "blocks.0.attn.W_X": torch.zeros(1)})


def test_the_caller_keeps_its_configuration():
    plain = plain_model()
    cfg = plain.cfg
    before = dict(vars(cfg))
    SelfAblatingTransformer(cfg, gates_for("gpt2"))
    SelfAblatingTransformer.from_hooked(plain, gates_for("gpt2"))
    assert dict(vars(cfg)) == before


@pytest.mark.parametrize("scope", ["local", "both", "none"])
@pytest.mark.parametrize("shape", [*SHAPES])
def test_parameters_of_the_gates_and_of_the_base(shape, scope):
    """Weights of a gated MLP, `mlp.W_gate`, belong to the base."""
    model = SelfAblatingTransformer.from_hooked(plain_model(shape), gates_for(shape, scope))
    gates, base = model.gate_parameters(), model.base_parameters()
    inside = [p for module in model.modules() if isinstance(module, Gate) for p in module.parameters()]
    assert {id(p) for p in gates} == {id(p) for p in inside}
    assert bool(gates) == (scope != "none")
    assert sorted(map(id, [*gates, *base])) == sorted(map(id, model.parameters()))
    if model.cfg.gated_mlp:
        assert any(p is model.blocks[0].mlp.W_gate for p in base)
    assert model.freeze_base() is model
    assert not any(p.requires_grad for p in base)
    assert all(p.requires_grad for p in gates)
    model.freeze_base(False)
    assert all(p.requires_grad for p in model.parameters())


def test_unfreezing_leaves_biases_that_the_model_does_not_have():
    model = SelfAblatingTransformer(ModelConfig(n_layers=1, d_model=8, n_heads=2, n_ctx=8, d_vocab=11), device="cpu")
    absent = model.zero_biases
    assert absent
    model.freeze_base().freeze_base(False)
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == absent


def test_gates_train_on_a_frozen_llama_whose_clean_stream_stays():
    model, tokens = gated_model("llama"), random_tokens()
    clean = model(tokens)
    base = [p.detach().clone() for p in model.base_parameters()]
    step = TwoStreamLoss(model.freeze_base())
    optimizer = torch.optim.AdamW(model.gate_parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        terms = step(tokens)
        terms.total.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(terms.ablated.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(now, before) for now, before in zip(model.base_parameters(), base, strict=True))
    assert torch.equal(model(tokens), clean)
