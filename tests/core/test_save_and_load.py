"""A saved model comes back the same, a failed write changes nothing, what is no model is refused with the reason."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from full_disk import full_disk
from safetensors.torch import load_file, save_file
from small_models import SHAPES, gated_model, plain_model, random_tokens
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sa_lens.config import GateConfig, ModelConfig
from sa_lens.core import HookedTransformerConfig, SelfAblatingTransformer, save_and_load
from sa_lens.core.base import TRANSFORMER_LENS
from sa_lens.data import HubUnreachable, whole_files

SCOPES = ["none", "local", "global", "both"]


def small_model(scope: str = "local", *, seed: int = 0, **shape: Any) -> SelfAblatingTransformer:
    cfg = ModelConfig(**{"n_layers": 2, "d_model": 16, "n_heads": 4, "n_ctx": 16, "d_vocab": 23, **shape})
    return SelfAblatingTransformer(cfg, GateConfig(scope=scope, k_attn=3, k_mlp=5), seed=seed)


def assert_same(loaded: SelfAblatingTransformer, model: SelfAblatingTransformer) -> None:
    """Same parameters, same gates, and the same logits in both streams, bit for bit."""
    assert loaded.gates == model.gates
    assert (loaded.tied, loaded.qkv_bias, loaded.unembed_bias) == (model.tied, model.qkv_bias, model.unembed_bias)
    ours, theirs = dict(model.named_parameters()), dict(loaded.named_parameters())
    assert list(ours) == list(theirs)
    for name, parameter in ours.items():
        assert theirs[name].dtype == parameter.dtype
        assert theirs[name].requires_grad == parameter.requires_grad, name
        assert torch.equal(theirs[name], parameter), name
    tokens = random_tokens()
    with torch.no_grad():
        assert torch.equal(loaded(tokens), model(tokens))
        if model.gates.gated:
            with model.ablated() as ours_ablated:
                expected = ours_ablated(tokens)
            with loaded.ablated() as theirs_ablated:
                assert torch.equal(theirs_ablated(tokens), expected)


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of 23 tokens: end of text, and single letters and signs."""
    vocab = {"<|endoftext|>": 0, **{letter: i for i, letter in enumerate("abcdefghijklmnopqrst Ġ", start=1)}}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=end, eos_token=end, pad_token=end)
    folder = tmp_path_factory.mktemp("tokenizer") / "letters"
    tokenizer.save_pretrained(folder)
    return folder


