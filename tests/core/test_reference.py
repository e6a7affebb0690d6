"""Golden files made by the paper's own code in float64: logits, masks, loss and every gradient; weights in and out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from sa_lens.config import GateConfig, LossConfig, ModelConfig
from sa_lens.core import SelfAblatingTransformer, TwoStreamLoss, reference

GOLDEN = Path(__file__).parent / "golden"


class Golden(NamedTuple):
    state: dict[str, torch.Tensor]
    gates: GateConfig
    config: dict[str, Any]
    arrays: dict[str, np.ndarray]

    def tensor(self, name: str) -> torch.Tensor:
        return torch.from_numpy(self.arrays[name])

    def model(self, dtype: torch.dtype = torch.float64) -> SelfAblatingTransformer:
        state = {name: value.to(dtype) for name, value in self.state.items()}
        return SelfAblatingTransformer.from_reference(state, self.gates, n_heads=self.config["num_heads"])


@pytest.fixture(scope="module", params=["local", "global"])
def golden(request):
    with np.load(GOLDEN / f"{request.param}_hard.npz") as file:
        arrays = {name: file[name] for name in file.files}
    config = json.loads(str(arrays["config"]))
    gates = GateConfig(
        scope=request.param,
        k_attn=config["k_attention"],
        k_mlp=config["k_neurons"],
        temperature=config["temperature_attention"],
    )
    state = {
        name.removeprefix("param."): torch.from_numpy(a) for name, a in arrays.items() if name.startswith("param.")
    }
    return Golden(state, gates, config, arrays)


def test_logits_and_masks(golden):
    model = golden.model()
    assert model.embed.W_E.dtype == torch.float64
    tokens = golden.tensor("tokens")
    streams = model.run_streams(tokens, golden.tensor("targets"))

    def within(found: torch.Tensor, name: str) -> None:
        torch.testing.assert_close(found, golden.tensor(name), rtol=0, atol=1e-9, check_dtype=False)

    within(streams.clean_logits, "logits_clean")
    within(streams.ablated_logits, "logits_ablated")
    within(streams.mask_attn.permute(1, 2, 0, 3, 4).flatten(3), "mask_attn")
    within(streams.mask_mlp.permute(1, 2, 0, 3), "mask_mlp")
    within(model(tokens), "logits_clean")
    with model.ablated():
        within(model(tokens), "logits_ablated")
    for position in (0, 7, -1):
        with model.ablated(position=position):
            torch.testing.assert_close(
                model(tokens)[:, position], golden.tensor("logits_ablated")[:, position], rtol=0, atol=1e-9
            )
    assert streams.clean_loss.item() == pytest.approx(golden.arrays["loss_clean"].item(), abs=1e-6)
    assert streams.ablated_loss.item() == pytest.approx(golden.arrays["loss_ablated"].item(), abs=1e-6)


def test_loss_and_every_gradient(golden):
    model = golden.model()
    coefficients = LossConfig(clean=golden.config["loss_coeff_base"], ablated=golden.config["loss_coeff_ablated"])
    terms = TwoStreamLoss(model, coefficients)(golden.tensor("tokens"), golden.tensor("targets"))
    assert terms.total.item() == pytest.approx(golden.arrays["loss"].item(), abs=1e-6)
    terms.total.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            # so that the exporter names and transposes gradients as it does weights
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    found = reference.save(model)
    stored = {name.removeprefix("grad."): golden.tensor(name) for name in golden.arrays if name.startswith("grad.")}
    assert len(stored) >= len(golden.state) - 1
    for name, gradient in stored.items():
        assert (found[name] - gradient).norm() <= 1e-6 * gradient.norm(), name


def test_float32_logits(golden):
    streams = golden.model(torch.float32).run_streams(golden.tensor("tokens"))
    for found, name in ((streams.clean_logits, "logits_clean"), (streams.ablated_logits, "logits_ablated")):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, golden.tensor(name).float(), rtol=0, atol=1e-5)


def test_a_file_and_a_training_checkpoint_load_like_the_state_itself(golden, tmp_path):
    torch.save({"model_state_dict": golden.state, "step": 3}, tmp_path / "best_model.pt")
    heads = golden.config["num_heads"]
    loaded = SelfAblatingTransformer.from_reference(tmp_path / "best_model.pt", golden.gates, n_heads=heads)
    for name, value in golden.model().state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_weights_go_out_as_they_came_in(golden):
    out = reference.save(golden.model())
    assert set(out) == set(golden.state)
    for name, value in golden.state.items():
        assert torch.equal(out[name], value), name


def test_biases_that_the_reference_lacks_stay_zero_and_untrained(golden):
    model = golden.model()
    lacking = [n for n, _ in model.named_parameters() if n.rsplit(".", 1)[-1] in ("b_Q", "b_K", "b_V", "b_U")]
    assert len(lacking) == 3 * 3 + 1
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (name not in lacking)
        if name in lacking:
            assert not parameter.any()
    with torch.no_grad():
        model.blocks[1].attn.b_V[0, 0] = 0.1
    with pytest.raises(ValueError, match=r"b_V.*not zero"):
        reference.save(model)


LAYER_0 = "transformer.h.0"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_heads": 7}, "n_heads=7 does not divide d_model=24"),
        ({"n_heads": 0}, "n_heads=0"),
        ({"drop": f"{LAYER_0}.mlp.c_proj.bias"}, r"lack what blocks\.0\.mlp\.b_out"),
        ({"drop": "transformer.wpe.weight"}, "lack transformer.wpe.weight"),
        ({"drop": "transformer.ln_f.bias"}, "lack what ln_final.b"),
        ({"drop": "transformer.wte.weight"}, "not weights of the reference"),
        ({"put": (f"{LAYER_0}.mlp.c_proj.bias", (5,))}, r"b_out: the reference has shape \(5,\), expected \(24,\)"),
        ({"put": (f"{LAYER_0}.attn.attention.q_proj.bias", (24,))}, "q_proj.bias"),
        ({"put": ("transformer.h.0.something.weight", (24,))}, "something.weight"),
        ({"scope": "none"}, "scope"),
        ({"scope": "both"}, "scope"),
        ({"k_attn": 25}, "k_attn=25"),
        ({"k_mlp": 97}, "k_mlp=97"),
    ],
    ids=str,
)
def test_a_mismatch_is_a_clear_error(golden, change, message):
    state, heads = dict(golden.state), change.get("n_heads", 4)
    if "drop" in change:
        del state[change["drop"]]
    if "put" in change:
        name, shape = change["put"]
        state[name] = torch.zeros(shape, dtype=torch.float64)
    values = {key: change[key] for key in ("scope", "k_attn", "k_mlp") if key in change}
    gates = GateConfig(**{"scope": golden.gates.scope, "k_attn": 5, "k_mlp": 7, **values})
    with pytest.raises(ValueError, match=message):
        SelfAblatingTransformer.from_reference(state, gates, n_heads=heads)


def test_attention_buffers_of_the_reference_are_no_weights(golden):
    extra = {
        f"{LAYER_0}.attn.attention.bias": torch.ones(1, 1, 20, 20, dtype=torch.bool),
        f"{LAYER_0}.attn.attention.masked_bias": torch.tensor(-1e9),
    }
    model = SelfAblatingTransformer.from_reference({**golden.state, **extra}, golden.gates, n_heads=4)
    assert torch.equal(model(golden.tensor("tokens")), golden.model()(golden.tensor("tokens")))


def test_a_missing_file(golden, tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        SelfAblatingTransformer.from_reference(tmp_path / "absent.pt", golden.gates)


def test_a_damaged_file(golden, tmp_path):
    (tmp_path / "bad.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="damaged"):
        SelfAblatingTransformer.from_reference(tmp_path / "bad.pt", golden.gates)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda w: w.fill_(float("nan")), "holds values that are NaN or infinite"),
        (lambda w: w.to(torch.int8), r"is of type torch.int8, but the model is of type torch.float32"),
        (lambda w: w.to(torch.complex64), r"is of type torch.complex64"),
        (lambda w: w.double(), r"is of type torch.float64"),
    ],
)
def test_weights_that_are_no_finite_numbers_of_one_type(change, match):
    shape = ModelConfig(n_layers=1, d_model=16, n_heads=4, n_ctx=8, d_vocab=23)
    gates = GateConfig(k_attn=3, k_mlp=5)
    state = reference.save(SelfAblatingTransformer(shape, gates, device="cpu"))
    name = "transformer.h.0.mlp.c_fc.weight"
    with pytest.raises(ValueError, match=f"cannot be loaded: blocks.0.mlp.W_in {match}"):
        SelfAblatingTransformer.from_reference({**state, name: change(state[name])}, gates, n_heads=4)
