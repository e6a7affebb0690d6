"""What a run starts from when it does not start from random weights."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import MakeRun, same, weights
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from sa_lens.config import GateConfig, RunConfig
from sa_lens.core import HookedTransformer, HookedTransformerConfig, SelfAblatingTransformer
from sa_lens.core.base import TRANSFORMER_LENS
from sa_lens.core.initial_model import initial_model
from sa_lens.data import PreparedData, prepare
from sa_lens.training import train
from sa_lens.training.training_setup import load_text_and_model


def shaped(run: RunConfig, **model: Any) -> RunConfig:
    """The run with another model section."""
    return dataclasses.replace(run, model=dataclasses.replace(run.model, **model))


@pytest.fixture
def data(make_run: MakeRun) -> PreparedData:
    return prepare(make_run().data, 16, progress=False)


@pytest.fixture
def pretrained(data: PreparedData, monkeypatch: pytest.MonkeyPatch) -> HookedTransformer:
    """A model that TransformerLens would fetch under the name `gpt2`."""
    cfg = HookedTransformerConfig(
        n_layers=1, d_model=8, n_heads=2, d_head=4, n_ctx=32, d_vocab=data.d_vocab, act_fn="gelu", seed=0, device="cpu"
    )
    model = HookedTransformer(cfg, tokenizer=data.tokenizer)

    def fetch(name: str, **options: Any) -> HookedTransformer:
        assert (name, options) == ("gpt2", {"device": "cpu", "trust_remote_code": False})
        return model

    if TRANSFORMER_LENS > 3:
        # its bridge needs a configuration from the Hub
        monkeypatch.setattr("sa_lens.core.initial_model._transformer_lens_model", lambda name, known: model)
    else:
        monkeypatch.setattr(HookedTransformer, "from_pretrained_no_processing", fetch)
    return model


def test_a_transformer_lens_model(make_run: MakeRun, tmp_path: Path, pretrained: HookedTransformer) -> None:
    run = shaped(make_run(GateConfig(k_attn=2, k_mlp=2), init="gpt2", freeze="base"))
    found = train(run, tmp_path / "run", progress=False)
    base = {name: w for name, w in weights(found.model).items() if "_gate." not in name}
    assert same(base, {name: p.detach() for name, p in pretrained.named_parameters()})
    assert found.evaluation.ablated_loss is not None
    # its tokenizer reads the text, and stays with the run
    assert found.model.tokenizer.get_vocab() == pretrained.tokenizer.get_vocab()


@pytest.fixture
def hugging_face(data: PreparedData, tmp_path: Path) -> Path:
    """A folder with a small random Llama of `transformers` and a tokenizer."""
    cfg = LlamaConfig(
        **{"vocab_size": data.d_vocab, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 12},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32},
    )
    LlamaForCausalLM(cfg).save_pretrained(tmp_path / "llama")
    data.tokenizer.save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def test_a_hugging_face_folder(make_run: MakeRun, tmp_path: Path, hugging_face: Path) -> None:
    run = shaped(make_run(GateConfig(k_attn=2, k_mlp=2), init=str(hugging_face), freeze="base", steps=2))
    trained = train(run, tmp_path / "run", progress=False)
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        expected = LlamaForCausalLM.from_pretrained(hugging_face)(tokens).logits.log_softmax(-1)
        assert (trained.model(tokens).log_softmax(-1) - expected).abs().max() < 1e-4
    assert trained.evaluation.ablated_loss is not None
    # its tokenizer reads the text, and stays with the run, which no longer needs the folder
    vocabulary = trained.model.tokenizer.get_vocab()
    assert vocabulary == AutoTokenizer.from_pretrained(hugging_face).get_vocab()
    shutil.rmtree(hugging_face)
    again = SelfAblatingTransformer.from_pretrained(tmp_path / "run")
    assert again.tokenizer.get_vocab() == vocabulary


def test_blocks_may_be_shorter_than_the_models_context_but_not_longer(
    make_run: MakeRun, pretrained: HookedTransformer
) -> None:
    gates = GateConfig(k_attn=2, k_mlp=2)
    _, model = load_text_and_model(shaped(make_run(gates, init="gpt2"), n_ctx=32), progress=False)
    assert model.cfg.n_ctx == 32
    with pytest.raises(ValueError, match="n_ctx=33 is more than the 32 positions of gpt2"):
        load_text_and_model(shaped(make_run(gates, init="gpt2"), n_ctx=33), progress=False)


def test_a_shape_that_is_not_used_is_said(
    make_run: MakeRun, pretrained: HookedTransformer, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        load_text_and_model(make_run(GateConfig(k_attn=2, k_mlp=2), init="gpt2"), progress=False)
    assert "not used: model.n_layers, model.d_model" in caplog.text


def test_the_tokenizer_must_fit(make_run: MakeRun, pretrained: HookedTransformer, data: PreparedData) -> None:
    run = make_run(GateConfig(k_attn=2, k_mlp=2), init="gpt2")
    pretrained.tokenizer = None
    with pytest.raises(ValueError, match=r"brings no tokenizer: name it in data\.tokenizer"):
        load_text_and_model(run, progress=False)
    named = dataclasses.replace(run, data=dataclasses.replace(run.data, tokenizer=str(data.tokenizer_folder)))
    _, model = load_text_and_model(named, progress=False)
    assert model.tokenizer.get_vocab() == data.tokenizer.get_vocab()


def test_gates_are_kept_where_they_fit_and_fresh_where_not(make_run: MakeRun, tmp_path: Path) -> None:
    first = weights(train(make_run(steps=2), tmp_path / "run", progress=False).model)
    base = {name: w for name, w in first.items() if "_gate." not in name}
    kept = initial_model(tmp_path / "run", GateConfig(k_attn=2, k_mlp=3), seed=5)
    assert same(weights(kept), first)
    assert (kept.gates.k_attn, kept.gates.k_mlp) == (2, 3)
    fresh = weights(initial_model(tmp_path / "run", GateConfig("global", k_attn=2, k_mlp=3), seed=5))
    assert same({name: w for name, w in fresh.items() if "_gate." not in name}, base)
    assert {name.split(".")[-1] for name in fresh if "_gate." in name} == {"W_global", "b_global"}
    assert same(weights(initial_model(tmp_path / "run", GateConfig(scope="none"))), base)
    for scores in ("random-static", "random-token"):
        control = GateConfig(k_attn=2, k_mlp=3, scores=scores)
        found = weights(initial_model(tmp_path / "run", control, seed=5))
        expected = weights(
            SelfAblatingTransformer.from_hooked(
                initial_model(tmp_path / "run", GateConfig(scope="none")), control, seed=5
            )
        )
        assert same(found, expected), "the gates of a control are its own"


def test_only_what_a_trainer_left_is_cleared(make_run: MakeRun, tmp_path: Path) -> None:
    out = tmp_path / "run"
    (out / ".data.archived").mkdir(parents=True)
    kept = [out / ".env.template", out / ".bashrc.original", out / ".data.archived" / "file"]
    kept += [out / ".config.json.ab12cd_3", out / "x.ab12cd_3.sa_lens-part"]
    left = [out / f".{name}.sa_lens-part" for name in ("config.json.ab12cd_3", "run.yaml.0123abcd", "run.ab12cd_3")]
    for path in (*kept, *left):
        path.touch()
    train(make_run(steps=1), out, progress=False)
    assert all(path.exists() for path in kept)
    assert not any(path.exists() for path in left)
