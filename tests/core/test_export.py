"""An exported model gives the same logits in the program it is meant for; what a format cannot express is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from full_disk import full_disk
from safetensors.torch import load_file
from small_models import SHAPES, gated_model, plain_model, random_tokens
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from sa_lens.config import GateConfig, ModelConfig
from sa_lens.core import SelfAblatingTransformer, export
from sa_lens.core.base import TRANSFORMER_LENS


def small_model(scope: str = "local", *, seed: int = 0, gates: Any = None, **shape: Any) -> SelfAblatingTransformer:
    """A model in which no parameter of its own is zero or one, so that a forgotten weight shows."""
    cfg = ModelConfig(**{"n_layers": 2, "d_model": 16, "n_heads": 4, "n_ctx": 16, "d_vocab": 23, **shape})
    model = SelfAblatingTransformer(cfg, GateConfig(scope=scope, k_attn=3, k_mlp=5, **(gates or {})), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture
def letters(tmp_path: Path) -> PreTrainedTokenizerFast:
    """A tokenizer of 23 tokens, loaded from a folder as TransformerLens needs it."""
    vocab = {"<|endoftext|>": 0, **{letter: i for i, letter in enumerate("abcdefghijklmnopqrst Ġ", start=1)}}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    end = "<|endoftext|>"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=end, eos_token=end, pad_token=end)
    tokenizer.save_pretrained(tmp_path / "letters")
    return AutoTokenizer.from_pretrained(str(tmp_path / "letters"))


@torch.no_grad()
def clean_logits(model: SelfAblatingTransformer) -> torch.Tensor:
    return model(random_tokens())


# ------------------------------------------------------------------------------------------------------------- hooked


def run_loader(lines: str) -> Any:
    """What the printed lines call `model`, run where sa_lens cannot be imported if TransformerLens has the class."""
    assert len(lines.splitlines()) == 5
    names: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        if TRANSFORMER_LENS < 4:
            for name in [name for name in sys.modules if name.split(".")[0] == "sa_lens"]:
                patch.setitem(sys.modules, name, None)
        exec(lines, names)
    return names["model"]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_printed_lines_load_a_plain_model_with_the_same_logits(tmp_path, shape):
    model = gated_model(shape, "both")
    loaded = run_loader(export.to_hooked(model, tmp_path / "out"))
    assert type(loaded).__name__ == "HookedTransformer"
    assert not [name for name in loaded.hook_dict if "gate" in name]
    assert torch.equal(clean_logits(loaded), clean_logits(model))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_hooked_keeps_the_dtype(tmp_path, dtype):
    model = SelfAblatingTransformer.from_hooked(plain_model(dtype=dtype), GateConfig(k_attn=3, k_mlp=5))
    loaded = run_loader(export.to_hooked(model, tmp_path / "out"))
    assert loaded.cfg.dtype == dtype
    assert torch.equal(clean_logits(loaded), clean_logits(model))


def test_hooked_brings_the_tokenizer_and_a_path_with_odd_characters(tmp_path, letters):
    model = small_model(tied_embedding=True)
    model.set_tokenizer(letters)
    loaded = run_loader(export.to_hooked(model, tmp_path / 'Lily\'s "model"'))
    assert loaded.to_tokens("abc").tolist() == [[0, 1, 2, 3]]
    with torch.no_grad():
        assert torch.equal(loaded("abc"), model("abc"))


# ---------------------------------------------------------------------------------------------------------- reference


@pytest.mark.parametrize("scope", ["none", "local", "global"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reference_round_trip_is_exact_in_both_streams(tmp_path, scope, dtype):
    model = small_model(scope).to(dtype)
    model.cfg.dtype = dtype
    file = export.to_reference(model, tmp_path / "deep" / "model.pt")
    loaded = SelfAblatingTransformer.from_reference(file, model.gates, n_heads=4)
    tokens = random_tokens()
    with torch.no_grad():
        ours, theirs = model.run_streams(tokens), loaded.run_streams(tokens)
    assert torch.equal(theirs.clean_logits, ours.clean_logits)
    if scope != "none":
        assert torch.equal(theirs.ablated_logits, ours.ablated_logits)
        assert torch.equal(theirs.mask_attn, ours.mask_attn)


def test_reference_state_comes_back_as_it_was(tmp_path):
    """The other way round: read, written, and every tensor is the one that was read."""
    file = export.to_reference(small_model("global"), tmp_path / "a.pt")
    state = torch.load(file, weights_only=True)
    gates = GateConfig(scope="global", k_attn=3, k_mlp=5)
    again = export.to_reference(SelfAblatingTransformer.from_reference(state, gates, n_heads=4), tmp_path / "b.pt")
    written = torch.load(again, weights_only=True)
    assert written.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(written[name], tensor), name


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: small_model(attn_scale=True), "which has an attention scale"),
        (lambda: small_model(tied_embedding=False), "which has embeddings that are not tied"),
        (lambda: small_model(act_fn="relu"), "which has activation 'relu'"),
        (lambda: small_model("both"), "which has local and global gates at once"),
        (lambda: small_model(d_mlp=0), "which has no MLPs"),
        (lambda: small_model(gates={"scores": "ablated"}), "which has gates that read the ablated stream"),
        (lambda: small_model(gates={"rank": 3}), "which has low-rank gates"),
        (lambda: small_model(qkv_bias=True), "no bias b_Q, but blocks.0.attn.b_Q is not zero"),
        (lambda: small_model(unembed_bias=True), "no bias b_U, but unembed.b_U is not zero"),
        (lambda: gated_model("llama"), "which has grouped keys and values"),
    ],
)
def test_reference_refuses_what_it_cannot_express(tmp_path, make, reason):
    with pytest.raises(ValueError, match=rf"reference.*{reason}"):
        export.to_reference(make(), tmp_path / "model.pt")
    assert list(tmp_path.iterdir()) == []


def test_reference_wants_the_name_of_a_file(tmp_path):
    with pytest.raises(IsADirectoryError, match="is a folder: name the file to write"):
        export.to_reference(small_model(), tmp_path)


# ------------------------------------------------------------------------------------------------------- Hugging Face


@torch.no_grad()
def hugging_face_logits(folder: Path, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """Logits of the folder, loaded without network or knowledge of where it came from."""

    def no_network(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr("socket.socket.connect", no_network)
    loaded, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return loaded(random_tokens()).logits


@pytest.mark.parametrize("attn_scale", [True, False])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_hugging_face_gives_the_same_logits(tmp_path, monkeypatch, attn_scale, tied, qkv_bias):
    model = small_model(attn_scale=attn_scale, tied_embedding=tied, qkv_bias=qkv_bias)
    export.to_hf(model, tmp_path / "hf")
    logits = hugging_face_logits(tmp_path / "hf", monkeypatch)
    torch.testing.assert_close(logits, clean_logits(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("act_fn", ["gelu_new", "gelu", "relu", "silu"])
def test_hugging_face_knows_the_activation(tmp_path, monkeypatch, act_fn):
    model = small_model(act_fn=act_fn, d_mlp=40, eps=1e-3)
    export.to_hf(model, tmp_path / "hf")
    logits = hugging_face_logits(tmp_path / "hf", monkeypatch)
    torch.testing.assert_close(logits, clean_logits(model), rtol=0, atol=1e-5)


def test_hugging_face_takes_a_model_with_folded_layer_norm(tmp_path, monkeypatch):
    model = small_model()
    model.process_weights_(center_writing_weights=False, center_unembed=False)
    model.unembed.b_U.data.zero_()
    export.to_hf(model, tmp_path / "hf")
    logits = hugging_face_logits(tmp_path / "hf", monkeypatch)
    torch.testing.assert_close(logits, clean_logits(model), rtol=0, atol=1e-5)


def test_hugging_face_keeps_float64(tmp_path, monkeypatch):
    model = SelfAblatingTransformer.from_hooked(plain_model(dtype=torch.float64), GateConfig(k_attn=3, k_mlp=5))
    model.unembed.b_U.data.zero_()
    export.to_hf(model, tmp_path / "hf")
    logits = hugging_face_logits(tmp_path / "hf", monkeypatch)
    assert logits.dtype == torch.float64
    torch.testing.assert_close(logits, clean_logits(model), rtol=0, atol=1e-12)


def test_hugging_face_brings_the_tokenizer(tmp_path, letters):
    model = small_model()
    model.set_tokenizer(letters)
    export.to_hf(model, tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path / "hf"))
    assert tokenizer("abc").input_ids == [0, 1, 2, 3]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert loaded.config.eos_token_id == 0


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: gated_model("llama"), "grouped keys and values"),
        (lambda: gated_model("no-norm"), "normalisation None"),
        (lambda: gated_model("pythia"), "attention and MLP in parallel"),
        (lambda: gated_model("alibi"), "a LayerNorm on the embedding"),
        (lambda: gated_model("shortformer"), "positions of type 'shortformer'"),
        (lambda: gated_model("attention-only"), "no MLPs"),
        (lambda: gated_model("gpt-neo"), "windowed attention"),
        (lambda: gated_model("solu-ln"), "a LayerNorm inside the MLP"),
        (lambda: gated_model("inverse-layer-scale"), "an attention scale that falls with the layer"),
        (lambda: gated_model("capped-logits"), "a soft cap on logits"),
        (lambda: gated_model("gpt2"), "a bias on the logits"),
        (lambda: small_model(d_head=3), "heads that do not add up"),
    ],
)
def test_hugging_face_refuses_what_gpt2_cannot_express(tmp_path, make, reason):
    with pytest.raises(ValueError, match=rf"GPT-2 cannot express this model.*{reason}.*--to hooked"):
        export.to_hf(make(), tmp_path / "hf")
    assert list(tmp_path.iterdir()) == []


# -------------------------------------------------------------------------------------------------------------- folders


@pytest.mark.parametrize("write", [export.to_hooked, export.to_hf])
def test_a_folder_that_holds_something_is_refused(tmp_path, write):
    (tmp_path / "out").mkdir()
    write(small_model(), tmp_path / "out")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(FileExistsError, match="exists and is not empty: name another folder"):
        write(small_model(seed=1), tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("write", [export.to_hooked, export.to_hf])
def test_a_failed_export_leaves_nothing(tmp_path, letters, monkeypatch, write):
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    model = small_model()
    model.set_tokenizer(letters)
    monkeypatch.setattr(export, "save_tokenizer", full)
    with pytest.raises(OSError, match="No space left"):
        write(model, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["letters"]


@pytest.mark.parametrize("bytes_left", [0, 3_000])
@pytest.mark.parametrize("write", [export.to_hooked, export.to_hf, export.to_reference])
def test_a_full_disk_is_an_error_that_names_the_output(tmp_path, write, bytes_left):
    model, out = small_model(qkv_bias=False, unembed_bias=False, attn_scale=False), tmp_path / "out"
    with full_disk(bytes_left), pytest.raises(OSError, match=rf"File too large.*{out}|{out}.*File too large"):
        write(model, out)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_exports_have_the_dtype_of_the_parameters(tmp_path, dtype):
    """Also where the configuration says another."""
    model = small_model().to(dtype, print_details=False)
    model.cfg.dtype = torch.float32
    for write, name in ((export.to_hooked, "hooked"), (export.to_hf, "hf")):
        write(model, tmp_path / name)
        weights = load_file(tmp_path / name / "model.safetensors")
        buffers = ("IGNORE", "mask")
        assert {tensor.dtype for key, tensor in weights.items() if not key.endswith(buffers)} == {dtype}, name


def test_an_exported_model_is_not_mistaken_for_our_own(tmp_path):
    export.to_hf(small_model(), tmp_path / "hf")
    export.to_hooked(small_model(), tmp_path / "hooked")
    for folder in ("hf", "hooked"):
        with pytest.raises(ValueError, match="not written by sa_lens"):
            SelfAblatingTransformer.from_pretrained(tmp_path / folder)
