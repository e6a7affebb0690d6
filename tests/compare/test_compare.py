"""Comparisons from end to end on tiny models: what is trained, what is kept, what goes on."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pandas as pd
import pytest
import torch

from sa_lens.circuits.running.edge_removals import Recomputation
from sa_lens.compare import (
    ACDC,
    GRIDS,
    SAE,
    Comparison,
    Faithfulness,
    Grid,
    Learning,
    Losses,
    Measurement,
    Result,
    Skill,
    Weights,
    compare,
    learning_curves,
    plan,
    run_grid,
)
from sa_lens.compare.dry_run import plan_text
from sa_lens.compare.model_folder import ModelFolder, model_folders
from sa_lens.core import SelfAblatingTransformer
from sa_lens.stopping import Interrupted
from sa_lens.units import probes


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


def tiny(cache: str, *names: str, measurements: tuple = (Losses(tokens=256), Weights())) -> Grid:
    """The smoke grid with some of its variants and a few cheap columns."""
    grid = GRIDS["smoke"]()
    data = dataclasses.replace(grid.run.data, cache_dir=cache)
    return dataclasses.replace(
        grid,
        run=dataclasses.replace(grid.run, data=data),
        variants=tuple(v for v in grid.variants if v.name in ("baseline", *names)),
        measurements=measurements or grid.measurements,
    )


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is trained and measured, in order."""
    done: list[str] = []

    def counted_train(run, out, **options):
        done.append(f"train {Path(out).parent.name.rsplit('-', 1)[0]}")
        return train(run, out, **options)

    train = run_grid.train
    monkeypatch.setattr(run_grid, "train", counted_train)
    for kind in (Losses, Weights):
        measure = kind.measure

        def counted(self, trained, measure=measure):
            done.append(f"{self.name} {trained.folder.name.rsplit('-', 1)[0]}")
            return measure(self, trained)

        monkeypatch.setattr(kind, "measure", counted)
    return done


def run(grid: Grid, out: Path, **options) -> Comparison:
    return compare(grid, out, device="cpu", progress=False, **options)


@pytest.mark.slow
def test_every_column_of_every_kind_of_variant(tmp_path, cache, monkeypatch):
    """All measurements on a baseline, a gated model and one that is not trained: every promised value is there."""
    pytest.importorskip("sae_lens")
    monkeypatch.setattr(probes, "PROBE_STEPS", 100)
    grid = tiny(cache, "global-4", "frozen-base", "random-init", measurements=())
    found = run(grid, tmp_path, seeds=1)
    values = found.values.set_index(["variant", "task", "column", "stream"])["value"]
    for measurement in grid.measurements:
        for variant in found.variants:
            streams = ["", "clean"] if variant == "baseline" else ["", "clean", "ablated"]
            there = {
                column
                for v, task, column, stream in values.index
                if (v, task) == (variant, measurement.task) and stream in streams
            }
            absent = set(measurement.columns) - there
            if variant not in grid.learners:
                absent.discard("steps_to_skill")
            only_gated = {"units_used", "mask_share", "probe_mask_nats", "self_read_cost"}
            assert absent <= (only_gated if variant == "baseline" else set()), (measurement.label, variant)
    assert values["baseline", "ioi", "acdc_edges_0.003", "clean"] >= 0
    assert values["baseline", "", "effective_tokens_matched", "clean"] == 0
    assert values["frozen-base", "", "loss", "clean"] == values["baseline", "", "loss", "clean"]
    assert values["frozen-base", "", "mean_abs_weight", ""] == values["baseline", "", "mean_abs_weight", ""]
    assert values["random-init", "", "loss", "clean"] > values["baseline", "", "loss", "clean"]
    assert {"table.md", "table.tex", "summary.csv", "values.csv", "figure.html"} <= {
        path.name for path in tmp_path.iterdir()
    }
    assert found.unfinished == 0


