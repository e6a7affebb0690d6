"""The fused path is the hooked one, computed otherwise: same losses, same gradients, whatever the variant."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math

import pytest
import torch
from torch import Tensor

from sa_lens.config import GateConfig, LossConfig, ModelConfig
from sa_lens.core import HookedTransformerConfig, LossTerms, SelfAblatingTransformer, TwoStreamLoss

SHAPE = ModelConfig(n_layers=2, d_model=16, n_heads=4, n_ctx=12, d_vocab=31)
GATES = GateConfig(scope="local", k_attn=3, k_mlp=4, temperature=0.7)
LOSS = LossConfig(clean=0.7, ablated=1.3, reconstruction=0.3)


def build(
    gates: GateConfig = GATES, shape: ModelConfig = SHAPE, dtype: torch.dtype = torch.float64, seed: int = 0
) -> SelfAblatingTransformer:
    model = SelfAblatingTransformer(shape, gates, seed=seed, device="cpu")
    model.to(dtype, print_details=False)
    return model


def batch(shape: ModelConfig = SHAPE, length: int = 11, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    assert shape.d_vocab is not None
    tokens = torch.randint(0, shape.d_vocab, (3, length + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def gradients(
    model: SelfAblatingTransformer, loss: LossConfig, tokens: Tensor, targets: Tensor | None, **options: object
) -> tuple[LossTerms, dict[str, Tensor]]:
    model.zero_grad()
    terms = TwoStreamLoss(model, loss, **options)(tokens, targets)
    terms.total.backward()
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
    return terms, found


def relative(found: Tensor, expected: Tensor) -> float:
    scale = float(expected.norm())
    return float((found.double() - expected.double()).norm()) / scale if scale else float(found.norm())


def assert_same(
    model: SelfAblatingTransformer, loss: LossConfig, tokens: Tensor, targets: Tensor | None, **options: object
) -> None:
    """Losses and every gradient of both paths agree to 1e-8 in float64."""
    expected, expected_grads = gradients(model, loss, tokens, targets, path="hooked")
    found, found_grads = gradients(model, loss, tokens, targets, path="fused", **options)
    for name, term in expected._asdict().items():
        other = getattr(found, name)
        assert (term is None) == (other is None), name
        if term is not None:
            assert other.item() == pytest.approx(term.item(), rel=1e-8), name
    # keys' biases change no softmax: their gradients are zero but for rounding
    rounding = 1e-15 * math.sqrt(sum(float(g.norm()) ** 2 for g in expected_grads.values()))
    for name, gradient in expected_grads.items():
        assert float((found_grads[name] - gradient).norm()) <= 1e-8 * float(gradient.norm()) + rounding, name


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("scope", "kind", "surrogate", "unit"),
    list(itertools.product(("local", "global", "both"), ("hard", "soft"), ("sigmoid", "softmax"), ("channel", "head"))),
)
def test_equals_hooked_path(scope: str, kind: str, surrogate: str, unit: str, tied: bool) -> None:
    gates = dataclasses.replace(GATES, scope=scope, kind=kind, surrogate=surrogate, attn_unit=unit)
    model = build(gates, dataclasses.replace(SHAPE, tied_embedding=tied))
    tokens, targets = batch()
    assert_same(model, LOSS, tokens, targets)
    assert_same(model, LossConfig(clean=1.0, ablated=0.5), tokens, None)


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("scores", ["random-token", "random-static"])
def test_random_gates_pass_their_gradient_to_the_base_alone(scope: str, scores: str) -> None:
    model = build(dataclasses.replace(GATES, scope=scope, scores=scores))
    assert not any(p.requires_grad for name, p in model.named_parameters() if "_gate." in name)
    assert_same(model, LOSS, *batch())


@pytest.mark.parametrize("length", [1, 2, 12])
@pytest.mark.parametrize("scope", ["local", "global"])
def test_any_length(scope: str, length: int) -> None:
    model = build(dataclasses.replace(GATES, scope=scope))
    assert_same(model, LOSS, *batch(length=length))


def test_several_blocks_of_queries_and_chunks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    from sa_lens.core.fused import cross_entropy, two_stream_attention

    monkeypatch.setattr(two_stream_attention, "BLOCK", 4)
    monkeypatch.setattr(two_stream_attention, "BLOCK_ELEMENTS", 500)
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", 31 * 7)
    monkeypatch.setattr(cross_entropy, "CACHED_ELEMENTS", 31 * 3)
    for scope in ("none", "local", "both"):
        assert_same(build(dataclasses.replace(GATES, scope=scope)), LOSS, *batch())


@pytest.mark.parametrize(
    "changes",
    [
        {"d_mlp": 0},
        {"attn_scale": True},
        {"qkv_bias": True, "unembed_bias": True},
        {"unembed_bias": True, "tied_embedding": False},
        {"act_fn": "gelu"},
        {"act_fn": "relu"},
        {"act_fn": "silu"},
        {"n_heads": 2, "d_head": 6, "d_mlp": 40, "n_layers": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("scope", ["none", "local", "global"])
def test_shapes(changes: dict[str, object], scope: str) -> None:
    shape = dataclasses.replace(SHAPE, **changes)
    model = build(dataclasses.replace(GATES, scope=scope), shape)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and name.rsplit(".", 1)[-1] in ("b_Q", "b_K", "b_V", "b_U", "w", "b"):
                parameter.add_(torch.rand(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    assert_same(model, LOSS, *batch(shape))


ROTARY = {"positional_embedding_type": "rotary", "rotary_dim": 4}
GROUPED = {**ROTARY, "n_key_value_heads": 2, "normalization_type": "RMS", "final_rms": True}
LLAMA = {**GROUPED, "gated_mlp": True, "act_fn": "silu"}
LAYERS = {"use_local_attn": True, "attn_types": ["global", "local"], "window_size": 3}
OTHERS: dict[str, dict[str, object]] = {
    "GPT-Neo": {**LAYERS, "use_attn_scale": False, "act_fn": "gelu_new"},
    "GPT-J": {**ROTARY, "rotary_adjacent_pairs": True, "parallel_attn_mlp": True, "act_fn": "gelu_new"},
    "Pythia": {**ROTARY, "rotary_dim": 2, "parallel_attn_mlp": True},
    "Phi": {**ROTARY, "rotary_dim": 2, "rotary_adjacent_pairs": True, "parallel_attn_mlp": True},
    "Llama": LLAMA,
    "Llama, tied": {**LLAMA, "tie_word_embeddings": True},
    "Mistral": {**LLAMA, **LAYERS, "attn_types": ["local", "local"]},
    "two bases": {**LLAMA, **LAYERS, "rotary_base_local": 100},
    "StarCoder": {**ROTARY, "n_key_value_heads": 1},
    "Gemma's MLP": {"gated_mlp": True, "act_fn": "gelu_pytorch_tanh", "normalization_type": "RMSPre"},
    "gated with relu": {"gated_mlp": True, "act_fn": "relu2"},
    "SoLU": {"act_fn": "solu"},
    "scaled positions": {**ROTARY, "rotary_scaling_factor": 4.0, "attn_only": True},
}
"""Architectures that set several features together."""


def other(changes: dict[str, object], gates: GateConfig, dtype: torch.dtype = torch.float64) -> SelfAblatingTransformer:
    """A small model of another architecture in which no weight is zero or one."""
    sizes = {"n_layers": 2, "d_model": 16, "n_heads": 4, "d_head": 4, "d_mlp": 24, "n_ctx": 12, "d_vocab": 31}
    cfg = HookedTransformerConfig(**{**sizes, "act_fn": "gelu", "device": "cpu", "seed": 0, **changes})
    model = SelfAblatingTransformer(cfg, gates)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.to(dtype, print_details=False)


@pytest.mark.parametrize(
    ("scope", "kind"), [("none", "hard"), ("local", "hard"), ("global", "hard"), ("both", "soft")], ids=str
)
@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures(name: str, scope: str, kind: str) -> None:
    model = other(OTHERS[name], dataclasses.replace(GATES, scope=scope, kind=kind))
    assert_same(model, LOSS, *batch())
    model.freeze_base()
    if scope != "none":
        assert_same(model, LOSS, *batch())


@pytest.mark.parametrize(
    "changes",
    [
        {"normalization_type": None},
        {"normalization_type": "LNPre"},
        {"normalization_type": "RMS"},
        {"normalization_type": "RMSPre"},
        {"parallel_attn_mlp": True},
        {"scale_attn_by_inverse_layer_idx": True},
    ],
    ids=str,
)
def test_other_transformers(changes: dict[str, object]) -> None:
    cfg = HookedTransformerConfig(
        n_layers=2, d_model=16, d_head=4, n_ctx=12, d_vocab=31, act_fn="gelu", device="cpu", seed=0, **changes
    )
    for scope in ("local", "both"):
        model = SelfAblatingTransformer(cfg, dataclasses.replace(GATES, scope=scope))
        model.to(torch.float64, print_details=False)
        assert_same(model, LOSS, *batch())


@pytest.mark.parametrize(("k_attn", "k_mlp"), [(16, 64), (1, 1), (16, 3), (15, 63)])
def test_any_k(k_attn: int, k_mlp: int) -> None:
    for kind in ("hard", "soft"):
        assert_same(build(dataclasses.replace(GATES, k_attn=k_attn, k_mlp=k_mlp, kind=kind)), LOSS, *batch())


@pytest.mark.parametrize("scope", ["none", "local", "global", "both"])
def test_float32_is_as_close_as_the_hooked_path(scope: str) -> None:
    gates = dataclasses.replace(GATES, scope=scope)
    tokens, targets = batch()
    exact, exact_grads = gradients(build(gates), LOSS, tokens, targets, path="hooked")
    model = build(gates, dtype=torch.float32)
    hooked, hooked_grads = gradients(model, LOSS, tokens, targets, path="hooked")
    fused, fused_grads = gradients(model, LOSS, tokens, targets, path="fused")
    for name, term in fused._asdict().items():
        if term is not None:
            assert term.item() == pytest.approx(getattr(exact, name).item(), rel=1e-5), name

    def error(found: dict[str, Tensor]) -> float:
        return math.sqrt(sum(relative(found[name], g) ** 2 for name, g in exact_grads.items()))

    assert hooked.total.dtype == torch.float32
    assert error(fused_grads) <= 2 * error(hooked_grads)


@pytest.mark.parametrize("scope", ["none", "local", "global"])
def test_bfloat16_products_keep_float32_losses_and_parameters(scope: str) -> None:
    model = build(dataclasses.replace(GATES, scope=scope), dtype=torch.float32)
    tokens, targets = batch()
    exact, exact_grads = gradients(model, LOSS, tokens, targets, path="hooked")
    found, found_grads = gradients(model, LOSS, tokens, targets, path="fused", dtype=torch.bfloat16)
    assert found.total.dtype == torch.float32
    assert found.clean.item() == pytest.approx(exact.clean.item(), rel=5e-3)
    assert all(gradient.dtype == torch.float32 for gradient in found_grads.values())
    base = [name for name in exact_grads if "_gate." not in name]
    together = [torch.cat([grads[name].flatten() for name in base]) for grads in (found_grads, exact_grads)]
    assert relative(*together) < 0.1


def test_autocast_chooses_the_products_precision() -> None:
    model = build(dtype=torch.float32)
    tokens, targets = batch()
    asked = TwoStreamLoss(model, LOSS, dtype=torch.bfloat16)(tokens, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        implied = TwoStreamLoss(model, LOSS)(tokens, targets)
    assert torch.equal(asked.total, implied.total)
    assert not torch.equal(asked.total, TwoStreamLoss(model, LOSS)(tokens, targets).total)


@pytest.mark.parametrize("scope", ["local", "global", "none"])
def test_recomputing_layers_changes_nothing(scope: str) -> None:
    model = build(dataclasses.replace(GATES, scope=scope), dtype=torch.float32)
    tokens, targets = batch()
    kept, kept_grads = gradients(model, LOSS, tokens, targets, path="fused")
    again, again_grads = gradients(model, LOSS, tokens, targets, path="fused", checkpoint_activations=True)
    assert torch.equal(kept.total, again.total)
    for name, gradient in kept_grads.items():
        assert torch.equal(again_grads[name], gradient), name


@pytest.mark.parametrize("scope", ["local", "global", "both"])
def test_frozen_base(scope: str) -> None:
    """Only the gates get gradients, the right ones, and nothing is kept for the clean stream."""
    model = build(dataclasses.replace(GATES, scope=scope))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("_gate." in name)
    tokens, targets = batch()
    assert_same(model, LOSS, tokens, targets)
    terms = TwoStreamLoss(model, LOSS, path="fused")(tokens, targets)
    assert not terms.clean.requires_grad
    assert terms.ablated is not None
    assert terms.ablated.requires_grad


@pytest.mark.parametrize("name", ["GPT-2", "Llama"])
def test_a_frozen_base_costs_no_gradients_of_its_weights(name: str) -> None:
    """Torch counts as many operations as the products that are needed have."""
    from torch.utils.flop_counter import FlopCounterMode

    tokens, targets = batch()
    model = (build() if name == "GPT-2" else other(OTHERS[name], GATES)).freeze_base()
    with FlopCounterMode(display=False) as counter:
        TwoStreamLoss(model, LOSS, path="fused")(tokens, targets).total.backward()

    def product(*endings: str) -> int:
        sizes = [p.numel() for name, p in model.named_parameters() if name.endswith(endings)]
        return 2 * tokens.numel() * sum(sizes)

    logits, gates = product("unembed.W_U") or product("embed.W_E"), product("W_local")
    queries_keys_values = product("W_Q", "W_K", "W_V")
    layers = queries_keys_values + product("W_O", "W_in", "mlp.W_gate", "W_out")
    scores = 2 * tokens.numel() * tokens.shape[1] * 16
    both_forward = 2 * (logits + layers + 2 * 2 * scores) + gates
    # what enters the first layer is not differentiated; the scores of the second are computed again
    backward = logits + layers - queries_keys_values // 2 + 3 * scores + gates
    # the scores and the gradient of the pattern have two more columns each, for what is subtracted from them
    backward += 2 * 2 * (scores // model.cfg.d_head)
    assert counter.get_total_flops() == both_forward + backward


def test_each_term_can_be_differentiated_alone() -> None:
    model = build()
    tokens, targets = batch()
    for term in ("clean", "ablated", "reconstruction"):
        found = {}
        for path in ("hooked", "fused"):
            model.zero_grad()
            getattr(TwoStreamLoss(model, LOSS, path=path)(tokens, targets), term).backward()
            found[path] = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        for name, gradient in found["hooked"].items():
            if float(gradient.norm()):
                assert relative(found["fused"][name], gradient) <= 1e-8, (term, name)


def test_without_gradients_none_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    from sa_lens.core.fused import cross_entropy

    model = build()
    tokens, targets = batch()
    with_gradients = TwoStreamLoss(model, LOSS)(tokens, targets).total
    monkeypatch.setattr(cross_entropy, "_add_product_", lambda *_, **__: pytest.fail("a gradient was computed"))
    with torch.no_grad():
        terms = TwoStreamLoss(model, LOSS)(tokens, targets)
    assert not terms.total.requires_grad
    assert torch.equal(terms.total, with_gradients)


def test_targets_may_leave_positions_out() -> None:
    tokens, targets = batch()
    targets = targets.clone()
    targets[0, 3:] = -100
    assert_same(build(), LOSS, tokens, targets)


def test_same_batch_same_bits() -> None:
    model = build(dtype=torch.float32)
    tokens, targets = batch()
    first, first_grads = gradients(model, LOSS, tokens, targets, path="fused", dtype=torch.bfloat16)
    second, second_grads = gradients(model, LOSS, tokens, targets, path="fused", dtype=torch.bfloat16)
    assert torch.equal(first.total, second.total)
    assert all(torch.equal(first_grads[name], second_grads[name]) for name in first_grads)


def test_every_trained_parameter_gets_a_gradient() -> None:
    """As DistributedDataParallel demands, also where all units stay and the gates learn nothing."""
    for gates in (GATES, dataclasses.replace(GATES, k_attn=16, k_mlp=64)):
        model = build(gates, dtype=torch.float32)
        TwoStreamLoss(model, LOSS, path="fused")(*batch()).total.backward()
        assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.slow
@pytest.mark.parametrize("name", ["GPT-2", "Mistral"])
def test_under_torch_compile(name: str) -> None:
    # one layer of Mistral is enough; both layers of the other show how layers follow one another
    model = build() if name == "GPT-2" else other({**OTHERS[name], "n_layers": 1, "attn_types": ["local"]}, GATES)
    tokens, targets = batch()
    eager, eager_grads = gradients(model, LOSS, tokens, targets, path="fused")
    model.zero_grad()
    compiled = torch.compile(TwoStreamLoss(model, LOSS, path="fused"), backend="aot_eager")
    terms = compiled(tokens, targets)
    terms.total.backward()
    assert terms.total.item() == pytest.approx(eager.total.item(), rel=1e-10)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None
            assert relative(parameter.grad, eager_grads[name]) <= 1e-8, name


def test_falls_back_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model = other({"positional_embedding_type": "alibi"}, GATES, torch.float32)
    with caplog.at_level(logging.WARNING, logger="sa_lens.core.losses"):
        loss = TwoStreamLoss(model, LOSS)
        for _ in range(2):
            found = loss(*batch())
    assert [record.getMessage() for record in caplog.records if "alibi" in record.getMessage()] == [
        "training takes the slower hooked path, because the fused one does not cover positions of type 'alibi'"
    ]
    assert torch.equal(found.total, TwoStreamLoss(model, LOSS, path="hooked")(*batch()).total)


def test_refuses_what_it_cannot_honour() -> None:
    with pytest.raises(ValueError, match="path='fused' cannot run this model: a soft cap on logits"):
        TwoStreamLoss(other({"output_logits_soft_cap": 2.0}, GATES), LOSS, path="fused")
    with pytest.raises(ValueError, match="checkpoint_activations=True needs the fused path"):
        TwoStreamLoss(build(), LOSS, path="hooked", checkpoint_activations=True)
    with pytest.raises(ValueError, match="path='quick' must be"):
        TwoStreamLoss(build(), LOSS, path="quick")
    with pytest.raises(ValueError, match=r"dtype=torch\.int8 must be a floating type"):
        TwoStreamLoss(build(), LOSS, dtype=torch.int8)
    with pytest.raises(ValueError, match="13 positions, more than the model's n_ctx=12"):
        TwoStreamLoss(build(), LOSS, path="fused")(*batch(length=13))


def test_hooks_on_the_model_fire(caplog: pytest.LogCaptureFixture) -> None:
    """With hooks attached, `auto` takes the path on which they fire."""
    model = build()
    tokens, targets = batch()
    loss = TwoStreamLoss(model, LOSS)
    plain = loss(tokens, targets)
    fired = []

    def double(x: Tensor, hook: object) -> Tensor:
        fired.append(hook)
        return 2 * x

    with model.hooks(fwd_hooks=[("blocks.0.hook_mlp_out", double)]):
        edited = loss(tokens, targets)
    assert len(fired) == 1
    assert torch.allclose(edited.clean, plain.clean, rtol=1e-10)
    assert edited.ablated is not None
    assert not torch.allclose(edited.ablated, plain.ablated)


def test_biases_that_a_state_brings_along_count_on_both_paths() -> None:
    model = build()
    tokens, targets = batch()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.Generator().manual_seed(3)
    for name in model.zero_biases:
        state[name] = torch.randn(state[name].shape, generator=generator, dtype=torch.float64)
    before = TwoStreamLoss(model, LOSS, path="fused")(tokens, targets).total
    model.load_state_dict(state)
    fused, hooked = (TwoStreamLoss(model, LOSS, path=path)(tokens, targets).total for path in ("fused", "hooked"))
    torch.testing.assert_close(fused, hooked)
    assert not torch.isclose(fused, before)
    by_hand = build()
    with torch.no_grad():
        by_hand.unembed.b_U.fill_(1)
        by_hand.unembed.b_U[0] = 5
    with pytest.raises(ValueError, match="biases that its configuration does not have"):
        TwoStreamLoss(by_hand, LOSS, path="fused")


@pytest.mark.parametrize("scope", ["none", "local", "global"])
@pytest.mark.parametrize("path", ["fused", "hooked"])
def test_the_clean_stream_alone_is_the_dense_model(scope: str, path: str) -> None:
    """The loss and every gradient are those of the same transformer without gates."""
    model = build(dataclasses.replace(GATES, scope=scope))
    dense = build(GateConfig(scope="none"))
    dense.load_state_dict(model.state_dict(), strict=False)
    tokens, targets = batch()
    expected, expected_grads = gradients(dense, LossConfig(), tokens, targets, path=path)
    model.zero_grad()
    terms = TwoStreamLoss(model, LOSS, path=path)(tokens, targets, clean_alone=True)
    terms.total.backward()
    assert terms.ablated is None
    assert terms.reconstruction is None
    assert torch.equal(terms.total, expected.total)
    for name, parameter in model.named_parameters():
        if "_gate." in name:
            assert parameter.grad is None, name
        elif parameter.requires_grad:
            assert torch.equal(parameter.grad, expected_grads[name]), name


@pytest.mark.parametrize("k_mlp", [4, 64])
@pytest.mark.parametrize(("scope", "kind"), [("local", "hard"), ("global", "hard"), ("both", "soft")])
@torch.no_grad()
def test_a_gate_that_is_not_a_number_gives_no_finite_loss(scope, kind, k_mlp):
    """On either path, with any gate weight, and with k equal to the number of units; the clean stream is untouched."""
    model = build(dataclasses.replace(GATES, scope=scope, kind=kind, k_mlp=k_mlp))
    tokens, _ = batch()
    losses = [TwoStreamLoss(model, path=path) for path in ("fused", "hooked")]
    clean = losses[0](tokens).clean
    for name, parameter in model.named_parameters():
        if "_gate." not in name:
            continue
        _, layer, gate, _ = name.split(".")
        first = parameter.flatten()[0].clone()
        parameter.view(-1)[0] = float("nan")
        assert model.record_masks(tokens)[gate][int(layer)].isnan().all(), name
        for loss in losses:
            terms = loss(tokens)
            assert terms.ablated.isnan(), (name, loss.path)
            torch.testing.assert_close(terms.clean, clean)
        parameter.view(-1)[0] = first
    assert losses[0](tokens).ablated.isfinite()
