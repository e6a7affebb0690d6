"""Which transformers take gates, what their weights start as, and which weight processing they carry."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from small_models import BASE, SHAPES, gated_model, gates_for, plain_model, random_tokens

from sa_lens.config import GateConfig, ModelConfig
from sa_lens.core import HookedTransformerConfig, SelfAblatingTransformer

SMALL = {"n_layers": 2, "d_model": 64, "n_heads": 4, "n_ctx": 32, "d_vocab": 200}


# --------------------------------------------------------------------------------------------------------- ModelConfig


def test_shape_of_a_model_config():
    cfg = ModelConfig(n_layers=3, d_model=32, n_heads=4, d_head=5, d_mlp=17, n_ctx=11, d_vocab=50, eps=1e-4)
    model = SelfAblatingTransformer(cfg, GateConfig(), device="cpu")
    found = model.cfg
    assert (found.n_layers, found.d_model, found.n_heads, found.d_head, found.d_mlp) == (3, 32, 4, 5, 17)
    assert (found.n_ctx, found.d_vocab, found.eps, found.act_fn) == (11, 50, 1e-4, "gelu_new")
    assert found.normalization_type == "LN"
    assert found.dtype == torch.float32
    assert model.blocks[0].attn.attn_scale == 1.0
    assert SelfAblatingTransformer(ModelConfig(**SMALL, attn_scale=True), device="cpu").blocks[0].attn.attn_scale == 4.0
    default = SelfAblatingTransformer(ModelConfig(**SMALL), device="cpu")
    assert (default.cfg.d_head, default.cfg.d_mlp) == (16, 256)
    assert default.gates == GateConfig()
    attention_only = SelfAblatingTransformer(ModelConfig(**SMALL, d_mlp=0), device="cpu")
    assert attention_only.cfg.attn_only
    assert attention_only.run_streams(torch.zeros(1, 3, dtype=torch.long)).mask_mlp is None


def test_the_vocabulary_comes_from_the_tokenizer_or_must_be_given(tokenizer):
    values = {**SMALL, "d_vocab": None}
    assert SelfAblatingTransformer(ModelConfig(**values), tokenizer=tokenizer, device="cpu").cfg.d_vocab == 23
    with pytest.raises(ValueError, match="d_vocab=None"):
        SelfAblatingTransformer(ModelConfig(**values), device="cpu")


@pytest.mark.parametrize("tied", [True, False])
def test_reference_initialisation(tied):
    """Uniform +-1/sqrt(fan_in), positions N(0, 1), LayerNorm 1 and 0, absent biases 0."""
    cfg = ModelConfig(**{**SMALL, "d_model": 64, "d_mlp": 100, "d_head": 9}, tied_embedding=tied)
    model = SelfAblatingTransformer(cfg, GateConfig(scope="both"), device="cpu")
    fan_in = {"W_O": 36, "b_O": 36, "W_out": 100, "b_out": 100}
    for name, parameter in model.named_parameters():
        leaf = name.rsplit(".", 1)[-1]
        if leaf in ("b_Q", "b_K", "b_V", "b_U"):
            assert not parameter.any(), name
        elif leaf in ("w", "b"):
            assert (parameter == (1 if leaf == "w" else 0)).all(), name
        elif leaf == "W_pos":
            assert parameter.std().item() == pytest.approx(1, abs=0.05)
            assert parameter.abs().max() > 2.5
        else:
            bound = 1 / math.sqrt(fan_in.get(leaf, 64))
            assert parameter.abs().max() <= bound, name
            assert parameter.abs().max() > 0.9 * bound, name
            if parameter.numel() > 1000:
                assert parameter.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05), name
                assert parameter.mean().item() == pytest.approx(0, abs=0.05 * bound), name
    seen = [p.flatten()[:5] for name, p in model.named_parameters() if p.any() and name.rsplit(".", 1)[-1] not in "wb"]
    for i, first in enumerate(seen):
        for second in seen[i + 1 :]:
            assert not torch.equal(first, second), "two parameters must not share a draw"


def test_gpt2_initialisation():
    model = SelfAblatingTransformer(ModelConfig(**SMALL, init="gpt2"), device="cpu")
    assert model.blocks[0].mlp.W_in.std().item() == pytest.approx(0.8 / 8, rel=0.05)
    assert model.embed.W_E.std().item() == pytest.approx(0.8 / 8, rel=0.05)
    assert not model.blocks[0].attn.b_O.any()


@pytest.mark.parametrize("init", ["reference", "gpt2"])
def test_weights_follow_the_seed_and_leave_the_global_random_state_alone(init):
    def build(seed):
        return SelfAblatingTransformer(
            ModelConfig(**SMALL, init=init), GateConfig(), seed=seed, device="cpu"
        ).state_dict()

    torch.manual_seed(123)
    expected = torch.rand(3)
    torch.manual_seed(123)
    first = build(0)
    assert torch.equal(torch.rand(3), expected)
    again, other = build(0), build(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    for name in ("embed.W_E", "blocks.1.mlp.W_out", "blocks.0.attn_gate.W_local", "blocks.1.mlp_gate.b_local"):
        assert not torch.equal(first[name], other[name])


@pytest.mark.parametrize(("qkv", "unembed"), [(False, False), (True, False), (False, True), (True, True)])
def test_absent_biases_are_zero_and_untrained(qkv, unembed):
    cfg = ModelConfig(**SMALL, qkv_bias=qkv, unembed_bias=unembed)
    model = SelfAblatingTransformer(cfg, GateConfig(), device="cpu")
    for name, parameter in model.named_parameters():
        leaf = name.rsplit(".", 1)[-1]
        absent = (leaf in ("b_Q", "b_K", "b_V") and not qkv) or (leaf == "b_U" and not unembed)
        assert parameter.requires_grad == (not absent), name
        assert (name in model.zero_biases) == absent
    copied = SelfAblatingTransformer.from_hooked(model, GateConfig(scope="global"))
    assert (copied.qkv_bias, copied.unembed_bias) == (qkv, unembed)
    assert copied.zero_biases == model.zero_biases
    assert all(not copied.get_parameter(name).requires_grad for name in copied.zero_biases)


# -------------------------------------------------------------------------------------------------------------- limits

UNSUPPORTED = {
    "bidirectional": ({"attention_dir": "bidirectional"}, "causal decoders"),
    "soft-capped-scores": ({"attn_scores_soft_cap": 50.0}, "soft cap on attention scores: scores are hooked after"),
    "sinks": ({"use_attention_sinks": True}, "attention sinks"),
    "qk-norm": ({"use_qk_norm": True}, "normalised queries and keys"),
    "clipped-qkv": ({"clip_qkv": 1.0}, "clipped queries"),
    "log-n": ({"use_logn_attn": True}, "log-n"),
    "dynamic-ntk": ({"use_dynamic_ntk_rope": True}, "NTK"),
    "relative-bias": (
        {"positional_embedding_type": "relative_positional_bias"},
        "relative_positional_bias",
    ),
    "norm-before-and-after": ({"use_normalization_before_and_after": True}, "normalisation after the layers"),
    "post-norm": ({"original_architecture": "Olmo2ForCausalLM"}, "normalisation after the layers"),
    "mixture-of-experts": ({"num_experts": 4, "experts_per_token": 2}, "mixture of experts"),
    "4-bit": ({"load_in_4bit": True}, "4-bit"),
    "several-devices": ({"n_devices": 2}, "n_devices > 1"),
}


@pytest.mark.parametrize(("changes", "reason"), UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_what_would_not_be_exact_is_refused_with_the_reason(changes, reason):
    cfg = HookedTransformerConfig(**BASE)
    for name, value in changes.items():
        assert hasattr(cfg, name), name
        setattr(cfg, name, value)
    with pytest.raises(ValueError, match=f"no gates on this model.*{reason}"):
        SelfAblatingTransformer(cfg, gates_for("gpt2"))


def test_without_gates_there_are_no_such_limits():
    plain = plain_model(attn_scores_soft_cap=5.0)
    model = SelfAblatingTransformer.from_hooked(plain, GateConfig(scope="none"))
    assert torch.equal(model(random_tokens()), plain(random_tokens()))
    with pytest.raises(ValueError, match="soft cap"):
        SelfAblatingTransformer.from_hooked(plain, gates_for("gpt2"))


def test_from_hooked_takes_a_hooked_transformer_only():
    with pytest.raises(ValueError, match="takes a HookedTransformer or a TransformerBridge, not a Linear"):
        SelfAblatingTransformer.from_hooked(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("gates", "message"),
    [
        ({"k_attn": 17, "k_mlp": 5}, r"k_attn=17 is more than the 16 units.*from 1 to 16"),
        ({"k_attn": 5, "k_mlp": 25}, r"k_mlp=25 is more than the 24 units.*from 1 to 24"),
        ({"k_attn": 5, "k_mlp": 5, "attn_unit": "head"}, r"k_attn=5 is more than the 4 units"),
    ],
)
def test_k_larger_than_the_units_of_a_layer(gates, message):
    with pytest.raises(ValueError, match=message):
        SelfAblatingTransformer.from_hooked(plain_model(), GateConfig(**gates))
    SelfAblatingTransformer.from_hooked(plain_model(), GateConfig(scope="none", **gates))


def test_k_mlp_is_ignored_without_an_mlp():
    SelfAblatingTransformer.from_hooked(plain_model("attention-only"), GateConfig(k_attn=4, k_mlp=10_000))


# ---------------------------------------------------------------------------------------------------------- processing


def log_probs(model, tokens):
    with torch.no_grad(), model.ablated():
        ablated = model(tokens).log_softmax(-1)
        with model.clean():
            return model(tokens).log_softmax(-1), ablated


@pytest.mark.parametrize("scope", ["local", "global", "both"])
@pytest.mark.parametrize("shape", ["gpt2", "gpt-neo", "pythia", "llama", "alibi", "attention-only"])
def test_folding_layernorm_and_centring_the_unembedding_keep_both_streams(shape, scope):
    model, tokens = gated_model(shape, scope), random_tokens()
    before, weights = log_probs(model, tokens), model.unembed.W_U.detach().clone()
    model.load_and_process_state_dict(
        model.state_dict(), center_writing_weights=False, fold_value_biases=False, fold_ln=True, center_unembed=True
    )
    assert model.cfg.normalization_type in ("LNPre", "RMSPre")
    assert not torch.equal(model.unembed.W_U, weights)
    for found, expected in zip(log_probs(model, tokens), before, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert "blocks.0.attn_gate.hook_mask" in model.hook_dict


@pytest.mark.parametrize("scope", ["local", "global"])
def test_processing_the_weights_of_a_plain_transformer_keeps_the_gates_in_step(scope):
    """The state holds no gates; global ones must still take over the final LayerNorm's weight."""
    model, tokens = gated_model(scope=scope), random_tokens()
    before = log_probs(model, tokens)
    model.load_and_process_state_dict(plain_model().state_dict(), center_writing_weights=False, fold_value_biases=False)
    for found, expected in zip(log_probs(model, tokens), before, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_process_weights_in_place():
    model, tokens = gated_model(scope="both"), random_tokens()
    before = log_probs(model, tokens)
    model.process_weights_(center_writing_weights=False)
    for found, expected in zip(log_probs(model, tokens), before, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "left_out"),
    [
        ("gpt2", ["center_writing_weights"]),
        ("llama", ["center_writing_weights"]),
        ("solu-ln", ["center_writing_weights", "fold_ln"]),
        ("shortformer", ["center_writing_weights", "fold_ln"]),
        ("capped-logits", ["center_writing_weights", "center_unembed"]),
    ],
)
def test_processing_without_options_does_what_is_exact_and_names_the_rest(shape, left_out, caplog):
    model, tokens = gated_model(shape, "both"), random_tokens()
    before = log_probs(model, tokens)
    for _ in range(2):
        caplog.clear()
        model.process_weights_()
        lines = [text for text in caplog.messages if text.startswith("process_weights_ leaves")]
        assert [text.split()[2] for text in lines] == left_out
        assert "the gates read the residual stream before LayerNorm" in lines[0]
        for found, expected in zip(log_probs(model, tokens), before, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert model.cfg.normalization_type.endswith("Pre") == ("fold_ln" not in left_out)


@torch.no_grad()
@pytest.mark.parametrize("shape", ["gpt2", "pythia", "llama", "alibi", "attention-only"])
def test_direct_logit_attribution_adds_up_in_both_streams_once_layernorm_is_folded(shape):
    """The effects of all parts and the difference of the biases are the logit difference."""
    model, tokens = gated_model(shape), random_tokens()
    model.process_weights_()
    for context in (model.clean(), model.ablated(), model.ablated(position=-1)):
        with context:
            logits, cache = model.run_with_cache(tokens)
        right, wrong = torch.tensor([4, 5]), torch.tensor([6, 7])
        bias = model.b_U[right] - model.b_U[wrong]
        expected = logits[:, -1].gather(1, right[:, None])[:, 0] - logits[:, -1].gather(1, wrong[:, None])[:, 0]
        for parts in (
            cache.decompose_resid(pos_slice=-1),
            cache.get_full_resid_decomposition(pos_slice=-1, expand_neurons=False),
        ):
            effects = cache.logit_attrs(parts, right, incorrect_tokens=wrong, pos_slice=-1)
            torch.testing.assert_close(effects.sum(0) + bias, expected, rtol=1e-4, atol=1e-4)


def test_biases_that_folding_fills_count_as_biases_of_the_model():
    model = SelfAblatingTransformer(ModelConfig(**SMALL), device="cpu")
    with torch.no_grad():
        for block in model.blocks:
            block.ln1.b += 0.5
        model.ln_final.b += 0.5
    model.process_weights_(center_writing_weights=False)
    assert model.blocks[0].attn.b_Q.any()
    assert model.unembed.b_U.any()
    assert model.zero_biases == []
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ("center_writing_weights", "before LayerNorm"),
        ("fold_value_biases", "b_V is not zero"),
        ("refactor_factored_attn_matrices", "mixes the channels"),
    ],
)
def test_other_processing_is_refused_with_the_reason_and_changes_nothing(option, reason):
    model = gated_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    options = dict.fromkeys(("center_writing_weights", "fold_value_biases", "refactor_factored_attn_matrices"), False)
    with pytest.raises(ValueError, match=rf"{option}=True.*{reason}.*to_hooked_transformer"):
        model.load_and_process_state_dict(model.state_dict(), **{**options, option: True})
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    if option != "fold_value_biases":
        with pytest.raises(ValueError, match=f"{option}=True"):
            model.process_weights_(**{"center_writing_weights": False, option: True})