def test_controls_are_what_they_say(tmp_path, cache):
    grid = tiny(cache, "random-static", "frozen-base", "random-init")
    run(grid, tmp_path, seeds=1)
    models = {
        folder.variant.name: SelfAblatingTransformer.from_pretrained(folder.final, device="cpu")
        for folder in model_folders(dataclasses.replace(grid, seeds=(0,)), tmp_path)
    }
    plain = dict(models["baseline"].named_parameters())
    frozen = dict(models["frozen-base"].named_parameters())
    assert all(torch.equal(frozen[name], p) for name, p in plain.items())
    fresh = SelfAblatingTransformer(
        dataclasses.replace(grid.run.model, d_vocab=models["baseline"].cfg.d_vocab), models["random-init"].gates, seed=0
    )
    untrained = dict(models["random-init"].named_parameters())
    assert all(torch.equal(untrained[name].cpu(), p.cpu()) for name, p in fresh.named_parameters())
    tokens = torch.arange(40).view(2, 20)
    for mask in models["random-static"].run_streams(tokens).mask_mlp:
        assert bool((mask == mask[:1, :1]).all())


def test_a_second_call_does_nothing(tmp_path, cache, jobs):
    grid = tiny(cache, "local-4", "frozen-base")
    first = run(grid, tmp_path, seeds=1)
    assert [job for job in jobs if job.startswith("train")] == [
        *("train baseline-seed0", "train local-4-seed0", "train frozen-base-seed0")
    ]
    jobs.clear()
    second = run(grid, tmp_path, seeds=1)
    assert jobs == []
    assert first.values.equals(second.values)


def test_a_further_column_and_a_further_seed_cost_themselves_alone(tmp_path, cache, jobs):
    grid = tiny(cache, "local-4")
    run(grid, tmp_path, seeds=1, columns=["losses"])
    jobs.clear()
    run(grid, tmp_path, seeds=1)
    assert jobs == ["weights baseline-seed0", "weights local-4-seed0"]
    jobs.clear()
    found = run(grid, tmp_path, seeds=2)
    assert all("seed1" in job for job in jobs)
    assert len(jobs) == 6
    assert found.seeds == (0, 1)


def test_changed_settings_are_measured_or_trained_again(tmp_path, cache, jobs):
    grid = tiny(cache)
    run(grid, tmp_path, seeds=1)
    jobs.clear()
    run(dataclasses.replace(grid, measurements=(Losses(tokens=128), Weights())), tmp_path, seeds=1)
    assert jobs == ["losses baseline-seed0"]
    jobs.clear()
    often = dataclasses.replace(grid.run, train=dataclasses.replace(grid.run.train, save_every=2, log_every=1))
    run(dataclasses.replace(grid, run=often), tmp_path, seeds=1)
    assert jobs == []
    faster = dataclasses.replace(grid.run, train=dataclasses.replace(grid.run.train, lr=1e-2))
    run(dataclasses.replace(grid, run=faster), tmp_path, seeds=1)
    assert jobs == ["train baseline-seed0", "losses baseline-seed0", "weights baseline-seed0"]


def test_changed_settings_of_an_sae_are_another_sae(tmp_path, cache):
    pytest.importorskip("sae_lens")
    settings = GRIDS["smoke"]().measurements[-1].settings
    for steps in (2, 3):
        measurement = SAE(dataclasses.replace(settings, steps=steps), tokens=256)
        found = run(tiny(cache, measurements=(measurement,)), tmp_path, seeds=1)
        assert found.unfinished == 0
    assert len([*tmp_path.glob("models/*/sae-clean-*")]) == 2