# -------------------------------------------------------------------------------------------------------- round trip


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("tied", [True, False])
def test_round_trip_gives_the_same_model(tmp_path, scope, tied):
    model = small_model(scope, tied_embedding=tied)
    assert model.save_pretrained(tmp_path / "m") == tmp_path / "m"
    assert_same(SelfAblatingTransformer.from_pretrained(tmp_path / "m"), model)
    assert_same(SelfAblatingTransformer.from_pretrained(str(tmp_path / "m")), model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_round_trip_keeps_the_dtype(tmp_path, dtype, tied):
    base = plain_model(dtype=dtype, tie_word_embeddings=tied)
    if tied:
        base.unembed.W_U.data = base.embed.W_E.data.T.clone()
    model = SelfAblatingTransformer.from_hooked(base, GateConfig(scope="both", k_attn=3, k_mlp=5))
    assert model.tied == tied
    model.save_pretrained(tmp_path / "m")
    loaded = SelfAblatingTransformer.from_pretrained(tmp_path / "m")
    assert loaded.cfg.dtype == dtype
    assert_same(loaded, model)


@pytest.mark.parametrize("shape", SHAPES)
def test_round_trip_of_every_shape(tmp_path, shape):
    model = gated_model(shape, "both")
    model.save_pretrained(tmp_path / "m")
    assert_same(SelfAblatingTransformer.from_pretrained(tmp_path / "m"), model)


@pytest.mark.parametrize(
    "gates",
    [
        GateConfig(kind="soft", k_attn=2, k_mlp=3, temperature=0.3),
        GateConfig(surrogate="softmax", attn_unit="head", k_attn=1, k_mlp=24),
    ],
)
def test_round_trip_of_other_gates(tmp_path, gates):
    model = SelfAblatingTransformer.from_hooked(plain_model(), gates)
    model.save_pretrained(tmp_path / "m")
    assert_same(SelfAblatingTransformer.from_pretrained(tmp_path / "m"), model)


@pytest.mark.parametrize("options", [{"qkv_bias": True}, {"unembed_bias": True}, {"attn_scale": True}, {"d_mlp": 0}])
def test_round_trip_of_the_options_of_a_model(tmp_path, options):
    model = small_model(**options)
    model.save_pretrained(tmp_path / "m")
    assert_same(SelfAblatingTransformer.from_pretrained(tmp_path / "m"), model)


def test_round_trip_after_weight_processing(tmp_path):
    model = gated_model("gpt2", "both")
    model.process_weights_(center_writing_weights=False)
    model.save_pretrained(tmp_path / "m")
    assert_same(SelfAblatingTransformer.from_pretrained(tmp_path / "m"), model)


def test_loading_leaves_the_random_state_alone_and_the_model_in_eval_mode(tmp_path):
    small_model().train().save_pretrained(tmp_path / "m")
    before = torch.random.get_rng_state()
    loaded = SelfAblatingTransformer.from_pretrained(tmp_path / "m", device="cpu")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not any(module.training for module in loaded.modules())


def test_the_configuration_of_the_run_is_kept(tmp_path):
    save_and_load.save(small_model(), tmp_path / "m", extra={"run": {"steps": 3}})
    assert save_and_load.read_config(tmp_path / "m")["run"] == {"steps": 3}


def test_a_tied_matrix_is_stored_once(tmp_path):
    small_model().save_pretrained(tmp_path / "m")
    assert "unembed.W_U" not in load_file(tmp_path / "m" / "model.safetensors")


# --------------------------------------------------------------------------------------------------------- tokenizer


def with_tokenizer(folder: Path, **options: Any) -> SelfAblatingTransformer:
    model = small_model(**options)
    model.set_tokenizer(PreTrainedTokenizerFast.from_pretrained(folder))
    return model


def test_strings_work_after_loading_with_one_begin_of_text(tmp_path, tokenizer_folder):
    model = with_tokenizer(tokenizer_folder)
    model.save_pretrained(tmp_path / "m")
    for _ in range(2):
        loaded = SelfAblatingTransformer.from_pretrained(tmp_path / "m")
        assert loaded.to_tokens("abc").tolist() == [[0, 1, 2, 3]]
        assert loaded.to_tokens("abc", prepend_bos=False).tolist() == [[1, 2, 3]]
        assert loaded.to_string(torch.tensor([1, 2, 3])) == "abc"
        assert loaded.tokenizer.padding_side == model.tokenizer.padding_side
        with torch.no_grad():
            assert torch.equal(loaded("abc"), model("abc"))
        # saved again, it is still the same: nothing piles up
        loaded.save_pretrained(tmp_path / "m")


def test_a_model_without_tokenizer_does_not_inherit_that_of_the_folder(tmp_path, tokenizer_folder):
    with_tokenizer(tokenizer_folder).save_pretrained(tmp_path / "m")
    small_model(seed=1).save_pretrained(tmp_path / "m")
    assert SelfAblatingTransformer.from_pretrained(tmp_path / "m").tokenizer is None


# --------------------------------------------------------------------------------------------------------- atomicity


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("bytes_left", [0, 100, 2_000, 20_000])
def test_a_full_disk_leaves_the_old_model(tmp_path, tokenizer_folder, bytes_left):
    folder = tmp_path / "m"
    with_tokenizer(tokenizer_folder).save_pretrained(folder)
    (folder / "metrics.jsonl").write_text("{}")
    before = content(folder)
    with full_disk(bytes_left), pytest.raises(OSError, match=rf"File too large.*{folder}|{folder}.*File too large"):
        with_tokenizer(tokenizer_folder, scope="global", seed=1).save_pretrained(folder)
    assert content(folder) == before


@pytest.mark.parametrize("bytes_left", [0, 20_000])
def test_a_full_disk_leaves_no_part_of_a_new_model(tmp_path, bytes_left):
    with full_disk(bytes_left), pytest.raises(OSError, match=r"File too large"):
        small_model().save_pretrained(tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_leaves_the_old_model(tmp_path, monkeypatch):
    folder = small_model().save_pretrained(tmp_path / "m")
    before = content(folder)

    def interrupted(weights: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(save_and_load, "write_weights", interrupted)
    with pytest.raises(KeyboardInterrupt):
        small_model(seed=1).save_pretrained(folder)
    with pytest.raises(KeyboardInterrupt):
        small_model(seed=1).save_pretrained(tmp_path / "new")
    assert content(folder) == before
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_a_new_folder_appears_only_when_complete(tmp_path, monkeypatch):
    seen = []
    write = save_and_load.write_weights

    def watched(weights: Any, path: Path) -> None:
        write(weights, path)
        seen.append((tmp_path / "deep" / "m").exists())

    monkeypatch.setattr(save_and_load, "write_weights", watched)
    small_model().save_pretrained(tmp_path / "deep" / "m")
    assert seen == [False]
    assert {p.name for p in (tmp_path / "deep" / "m").iterdir()} == {"config.json", "model.safetensors"}
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["m"]


def test_saving_over_a_model_replaces_it_and_leaves_other_files(tmp_path):
    folder = small_model("local").save_pretrained(tmp_path / "m")
    (folder / "metrics.jsonl").write_text("{}")
    model = small_model("both", seed=1, n_layers=1)
    model.save_pretrained(folder)
    assert_same(SelfAblatingTransformer.from_pretrained(folder), model)
    assert {p.name for p in folder.iterdir()} == {"config.json", "model.safetensors", "metrics.jsonl"}


def test_files_have_ordinary_permissions(tmp_path):
    folder = small_model().save_pretrained(tmp_path / "m")
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "file").write_text("")
    assert folder.stat().st_mode == (tmp_path / "plain").stat().st_mode
    for file in folder.iterdir():
        assert stat.filemode(file.stat().st_mode) == stat.filemode((tmp_path / "plain" / "file").stat().st_mode)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_an_error_that_names_it(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o555)
    with pytest.raises(PermissionError, match="locked"):
        small_model().save_pretrained(tmp_path / "locked" / "m")


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "m").write_text("mine")
    with pytest.raises(NotADirectoryError, match="is a file: give the name of a folder"):
        small_model().save_pretrained(tmp_path / "m")
    assert (tmp_path / "m").read_text() == "mine"


def test_atomic_write_leaves_the_old_file_when_writing_fails(tmp_path):
    file = tmp_path / "f"
    whole_files.atomic_write(file, b"old")
    with full_disk(10), pytest.raises(OSError, match="File too large"):
        whole_files.atomic_write(file, b"new content of the file")
    assert content(tmp_path) == {"f": b"old"}


def test_a_bias_that_the_model_does_not_have_must_be_zero(tmp_path):
    model = small_model()
    model.blocks[1].attn.b_K.data[0, 0] = 1
    with pytest.raises(ValueError, match=r"blocks.1.attn.b_K is not zero.*set it to zero"):
        model.save_pretrained(tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------ what the parameters are, not what cfg says


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "change",
    [
        lambda model, dtype: model.to(dtype, print_details=False),
        lambda model, dtype: {8: model.double, 4: model.float}.get(
            dtype.itemsize, model.half if dtype == torch.float16 else model.bfloat16
        )(),
        lambda model, dtype: torch.nn.Module.to(model, dtype),
        lambda model, dtype: torch.nn.Sequential(model).to(dtype)[0],
        lambda model, dtype: model.type(dtype),
    ],
    ids=["to", "method", "Module.to", "within another module", "type"],
)
def test_the_dtype_of_the_parameters_is_saved(tmp_path, change, dtype):
    model = change(small_model("both"), dtype)
    assert {p.dtype for p in model.parameters()} == {dtype} == {model.cfg.dtype}
    loaded = SelfAblatingTransformer.from_pretrained(model.save_pretrained(tmp_path / "m"))
    assert loaded(random_tokens()).dtype == dtype
    assert_same(loaded, model)


def test_a_state_of_another_dtype_that_is_assigned_is_what_is_saved(tmp_path):
    model, wide = small_model(), small_model().double()
    model.load_state_dict(wide.state_dict(), assign=True)
    loaded = SelfAblatingTransformer.from_pretrained(model.save_pretrained(tmp_path / "m"))
    assert loaded.cfg.dtype == torch.float64
    assert all(torch.equal(loaded.get_parameter(name), p) for name, p in wide.named_parameters())


@pytest.mark.parametrize("convert", [torch.nn.Module.double, torch.nn.Module.half])
def test_from_hooked_takes_the_dtype_of_the_parameters(tmp_path, convert):
    base = convert(plain_model())
    # that of TransformerLens 3 stays behind
    assert base.cfg.dtype == (torch.float32 if TRANSFORMER_LENS < 4 else base.W_E.dtype)
    model = SelfAblatingTransformer.from_hooked(base, GateConfig(k_attn=3, k_mlp=5))
    assert all(torch.equal(model.get_parameter(name), p) for name, p in base.named_parameters())
    assert {p.dtype for p in model.parameters()} == {model.cfg.dtype} == {base.W_E.dtype}
    assert_same(SelfAblatingTransformer.from_pretrained(model.save_pretrained(tmp_path / "m")), model)
    assert model.to_hooked_transformer().W_E.dtype == base.W_E.dtype


def test_the_device_of_the_parameters_is_the_configuration_s():
    model = small_model().to(torch.device("meta"), print_details=False)
    assert model.cfg.device == "meta"
    assert torch.nn.Module.to_empty(model, device="cpu").cfg.device == "cpu"
    base = plain_model()
    base.cfg.device = "meta"
    assert SelfAblatingTransformer.from_hooked(base, GateConfig(k_attn=3, k_mlp=5)).W_E.device.type == "cpu"


def test_sizes_and_tying_are_those_of_the_parameters(tmp_path):
    model = small_model(tied_embedding=True)
    model.cfg.n_ctx, model.cfg.d_vocab, model.cfg.tie_word_embeddings = 8, 7, False
    loaded = SelfAblatingTransformer.from_pretrained(model.save_pretrained(tmp_path / "m"))
    assert (loaded.cfg.n_ctx, loaded.cfg.d_vocab, loaded.tied) == (16, 23, True)
    assert_same(loaded, model)
    model.untie()
    model.cfg.tie_word_embeddings = True
    assert not SelfAblatingTransformer.from_pretrained(model.save_pretrained(tmp_path / "m")).tied


@pytest.mark.parametrize("processing", [{"fold_ln": True}, {"center_unembed": True}, {"fold_ln": True, "wide": True}])
def test_processed_weights_come_back(tmp_path, processing):
    model = gated_model(scope="both")
    if processing.pop("wide", False):
        model.double()
    choices = {"fold_ln": False, "center_unembed": False, "fold_value_biases": False, "center_writing_weights": False}
    model.load_and_process_state_dict(model.state_dict(), **(choices | processing))
    assert_same(SelfAblatingTransformer.from_pretrained(model.save_pretrained(tmp_path / "m")), model)


def spoil_k(model):
    model.blocks[1].mlp_gate.k = 2


def spoil_gates(model):
    model.gates = dataclasses.replace(model.gates, temperature=0.5)


def spoil_layers(model):
    model.cfg.n_layers = 1


def spoil_heads(model):
    model.cfg.n_heads = 2


def spoil_one_dtype(model):
    model.blocks[0].mlp.double()


def spoil_scale(model):
    model.blocks[0].attn.attn_scale = 2.0


def spoil_eps(model):
    model.ln_final.eps = 0.1


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (spoil_k, r"blocks.1.mlp_gate is \{.*'k': 5.*it is \{.*'k': 2"),
        (spoil_gates, r"blocks.0.attn_gate is .*temperature=0.5.*it is .*temperature=1.0"),
        (spoil_layers, r"blocks.1\S+ is None, but it is \(\("),
        (spoil_heads, r"blocks.0\S+ is .*, but it is"),
        (spoil_one_dtype, r"blocks.0.mlp.W_in is \(\(16, 64\), torch.float32\), but it is .*float64"),
        (spoil_scale, r"blocks.0.attn is .*but it is .*'attn_scale': 2.0"),
        (spoil_eps, r"ln_final is .*'eps': 0.1"),
    ],
)
def test_a_model_that_its_configuration_does_not_describe_is_not_saved(tmp_path, spoil, match):
    model = small_model()
    spoil(model)
    with pytest.raises(ValueError, match=match):
        model.save_pretrained(tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_not_saved(tmp_path, value):
    model = small_model()
    model.blocks[1].mlp_gate.b_local.data[3] = value
    with pytest.raises(
        ValueError, match=r"cannot be saved: blocks.1.mlp_gate.b_local holds values that are NaN or inf"
    ):
        model.save_pretrained(tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_a_field_that_json_cannot_hold_is_not_dropped(tmp_path):
    model = small_model()
    model.cfg.attn_types = {"a": 1}
    with pytest.raises(ValueError, match=r"model.cfg.attn_types is a dict, which config.json cannot hold"):
        model.save_pretrained(tmp_path / "m")


# ----------------------------------------------------------------------------------------------------------- refusals


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return small_model().save_pretrained(tmp_path / "saved")


def refused(folder: Path, match: str, error: type[Exception] = ValueError) -> None:
    with pytest.raises(error, match=match):
        SelfAblatingTransformer.from_pretrained(folder)


@pytest.mark.parametrize("text", ["", "{", '{"format": "sa_lens", "vers', "[1, 2"])
def test_a_damaged_config_is_refused(saved, text):
    (saved / "config.json").write_text(text)
    refused(saved, "config.json is damaged")


def test_a_config_that_is_not_text_is_refused(saved):
    (saved / "config.json").write_bytes(b"\xff\xfe\x00\x80")
    refused(saved, "config.json is damaged")


@pytest.mark.parametrize("text", ["[]", "3", "{}", '{"model_type": "gpt2"}'])
def test_a_foreign_config_is_refused_with_the_way_to_load_it(saved, text):
    (saved / "config.json").write_text(text)
    refused(saved, r"not written by sa_lens.*from_hugging_face\(")


@pytest.mark.parametrize("key", ["version", "dtype", "gates", "model", "qkv_bias", "unembed_bias"])
def test_a_config_with_a_missing_part_is_refused(saved, key):
    config = json.loads((saved / "config.json").read_text())
    del config[key]
    (saved / "config.json").write_text(json.dumps(config))
    refused(saved, f"config.json is damaged.*{key}")


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("version", 99, "version 99.*upgrade sa_lens"),
        ("version", "2", "damaged: its version is '2'"),
        ("dtype", "load", "dtype 'load' is unknown"),
        ("version", True, "damaged: its version is True"),
        ("version", 0, "damaged: its version is 0"),
        ("dtype", None, "dtype must be of type str, not None"),
        ("dtype", "int8", "dtype 'int8' is unknown"),
        ("dtype", "complex64", "dtype 'complex64' is unknown"),
        ("model", {}, "damaged: model lacks"),
        ("model", [], r"damaged: model must be of type dict, not \[\]"),
        ("gates", {"scope": "sideways"}, "gates.scope='sideways' is not one of"),
        ("gates", {"k": 3}, "unknown key gates.'k'"),
        ("qkv_bias", 1, "qkv_bias must be of type bool, not 1"),
        ("tokenizer", None, "tokenizer must be of type bool, not None"),
    ],
)
def test_a_config_with_a_wrong_part_is_refused(saved, key, value, match):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, key: value}))
    refused(saved, match)


