"""On a GPU every analysis gives what it gives on the CPU; skipped where there is none.

Everything runs in float64, where the two differ by rounding alone.
"""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

import sa_lens as sa
from sa_lens import circuits, training, units, views
from sa_lens.config import GateConfig, LossConfig, ModelConfig, RunConfig, TrainConfig
from sa_lens.core import HookedTransformerConfig, TwoStreamLoss
from sa_lens.stopping import Interrupted
from sa_lens.training import loop

GPU = "cuda"
TEXT = "Once upon a time there was a girl named Lily. Lily and Tom went to the park. Tom gave the ball to"
STREAMS = ("clean", "ablated")

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

Model = sa.SelfAblatingTransformer


def shipped(device: str) -> Model:
    model = Model.from_pretrained("stories-local", device=device)
    return model.to(torch.float64)


@pytest.fixture(scope="module")
def models() -> tuple[Model, Model]:
    """The shipped model on both devices."""
    return shipped("cpu"), shipped(GPU)


def blocks(model: Model, n: int = 12) -> Tensor:
    labelled = units.label_stories(model.tokenizer, 2 * n, n_ctx=64, seed=1)
    return labelled.tokens[:n]


def pairs(model: Model, n: int = 8, seed: int = 0) -> circuits.PromptPairs:
    return circuits.tasks.ioi(model.tokenizer, n, words="stories", seed=seed)


def experiment(model: Model, stream: Any = "ablated", n: int = 8, **options: Any) -> circuits.Experiment:
    return circuits.Experiment(model, pairs(model, n), stream=stream, **options)


def leaves(value: Any) -> Iterator[Any]:
    """The numbers, texts and tables inside a result."""
    if value is None or isinstance(value, str | bool | int | float | Tensor | np.ndarray | pd.DataFrame | pd.Series):
        yield value
    elif isinstance(value, Mapping):
        for key in value:
            yield from leaves(value[key])
    elif isinstance(value, tuple | list):
        for part in value:
            yield from leaves(part)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from leaves(getattr(value, field.name))


def assert_close(found: Any, expected: Any, tolerance: float = 1e-6) -> None:
    """All parts of two results are equal, numbers up to the tolerance (relative, and of the largest of a tensor)."""
    found, expected = list(leaves(found)), list(leaves(expected))
    assert expected
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        if isinstance(other, pd.DataFrame):
            pd.testing.assert_frame_equal(one, other, rtol=tolerance, atol=tolerance)
        elif isinstance(other, Tensor | np.ndarray | float):
            a, b = (torch.as_tensor(x).detach().cpu().double() for x in (one, other))
            largest = float(b.nan_to_num().abs().amax()) if b.numel() else 0.0
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * max(1.0, largest), equal_nan=True)
        elif not isinstance(other, pd.Series):
            assert one == other


def cached(model: Model, stream: str) -> dict[str, Tensor]:
    if stream == "clean":
        return dict(model.run_with_cache(TEXT)[1])
    with model.ablated():
        return dict(model.run_with_cache(TEXT)[1])


def continued(model: Model, stream: str, **options: Any) -> str:
    if stream == "clean":
        return model.generate(TEXT, max_new_tokens=12, do_sample=False, verbose=False, **options)
    with model.ablated():
        return model.generate(TEXT, max_new_tokens=12, do_sample=False, verbose=False, **options)


def calibrated(model: Model) -> Any:
    return units.calibrate(model, blocks(model), STREAMS, progress=False)


