"""What is trained, and what decays."""

from __future__ import annotations

import pytest
import torch

from sa_lens.config import GateConfig, ModelConfig, TrainConfig
from sa_lens.core import SelfAblatingTransformer
from sa_lens.training.checkpoints import optimizer_tensors
from sa_lens.training.optimizer import adamw, allocate_averages, choose_trained

SHAPE = ModelConfig(n_layers=1, d_model=8, n_heads=2, n_ctx=8, d_vocab=11)


def model(gates: GateConfig) -> SelfAblatingTransformer:
    return SelfAblatingTransformer(SHAPE, gates, device="cpu")


def test_everything_but_absent_biases_is_trained() -> None:
    gated = model(GateConfig(k_attn=2, k_mlp=2))
    trained = choose_trained(gated, "none")
    assert set(trained) == {name for name, _ in gated.named_parameters()} - set(gated.zero_biases)
    assert gated.zero_biases
    assert "blocks.0.attn_gate.W_local" in trained


def test_frozen_base_trains_gates_alone() -> None:
    trained = choose_trained(model(GateConfig(scope="both", k_attn=2, k_mlp=2)), "base")
    gates = [
        f"blocks.0.{gate}.{x}_{scope}"
        for gate in ("attn_gate", "mlp_gate")
        for x in "Wb"
        for scope in ("local", "global")
    ]
    assert sorted(trained) == sorted(gates)


@pytest.mark.parametrize("scores", ["random-token", "random-static"])
def test_random_gates_are_left_as_drawn(scores: str) -> None:
    random = model(GateConfig(k_attn=2, k_mlp=2, scores=scores))  # type: ignore[arg-type]
    trained = choose_trained(random, "none")
    assert not any("_gate" in name for name in trained)
    assert "blocks.0.attn.W_Q" in trained
    with pytest.raises(ValueError, match="nothing to train"):
        choose_trained(random, "base")


def test_a_gate_that_keeps_every_unit_is_left_out() -> None:
    trained = choose_trained(model(GateConfig(k_attn=8, k_mlp=2)), "none")
    assert not any("attn_gate" in name for name in trained)
    assert any("mlp_gate" in name for name in trained)


@pytest.mark.parametrize("gates", [GateConfig(scope="none"), GateConfig(k_attn=8, k_mlp=32)])
def test_nothing_left_to_train(gates: GateConfig) -> None:
    with pytest.raises(ValueError, match="nothing to train"):
        choose_trained(model(gates), "base")


def test_weight_decay_reaches_the_matrices_of_the_transformer_alone() -> None:
    gated = model(GateConfig(k_attn=2, k_mlp=2))
    choose_trained(gated, "none")
    names = {id(p): name for name, p in gated.named_parameters()}
    optimizer = adamw(gated, TrainConfig(weight_decay=0.1, betas=(0.8, 0.9), adam_eps=1e-6), fused=False)
    decayed = {names[id(p)] for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {
        "embed.W_E",
        "pos_embed.W_pos",
        *(f"blocks.0.attn.W_{x}" for x in "QKVO"),
        "blocks.0.mlp.W_in",
        "blocks.0.mlp.W_out",
    }
    for group in optimizer.param_groups:
        assert group["weight_decay"] in (0.1, 0.0)
        assert group["betas"] == (0.8, 0.9)
        assert group["eps"] == 1e-6


def test_averages_that_are_there_already_change_nothing() -> None:
    steps = []
    for allocated in (True, False):
        torch.manual_seed(0)
        gated = model(GateConfig(k_attn=2, k_mlp=2))
        optimizer = adamw(gated, TrainConfig(), fused=True)
        if allocated:
            allocate_averages(optimizer)
        assert not optimizer_tensors(gated, optimizer)
        # the first step leaves the gates out
        for trained in (list(gated.base_parameters()), list(gated.parameters())):
            optimizer.zero_grad()
            for parameter in trained:
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
            steps.append({**optimizer_tensors(gated, optimizer), **gated.state_dict()})
    for a, b in zip(steps[:2], steps[2:], strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)