def edit_config(folder: Path, part: str, changes: dict[str, Any], *, drop: str | None = None) -> None:
    config = json.loads((folder / "config.json").read_text())
    config[part].update(changes)
    config[part].pop(drop, None)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(GateConfig) if f.name != "rank"])
def test_no_key_of_the_gates_is_filled_in(saved, name):
    edit_config(saved, "gates", {}, drop=name)
    refused(saved, f"config.json is damaged: gates lacks '{name}'; save the model again")


def test_no_key_of_the_model_is_filled_in(saved):
    """By hand, as a loop: a fresh folder for each key would take long."""
    text = (saved / "config.json").read_text()
    names = list(json.loads(text)["model"])
    assert len(names) > 70
    for name in names:
        edit_config(saved, "model", {}, drop=name)
        refused(saved, f"config.json is damaged: model lacks '{name}'; save the model again")
        (saved / "config.json").write_text(text)


def test_every_field_of_the_installed_transformer_lens_is_required_or_known_to_be_left_out():
    fields = {f.name for f in dataclasses.fields(HookedTransformerConfig)} - set(save_and_load._NOT_SAVED)
    assert fields - save_and_load._LATER_KEYS.keys() == save_and_load._MODEL_KEYS


def test_a_field_of_another_transformer_lens(saved, monkeypatch):
    """A later one's is refused by name; an absent feature of a later one is no obstacle to an earlier one."""
    edit_config(saved, "model", {"use_new_feature": False})
    refused(saved, "damaged: model has the unknown key 'use_new_feature'")
    edit_config(saved, "model", {}, drop="use_new_feature")
    monkeypatch.setitem(save_and_load._LATER_KEYS, "use_other_feature", False)
    edit_config(saved, "model", {"use_other_feature": False})
    assert_same(SelfAblatingTransformer.from_pretrained(saved), small_model())
    edit_config(saved, "model", {"use_other_feature": True})
    refused(saved, "damaged: model has the unknown key 'use_other_feature'")


