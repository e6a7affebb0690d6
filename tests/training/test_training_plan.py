"""What a run is about to do is said before it starts, and is what it then does."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from tiny_runs import MakeRun
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from sa_lens import cli
from sa_lens.config import DataConfig, GateConfig, ModelConfig, RunConfig, TrainConfig
from sa_lens.core import SelfAblatingTransformer
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
        "memory   about 0.6 GB on the fused path"
    )


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
