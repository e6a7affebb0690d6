"""The configuration: YAML there and back, unknown keys, values out of range or of the wrong type."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
import typing

import hypothesis.strategies as st
import numpy as np
import pytest
import yaml
from hypothesis import given

from sa_lens import config
from sa_lens.config import (
    PRESETS,
    DataConfig,
    GateConfig,
    LossConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
    from_dict,
    read_yaml,
    to_dict,
    write_yaml,
)

CLASSES = [ModelConfig, GateConfig, LossConfig, DataConfig, TrainConfig, RunConfig]

CHANGED = RunConfig(
    model=ModelConfig(n_layers=2, d_head=7, d_mlp=0, d_vocab=100, act_fn="gelu", attn_scale=True, init="gpt2"),
    gates=GateConfig("both", 3, 4, "soft", "softmax", 0.1, "head"),
    loss=LossConfig(0.1, 0.9, 0.1),
    data=DataConfig(source="a.txt", max_documents=10, streaming=True, keep_whole="names.txt"),
    train=TrainConfig(steps=7, warmup_steps=3, betas=(0.8, 0.95), adam_eps=1e-9, precision="bf16", lr=1e-4),
)


@pytest.mark.parametrize("run", [RunConfig(), CHANGED, *PRESETS.values()], ids=["default", "changed", *PRESETS])
def test_yaml_round_trip(run, tmp_path):
    write_yaml(run, tmp_path / "run.yaml")
    assert read_yaml(tmp_path / "run.yaml") == run
    assert from_dict(RunConfig, to_dict(run)) == run
    assert yaml.safe_load((tmp_path / "run.yaml").read_text()) == to_dict(run)


def test_keys_left_out_keep_the_base(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("gates: {k_attn: 2}\ntrain:\n  lr: 1e-3\n")
    assert read_yaml(file) == RunConfig(gates=GateConfig(k_attn=2), train=TrainConfig(lr=1e-3))
    found = read_yaml(file, base=PRESETS["paper-head"])
    assert found.gates == GateConfig(k_attn=2, temperature=0.1)
    assert found.loss == PRESETS["paper-head"].loss
    file.write_text("")
    assert read_yaml(file) == RunConfig()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {layers: 3}", r"unknown key model\.'layers'; known keys: n_layers, d_model"),
        ("modl: {}", r"unknown key 'modl'; known keys: model, gates"),
        ("model: 3", r"model\. must be a mapping, not 3"),
        ("- 1", "must be a mapping"),
        ("model: {n_layers: 2.5}", r"model\.n_layers=2\.5 must be a whole number"),
        ("model: {n_layers: true}", r"model\.n_layers=True must be a whole number"),
        ("model: {n_layers: '2'}", r"model\.n_layers='2' must be a whole number"),
        ("model: {attn_scale: 1}", r"model\.attn_scale=1 must be true or false"),
        ("model: {d_vocab: many}", r"model\.d_vocab='many' must be a whole number"),
        ("model: {n_layers: null}", r"model\.n_layers=None must be a whole number"),
        ("train: {lr: fast}", r"train\.lr='fast' must be a number"),
        ("train: {betas: [0.9]}", r"train\.betas=\[0\.9\] must be a list of 2 numbers"),
        ("train: {betas: [0.9, x]}", r"train\.betas='x' must be a number"),
        ("gates: {scope: everywhere}", r"gates\.scope='everywhere' is not one of 'none', 'local', 'global', 'both'"),
        ("gates: {kind: firm}", r"gates\.kind='firm' is not one of 'hard', 'soft'"),
        ("gates: {scope: [local]}", r"gates\.scope=\['local'\] is not one of"),
        ("gates: {k_attn: 0}", r"gates\.k_attn=0 must be at least 1"),
        ("a: [", "is not valid YAML"),
        ("{1: a, b: c}", "unknown key 1; known keys: model"),
        ("gates: {null: 1, foo: 2}", r"unknown key gates\.None"),
        ("train: {seeds: 1}", "perhaps you meant seed$"),
        ("train: {steps: 3}\ntrain: {steps: 4}", "the key 'train' stands twice.*line 2"),
        ("train: {steps: 3, seed: 1, 'steps': 4}", "the key 'steps' stands twice"),
        ("train: {lr: 1" + "0" * 400 + "}", r"train\.lr=.{,60} must be a finite number"),
        ("train: {steps: 1" + "0" * 400 + "}", r"train\.steps=.{,60} must be at most 1_000_000_000_000$"),
        ("train: {seed: 1" + "0" * 5000 + "}", "is not valid YAML: .*limit"),
        ("data: {source: " + "[" * 3000 + "]" * 3000 + "}", r"run\.yaml is not valid YAML: .* nested too deeply"),
        ("a: 1\n---\nb: 2", "is not valid YAML"),
        ("model: !!python/name:os.system", "is not valid YAML"),
    ],
)
def test_what_a_file_may_not_say(text, message, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_yaml(file)


def test_a_file_that_is_not_utf8(tmp_path):
    (tmp_path / "run.yaml").write_bytes("data: {source: é.txt}".encode("latin-1"))
    with pytest.raises(ValueError, match=r"run\.yaml is not UTF-8 text \(byte 15\)"):
        read_yaml(tmp_path / "run.yaml")


@pytest.mark.parametrize(
    ("first", "next_level", "message"),
    [
        ("[x, x, x, x, x, x, x, x, x]", "[{}]", "unknown key 'l0'"),
        ("{a: 1, b: 2, c: 3, d: 4, e: 5, f: 6, g: 7, h: 8, i: 9}", "{{<<: [{}]}}", "too many keys are merged"),
    ],
    ids=["aliases", "merged keys"],
)
def test_aliases_that_unfold_to_a_billion_items_are_refused_at_once(first, next_level, message, tmp_path):
    """Each level holds the one before nine times, 9^11 items in all: if they were written out, this would not end."""
    levels = [first, *(next_level.format(", ".join([f"*l{level}"] * 9)) for level in range(10))]
    (tmp_path / "run.yaml").write_text("\n".join(f"l{i}: &l{i} {level}" for i, level in enumerate(levels)))
    with pytest.raises(ValueError, match=message) as raised:
        read_yaml(tmp_path / "run.yaml")
    assert len(str(raised.value)) < 500


def test_aliases_and_merged_keys_of_a_sound_file(tmp_path):
    (tmp_path / "run.yaml").write_text("gates: {k_attn: &k 3, k_mlp: *k}\ntrain: &t {steps: 7}\n")
    assert read_yaml(tmp_path / "run.yaml") == RunConfig(
        gates=GateConfig(k_attn=3, k_mlp=3), train=TrainConfig(steps=7)
    )


def test_text_that_looks_like_a_number_comes_back(tmp_path):
    run = RunConfig(data=DataConfig(source="1e5", column="3"), train=TrainConfig(lr=1e-3, adam_eps=1e-30))
    write_yaml(run, tmp_path / "run.yaml")
    assert read_yaml(tmp_path / "run.yaml") == run


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        read_yaml(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("cls", "values", "message"),
    [
        (ModelConfig, {"n_layers": 0}, r"model\.n_layers=0 must be at least 1"),
        (ModelConfig, {"n_ctx": -1}, r"model\.n_ctx=-1"),
        (ModelConfig, {"d_model": 130}, r"d_model=130 is not a multiple of model\.n_heads=16; set model\.d_head"),
        (ModelConfig, {"d_head": 0}, r"model\.d_head=0"),
        (ModelConfig, {"d_mlp": -1}, r"model\.d_mlp=-1 must be 0"),
        (ModelConfig, {"d_vocab": 1}, r"model\.d_vocab=1"),
        (ModelConfig, {"eps": 0.0}, r"model\.eps=0\.0 must be above 0"),
        (ModelConfig, {"init": "zeros"}, r"model\.init='zeros' is not one of 'reference', 'gpt2'"),
        (GateConfig, {"k_mlp": 0}, r"gates\.k_mlp=0"),
        (GateConfig, {"k_attn": 2.0}, r"gates\.k_attn=2\.0 must be a whole number"),
        (GateConfig, {"temperature": 0.0}, r"gates\.temperature=0\.0 must be above 0"),
        (GateConfig, {"temperature": float("nan")}, r"gates\.temperature=nan"),
        (GateConfig, {"surrogate": "tanh"}, r"gates\.surrogate='tanh'"),
        (GateConfig, {"attn_unit": "layer"}, r"gates\.attn_unit='layer'"),
        (LossConfig, {"clean": -1.0}, r"loss\.clean=-1\.0 must be 0 or more"),
        (LossConfig, {"clean": 0.0, "ablated": 0.0}, "at least one coefficient"),
        (LossConfig, {"ablated": float("nan")}, r"loss\.ablated=nan"),
        (DataConfig, {"validation_fraction": 1.0}, r"data\.validation_fraction=1\.0"),
        (DataConfig, {"n_stories": 99}, r"data\.n_stories=99 must be at least 100"),
        (DataConfig, {"vocab_size": 299}, r"data\.vocab_size=299"),
        (DataConfig, {"max_documents": 1}, r"data\.max_documents=1"),
        (DataConfig, {"streaming": True}, r"streaming needs data\.max_documents"),
        (TrainConfig, {"steps": 0}, r"train\.steps=0"),
        (TrainConfig, {"warmup_steps": 1000}, r"train\.warmup_steps=1000 must be below train\.steps=1000"),
        (TrainConfig, {"batch_size": 10, "accumulate": 3}, "batch_size=10 is not a multiple of train.accumulate=3"),
        (TrainConfig, {"lr": 0.0}, r"train\.lr=0\.0"),
        (TrainConfig, {"clip": -1.0}, r"train\.clip=-1\.0"),
        (TrainConfig, {"precision": "fp8"}, r"train\.precision='fp8'"),
        (TrainConfig, {"freeze": "base"}, r"name it in train\.init"),
        (TrainConfig, {"betas": (0.9, 1.0)}, r"train\.betas=\(0\.9, 1\.0\) must be two numbers from 0 to below 1"),
        (TrainConfig, {"adam_eps": 0.0}, r"train\.adam_eps=0\.0 must be above 0"),
        (TrainConfig, {"steps": 10**13}, r"train\.steps=10000000000000 must be at most 1_000_000_000_000"),
        (TrainConfig, {"seed": 2**32}, r"train\.seed=4294967296 must be at most 4_294_967_295"),
        (DataConfig, {"stories_seed": -1}, r"data\.stories_seed=-1 must be 0 or more"),
        (DataConfig, {"source": "a\0b"}, r"data\.source='a.x00b' holds a NUL character"),
        (RunConfig, {"gates": 3}, r"gates\. must be a mapping, not 3"),
    ],
)
def test_values_out_of_range(cls, values, message):
    with pytest.raises(ValueError, match=message):
        cls(**values)


SECTIONS = {"model": ModelConfig, "gates": GateConfig, "loss": LossConfig, "data": DataConfig, "train": TrainConfig}
KEYS = [(section, f.name) for section, cls in SECTIONS.items() for f in dataclasses.fields(cls)]


@pytest.mark.parametrize(("section", "key"), KEYS, ids=[".".join(key) for key in KEYS])
def test_every_key_refuses_what_it_cannot_be_and_is_named(section, key):
    """In the dataclass, and in a dictionary as a file or a flag gives it."""
    for value in (
        {},
        object(),
        math.inf,
        -math.inf,
        math.nan,
        10**400,
        -(10**13),
        "",
        " ",
        "nonsense\0",
        [],
        (1, 2, 3),
    ):
        with pytest.raises(ValueError, match=rf"^(unknown key )?{section}\.{key}\b") as raised:
            SECTIONS[section](**{key: value})
        assert len(str(raised.value)) < 300
        with pytest.raises(ValueError, match=rf"^(unknown key )?{section}\.{key}\b"):
            from_dict(RunConfig, {section: {key: value}})


def test_numbers_of_numpy_become_those_of_python():
    gates, train = GateConfig(k_attn=np.int64(3), temperature=np.float32(0.5)), TrainConfig(betas=[0.5, np.float64(0)])
    assert (type(gates.k_attn), type(gates.temperature), type(train.betas)) == (int, float, tuple)
    assert json.loads(json.dumps(to_dict(gates)))["temperature"] == 0.5


def test_activations_are_those_of_transformer_lens():
    from transformer_lens.utilities.activation_functions import SUPPORTED_ACTIVATIONS

    assert set(typing.get_args(config.Activation)) <= set(SUPPORTED_ACTIVATIONS)


def test_the_smallest_values_are_allowed():
    ModelConfig(n_layers=1, d_model=1, n_heads=1, n_ctx=1, d_vocab=2, d_mlp=0)
    GateConfig(k_attn=1, k_mlp=1)
    LossConfig(clean=0, ablated=1e-9)
    TrainConfig(steps=1, batch_size=1, clip=0, warmup_steps=0)


@pytest.mark.parametrize("cls", CLASSES)
def test_configurations_are_frozen_and_document_every_field(cls):
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(cls(), dataclasses.fields(cls)[0].name, None)
    source = __import__("inspect").getsource(cls)
    for f in dataclasses.fields(cls):
        after = source.split(f"    {f.name}: ", 1)[1].split("\n", 1)[1].lstrip()
        assert after.startswith('"""'), f"{cls.__name__}.{f.name} has no docstring"