def test_skill_during_training_is_measured_by_the_run_and_found_again(tmp_path, cache):
    """The last row of each run is what the finished model has; the weights are those of a run without measuring."""
    grid = tiny(cache, "local-4", "joint-4", measurements=(Skill(pairs=16), Learning()))
    found = run(grid, tmp_path / "measured", seeds=1)
    table = found.learning
    assert table[["variant", "stream"]].drop_duplicates().to_numpy().tolist() == [
        *(["baseline", "clean"], ["local-4", "clean"], ["local-4", "ablated"]),
        *(["joint-4", "clean"], ["joint-4", "ablated"]),
    ]
    assert sorted(table["step"].unique()) == [3, 6]
    assert table.groupby("variant")["dense_steps"].unique().map(list).to_dict() == {
        **{"baseline": [0], "local-4": [3], "joint-4": [0]},
    }
    last = table[table["step"] == 6].set_index(["variant", "stream"])["ioi"]
    skill = found.values[found.values["column"] == "pair_accuracy"].set_index(["variant", "stream"])["value"]
    assert last.to_dict() == skill.to_dict()
    curves = learning_curves(table, "ioi", ["baseline", "local-4"])
    assert [(line.name, line.stream, line.x) for line in curves.lines] == [
        (name, stream, (3.0, 6.0))
        for name, stream in (("baseline", "clean"), ("local-4", "clean"), ("local-4", "ablated"))
    ]
    assert [moment.value for moment in curves.moments] == [3.0]
    seeds = pd.concat([table, table.assign(seed=1, ioi=1.0)])
    curves = learning_curves(
        pd.concat([table[table["variant"] == "joint-4"], seeds[seeds["variant"] == "baseline"]]), "ioi"
    )
    assert curves.note.startswith("means over 1 or 2 seeds; ")
    line = curves.lines[0]
    assert line.name == "joint-4"
    line = learning_curves(seeds, "ioi", ["baseline"]).lines[0]
    assert (line.low[1], line.y[1], line.high[1]) == (last["baseline", "clean"], (last["baseline", "clean"] + 1) / 2, 1)
    with pytest.raises(ValueError, match="task='all' must be one of ioi, object, loss, and variants some of baseline"):
        learning_curves(table, "all")
    assert table[table["stream"] == "ablated"].set_index(["variant", "step"])["loss"].isna().to_dict() == {
        **{("local-4", 3): True, ("local-4", 6): False},
        **{("joint-4", 3): False, ("joint-4", 6): False},
    }
    assert (tmp_path / "measured" / "learning.html").is_file()
    silent = run(dataclasses.replace(grid, learners=()), tmp_path / "silent", seeds=1)
    assert not len(silent.learning)
    assert not (tmp_path / "silent" / "learning.html").exists()
    weights = [
        {path.parent.parent.name: path.read_bytes() for path in (tmp_path / name).rglob("final/model.safetensors")}
        for name in ("measured", "silent")
    ]
    assert weights[0] == weights[1]
    again = run(grid, tmp_path / "silent", seeds=1)
    assert not len(again.learning), "a finished model is not trained again"