@pytest.mark.parametrize(
    ("part", "key", "value", "match"),
    [
        ("model", "eps", "1e-5", "model.eps must be of type float, not '1e-5'"),
        ("model", "eps", -1.0, "model.eps=-1.0 must be 0 or above"),
        ("model", "n_layers", "2", "model.n_layers must be of type int"),
        ("model", "n_layers", True, "model.n_layers must be of type int"),
        ("model", "n_layers", 0, "model.n_layers=0 must be a whole number above 0"),
        ("model", "d_head", 8.0, "model.d_head must be of type int"),
        ("model", "d_vocab", None, "model.d_vocab must be of type int"),
        ("model", "n_ctx", -3, "model.n_ctx=-3 must be"),
        ("model", "d_mlp", 0, "model.d_mlp=0 must be"),
        ("model", "act_fn", "evil", "act_fn='?evil'? must be one of"),
        ("model", "use_attn_scale", None, "use_attn_scale must be of type bool"),
        ("model", "attn_types", 3, "attn_types must be of type"),
        ("model", "load_in_4bit", True, "no gates on this model, which has 4-bit weights"),
        ("gates", "k_mlp", 10**9, "gates.k_mlp=1000000000 is more than the 64 units"),
        ("gates", "k_mlp", True, "gates.k_mlp=True must be a whole number"),
        ("gates", "temperature", -1.0, "gates.temperature=-1.0 must be above 0"),
    ],
)
def test_a_value_of_the_wrong_type_or_range_is_refused(saved, part, key, value, match):
    edit_config(saved, part, {key: value})
    refused(saved, f"config.json is damaged: .*{match}")


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("value", [0.0, -2.0])
def test_an_attention_scale_of_zero_is_refused(tmp_path, value, scaled):
    folder = small_model(attn_scale=scaled).save_pretrained(tmp_path / "m")
    edit_config(folder, "model", {"attn_scale": value})
    refused(folder, f"config.json is damaged: model.attn_scale={value} must be above 0")