@pytest.mark.parametrize(
    ("shape", "option", "reason"),
    [
        ("solu-ln", "fold_ln", "the ablated stream: a masked neuron must lose"),
        ("shortformer", "fold_ln", "both streams: positions are added after"),
        ("capped-logits", "center_unembed", "both streams: the soft cap"),
    ],
)
def test_shapes_whose_streams_a_usual_processing_would_change(shape, option, reason):
    model, tokens = gated_model(shape), random_tokens()
    before = log_probs(model, tokens)
    options = {"center_writing_weights": False, "fold_ln": True, "center_unembed": True}
    with pytest.raises(ValueError, match=rf"{option}=True would change {reason}"):
        model.process_weights_(**options)
    model.process_weights_(**{**options, option: False})
    for found, expected in zip(log_probs(model, tokens), before, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_value_biases_of_zero_may_be_folded():
    model, tokens = gated_model(), random_tokens()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.b_V.zero_()
            block.ln1.b.zero_()  # folding it would make b_V nonzero again
    before = log_probs(model, tokens)
    model.load_and_process_state_dict(model.state_dict(), center_writing_weights=False, fold_value_biases=True)
    for found, expected in zip(log_probs(model, tokens), before, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_value_bias_that_folding_layernorm_makes_is_not_folded_on():
    """ln1.b goes into b_V, which fold_value_biases would then move past the mask."""
    model, tokens = gated_model(), random_tokens()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.b_V.zero_()
            block.ln1.b.fill_(0.7)
    before = log_probs(model, tokens)
    with pytest.raises(ValueError, match="fold_value_biases=True"):
        model.load_and_process_state_dict(
            model.state_dict(), fold_ln=True, center_writing_weights=False, fold_value_biases=True
        )
    model.load_and_process_state_dict(model.state_dict(), center_writing_weights=False, fold_value_biases=False)
    for found, expected in zip(log_probs(model, tokens), before, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("options", [{}, {"fold_ln": False, "center_unembed": False}], ids=["all", "centre-only"])
def test_a_model_without_gates_may_be_processed_freely(options, tied):
    cfg = ModelConfig(**SMALL, tied_embedding=tied)
    model = SelfAblatingTransformer(cfg, GateConfig(scope="none"), device="cpu")
    tokens = random_tokens()
    before = model(tokens).log_softmax(-1)
    model.process_weights_(**options)
    torch.testing.assert_close(model(tokens).log_softmax(-1), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [s for s in SHAPES if s not in ("shortformer", "capped-logits")])
def test_a_plain_copy_may_be_processed_freely(shape):
    model, tokens = gated_model(shape), random_tokens()
    plain = model.to_hooked_transformer()
    assert not isinstance(plain, SelfAblatingTransformer)
    assert torch.equal(plain(tokens), model(tokens))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plain.process_weights_(fold_ln=shape != "no-norm")
    torch.testing.assert_close(plain(tokens).log_softmax(-1), model(tokens).log_softmax(-1), rtol=1e-4, atol=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("shape", ["gpt2", "llama", "pythia"])
@torch.no_grad()
def test_gates_go_on_an_already_processed_base(shape):
    plain, tokens = plain_model(shape), random_tokens()
    plain.process_weights_()
    model = SelfAblatingTransformer.from_hooked(plain, gates_for(shape, "both"), seed=3)
    assert torch.equal(model(tokens), plain(tokens))
    with model.ablated():
        torch.testing.assert_close(model(tokens), oracle.ablated_logits(plain, model, tokens), rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------- NaN weights


@pytest.mark.parametrize("shape", ["gpt2", "llama"])
def test_weights_whose_nan_the_logits_would_hide_are_refused(shape):
    """TransformerLens sets attention patterns that are NaN to 0, so that the logits of such a model are finite."""
    plain = plain_model(shape)
    names = [
        n for n, _ in plain.named_parameters() if n.startswith("blocks.1.attn.") and n[-3:] in ("W_Q", "W_K", "b_Q")
    ]
    assert len(names) == 3
    for name in names:
        weight = plain.get_parameter(name)
        before = weight.detach().clone()
        with torch.no_grad():
            weight.view(-1)[0] = float("nan")
        assert plain(random_tokens()).isfinite().all(), name
        with pytest.raises(ValueError, match=rf"{name} holds values that are NaN"):
            SelfAblatingTransformer.from_hooked(plain, gates_for(shape))
        with torch.no_grad():
            weight.copy_(before)
    SelfAblatingTransformer.from_hooked(plain, gates_for(shape))
