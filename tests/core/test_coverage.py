"""A path says what it covers, and names the first thing that it does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import BASE

from sa_lens.core import HookedTransformerConfig
from sa_lens.core.coverage import FEATURES, Coverage

CHANGES: dict[str, dict[str, Any]] = {
    "bidirectional attention": {"attention_dir": "bidirectional"},
    "windowed attention": {"use_local_attn": True},
    "grouped keys and values": {"n_key_value_heads": 2},
    "a soft cap on attention scores": {"attn_scores_soft_cap": 5.0},
    "a soft cap on logits": {"output_logits_soft_cap": 5.0},
    "attention sinks": {"use_attention_sinks": True},
    "normalised queries and keys": {"use_qk_norm": True},
    "clipped queries, keys and values": {"clip_qkv": 1.0},
    "log-n attention": {"use_logn_attn": True},
    "dynamic NTK rotary embeddings": {"use_dynamic_ntk_rope": True},
    "an attention scale that falls with the layer": {"scale_attn_by_inverse_layer_idx": True},
    "a final RMSNorm after LayerNorms": {"final_rms": True},
    "a LayerNorm on the embedding": {"post_embedding_ln": True},
    "normalisation after the layers": {"use_normalization_before_and_after": True},
    "attention and MLP in parallel": {"parallel_attn_mlp": True},
    "no MLPs": {"attn_only": True},
    "a gated MLP": {"gated_mlp": True},
    "a LayerNorm inside the MLP": {"act_fn": "solu_ln"},
    "a mixture of experts": {"num_experts": 4},
    "4-bit weights": {"load_in_4bit": True},
    "several devices (n_devices > 1)": {"n_devices": 2},
}


def config(**changes: Any) -> HookedTransformerConfig:
    cfg = HookedTransformerConfig(**BASE)
    for name, value in changes.items():
        assert hasattr(cfg, name), name
        setattr(cfg, name, value)
    return cfg


def test_every_feature_is_tried_here():
    assert CHANGES.keys() == FEATURES.keys()
    assert Coverage().reason_against(config()) is None


@pytest.mark.parametrize("feature", FEATURES)
def test_a_feature_is_the_reason_until_it_is_covered(feature):
    cfg = config(**CHANGES[feature])
    assert [name for name, applies in FEATURES.items() if applies(cfg)] == [feature]
    assert Coverage().reason_against(cfg) == feature
    assert Coverage(because={feature: "it is not exact"}).reason_against(cfg) == f"{feature}: it is not exact"
    assert Coverage(features={feature}).reason_against(cfg) is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"positional_embedding_type": "rotary"}, "positions of type 'rotary'"),
        ({"normalization_type": "RMS"}, "normalisation 'RMS'"),
        ({"act_fn": "relu"}, "activation 'relu'"),
        ({"act_fn": "relu", "attn_only": True}, None),
        ({"dtype": torch.bfloat16}, "parameters of type torch.bfloat16"),
    ],
)
def test_choices_are_named(changes, reason):
    coverage = Coverage({"no MLPs"}, normalizations={"LN"}, activations={"gelu_new"}, dtypes={torch.float32})
    assert coverage.reason_against(config(**changes)) == reason
    assert coverage.reason_against(config(), torch.float64) == "parameters of type torch.float64"


def test_a_feature_that_nobody_knows_is_an_error():
    with pytest.raises(ValueError, match=r"unknown features of an architecture: \['biderectional attention'\]"):
        Coverage(features={"biderectional attention"})