def test_sizes_that_the_weights_do_not_have_take_no_memory(saved):
    edit_config(saved, "model", {"n_layers": 10**9})
    refused(saved, "model.safetensors does not fit this model: it has 2 layers, expected 1000000000")


@pytest.mark.parametrize("text", ["{}", "", '{"version": "1.0"}'])
def test_a_damaged_tokenizer_is_refused(tmp_path, tokenizer, text):
    model = SelfAblatingTransformer.from_hooked(plain_model(), GateConfig(k_attn=3, k_mlp=5))
    model.set_tokenizer(tokenizer)
    folder = model.save_pretrained(tmp_path / "m")
    (folder / "tokenizer.json").write_text(text)
    refused(folder, f"the tokenizer in {folder} is damaged")
    (folder / "tokenizer_config.json").unlink()
    refused(folder, f"{folder} lacks the tokenizer of its model", FileNotFoundError)


def test_a_device_that_is_not_there_is_no_fault_of_the_file(saved):
    with pytest.raises((RuntimeError, AssertionError)) as caught:
        SelfAblatingTransformer.from_pretrained(saved, device="xpu" if not torch.xpu.is_available() else "hpu")
    assert "damaged" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda w: w.fill_(float("nan")), "holds values that are NaN or infinite"),
        (lambda w: w.index_fill_(0, torch.tensor([3]), float("inf")), "holds values that are NaN or infinite"),
        (lambda w: w.to(torch.int8), "is of type torch.int8, but the model is of type torch.float32"),
        (lambda w: w.bool(), "is of type torch.bool"),
        (lambda w: w.to(torch.complex64), "is of type torch.complex64"),
        (lambda w: w.half(), "is of type torch.float16, but the model is of type torch.float32"),
    ],
)
@pytest.mark.parametrize("name", ["blocks.0.mlp_gate.W_local", "embed.W_E"])
def test_weights_that_are_no_finite_numbers_of_the_model_s_type_are_refused(saved, name, change, match):
    weights = load_file(saved / "model.safetensors")
    weights[name] = change(weights[name])
    save_file(weights, saved / "model.safetensors")
    refused(saved, f"model.safetensors cannot be loaded: {name} {match}")