ACTIONS: dict[str, Callable[[Model], Any]] = {
    "clean cache": lambda model: cached(model, "clean"),
    "ablated cache": lambda model: cached(model, "ablated"),
    "both streams": lambda model: model.run_streams(model.to_tokens(TEXT)),
    "clean continuation": lambda model: continued(model, "clean"),
    "ablated continuation": lambda model: continued(model, "ablated"),
    "continuation without cache": lambda model: continued(model, "ablated", use_past_kv_cache=False),
    "skill": lambda model: circuits.skill(model, pairs(model, 32)),
    **{
        f"patch {what} {stream}": lambda model, what=what, stream=stream: circuits.patch(
            experiment(model, stream), what, progress=False
        )
        for what, stream in (
            ("resid_pre", "clean"),
            ("resid_pre", "ablated"),
            ("z", "ablated"),
            ("pattern", "clean"),
            ("post", "ablated"),
            ("mask_mlp", "ablated"),
            ("mask_attn", "ablated"),
        )
    },
    **{
        f"nodes {what}": lambda model, what=what: circuits.attribute_nodes(
            experiment(model), what, exact=3, progress=False
        )
        for what in ("heads", "neurons")
    },
    **{
        f"{method} {stream} {masks}": lambda model, method=method, stream=stream, masks=masks: circuits.find_circuit(
            experiment(model, stream, 32, masks=masks), pairs(model, 32, seed=1), method, edges=8, progress=False
        ).circuit.table()
        for method in ("eap", "eap-ig")
        for stream, masks in (("clean", None), ("ablated", "live"), ("ablated", "frozen"))
    },
    "relp": lambda model: circuits.relp(experiment(model)).table(every=True),
    "acdc clean": lambda model: circuits.acdc(experiment(model, "clean", n=4), progress=False).circuit.table(),
    "acdc ablated": lambda model: circuits.acdc(experiment(model, n=4), progress=False).circuit.table(),
    "acdc ablated, frozen": lambda model: circuits.acdc(
        experiment(model, n=4, masks="frozen"), progress=False
    ).circuit.table(),
    "exact effects": lambda model: circuits.exact_effects(experiment(model, "clean", n=4), progress=False).table(
        every=True
    ),
    "mean ablation": lambda model: circuits.eap(experiment(model, ablation="mean")).table(every=True),
    "gates' circuit": lambda model: circuits.gate_circuit(experiment(model)).table(every=True),
    "thresholds": lambda model: {s: rules.levels(units.Sublayer(0, "mlp")) for s, rules in calibrated(model).items()},
    "specialization": lambda model: units.specialization(model, blocks(model), calibrated(model), progress=False).table,
    "snippets": lambda model: units.snippets(
        model, blocks(model), "ablated", units=[units.Unit(1, "mlp", 3)], n_top=4, n_sample=4, progress=False
    ),
    "explanations": lambda model: units.explain(
        model, blocks(model), calibrated(model)["ablated"], units=3, progress=False
    ),
    "labels": lambda model: units.selectivity(
        model, units.label_stories(model.tokenizer, 40, n_ctx=64, seed=1), calibrated(model), progress=False
    ).table[["stream", "layer", "unit", "f1_label", "f1", "mutual_information"]],
    "sparsity": lambda model: units.sparsity(model),
    "activation sparsity": lambda model: units.activation_sparsity(model, blocks(model), progress=False).drop(
        columns="share_zero"
    ),  # whether GELU underflows to zero is a matter of rounding
    "leakage": lambda model: units.leakage(model, blocks(model, 16), probe_tokens=256, progress=False),
    "story": lambda model: views.story(model, TEXT),
    "predictions": lambda model: views.predictions(model, TEXT),
    "logit lens": lambda model: views.logit_lens(model, TEXT),
    "raster": lambda model: views.gate_raster(model, TEXT),
    "attention": lambda model: views.attention(model, TEXT, 0),
    "unit activations": lambda model: views.unit_activations(model, TEXT),
}
"""What a user does with a model; the result is compared between the devices."""

TOLERANCE = {"specialization": 1e-4, "leakage": 1e-2}
"""For sums in float32, and for probes that are trained in it."""


@pytest.mark.parametrize("name", ACTIONS)
def test_an_analysis_gives_what_it_gives_on_the_cpu(name: str, models: tuple[Model, Model]) -> None:
    on_cpu, on_gpu = models
    assert_close(ACTIONS[name](on_gpu), ACTIONS[name](on_cpu), TOLERANCE.get(name, 1e-6))


LLAMA = HookedTransformerConfig(
    n_layers=2, d_model=16, n_ctx=12, d_head=4, n_heads=4, n_key_value_heads=2, d_mlp=24, d_vocab=31, act_fn="silu",
    gated_mlp=True, normalization_type="RMS", positional_embedding_type="rotary", rotary_dim=4, final_rms=True,
)  # fmt: skip