@given(
    scope=st.sampled_from(["none", "local", "global", "both"]),
    k=st.integers(1, 1000),
    temperature=st.floats(1e-6, 1e6),
    coefficients=st.tuples(*[st.floats(0, 1e6)] * 2),
)
def test_any_allowed_gates_and_loss_come_back(scope, k, temperature, coefficients):
    run = RunConfig(gates=GateConfig(scope, k, k, temperature=temperature), loss=LossConfig(1.0, *coefficients))
    assert from_dict(RunConfig, yaml.safe_load(yaml.safe_dump(to_dict(run)))) == run


@pytest.mark.parametrize(
    ("scope", "gated", "local", "global_"),
    [
        ("none", False, False, False),
        ("local", True, True, False),
        ("global", True, False, True),
        ("both", True, True, True),
    ],
)
def test_what_a_scope_reads(scope, gated, local, global_):
    gates = GateConfig(scope)
    assert (gates.gated, gates.reads_local, gates.reads_global) == (gated, local, global_)


def test_presets_are_those_of_the_paper():
    october, head = PRESETS["paper-2024-10"], PRESETS["paper-head"]
    for run in (october, head):
        m = run.model
        assert (m.n_layers, m.d_model, m.n_heads, m.n_ctx, m.act_fn, m.eps) == (8, 128, 16, 256, "gelu_new", 1e-5)
        assert (m.tied_embedding, m.attn_scale, m.qkv_bias, m.unembed_bias, m.init) == (
            True,
            False,
            False,
            False,
            "reference",
        )
        assert run.gates.kind == "hard"
        t = run.train
        assert (t.betas, t.adam_eps, t.weight_decay, t.clip, t.warmup_steps) == ((0.9, 0.999), 1e-8, 0.0, 1.0, 0)
    assert (october.train.batch_size, october.train.steps, october.train.lr) == (24, 400_000, 1.4e-3)
    assert (october.gates.temperature, october.loss) == (1.0, LossConfig(0.5, 0.5, 0.0))
    assert (head.train.batch_size, head.train.steps, head.train.lr) == (32, 200_000, 1e-3)
    assert (head.gates.temperature, head.loss) == (0.1, LossConfig(0.1, 0.9, 0.1))


def test_the_configuration_needs_no_torch():
    code = f"import sys, importlib.util as u; s = u.spec_from_file_location('sa_config', {config.__file__!r}); "
    code += "m = u.module_from_spec(s); sys.modules['sa_config'] = m; s.loader.exec_module(m); "
    code += "assert 'torch' not in sys.modules and m.RunConfig()"
    subprocess.run([sys.executable, "-c", code], check=True)
