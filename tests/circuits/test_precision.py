"""Figures of models in every precision: those that float64 gives for the same logits, activations and gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from micro import gated, token_pairs

from sa_lens.circuits import metrics, skill
from sa_lens.circuits.discovery.acdc import acdc
from sa_lens.circuits.discovery.eap import eap, eap_ig
from sa_lens.circuits.discovery.exact_effects import exact_effects
from sa_lens.circuits.discovery.gate_circuit import mask_shares
from sa_lens.circuits.judging.faithfulness import faithfulness
from sa_lens.circuits.patching.activation_patching import patch
from sa_lens.circuits.patching.node_attribution import attribute_nodes
from sa_lens.circuits.running.circuit_by_hooks import run_circuit
from sa_lens.core.host import run_to_last
from sa_lens.core.nodes import split_inputs, why_not_single_nodes

PRECISIONS = [torch.bfloat16, torch.float16, torch.float64]
QUIET: dict[str, Any] = {"progress": False}


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def divergence(p_logits: torch.Tensor, q_logits: torch.Tensor) -> np.ndarray:
    p, q = (log_softmax(x.double().numpy()) for x in (p_logits, q_logits))
    return (np.exp(p) * (p - q)).sum(-1)


def last(model: Any, tokens: torch.Tensor, stream: str) -> torch.Tensor:
    """Logits at the end, as the model gives them."""
    with torch.no_grad():
        if stream == "clean":
            return model(tokens)[:, -1]
        with model.ablated(position=-1):
            return model(tokens)[:, -1]


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_metrics_of_narrow_logits(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(64, 2048, generator=generator) * 3).to(dtype)
    other = (logits.double() + 0.05 * torch.randn(64, 2048, generator=generator)).to(dtype)
    pairs = token_pairs(64, d_vocab=2048)
    x, rows = logits.double().numpy(), np.arange(64)
    answer, wrong = x[rows, pairs.answers], x[rows, pairs.wrong_answers]
    expected = {
        "logit_difference": answer - wrong,
        "pair_accuracy": answer > wrong,
        "answer_rank": (x >= answer[:, None]).sum(-1) - 1,
        "answer_log_probability": log_softmax(x)[rows, pairs.answers],
    }
    for name, values in expected.items():
        np.testing.assert_allclose(metrics.METRICS[name](logits, pairs), values, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(metrics.kl(other, logits), divergence(logits, other), atol=1e-5)


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_accuracy_is_counted(dtype: torch.dtype) -> None:
    pairs = token_pairs(1000)
    logits = torch.zeros(1000, 61, dtype=dtype)
    right = torch.arange(1000) < 799
    logits[torch.arange(1000), torch.where(right, pairs.answers, pairs.wrong_answers)] = 1
    for name in ("pair_accuracy", "top1_accuracy"):
        assert float(metrics.METRICS[name](logits, pairs).mean()) == pytest.approx(0.799, abs=1e-6)


@pytest.mark.parametrize("stream", ["clean", "ablated"])
@pytest.mark.parametrize("dtype", PRECISIONS)
def test_figures_of_a_narrow_model(dtype: torch.dtype, stream: Any) -> None:
    model, pairs = gated(n_layers=1).to(dtype), token_pairs(6)
    masks = "frozen" if stream == "ablated" else None
    clean, corrupt = last(model, pairs.clean, stream), last(model, pairs.corrupt, stream)
    assert clean.dtype == dtype
    row = skill(model, pairs, stream).iloc[0]
    rows = torch.arange(6)
    difference = (clean.double()[rows, pairs.answers] - clean.double()[rows, pairs.wrong_answers]).mean()
    assert row["logit_difference"] == pytest.approx(float(difference), rel=1e-6)
    # the whole residual stream of the other prompt is the other prompt's run
    options: dict[str, Any] = {
        "what": "resid_pre",
        "layers": [0],
        "positions": "all",
        "stream": stream,
        "masks": masks,
        **QUIET,
    }
    swapped = patch(model, pairs, metric="kl", direction="noise", **options)
    if stream == "clean":
        assert swapped["value"][0] == pytest.approx(divergence(clean, corrupt).mean(), rel=1e-4)
    assert swapped["corrupt"][0] == pytest.approx(divergence(clean, corrupt).mean(), rel=1e-4)
    found = acdc(model, pairs, 0.05, stream=stream, masks=masks, **QUIET)
    run = run_circuit(model, pairs, found.circuit, stream=stream, masks=masks)
    tolerance = {"rel": 1e-3, "abs": 1e-5}
    assert found.value == pytest.approx(divergence(clean, run).mean(), **tolerance)
    assert found.shortcuts == ("on" if dtype == torch.float64 else why_not_single_nodes(model))
    any_gap = replace(metrics.METRICS["kl"], minimum_gap=1e-6)
    curve = faithfulness(model, pairs, [found.circuit], stream=stream, masks=masks, metric=any_gap, **QUIET)
    assert curve.points[0].kl.mean == pytest.approx(divergence(clean, run).mean(), **tolerance)


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_attribution_in_a_narrow_model(dtype: torch.dtype) -> None:
    """Differences, products and sums are those of float64 on the activations and gradients of the model's own pass."""
    model, pairs = gated(n_layers=1).to(dtype), token_pairs(6)
    names = ("blocks.0.hook_resid_pre", "blocks.0.hook_mlp_out", "blocks.0.hook_resid_post")
    seen: dict[str, torch.Tensor] = {}

    def keep(x: torch.Tensor, hook: Any) -> None:
        x.retain_grad()
        seen[hook.name] = x

    def changes_and_gradients() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        hooks = [(name, keep) for name in names]
        run_to_last(model, pairs.corrupt, hooks)
        carried = {name: x.detach().double() for name, x in seen.items()}
        logits, rows = run_to_last(model, pairs.clean, hooks), torch.arange(6)
        (logits[rows, pairs.answers] - logits[rows, pairs.wrong_answers]).sum().backward()
        changes = {name: carried[name] - x.detach().double() for name, x in seen.items()}
        return changes, {name: x.grad.double() for name, x in seen.items() if x.grad is not None}

    with split_inputs(model):
        changes, gradients = changes_and_gradients()
    scores = eap(model, pairs, **QUIET).table().set_index("edge")["score"]
    for edge, name in (("embed->logits", names[0]), ("m0->logits", names[1])):
        expected = -float((changes[name] * gradients[names[2]]).sum((1, 2)).mean())
        assert scores[edge] == pytest.approx(expected, rel=2e-5, abs=1e-9)
    changes, gradients = changes_and_gradients()
    estimate = float((changes[names[1]] * gradients[names[1]]).sum((1, 2)).mean())
    assert attribute_nodes(model, pairs, "mlps", **QUIET)["estimate"][0] == pytest.approx(estimate, rel=2e-5, abs=1e-9)
    # at one point the line of inputs is the clean prompt
    line = eap_ig(model, pairs, steps=1, rule="right", **QUIET).table().set_index("edge")["score"]
    assert line["m0->logits"] == pytest.approx(scores["m0->logits"])
    effects = exact_effects(model, pairs, metric="kl", **QUIET)
    exists = effects.graph.exists
    assert bool((effects.scores[exists] > -1e-6).all()), "a divergence from the unedited prompt is not negative"


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_shares_of_masks_are_counted_in_a_narrow_model(dtype: torch.dtype) -> None:
    model, pairs = gated(n_layers=1).to(dtype), token_pairs(300)
    with torch.no_grad(), model.ablated(position=-1):
        _, cache = model.run_with_cache(pairs.clean)
    kept = cache["mask", 0, "mlp_gate"][:, -1].double().mean(0)
    torch.testing.assert_close(mask_shares(model, pairs).mlp[0], kept, rtol=0, atol=1e-12)