@pytest.mark.parametrize("path", ["hooked", "fused"])
@pytest.mark.parametrize("scope", ["local", "global", "both"])
@pytest.mark.parametrize("shape", ["own", "llama"])
def test_losses_and_gradients(shape: str, scope: Any, path: Any) -> None:
    gates = GateConfig(scope=scope, k_attn=3, k_mlp=4, temperature=0.7)
    chosen = LLAMA if shape == "llama" else ModelConfig(n_layers=2, d_model=16, n_heads=4, n_ctx=12, d_vocab=31)
    tokens = torch.randint(0, 31, (3, 12), generator=torch.Generator().manual_seed(0))
    results = []
    for device, way in (("cpu", "hooked"), (GPU, path)):
        model = Model(chosen, gates, seed=0, device="cpu").to(torch.float64).to(device)
        loss = TwoStreamLoss(model, LossConfig(clean=0.7, ablated=1.3, reconstruction=0.3), path=way)
        terms = loss(tokens[:, :-1].to(device), tokens[:, 1:].to(device))
        terms.total.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        results.append((terms.total, {name: g for name, g in gradients.items() if g is not None}))
    assert_close(results[1], results[0])


def run_of(cache: Path, **train: Any) -> RunConfig:
    return RunConfig(
        model=ModelConfig(n_layers=2, d_model=16, n_heads=2, n_ctx=16, attn_scale=True, init="gpt2"),
        gates=GateConfig(k_attn=4, k_mlp=8),
        data=sa.DataConfig(n_stories=200, vocab_size=900, cache_dir=str(cache)),
        train=TrainConfig(
            **{
                "steps": 12, "batch_size": 4, "lr": 1e-2, "eval_every": 6, "eval_tokens": 160, "save_every": 6,
                "log_every": 3, "sample_tokens": 4, **train,
            }
        ),
    )  # fmt: skip


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"precision": "bf16"},
        {"dense_share": 0.5, "dense_lr": 1e-2},
        {"checkpoint_activations": True, "precision": "bf16"},
        {"path": "hooked"},
        {"cuda_graph": False},
        {"accumulate": 2},
    ],
    ids=str,
)
def test_training_resumes(settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(tmp_path / "cache", **settings)
    whole = training.train(run, tmp_path / "whole", device=GPU, progress=False)
    rate = loop.learning_rate

    def stopped(step: int, settings: TrainConfig) -> float:
        if step == 7:
            monkeypatch.setattr(loop, "learning_rate", rate)
            os.kill(os.getpid(), signal.SIGINT)
        return rate(step, settings)

    monkeypatch.setattr(loop, "learning_rate", stopped)
    with pytest.raises(Interrupted):
        training.train(run, tmp_path / "parts", device=GPU, progress=False)
    parts = training.train(run, tmp_path / "parts", device=GPU, resume=True, progress=False)
    assert np.isfinite(whole.best_loss)
    assert parts.best_loss == pytest.approx(whole.best_loss, rel=1e-4)
    model = Model.from_pretrained(tmp_path / "whole", device=GPU)
    assert model.W_E.device.type == GPU


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_recorded_steps_train_the_same_model(precision: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = {"precision": precision, "dense_share": 0.5, "dense_lr": 1e-2}
    found = [
        training.train(
            run_of(tmp_path / "cache", **settings, cuda_graph=recorded),
            tmp_path / str(recorded),
            device=GPU,
            progress=False,
        )
        for recorded in (True, False)
    ]
    assert "CUDA graph" not in caplog.text
    for (name, one), other in zip(found[0].model.named_parameters(), found[1].model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6, msg=name)


def test_a_report_and_a_comparison(tmp_path: Path) -> None:
    report = sa.report.make_report(["stories-local"], n_stories=2, n_units=4, device=GPU, progress=False)
    sa.report.save(report, tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size > 10_000
    smoke = sa.compare("smoke", tmp_path / "grid", seeds=1, device=GPU, progress=False)
    assert smoke.values["value"].notna().any()


def test_a_model_that_moves(models: tuple[Model, Model]) -> None:
    there = shipped("cpu").to(GPU)
    assert {p.device.type for p in there.parameters()} == {GPU}
    assert_close(there(TEXT), models[0](TEXT))
    wrapped = Model.from_hooked(there.to_hooked_transformer(), GateConfig(k_attn=8, k_mlp=8))
    assert wrapped.W_E.device.type == GPU
    with wrapped.ablated():
        assert wrapped(TEXT).device.type == GPU