@pytest.mark.parametrize("kept", [0, 4, 500, -1])
def test_truncated_weights_are_refused(saved, kept):
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    refused(saved, r"model.safetensors is damaged")


def test_weights_that_are_a_pickle_are_refused_and_not_run(saved):
    torch.save({"a": torch.zeros(2)}, saved / "model.safetensors")
    refused(saved, r"model.safetensors is damaged")


def test_weights_of_another_model_are_refused(saved, tmp_path):
    other = small_model(n_layers=1).save_pretrained(tmp_path / "other")
    shutil.copy(other / "model.safetensors", saved / "model.safetensors")
    refused(saved, r"does not fit this model: it has 1 layers, expected 2")
    other = small_model(n_layers=3).save_pretrained(tmp_path / "other3")
    shutil.copy(other / "model.safetensors", saved / "model.safetensors")
    refused(saved, r"does not fit this model: blocks.2.\S+ has shape \(.*, expected None")
    other = small_model("global").save_pretrained(tmp_path / "other2")
    shutil.copy(other / "model.safetensors", saved / "model.safetensors")
    refused(saved, r"does not fit this model: blocks.0.attn_gate.W_global has shape \(16, 16\), expected None")


def test_weights_of_another_shape_are_refused(saved):
    weights = load_file(saved / "model.safetensors")
    weights["ln_final.w"] = torch.ones(17)
    save_file(weights, saved / "model.safetensors")
    refused(saved, r"ln_final.w has shape \(17,\), expected \(16,\)")


