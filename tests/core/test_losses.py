"""The two-stream loss, term by term, against its formula written out."""

from __future__ import annotations

import pytest
import torch
from small_models import gated_model, random_tokens

from sa_lens.config import LossConfig
from sa_lens.core import TwoStreamLoss
from sa_lens.core.loss_terms import cross_entropy, reconstruction_loss


def slow_cross_entropy(logits, targets):
    """Mean of -log p(target), in float64."""
    p = torch.softmax(logits.double(), -1)
    return torch.stack(
        [-p[b, t, targets[b, t]].log() for b in range(len(targets)) for t in range(targets.shape[1])]
    ).mean()


def test_next_token_and_given_targets():
    logits = torch.randn(2, 5, 23, generator=torch.Generator().manual_seed(0))
    tokens = random_tokens(2, 5)
    expected = slow_cross_entropy(logits[:, :-1], tokens[:, 1:])
    assert cross_entropy(logits, tokens).item() == pytest.approx(expected.item(), rel=1e-6)
    targets = random_tokens(2, 5, seed=1)
    expected = slow_cross_entropy(logits, targets)
    assert cross_entropy(logits, tokens, targets).item() == pytest.approx(expected.item(), rel=1e-6)


def test_padding_is_left_out():
    logits = torch.randn(2, 5, 23, generator=torch.Generator().manual_seed(0))
    tokens, keep = random_tokens(2, 5), torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    # 4 pairs of the first row, (2, 3) and (3, 4) of the second
    rows = [slow_cross_entropy(logits[:1, :-1], tokens[:1, 1:]), slow_cross_entropy(logits[1:, 2:-1], tokens[1:, 3:])]
    expected = (4 * rows[0] + 2 * rows[1]) / 6
    assert cross_entropy(logits, tokens, attention_mask=keep).item() == pytest.approx(expected.item(), rel=1e-6)
    targets = random_tokens(2, 5, seed=1)
    rows = [slow_cross_entropy(logits[:1], targets[:1]), slow_cross_entropy(logits[1:, 2:], targets[1:, 2:])]
    expected = (5 * rows[0] + 3 * rows[1]) / 8
    assert cross_entropy(logits, tokens, targets, keep).item() == pytest.approx(expected.item(), rel=1e-6)


def test_losses_are_float32_in_narrow_precision():
    logits, tokens = torch.randn(2, 5, 23).bfloat16(), random_tokens(2, 5)
    assert cross_entropy(logits, tokens).dtype == torch.float32
    assert torch.equal(cross_entropy(logits, tokens), cross_entropy(logits.float(), tokens))


def test_reconstruction_worked_by_hand():
    # (3, 4) -> (0.6, 0.8), (0, 2) -> (0, 1): squared differences 0.36, 0.04, mean 0.2; a parallel pair gives 0
    clean = [torch.tensor([[[3.0, 4.0]]]), torch.tensor([[[1.0, 1.0]]])]
    ablated = [torch.tensor([[[0.0, 2.0]]]), torch.tensor([[[5.0, 5.0]]])]
    assert reconstruction_loss(clean, ablated).item() == pytest.approx(0.1)


@pytest.mark.parametrize("scope", ["local", "global", "both"])
def test_terms_are_those_of_the_two_streams(scope):
    model, tokens = gated_model(scope=scope), random_tokens()
    cfg = LossConfig(clean=0.3, ablated=0.6, reconstruction=2.0)
    terms = TwoStreamLoss(model, cfg)(tokens)
    _, clean_cache = model.run_with_cache(tokens)
    with model.ablated():
        ablated_logits, ablated_cache = model.run_with_cache(tokens)
    outputs = []
    for cache in (clean_cache, ablated_cache):
        final = model.ln_final(cache["resid_post", 1])
        outputs.append([*(cache["resid_post", layer] for layer in range(2)), final])
    pieces = []
    for c, a in zip(*outputs, strict=True):
        c, a = c / c.square().sum(-1, keepdim=True).sqrt(), a / a.square().sum(-1, keepdim=True).sqrt()
        pieces.append((c - a).square().mean())
    torch.testing.assert_close(terms.clean, slow_cross_entropy(model(tokens)[:, :-1], tokens[:, 1:]).float())
    torch.testing.assert_close(terms.ablated, slow_cross_entropy(ablated_logits[:, :-1], tokens[:, 1:]).float())
    torch.testing.assert_close(terms.reconstruction, sum(pieces) / 3)
    torch.testing.assert_close(terms.total, 0.3 * terms.clean + 0.6 * terms.ablated + 2.0 * terms.reconstruction)
    streams = model.run_streams(tokens)
    torch.testing.assert_close(streams.clean_loss, terms.clean)
    torch.testing.assert_close(streams.ablated_loss, terms.ablated)
    torch.testing.assert_close(streams.reconstruction, terms.reconstruction)


def test_terms_that_are_left_out_are_none():
    model, tokens = gated_model(), random_tokens()
    terms = TwoStreamLoss(model, LossConfig(clean=1, ablated=1))(tokens)
    assert terms.reconstruction is None
    torch.testing.assert_close(terms.total, terms.clean + terms.ablated)


def test_without_gates_the_loss_is_the_clean_one_whatever_the_coefficients():
    model, tokens = gated_model(scope="none"), random_tokens()
    terms = TwoStreamLoss(model, LossConfig(clean=0.25, ablated=3, reconstruction=1))(tokens)
    assert terms.ablated is None
    assert terms.reconstruction is None
    assert torch.equal(terms.total, terms.clean)
    torch.testing.assert_close(terms.total, model(tokens, return_type="loss"))


def test_the_stream_that_is_chosen_makes_no_difference():
    model, tokens = gated_model(), random_tokens()
    loss = TwoStreamLoss(model)
    outside = loss(tokens).total
    with model.ablated(position=2):
        assert torch.equal(loss(tokens).total, outside)


def test_every_parameter_is_trained_by_the_loss():
    for scope in ("local", "global", "both"):
        model = gated_model(scope=scope)
        TwoStreamLoss(model)(random_tokens()).total.backward()
        for name, parameter in model.named_parameters():
            if name.endswith("attn.b_K"):
                continue  # adds the same to all scores of a query in the clean stream
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), name
