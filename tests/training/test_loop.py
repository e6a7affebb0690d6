"""Training: the same weights as a plain loop, and what a run leaves behind."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import MakeRun, records, same, weights

from sa_lens.config import GateConfig, LossConfig, RunConfig, read_yaml
from sa_lens.core import SelfAblatingTransformer, TwoStreamLoss, save_and_load
from sa_lens.data import BlockOrder, prepare, validation_blocks
from sa_lens.training import Evaluation, TrainingDiverged, bytes_per_token, checkpoints, evaluate, loop, train
from sa_lens.training.training_setup import load_text_and_model


def plain_loop(run: RunConfig) -> SelfAblatingTransformer:
    """The training that `train` must agree with, bit for bit."""
    cfg, n_ctx = run.train, run.model.n_ctx
    data = prepare(run.data, n_ctx, progress=False)
    shape = dataclasses.replace(run.model, d_vocab=data.d_vocab)
    model = SelfAblatingTransformer(shape, run.gates, data.tokenizer, seed=cfg.seed, device="cpu")
    loss = TwoStreamLoss(model, run.loss)
    matrices, others = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            (matrices if ".W_" in name and "_gate" not in name else others).append(p)
    groups = [{"params": matrices, "weight_decay": cfg.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=cfg.betas, eps=cfg.adam_eps, fused=True)
    order = BlockOrder(data.train.n_blocks(n_ctx), cfg.seed)
    for step in range(cfg.steps):
        indices = order.indices(step * cfg.batch_size, cfg.batch_size)
        blocks = torch.stack([torch.from_numpy(data.train.block(int(i), n_ctx)) for i in indices])
        loss(blocks[:, :-1], blocks[:, 1:], clean_alone=step < cfg.dense_steps).total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
        for group in optimizer.param_groups:
            cosine = math.cos(math.pi * (step - cfg.dense_steps) / (cfg.steps - cfg.dense_steps))
            group["lr"] = cfg.lr if step < cfg.dense_steps else cfg.lr * (1 + cosine) / 2
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("scope", ["none", "local", "global"])
def test_it_is_a_plain_loop(make_run: MakeRun, tmp_path: Path, scope: str) -> None:
    run = make_run(
        GateConfig(scope=scope, k_attn=4, k_mlp=8),  # type: ignore[arg-type]
        LossConfig(0.5, 1.0, 0.1),
        weight_decay=0.1,
        clip=0.5,
    )
    found = train(run, tmp_path / "run", progress=False)
    assert same(weights(found.model), weights(plain_loop(run)))


SCHEDULE = {"dense_share": 5 / 12}
"""The clean stream alone for five of the twelve steps, which no record, evaluation or checkpoint falls on."""


@pytest.mark.parametrize("scope", ["local", "global"])
def test_with_a_schedule_it_is_a_plain_loop_too(make_run: MakeRun, tmp_path: Path, scope: str) -> None:
    gates = GateConfig(scope=scope, k_attn=4, k_mlp=8)  # type: ignore[arg-type]
    run = make_run(gates, LossConfig(0.5, 1.0, 0.1), weight_decay=0.1, **SCHEDULE)
    result = train(run, tmp_path / "run", progress=False)
    assert same(weights(result.model), weights(plain_loop(run)))


def test_the_dense_steps_are_those_of_the_baseline(make_run: MakeRun, tmp_path: Path) -> None:
    """Until the switch the transformer is the dense one of the same seed, bit for bit, and the gates are as drawn."""
    settings = {"dense_share": 8 / 12, "save_every": 8, "steps": 12, "log_every": 1}
    gated = train(make_run(**settings), tmp_path / "gated", progress=False)
    dense = train(make_run(GateConfig(scope="none"), **settings), tmp_path / "dense", progress=False)
    (_, at_switch), (_, baseline) = (checkpoints.read(r.folder / "state" / "step-8") for r in (gated, dense))
    fresh = weights(load_text_and_model(make_run(**settings), progress=False)[1])
    for name, weight in at_switch.weights.items():
        assert torch.equal(weight, fresh[name] if "_gate." in name else baseline.weights[name]), name
    assert same(at_switch.optimizer, baseline.optimizer)


def test_what_a_scheduled_run_records(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(eval_every=2, log_every=3, **SCHEDULE)
    result = train(run, tmp_path / "run", progress=False)
    rows = records(result.folder, "train")
    # a record at the switch, so that none mixes steps of both kinds
    assert [row["step"] for row in rows] == [3, 5, 6, 9, 12]
    assert [row["streams"] for row in rows] == [1, 1, 2, 2, 2]
    assert ["ablated" in row for row in rows] == [False, False, True, True, True]
    evaluations = records(result.folder, "eval")
    assert ["ablated_loss" in row for row in evaluations] == [False, False, True, True, True, True]
    # the best model is chosen among those whose ablated stream was trained
    assert result.best_step == min((row["ablated_loss"], row["step"]) for row in evaluations[2:])[1]
    assert math.isfinite(result.best_loss)


def test_no_best_model_before_the_ablated_stream_is_trained(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved_after = []
    save = save_and_load.save
    monkeypatch.setattr(
        save_and_load, "save", lambda m, f, extra: saved_after.append(extra["step"]) or save(m, f, extra)
    )
    # the clean loss falls from evaluation to evaluation, so that each would be the best one
    train(make_run(eval_every=2, dense_share=0.5), tmp_path / "run", progress=False)
    assert saved_after[0] == 8


def test_twice_the_same(make_run: MakeRun, tmp_path: Path) -> None:
    torch.manual_seed(1)
    first = train(make_run(workers=1), tmp_path / "a", progress=False)
    torch.manual_seed(2)
    second = train(make_run(), tmp_path / "b", progress=False)
    assert same(weights(first.model), weights(second.model))
    other = train(make_run(seed=1), tmp_path / "c", progress=False)
    assert not same(weights(first.model), weights(other.model))


def test_accumulation_changes_rounding_only(make_run: MakeRun, tmp_path: Path) -> None:
    gates = GateConfig(scope="none")
    whole = train(make_run(gates, log_every=1), tmp_path / "whole", progress=False)
    parts = train(make_run(gates, log_every=1, accumulate=4), tmp_path / "parts", progress=False)
    for a, b in zip(records(whole.folder, "train"), records(parts.folder, "train"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_what_a_run_leaves(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(sample_tokens=5)
    out = tmp_path / "runs" / "tiny"
    found = train(run, out, progress=False)
    assert found.steps == 12
    assert read_yaml(out / "run.yaml") == run
    assert sorted(p.name for p in (out / "state").iterdir()) == ["step-12", "step-8"]
    assert not [p for p in out.rglob(".*") if p.name != ".lock"]
    assert not [p for p in out.rglob("*") if p.suffix in (".pt", ".bin", ".pkl", ".pth")]
    trained, evaluated, drawn = (records(out, kind) for kind in ("train", "eval", "sample"))
    assert [r["step"] for r in trained] == [3, 6, 9, 12]
    assert [r["tokens"] for r in trained] == [3 * 64, 6 * 64, 9 * 64, 12 * 64]
    assert [r["step"] for r in evaluated] == [6, 12]
    assert len(drawn) == 1
    assert found.sample is not None
    assert found.sample.clean == drawn[0]["clean"]
    best = min(evaluated, key=lambda r: r["ablated_loss"])
    assert (found.best_step, found.best_loss) == (best["step"], best["ablated_loss"])
    config = json.loads((out / "config.json").read_text())
    assert config["step"] == best["step"]
    assert config["validation"]["ablated_loss"] == best["ablated_loss"]


def test_best_and_last_load_back(make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Evaluation] = []

    def rising(*args: Any, **kwargs: Any) -> Evaluation:
        """Evaluations that get worse after the second."""
        seen.append(evaluate(*args, **kwargs))
        worse = max(0, len(seen) - 2)
        return dataclasses.replace(seen[-1], ablated_loss=seen[min(1, len(seen) - 1)].ablated_loss + worse)  # type: ignore[operator]

    monkeypatch.setattr(loop, "evaluate", rising)
    run = make_run(eval_every=1, steps=6)
    found = train(run, tmp_path / "run", progress=False)
    assert found.best_step == 2
    last = SelfAblatingTransformer.from_pretrained(tmp_path / "run", which="last")
    assert same(weights(last), weights(found.model))
    best = SelfAblatingTransformer.from_pretrained(tmp_path / "run")
    data = prepare(run.data, 16, progress=False)
    blocks = validation_blocks(data.validation, 16, 160)
    again = evaluate(best, blocks, bytes_per_token=bytes_per_token(data.validation))
    assert again.ablated_loss == pytest.approx(found.best_loss, rel=1e-6)
    assert best.tokenizer is not None
    assert best.tokenizer.encode("Lily", add_special_tokens=False) == data.tokenizer.encode("Lily")


def test_a_dense_baseline_is_chosen_by_clean_loss(make_run: MakeRun, tmp_path: Path) -> None:
    found = train(make_run(GateConfig(scope="none")), tmp_path / "run", progress=False)
    evaluated = records(tmp_path / "run", "eval")
    assert found.best_loss == min(r["clean_loss"] for r in evaluated)
    assert "ablated_loss" not in evaluated[0]
    assert records(tmp_path / "run", "train")[0].keys() == {
        *("kind", "step", "tokens", "loss", "clean", "grad_norm", "lr", "tokens_per_s", "seconds")
    }


def test_gates_on_a_frozen_base(make_run: MakeRun, tmp_path: Path) -> None:
    dense = train(make_run(GateConfig(scope="none")), tmp_path / "dense", progress=False)
    run = make_run(GateConfig(k_attn=4, k_mlp=8), init=str(tmp_path / "dense"), freeze="base")
    found = train(run, tmp_path / "gated", progress=False)
    before = weights(SelfAblatingTransformer.from_pretrained(dense.folder))
    after = weights(found.model)
    assert same(before, {name: w for name, w in after.items() if "_gate." not in name})
    evaluated = records(tmp_path / "gated", "eval")
    assert evaluated[0]["clean_loss"] == evaluated[1]["clean_loss"]
    assert evaluated[0]["ablated_loss"] != evaluated[1]["ablated_loss"]


def test_continuing_from_a_gated_run_keeps_its_gates(make_run: MakeRun, tmp_path: Path) -> None:
    first = train(make_run(), tmp_path / "first", progress=False)
    # one step at a negligible rate shows where the run began
    run = make_run(GateConfig(k_attn=2, k_mlp=8), init=str(tmp_path / "first"), steps=1, lr=1e-12)
    second = train(run, tmp_path / "second", progress=False)
    start = weights(SelfAblatingTransformer.from_pretrained(first.folder))
    for name, weight in weights(second.model).items():
        assert torch.allclose(weight, start[name], atol=1e-9), name
    assert second.model.gates.k_attn == 2


def test_bf16_and_the_hooked_path_are_honoured(make_run: MakeRun, tmp_path: Path) -> None:
    losses = {}
    for name, settings in {"fp32": {}, "hooked": {"path": "hooked"}, "bf16": {"precision": "bf16"}}.items():
        train(make_run(GateConfig(scope="none"), **settings), tmp_path / name, progress=False)
        losses[name] = records(tmp_path / name, "train")[0]["loss"]
    assert losses["hooked"] == pytest.approx(losses["fp32"], rel=1e-5)
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=2e-2)
    assert losses["bf16"] != losses["fp32"]


def test_recomputed_layers_give_the_same_losses(make_run: MakeRun, tmp_path: Path) -> None:
    for name, flag in (("kept", False), ("again", True)):
        train(make_run(checkpoint_activations=flag), tmp_path / name, progress=False)
    kept, again = (records(tmp_path / name, "train") for name in ("kept", "again"))
    assert [r["loss"] for r in kept] == pytest.approx([r["loss"] for r in again], rel=1e-4)


@pytest.mark.parametrize("term", ["clean", "ablated"])
def test_a_loss_that_is_not_finite_stops_the_run(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, term: str
) -> None:
    forward = TwoStreamLoss.forward
    calls = []

    def poisoned(self: TwoStreamLoss, *args: torch.Tensor, **options: Any) -> object:
        terms = forward(self, *args, **options)
        calls.extend([1] * torch.is_grad_enabled())
        if len(calls) != 8 or not torch.is_grad_enabled():
            return terms
        bad = getattr(terms, term) * float("nan")
        return terms._replace(**{term: bad, "total": terms.total + bad})

    monkeypatch.setattr(TwoStreamLoss, "forward", poisoned)
    out = tmp_path / "run"
    with pytest.raises(TrainingDiverged, match=rf"at step 8 .*{term} = nan.*step-4, is kept"):
        train(make_run(), out, progress=False)
    assert [p.name for p in (out / "state").iterdir()] == ["step-4"]
    last = SelfAblatingTransformer.from_pretrained(out, which="last")
    assert all(bool(w.isfinite().all()) for w in weights(last).values())
    # without the fault the run goes on as if nothing had happened
    monkeypatch.setattr(TwoStreamLoss, "forward", forward)
    resumed = train(make_run(), out, resume=True, progress=False)
    whole = train(make_run(), tmp_path / "whole", progress=False)
    assert same(weights(resumed.model), weights(whole.model))


def test_weights_that_are_not_finite_are_never_saved(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = torch.optim.AdamW.step
    calls = []

    def poisoned(self: torch.optim.AdamW, *args: object, **kwargs: object) -> object:
        calls.append(1)
        done = step(self, *args, **kwargs)
        if len(calls) == 8:
            with torch.no_grad():
                self.param_groups[0]["params"][0].fill_(float("inf"))
        return done

    monkeypatch.setattr(torch.optim.AdamW, "step", poisoned)
    with pytest.raises(TrainingDiverged, match=r"after step 8 embed\.W_E is not finite"):
        train(make_run(log_every=100), tmp_path / "run", progress=False)
    assert [p.name for p in (tmp_path / "run" / "state").iterdir()] == ["step-4"]


class TestRefusals:
    """Bad input raises before anything is written."""

    def refused(self, run: RunConfig, out: Path, error: type[Exception], match: str, **options: object) -> None:
        with pytest.raises(error, match=match):
            train(run, out, progress=False, **options)  # type: ignore[arg-type]
        assert not out.exists()

    def test_device(self, make_run: MakeRun, tmp_path: Path) -> None:
        self.refused(make_run(), tmp_path / "run", ValueError, "device='tpu' is not one of", device="tpu")
        if not torch.cuda.is_available():
            self.refused(make_run(), tmp_path / "run", ValueError, "has none; use 'auto' or 'cpu'", device="cuda")

    def test_tracker(self, make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        self.refused(make_run(tracker="wandb"), tmp_path / "run", ValueError, r"pip install 'sa-lens\[wandb\]'")

    def test_gates(self, make_run: MakeRun, tmp_path: Path) -> None:
        self.refused(make_run(GateConfig(k_attn=17)), tmp_path / "run", ValueError, "k_attn=17 is more than the 16")

    def test_source(self, make_run: MakeRun, tmp_path: Path) -> None:
        run = make_run()
        run = dataclasses.replace(run, data=dataclasses.replace(run.data, source="missing.txt"))
        self.refused(run, tmp_path / "run", FileNotFoundError, "missing.txt")

    def test_vocabulary(self, make_run: MakeRun, tmp_path: Path) -> None:
        run = make_run()
        run = dataclasses.replace(run, model=dataclasses.replace(run.model, d_vocab=399))
        self.refused(run, tmp_path / "run", ValueError, "beyond the model's 399")

    def test_init(self, make_run: MakeRun, tmp_path: Path) -> None:
        self.refused(make_run(init=str(tmp_path / "no")), tmp_path / "run", FileNotFoundError, "no folder")

    def test_a_file_in_the_way(self, make_run: MakeRun, tmp_path: Path) -> None:
        (tmp_path / "run").write_text("")
        with pytest.raises(NotADirectoryError, match="is a file"):
            train(make_run(), tmp_path / "run", progress=False)


def test_a_tracker_gets_the_configuration_and_every_figure(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import accelerate

    begun: list[dict[str, Any]] = []
    logged: list[tuple[int, dict[str, Any]]] = []
    ended: list[bool] = []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    monkeypatch.setattr(accelerate.Accelerator, "init_trackers", lambda self, name, config, **_: begun.append(config))
    monkeypatch.setattr(accelerate.Accelerator, "log", lambda self, values, step: logged.append((step, values)))
    monkeypatch.setattr(accelerate.Accelerator, "end_training", lambda self: ended.append(True))
    train(make_run(tracker="wandb"), tmp_path / "run", progress=False)
    assert begun[0]["train.lr"] == 0.01
    assert begun[0]["gates.k_mlp"] == 8
    assert all(isinstance(value, int | float | str) for value in begun[0].values())
    assert [step for step, _ in logged] == [r["step"] for r in records(tmp_path / "run")]
    for (_, values), found in zip(logged, records(tmp_path / "run"), strict=True):
        kind = found.pop("kind")
        assert values == {f"{kind}/{name}": value for name, value in found.items() if name != "step"}
    assert ended == [True]