def test_missing_files_are_named(saved, tmp_path):
    (saved / "model.safetensors").unlink()
    refused(saved, "model.safetensors does not exist", FileNotFoundError)
    (saved / "config.json").unlink()
    refused(saved, "holds no config.json", FileNotFoundError)
    refused(tmp_path / "no" / "such" / "folder", "no folder", FileNotFoundError)
    with pytest.raises(FileNotFoundError, match="is a file, not a model folder: give the folder"):
        SelfAblatingTransformer.from_pretrained(__file__)


@pytest.mark.parametrize("name", ["gpt2", "pythia-70m", "EleutherAI/pythia-70m"])
def test_names_of_transformer_lens_are_refused_with_the_fix(name):
    with pytest.raises(
        ValueError, match=r"a model of TransformerLens, without gates: load it with TransformerBridge.*from_hooked"
    ):
        SelfAblatingTransformer.from_pretrained(name)


def test_another_dtype_is_asked_for_afterwards(saved):
    with pytest.raises(ValueError, match=r"dtype is no argument; change it afterwards: .*\.to\(torch\.float16\)"):
        SelfAblatingTransformer.from_pretrained(saved, dtype=torch.float16)


@pytest.mark.parametrize("keyword", ["fold_ln", "center_unembed", "hf_model", "default_prepend_bos"])
def test_keywords_of_transformer_lens_are_refused_with_the_fix(saved, keyword):
    with pytest.raises(ValueError, match=rf"no argument '{keyword}'.*from_hooked"):
        SelfAblatingTransformer.from_pretrained(saved, **{keyword: True})


