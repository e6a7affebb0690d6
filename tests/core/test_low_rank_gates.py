"""Gates whose matrix is a product of two narrow ones (`rank`), against gates with the product as a full matrix."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from small_models import gates_for, plain_model, random_tokens
from torch import Tensor

from sa_lens.config import GateConfig, LossConfig
from sa_lens.core import SelfAblatingTransformer, TwoStreamLoss
from sa_lens.core.gate import Gate
from sa_lens.core.host import fingerprint_of

LOSS = LossConfig(clean=0.7, ablated=1.3, reconstruction=0.3)
SCOPES = [("local", "learned"), ("local", "ablated"), ("global", "learned"), ("both", "learned")]


def low_rank_model(scope: str = "local", scores: str = "learned", shape: str = "gpt2") -> SelfAblatingTransformer:
    gates = gates_for(shape, scope, scores=scores, rank=3)
    return SelfAblatingTransformer.from_hooked(plain_model(shape), gates, seed=5).to(torch.float64, print_details=False)


def full_twin(model: SelfAblatingTransformer) -> SelfAblatingTransformer:
    """The same model with each product of two matrices as one."""
    twin = SelfAblatingTransformer.from_hooked(model, dataclasses.replace(model.gates, rank=None))
    state = model.state_dict()
    for name in [name for name in state if "_gate.A_" in name]:
        state[name.replace(".A_", ".W_")] = state.pop(name) @ state.pop(name.replace(".A_", ".B_"))
    twin.load_state_dict(state)
    return twin


@pytest.mark.parametrize("path", ["hooked", "fused"])
@pytest.mark.parametrize(("scope", "scores"), SCOPES)
def test_losses_and_gradients_are_those_of_the_product(scope: str, scores: str, path: str) -> None:
    model, tokens = low_rank_model(scope, scores), random_tokens(3, 9)
    twin = full_twin(model)
    found, expected = TwoStreamLoss(model, LOSS, path=path)(tokens), TwoStreamLoss(twin, LOSS, path="hooked")(tokens)
    assert [x.item() for x in found] == pytest.approx([x.item() for x in expected], rel=1e-9)
    found.total.backward()
    expected.total.backward()
    weights, of_twin = dict(model.named_parameters()), dict(twin.named_parameters())
    assert weights.keys() - of_twin.keys() == {n for n in weights if "_gate.A_" in n or "_gate.B_" in n}
    for name, parameter in weights.items():
        full = name.replace(".A_", ".W_").replace(".B_", ".W_")
        gradient: Tensor = of_twin[full].grad
        if full != name:
            other = weights[name.replace(".A_", ".B_") if ".A_" in name else name.replace(".B_", ".A_")].detach()
            gradient = gradient @ other.T if ".A_" in name else other.T @ gradient
        assert float((parameter.grad - gradient).norm()) <= 1e-8 * float(gradient.norm()) + 1e-14, name


@pytest.mark.parametrize(("scope", "scores"), SCOPES)
@torch.no_grad()
def test_streams_processing_and_files(scope: str, scores: str, tmp_path) -> None:
    model, tokens = low_rank_model(scope, scores), random_tokens()
    expected = full_twin(model).run_streams(tokens)
    loaded = SelfAblatingTransformer.from_pretrained(model.save_pretrained(tmp_path / "model"), device="cpu")
    assert loaded.gates == model.gates
    for other in (model, loaded):
        found = other.run_streams(tokens)
        torch.testing.assert_close(found.ablated_logits, expected.ablated_logits)
        assert torch.equal(found.mask_mlp, expected.mask_mlp)
    assert "blocks.0.mlp_gate.hook_scores" in model.hook_dict
    loaded.process_weights_()
    folded = loaded.run_streams(tokens).ablated_logits.log_softmax(-1)
    torch.testing.assert_close(folded, expected.ablated_logits.log_softmax(-1), atol=1e-5, rtol=0)


def test_a_file_that_names_no_rank_has_full_matrices(tmp_path) -> None:
    model = SelfAblatingTransformer.from_hooked(plain_model(), gates_for("gpt2"))
    folder = model.save_pretrained(tmp_path / "model")
    written = json.loads((folder / "config.json").read_text())
    assert written["gates"].pop("rank") is None
    (folder / "config.json").write_text(json.dumps(written))
    assert SelfAblatingTransformer.from_pretrained(folder, device="cpu").gates == model.gates


@pytest.mark.parametrize("rank", [1, 4, 40])
def test_first_scores_have_the_scale_of_full_matrices(rank: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, spread = 3 * torch.randn(1, 50, 256, generator=generator), {}
    for chosen in (None, rank):
        scores = []
        for _ in range(40):
            gate = Gate(GateConfig(rank=chosen), 8, 256, (16, 8))
            gate.reset_parameters(generator)
            assert all(bool((p != 0).all()) for p in gate.parameters())
            scores.append(gate.project(x, None).detach())
        spread[chosen] = float(torch.stack(scores).std())
    assert spread[rank] == pytest.approx(spread[None], rel=0.15 if rank == 1 else 0.08)
    assert spread[None] == pytest.approx(math.sqrt((9 * 256 + 1) / (3 * 256)), rel=0.02), "by hand"


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("scope", ["none", "local", "both"])
def test_the_number_of_parameters(scope: str, rank: int | None) -> None:
    gates = GateConfig(scope, rank=rank)
    model = SelfAblatingTransformer.from_hooked(plain_model(), gates)
    expected = 2 * (gates.count_parameters(16, 16) + gates.count_parameters(16, 24))
    assert sum(p.numel() for p in model.gate_parameters()) == expected


def test_the_fingerprint_depends_on_the_rank_alone_if_it_is_given() -> None:
    full, narrow = (SelfAblatingTransformer.from_hooked(plain_model(), gates_for("gpt2", rank=r)) for r in (None, 3))
    assert fingerprint_of(full) != fingerprint_of(narrow)
    assert fingerprint_of(full, "clean") != fingerprint_of(narrow, "clean")


@pytest.mark.parametrize(
    ("gates", "message"),
    [
        ({"rank": 0}, "gates.rank=0 must be at least 1"),
        ({"rank": 16}, r"gates.rank=16 must be less than both sizes.*d_model=16 and 16 units.*from 1 to 15"),
        ({"rank": 4, "attn_unit": "head"}, r"gates.rank=4 must be less.*4 units of a layer \(k_attn\).*from 1 to 3"),
        ({"rank": 3, "scores": "random-token"}, "gates.rank=3 does not fit gates.scores='random-token'"),
    ],
)
def test_ranks_that_do_not_fit_are_refused(gates: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SelfAblatingTransformer.from_hooked(plain_model(), GateConfig(k_attn=2, k_mlp=2, **gates))