def test_steps_to_skill_are_those_of_the_first_evaluation_at_the_bar(tmp_path):
    run_folder = tmp_path / "run"
    run_folder.mkdir()
    figures = {100: (0.5, 0.4), 200: (0.8, 0.5), 300: (0.7, 0.79), 400: (0.9, 0.6)}
    lines = []
    for step, (clean, ablated) in figures.items():
        lines.append({"kind": "eval", "step": step, "clean_loss": 1.0, "ablated_loss": 2.0})
        skills = {"ioi_clean": clean, "ioi_ablated": ablated, "object_clean": 0.9, "object_ablated": 0.9}
        lines.append({"kind": "measured", "step": step, **skills})
    (run_folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    trained = SimpleNamespace(folder=tmp_path, streams=("clean", "ablated"))
    trained.no_values = lambda columns: {column: dict.fromkeys(trained.streams) for column in columns}
    found = Learning().measure(trained)
    assert found.values == {"steps_to_skill": {"clean": 200, "ablated": None}}
    assert found.notes == ("the ablated stream never reaches 80% pair accuracy in training",)
    assert Learning(task="object").measure(trained).values == {"steps_to_skill": {"clean": 100, "ablated": 100}}


def test_a_changed_baseline_changes_the_gates_on_it_alone(tmp_path, cache):
    grid = tiny(cache, "local-4", "frozen-base")
    gates = dataclasses.replace(grid.variants[1].gates, temperature=1.0)
    other = dataclasses.replace(
        grid, variants=(grid.variants[0], dataclasses.replace(grid.variants[1], gates=gates), grid.variants[2])
    )
    keys, changed = (
        [folder.key for folder in model_folders(dataclasses.replace(g, seeds=(0,)), tmp_path)] for g in (grid, other)
    )
    assert [a == b for a, b in zip(keys, changed, strict=True)] == [True, False, True]
    longer = dataclasses.replace(grid.run, train=dataclasses.replace(grid.run.train, steps=7))
    changed = [folder.key for folder in model_folders(dataclasses.replace(grid, run=longer, seeds=(0,)), tmp_path)]
    assert not set(keys) & set(changed)


def test_the_same_text_elsewhere_is_the_same_model(tmp_path, cache):
    keys = []
    for name in ("here", "there"):
        file = tmp_path / name / "text.txt"
        file.parent.mkdir()
        file.write_text("once upon a time\n" * 50)
        grid = tiny(cache)
        data = dataclasses.replace(grid.run.data, source=str(file), cache_dir=name)
        grid = dataclasses.replace(grid, run=dataclasses.replace(grid.run, data=data))
        keys.append(ModelFolder(grid, grid.variants[0], 0, tmp_path).key)
    assert keys[0] == keys[1]


def test_a_stopped_run_goes_on_where_it_was(tmp_path, cache, monkeypatch):
    """Stopped in the second training: the first model is not touched again, the second resumes, and all figures are
    those of an undisturbed comparison."""
    grid = tiny(cache, "local-4")
    whole = run(grid, tmp_path / "whole", seeds=1)
    train = run_grid.train
    calls = []

    def stopping(config, out, **options):
        calls.append(options["resume"])
        if len(calls) == 2:
            return stop_after(config, out, 3, train, **options)
        return train(config, out, **options)

    monkeypatch.setattr(run_grid, "train", stopping)
    with pytest.raises(Interrupted, match="The same command goes on") as stop:
        run(grid, tmp_path / "stopped", seeds=1)
    assert isinstance(stop.value, KeyboardInterrupt)
    status = plan(grid, tmp_path / "stopped", seeds=1, device="cpu").set_index(["variant", "what"])["status"]
    assert status["baseline", "losses"] == "done"
    assert status["local-4", "training"] == "step 3 of 6"
    found = run(grid, tmp_path / "stopped", seeds=1)
    assert calls == [False, False, True]
    assert found.values.equals(whole.values)


def stop_after(config, out, step, train, **options):
    """Trains up to a step, by asking for a stop as Ctrl-C does."""
    from sa_lens.training import loop

    class Stop:
        @property
        def made(self) -> bool:
            return self.asked >= step

        asked = -1

    stop = Stop()

    class Context:
        def __enter__(self):
            return stop

        def __exit__(self, *error):
            return None

    agreed = loop._processes_stop

    def counted(request, at, every, accelerator):
        stop.asked = at
        return agreed(request, at, every, accelerator)

    before = loop.stop_requests
    loop._processes_stop, loop.stop_requests = counted, Context
    try:
        return train(config, out, **options)
    finally:
        loop._processes_stop, loop.stop_requests = agreed, before


def test_a_stop_while_measuring_keeps_what_is_measured(tmp_path, cache, monkeypatch, jobs):
    grid = tiny(cache)

    def interrupted(self, trained):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Weights, "measure", interrupted)
        with pytest.raises(Interrupted):
            run(grid, tmp_path, seeds=1)
    jobs.clear()
    run(grid, tmp_path, seeds=1)
    assert jobs == ["weights baseline-seed0"]


def test_figures_of_other_weights_are_not_taken_for_these(tmp_path, cache, jobs):
    grid = tiny(cache)
    run(grid, tmp_path, seeds=1)
    (final,) = tmp_path.glob("models/*/final/model.safetensors")
    content = bytearray(final.read_bytes())
    content[-1] ^= 1
    final.write_bytes(content)
    with pytest.raises(ValueError, match=f"{final} has changed since this model was finished: restore it, or delete"):
        run(grid, tmp_path, seeds=1)