def test_a_local_folder_comes_before_a_model_name(tmp_path, monkeypatch):
    model = small_model()
    model.save_pretrained(tmp_path / "gpt2")
    monkeypatch.chdir(tmp_path)
    assert_same(SelfAblatingTransformer.from_pretrained("gpt2"), model)


def test_a_hub_id_offline_is_an_error_with_the_local_way(monkeypatch):
    import huggingface_hub

    from sa_lens.data import hub

    asked = []
    monkeypatch.setattr(hub, "probe", lambda *args: "no answer within 3 s")
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda name, **options: asked.append(options) or _not_cached(),
    )
    with pytest.raises(HubUnreachable, match=r"'someone/model', no local folder but a Hub id.*download the model's"):
        SelfAblatingTransformer.from_pretrained("someone/model")
    assert [options["local_files_only"] for options in asked] == [True]


def _not_cached() -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    raise LocalEntryNotFoundError("not in the cache")


def test_a_model_from_the_hub_that_is_cached_loads_offline(saved, monkeypatch):
    import huggingface_hub

    from sa_lens.data import hub

    monkeypatch.setattr(hub, "probe", lambda *args: "no answer within 3 s")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **options: str(saved))
    assert_same(SelfAblatingTransformer.from_pretrained("someone/model"), small_model())


# --------------------------------------------------------------------------------------------------------- last step


def write_step(run: Path, step: int, model: SelfAblatingTransformer, *, complete: bool = True) -> None:
    folder = run / "state" / f"step-{step}"
    folder.mkdir(parents=True)
    save_and_load.write_weights(save_and_load.weights_of(model), folder / "model.safetensors")
    if complete:
        (folder / save_and_load.MARKER).write_text("")


def test_last_is_the_highest_complete_step(saved):
    best, at_9, at_10, unfinished = (small_model(seed=seed) for seed in range(4))
    write_step(saved, 9, at_9)
    write_step(saved, 10, at_10)
    write_step(saved, 11, unfinished, complete=False)
    (saved / "state" / "step-12x").mkdir()
    assert_same(SelfAblatingTransformer.from_pretrained(saved, which="best"), best)
    assert_same(SelfAblatingTransformer.from_pretrained(saved, which="last"), at_10)
    assert [folder.name for folder in save_and_load.complete_steps(saved)] == ["step-9", "step-10"]


def test_last_without_a_complete_step_is_an_error(saved):
    write_step(saved, 1, small_model(), complete=False)
    with pytest.raises(FileNotFoundError, match="no complete checkpoint under state/: use which='best'"):
        SelfAblatingTransformer.from_pretrained(saved, which="last")
    with pytest.raises(ValueError, match="which='newest' must be 'best' or 'last'"):
        SelfAblatingTransformer.from_pretrained(saved, which="newest")  # type: ignore[arg-type]


def test_the_description_says_everything_about_the_shape():
    """No field of TransformerLens's configuration that differs from its default is lost."""
    for shape in SHAPES:
        cfg = gated_model(shape).cfg
        described = save_and_load.describe(gated_model(shape))["model"]
        for field in dataclasses.fields(cfg):
            value = getattr(cfg, field.name)
            if field.name not in described and field.name not in save_and_load._NOT_SAVED:
                assert value is None or value == field.default, field.name
