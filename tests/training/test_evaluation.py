"""An evaluation against a slow twin that goes token by token."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from sa_lens.config import GateConfig, ModelConfig
from sa_lens.core import SelfAblatingTransformer
from sa_lens.core.fused import why_not_fused
from sa_lens.training import evaluation
from sa_lens.training.evaluation import evaluate

SHAPE = ModelConfig(n_layers=2, d_model=8, n_heads=2, n_ctx=6, d_vocab=11, init="gpt2")
BLOCKS = np.random.default_rng(0).integers(0, 11, (5, 7))


def model(**gates: object) -> SelfAblatingTransformer:
    return SelfAblatingTransformer(SHAPE, GateConfig(**{"k_attn": 2, "k_mlp": 3, **gates}), device="cpu")  # type: ignore[arg-type]


@pytest.mark.parametrize("path", ["fused", "hooked"])
@pytest.mark.parametrize("gates", [{}, {"scope": "global"}, {"scores": "ablated"}, {"attn_unit": "head", "k_attn": 1}])
def test_against_a_slow_twin(gates: dict[str, object], path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gated = model(**gates)
    assert why_not_fused(gated) is None
    if path == "hooked":
        monkeypatch.setattr(evaluation, "reads_fused", lambda model: False)
    found = evaluate(gated, BLOCKS, bytes_per_token=3.0)
    nats: dict[str, list[float]] = {"clean": [], "ablated": []}
    kept: dict[tuple[str, int], set[int]] = {}
    shared: list[float] = []
    for block in torch.from_numpy(BLOCKS):
        streams = gated.run_streams(block[None, :-1])
        for name, logits in (("clean", streams.clean_logits), ("ablated", streams.ablated_logits)):
            nats[name] += [-float(logits.detach()[0, t].log_softmax(-1)[block[t + 1]]) for t in range(6)]
        for kind, masks in (("attn", streams.mask_attn), ("mlp", streams.mask_mlp)):
            for layer, mask in enumerate(masks):
                rows = [set(row.flatten().nonzero().flatten().tolist()) for row in mask[0]]
                kept.setdefault((kind, layer), set()).update(*rows)
                shared += [len(a & b) / len(a) for a, b in itertools.pairwise(rows)]
    assert found.tokens == 30
    for name in ("clean", "ablated"):
        loss = np.mean(nats[name])
        assert getattr(found, f"{name}_loss") == pytest.approx(loss, rel=1e-5)
        assert getattr(found, f"{name}_perplexity") == pytest.approx(math.exp(loss), rel=1e-4)
        assert getattr(found, f"{name}_bits_per_byte") == pytest.approx(loss / math.log(2) / 3, rel=1e-5)
    n_attn = 2 if "attn_unit" in gates else 8
    used = {kind: sum(len(units) for (k, _), units in kept.items() if k == kind) for kind in ("attn", "mlp")}
    assert found.attn_units_used == pytest.approx(used["attn"] / (2 * n_attn))
    assert found.mlp_units_used == pytest.approx(used["mlp"] / (2 * 32))
    assert found.units_used == pytest.approx((used["attn"] + used["mlp"]) / (2 * (n_attn + 32)))
    assert found.mask_overlap == pytest.approx(np.mean(shared), rel=1e-5)


def test_how_it_is_cut_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    gated = model()
    whole = evaluate(gated, BLOCKS, bytes_per_token=3.0)
    monkeypatch.setattr(evaluation, "TOKENS_AT_ONCE", 1)
    one_by_one = evaluate(gated, BLOCKS, bytes_per_token=3.0)
    for name in ("clean_loss", "ablated_loss", "units_used", "mask_overlap"):
        assert getattr(one_by_one, name) == pytest.approx(getattr(whole, name), rel=1e-6)


def test_shares_of_processes_add_up() -> None:
    """Each process's tensors are recorded on a first pass and summed on the second, as a reduction would."""
    gated = model()
    calls: list[list[torch.Tensor]] = []
    for rank in range(3):
        recorded: list[torch.Tensor] = []
        evaluate(
            gated, BLOCKS, bytes_per_token=3.0, share=(rank, 3), total=lambda x, r=recorded: (r.append(x.clone()), x)[1]
        )
        calls.append(recorded)
    sums = [torch.stack(parts).sum(0) for parts in zip(*calls, strict=True)]
    left = iter(sums)
    found = evaluate(gated, BLOCKS, bytes_per_token=3.0, share=(1, 3), total=lambda _: next(left))
    whole = evaluate(gated, BLOCKS, bytes_per_token=3.0)
    for name in ("clean_loss", "ablated_loss", "units_used", "attn_units_used", "mlp_units_used", "mask_overlap"):
        assert getattr(found, name) == pytest.approx(getattr(whole, name), rel=1e-6)


def test_without_gates_there_is_one_stream() -> None:
    found = evaluate(model(scope="none"), BLOCKS, bytes_per_token=3.0)
    assert found.ablated_loss is None
    assert found.units_used is None


def test_it_changes_nothing() -> None:
    gated = model()
    before = {name: p.clone() for name, p in gated.named_parameters()}
    generator = torch.get_rng_state()
    evaluate(gated, BLOCKS, bytes_per_token=3.0)
    assert torch.equal(generator, torch.get_rng_state())
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in gated.named_parameters())


@pytest.mark.parametrize("scope", ["local", "global", "both"])
def test_masks_are_those_of_the_ablated_pass(scope: str) -> None:
    gated = model(scope=scope)
    tokens = torch.from_numpy(BLOCKS)[:, :6]
    expected = gated.run_both_passes(tokens).masks
    for with_gradient in (True, False):
        with torch.set_grad_enabled(with_gradient):
            found = gated.record_masks(tokens)
        assert found.keys() == expected.keys()
        for name in found:
            assert all(torch.equal(a, b) for a, b in zip(found[name], expected[name], strict=True))
    with pytest.raises(ValueError, match="needs gates"):
        model(scope="none").record_masks(tokens)


@torch.no_grad()
def test_hooks_of_the_caller_act_on_every_figure() -> None:
    gated = model()

    def zero(x: torch.Tensor, hook: object) -> torch.Tensor:
        return torch.zeros_like(x)

    plain = evaluate(gated, BLOCKS, bytes_per_token=3.0)
    with gated.hooks(fwd_hooks=[("hook_embed", zero)]):
        found = evaluate(gated, BLOCKS, bytes_per_token=3.0)
        streams = gated.run_streams(torch.from_numpy(BLOCKS[:, :-1]), torch.from_numpy(BLOCKS[:, 1:]))
    assert found.clean_loss == pytest.approx(float(streams.clean_loss), rel=1e-5)
    assert found.ablated_loss == pytest.approx(float(streams.ablated_loss), rel=1e-5)
    assert found.ablated_loss != pytest.approx(plain.ablated_loss, rel=1e-3)
