"""What a run is about to do is said before it starts, and is what it then does."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import MakeRun
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from sa_lens import cli
from sa_lens.config import PRESETS, DataConfig, GateConfig, ModelConfig, RunConfig, TrainConfig
from sa_lens.core import HookedTransformerConfig, SelfAblatingTransformer, TwoStreamLoss
from sa_lens.core.architecture import hooked_config
from sa_lens.core.initial_model import initial_model
from sa_lens.training import plan, train
from sa_lens.training.optimizer import choose_trained

GATES = [
    GateConfig(k_attn=2, k_mlp=3),
    GateConfig("both", k_attn=2, k_mlp=3),
    GateConfig(scope="none"),
    GateConfig(k_attn=2, k_mlp=3, attn_unit="head"),
    GateConfig(k_attn=2, k_mlp=3, scores="random-token"),
    GateConfig(k_attn=2, k_mlp=3, scores="ablated", rank=2),
]


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A folder with a small random Llama of `transformers`, without tokenizer."""
    cfg = LlamaConfig(
        **{"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 12},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64},
    )
    LlamaForCausalLM(cfg).to(torch.bfloat16).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


@pytest.mark.parametrize("gates", GATES, ids=str)
@pytest.mark.parametrize("freeze", ["none", "base"])
def test_parameters_are_those_of_the_model(llama: Path, gates: GateConfig, freeze: str) -> None:
    run = RunConfig(model=ModelConfig(n_ctx=32), gates=gates, train=TrainConfig(init=str(llama), freeze=freeze))
    planned = plan(run)
    model = initial_model(llama, gates, n_ctx=32)
    assert planned.gate_parameters == sum(p.numel() for p in model.gate_parameters())
    assert planned.base_parameters == sum(p.numel() for p in LlamaForCausalLM.from_pretrained(llama).parameters())
    # a model in memory has the biases of TransformerLens besides
    assert plan(run, model).base_parameters == sum(p.numel() for p in model.base_parameters())
    if gates.gated and gates.learned:
        assert planned.trained_parameters > 0
        expected = sum(model.get_parameter(name).numel() for name in choose_trained(model, freeze))
        assert plan(run, model).trained_parameters == expected
    assert (planned.n_ctx, planned.longest) == (32, 64)


def test_the_text_of_a_plan(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunConfig(
        model=ModelConfig(n_ctx=32),
        gates=GateConfig(k_attn=2, k_mlp=3, rank=4),
        train=TrainConfig(init=str(llama), freeze="base", batch_size=4, precision="bf16"),
    )
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)  # no weights are read
    # base: 50 * 16, and per layer 2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 12 and two norms, and the last norm;
    # gates: 5 numbers for each of 2 * (16 + 12) units, and 2 * 2 * 16 * 4
    base = 2 * 50 * 16 + 2 * (2 * 256 + 2 * 128 + 576 + 32) + 16
    assert str(plan(run)) == (
        f"model    LlamaForCausalLM from {llama} (bfloat16), {base:,} parameters, frozen\n"
        "gates    local, k_attn 2, k_mlp 3, rank 4, 536 parameters, trained\n"
        "context  32 tokens (model.n_ctx), of up to 64; 4 sequences per step\n"
        "types    base held in bfloat16 (evaluated and saved in float32), gates float32, matrix products bfloat16\n"
        "memory   about 0.5 GB on the fused path"
    )


def test_a_plan_says_why_hooks_are_taken(tmp_path: Path) -> None:
    def end_of_plan(folder: Path, **settings: object) -> str:
        fields = {"init": str(folder), "freeze": "base", "precision": "bf16"}
        run = RunConfig(
            model=ModelConfig(n_ctx=32),
            gates=GateConfig(k_attn=2, k_mlp=3),
            train=TrainConfig(**{**fields, **settings}),
        )
        planned = plan(run)
        model = initial_model(folder, run.gates, n_ctx=32)
        assert (planned.path, planned.why_hooked) == (plan(run, model).path, plan(run, model).why_hooked)
        if settings.get("path", "auto") == "auto":
            assert TwoStreamLoss(model).path == planned.path
        return "\n".join(str(planned).splitlines()[-2:])

    bloom = tmp_path / "bloom"
    cfg = BloomConfig(vocab_size=50, hidden_size=16, n_layer=2, n_head=4, seq_length=64)
    BloomForCausalLM(cfg).save_pretrained(bloom)
    types = "types    weights float32, matrix products bfloat16\n"
    why = ", because the fused one does not cover a LayerNorm on the embedding"
    assert end_of_plan(bloom) == f"{types}memory   about 0.5 GB on the hooked path{why}"

    small = LlamaConfig(
        **{"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 12},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64},
    )
    LlamaForCausalLM(small).save_pretrained(tmp_path / "llama")
    assert end_of_plan(tmp_path / "llama", path="hooked") == f"{types}memory   about 0.5 GB on the hooked path"
    assert end_of_plan(tmp_path / "llama").endswith("memory   about 0.5 GB on the fused path")
    vocabulary = {"a": 0, "<|endoftext|>": 1}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<|endoftext|>"))
    end = {f"{name}_token": "<|endoftext|>" for name in ("bos", "eos", "pad", "unk")}
    PreTrainedTokenizerFast(tokenizer_object=inner, padding_side="left", **end).save_pretrained(tmp_path / "llama")
    assert end_of_plan(tmp_path / "llama").endswith("does not cover a tokenizer that pads on the left")


SMOLLM2 = {
    **{"n_layers": 30, "d_model": 576, "n_heads": 9, "n_key_value_heads": 3, "d_head": 64, "d_mlp": 1536},
    **{"n_ctx": 128, "d_vocab": 49152, "positional_embedding_type": "rotary", "rotary_dim": 64, "act_fn": "silu"},
    **{"normalization_type": "RMS", "final_rms": True, "gated_mlp": True, "tie_word_embeddings": True},
}


@pytest.mark.parametrize(
    ("shape", "freeze", "batch_size", "measured"),
    [
        (ModelConfig(d_model=128, n_heads=16, n_ctx=256, d_vocab=50257), "none", 8, 1.01e9),
        (dataclasses.replace(PRESETS["laptop"].model, d_vocab=4096), "none", 8, 0.72e9),
        (SMOLLM2, "base", 2, 1.66e9),
        (SMOLLM2, "none", 2, 3.49e9),
    ],
    ids=["paper", "laptop", "SmolLM2 frozen", "SmolLM2"],
)
def test_memory_is_near_what_was_measured(shape: Any, freeze: str, batch_size: int, measured: float) -> None:
    """Peaks of `benchmarks/training.py`; a frozen base was held in bfloat16, as `train` does."""
    if isinstance(shape, dict):
        shape = HookedTransformerConfig(init_weights=False, **shape)
    gates = GateConfig()
    cfg = shape if isinstance(shape, HookedTransformerConfig) else hooked_config(shape)
    cfg.init_weights = False
    model = SelfAblatingTransformer(cfg, gates, device="meta")
    fields = {"init": "stories-local", "freeze": "base"} if freeze == "base" else {}
    train_config = TrainConfig(precision="bf16", batch_size=batch_size, **fields)
    run = RunConfig(model=ModelConfig(n_ctx=model.cfg.n_ctx), gates=gates, train=train_config)
    assert abs(plan(run, model).bytes / measured - 1) < 0.2


def test_other_starting_points(make_run: MakeRun, tmp_path: Path) -> None:
    run = dataclasses.replace(RunConfig(), data=DataConfig(vocab_size=1000))
    planned = plan(run)
    model = SelfAblatingTransformer(dataclasses.replace(run.model, d_vocab=1000), run.gates)
    assert planned.source == "random weights"
    assert planned.base_parameters == sum(p.numel() for p in model.base_parameters())
    shipped = plan(RunConfig(train=TrainConfig(init="stories-dense", freeze="base")))
    dense = SelfAblatingTransformer.from_pretrained("stories-dense")
    assert shipped.source == "weights of stories-dense"
    assert shipped.base_parameters == sum(p.numel() for p in dense.base_parameters())


def test_more_memory_for_more_of_everything(llama: Path) -> None:
    def memory(n_ctx: int = 64, **settings: object) -> float:
        return plan(RunConfig(model=ModelConfig(n_ctx=n_ctx), train=TrainConfig(init=str(llama), **settings))).bytes

    run = {"batch_size": 512, "freeze": "base"}
    assert memory(**run) > memory(**{**run, "batch_size": 256}) == memory(**run, accumulate=2) == memory(32, **run)
    assert memory(**run) < memory(batch_size=512)
    assert memory(**run, path="hooked") > memory(**run) > memory(**run, checkpoint_activations=True)


def test_a_dry_run_does_nothing(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["train", "--init", str(llama), "--out", str(tmp_path / "run"), "--dry-run", "--gates.k-attn", "2"]
    assert cli.main([*line, "--gates.k-mlp", "3", "--model.n-ctx", "64"]) == 0
    assert capsys.readouterr().out.startswith(f"model    LlamaForCausalLM from {llama} (bfloat16)")
    assert not (tmp_path / "run").exists()
    assert cli.main([*line, "--model.n-ctx", "65"]) != 0
    assert "n_ctx=65 is more than the 64 positions" in capsys.readouterr().err


def test_a_run_says_its_plan_once_at_its_beginning(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(steps=1)
    train(run, tmp_path / "run", progress=True)
    assert capsys.readouterr().err.startswith(f"{plan(run)}\n")
    train(run, tmp_path / "run", progress=True, resume=True)
    assert "model.n_ctx" not in capsys.readouterr().err