def test_an_interrupted_search_for_a_circuit_is_no_result(tmp_path, cache, monkeypatch):
    def stopped(self, rows):
        raise KeyboardInterrupt

    monkeypatch.setattr(Recomputation, "try_removals", stopped)
    measurements = (ACDC(pairs=8, orders=0, bar=0.0),)
    with pytest.raises(Interrupted, match="The same command goes on"):
        run(tiny(cache, measurements=measurements), tmp_path, seeds=1)
    assert not list(tmp_path.rglob("acdc-*.json"))


def test_a_weak_model_has_no_circuit(tmp_path, cache):
    measurements = (ACDC(pairs=8, orders=2), Faithfulness(pairs=16))
    found = run(tiny(cache, measurements=measurements), tmp_path, seeds=1)
    values = found.values.set_index("column")["value"]
    assert values[["acdc_edges_0.01", "acdc_order_spread", "edges_0.9", "cpr"]].isna().all()
    assert values["corrupt_kl"] > 0
    (note,) = set(found.notes["note"])
    assert "below 80%" in note, "judged on the same prompts for all columns of circuits"
    assert set(found.notes["measurement"]) == {"acdc", "faithfulness"}


def test_a_measurement_that_is_not_installed_is_left_for_later(tmp_path, cache, monkeypatch, jobs):
    monkeypatch.setattr(Weights, "missing", lambda self: "install it")
    found = run(tiny(cache), tmp_path, seeds=1)
    assert set(found.values["column"]) == {"loss", "perplexity"}
    assert list(found.notes["note"]) == ["install it"]
    assert found.unfinished == 0
    monkeypatch.setattr(Weights, "missing", lambda self: None)
    jobs.clear()
    run(tiny(cache), tmp_path, seeds=1)
    assert jobs == ["weights baseline-seed0"]


def test_a_model_that_another_process_holds_is_waited_for(tmp_path, cache, monkeypatch, jobs):
    """Held at the first look, free at the second; meanwhile the other models are done."""
    grid = tiny(cache, "local-4", "random-init")
    held = model_folders(dataclasses.replace(grid, seeds=(0,)), tmp_path)[1]
    lock = held.hold()
    waits = []

    def wait(seconds):
        waits.append(list(jobs))
        lock.__exit__(None, None, None)

    monkeypatch.setattr(run_grid.time, "sleep", wait)
    assert lock.__enter__()
    run(grid, tmp_path, seeds=1)
    assert len(waits) == 1
    assert "losses random-init-seed0" in waits[0]
    assert "train local-4-seed0" not in waits[0]
    assert jobs[-1] == "weights local-4-seed0"


def test_a_dry_run_does_nothing_and_says_what_is_to_do(tmp_path, cache, jobs):
    grid = tiny(cache, "local-4", "random-init")
    table = plan(grid, tmp_path / "out", seeds=2, device="cpu")
    assert not (tmp_path / "out").exists()
    assert jobs == []
    assert table["status"].tolist() == ["to do"] * 18
    text = plan_text(table)
    assert "local-4" in text
    assert "left in all" in text
    tokens = table.groupby("variant")["tokens"].sum().to_dict()
    assert tokens == {"baseline": 2 * 6 * 2 * 48, "local-4": 2 * 6 * 2 * 48, "random-init": 0}
    assert (table[table["what"] == "training"].set_index("variant")["seconds"].drop("random-init") > 0).all()
    run(grid, tmp_path / "out", seeds=1)
    again = plan(grid, tmp_path / "out", seeds=1, device="cpu")
    assert set(again["status"]) == {"done"}
    assert again["seconds"].sum() == 0


def test_times_of_finished_models_count_for_their_like(tmp_path, cache):
    grid = tiny(cache, measurements=(Weights(),))
    run(grid, tmp_path, seeds=1)
    (folder,) = model_folders(dataclasses.replace(grid, seeds=(0,)), tmp_path)
    done = folder.path / "done.json"
    done.write_text(json.dumps({**json.loads(done.read_text()), "seconds": 1234.0}))
    table = plan(grid, tmp_path, seeds=2, device="cpu")
    assert table[(table["seed"] == 1) & (table["what"] == "training")]["seconds"].item() == 1234.0


