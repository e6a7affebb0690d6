"""Tied embeddings are one parameter, in and out of state dicts, copies, dtypes and optimizers."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from small_models import gates_for, plain_model, random_tokens

from sa_lens.config import GateConfig, ModelConfig
from sa_lens.core import HookedTransformer, SelfAblatingTransformer, TwoStreamLoss

SHAPE = {"n_layers": 2, "d_model": 16, "n_heads": 4, "n_ctx": 16, "d_vocab": 23}


def model_with(tied: bool) -> SelfAblatingTransformer:
    return SelfAblatingTransformer(
        ModelConfig(**SHAPE, tied_embedding=tied), GateConfig(k_attn=4, k_mlp=5), device="cpu"
    )


def is_view(model):
    return model.unembed.W_U.data_ptr() == model.embed.W_E.data_ptr() and torch.equal(model.unembed.W_U, model.W_E.T)


def test_tied_means_one_parameter():
    tied, untied = model_with(True), model_with(False)
    assert tied.tied
    assert not untied.tied
    names = [name for name, _ in tied.named_parameters()]
    assert "embed.W_E" in names
    assert "unembed.W_U" not in names
    assert "unembed.W_U" in dict(untied.named_parameters())
    count = [sum(p.numel() for p in m.parameters()) for m in (tied, untied)]
    assert count[1] - count[0] == 16 * 23
    assert is_view(tied)
    assert tied.cfg.tie_word_embeddings
    assert torch.equal(tied.W_U, tied.W_E.T)


def test_the_tie_outlives_copies_dtypes_and_optimizer_steps():
    for model in (model_with(True), copy.deepcopy(model_with(True)), model_with(True).to(torch.float64)):
        assert is_view(model)
        before = model.embed.W_E.detach().clone()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        TwoStreamLoss(model)(random_tokens()).total.backward()
        optimizer.step()
        assert not torch.equal(model.embed.W_E, before)
        assert is_view(model)


def test_the_gradient_is_the_sum_of_both_uses():
    tied = model_with(True)
    untied = copy.deepcopy(tied)
    untied.untie()
    for model in (tied, untied):
        TwoStreamLoss(model)(random_tokens()).total.backward()
    expected = untied.embed.W_E.grad + untied.unembed.W_U.grad.T
    torch.testing.assert_close(tied.embed.W_E.grad, expected)


def test_state_dict_holds_both_keys_and_fits_a_plain_transformer():
    model = model_with(True)
    state = model.state_dict()
    assert torch.equal(state["unembed.W_U"], state["embed.W_E"].T)
    assert not state["unembed.W_U"].requires_grad
    plain = HookedTransformer(copy.deepcopy(model.cfg))
    plain.load_state_dict({name: value for name, value in state.items() if "_gate." not in name})
    assert torch.equal(plain(random_tokens()), model(random_tokens()))
    fresh = SelfAblatingTransformer(ModelConfig(**SHAPE), model.gates, seed=9, device="cpu")
    fresh.load_state_dict(state)
    assert is_view(fresh)
    assert torch.equal(fresh(random_tokens()), model(random_tokens()))
    del state["unembed.W_U"]
    fresh.load_state_dict(state)


@pytest.mark.parametrize("keys", [("embed.W_E", "unembed.W_U"), ("unembed.W_U",)])
def test_a_state_that_does_not_tie_is_refused_whole(keys):
    model = model_with(True)
    before = copy.deepcopy(model.state_dict())
    other = model_with(False).state_dict()
    with pytest.raises(ValueError, match=r"W_U is not the transpose.*model\.untie\(\)"):
        model.load_state_dict({key: other[key] for key in keys} | {"ln_final.w": torch.zeros(16)}, strict=False)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    model.untie()
    model.load_state_dict(other)
    assert torch.equal(model.unembed.W_U, other["unembed.W_U"])


def test_the_view_cannot_be_assigned():
    model = model_with(True)
    with pytest.raises((AttributeError, KeyError)):
        model.unembed.W_U = torch.nn.Parameter(torch.zeros(16, 23))
    assert is_view(model)


@torch.no_grad()
def test_untie_keeps_the_logits_and_makes_two_parameters():
    model, tokens = model_with(True), random_tokens()
    with model.ablated():
        before = model(tokens)
        model.untie()
        assert torch.equal(model(tokens), before)
    assert not model.tied
    assert not model.cfg.tie_word_embeddings
    assert "unembed.W_U" in dict(model.named_parameters())
    assert {"unembed.hook_in", "unembed.hook_out"} <= set(model.hook_dict)
    model.embed.W_E += 1
    assert not torch.equal(model.unembed.W_U, model.embed.W_E.T)
    model.untie()


@pytest.mark.parametrize(("flag", "agree"), [(True, True), (True, False), (False, True)])
def test_from_hooked_ties_only_if_flag_and_weights_agree(flag, agree):
    plain = plain_model(tie_word_embeddings=flag)
    if agree:
        plain.unembed.W_U.data = plain.embed.W_E.detach().T.clone()
    model = SelfAblatingTransformer.from_hooked(plain, gates_for("gpt2"))
    assert model.tied == (flag and agree)
    assert model.cfg.tie_word_embeddings == (flag and agree)
    assert torch.equal(model(random_tokens()), plain(random_tokens()))
    assert plain.cfg.tie_word_embeddings == flag


def test_processing_unties_first_and_says_so(caplog):
    model, tokens = model_with(True), random_tokens()
    before = model.embed.W_E.detach().clone()
    with caplog.at_level(logging.WARNING, logger="sa_lens"):
        model.process_weights_(center_writing_weights=False)
    assert "untied" in caplog.text
    assert not model.tied
    assert torch.equal(model.embed.W_E, before)
    assert model(tokens).isfinite().all()