def test_another_text_under_the_same_name_is_noticed(tmp_path, cache, monkeypatch):
    grid = tiny(cache)
    run(grid, tmp_path, seeds=1)
    prepare = run_grid.prepare

    def changed(*arguments, **options):
        data = prepare(*arguments, **options)
        return dataclasses.replace(data, train=dataclasses.replace(data.train, fingerprint="other"))

    monkeypatch.setattr(run_grid, "prepare", changed)
    with pytest.raises(ValueError, match="the text is not the one"):
        run(grid, tmp_path, seeds=1)


def test_a_damaged_result_is_named(tmp_path, cache):
    grid = tiny(cache)
    run(grid, tmp_path, seeds=1)
    file = next((tmp_path / "models").glob("*/losses-*.json"))
    file.write_text("{")
    with pytest.raises(ValueError, match=r"losses-.*is damaged.*delete it"):
        run(grid, tmp_path, seeds=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": "desk"}, "grid='desk'"),
        ({"seeds": 0}, "seeds=0"),
        ({"seeds": [1, 1]}, "different whole numbers"),
        ({"seeds": [-1]}, "whole numbers from 0"),
        ({"columns": ["circuits"]}, "no measurement circuits; there are losses"),
        ({"columns": []}, "no measurement given"),
        ({"variants": ["local-3"]}, "no variant local-3; there are baseline, local-4"),
        ({"validation": "text.txt"}, "goes with text="),
        ({"device": "tpu"}, "tpu"),
    ],
)
def test_bad_input_is_refused_before_anything_is_done(options, message, tmp_path, monkeypatch):
    monkeypatch.setattr(run_grid, "prepare", lambda *a, **k: pytest.fail("it began"))
    given = {"grid": "smoke", **options}
    with pytest.raises(ValueError, match=message):
        compare(given.pop("grid"), tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


def test_gates_that_do_not_fit_are_refused_before_training(tmp_path, cache, jobs):
    grid = tiny(cache, "local-4")
    gates = dataclasses.replace(grid.variants[1].gates, k_mlp=65)
    grid = dataclasses.replace(grid, variants=(grid.variants[0], dataclasses.replace(grid.variants[1], gates=gates)))
    with pytest.raises(ValueError, match=r"variant local-4: gates.k_mlp=65 is more than the 64 units"):
        run(grid, tmp_path)
    assert jobs == []


def test_a_short_validation_text_is_refused_before_training(tmp_path, cache, jobs):
    grid = tiny(cache)
    data = dataclasses.replace(grid.run.data, n_stories=100, validation_fraction=0.02)
    with pytest.raises(ValueError, match="8 are needed"):
        run(dataclasses.replace(grid, run=dataclasses.replace(grid.run, data=data)), tmp_path)
    assert jobs == []


def test_sigterm_stops_like_ctrl_c(tmp_path, cache, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)

    def terminated(self, trained):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    monkeypatch.setattr(Weights, "measure", terminated)
    with pytest.raises(Interrupted):
        run(tiny(cache), tmp_path, seeds=1)
    assert signal.getsignal(signal.SIGTERM) == before


@dataclass(frozen=True)
class Odd(Measurement):
    """A measurement of one's own whose figure is not a number in one stream."""

    name: ClassVar[str] = "odd"
    columns: ClassVar[tuple[str, ...]] = ("odd_one",)

    def work(self, run):
        return 1.0

    def measure(self, trained):
        return Result({"odd_one": {"clean": 1.5, "ablated": math.nan}})


def test_own_measurements_are_cached_and_shown(tmp_path, cache):
    grid = tiny(cache, "random-init", measurements=(Odd(),))
    for _ in range(2):
        found = run(grid, tmp_path, seeds=1)
        values = found.values.set_index(["variant", "stream"])["value"]
        assert values["baseline", "clean"] == 1.5
        assert math.isnan(values["random-init", "ablated"])
    assert "odd_one" in (tmp_path / "table.md").read_text()


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(NotADirectoryError, match="is a file"):
        compare("smoke", tmp_path / "out")
