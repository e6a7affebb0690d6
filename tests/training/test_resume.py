"""A run that is interrupted, in whatever way, ends as if it had not been."""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import child_processes
import forked
import numpy as np
import pytest
import torch
from filelock import FileLock
from tiny_runs import MakeRun, interrupt_at, records, same, tiny_run, weights

from sa_lens.config import GateConfig, RunConfig
from sa_lens.core import SelfAblatingTransformer
from sa_lens.core.save_and_load import complete_steps
from sa_lens.training import Interrupted, TrainResult, checkpoints, train
from sa_lens.training.run_log import MetricsFile


@pytest.fixture(scope="module")
def whole(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """The run that nothing interrupted."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = train(tiny_run(cache), tmp_path_factory.mktemp("whole") / "run", progress=False)
    torch.set_num_threads(threads)
    return found


def assert_as_if_whole(out: Path, found: TrainResult, whole: TrainResult) -> None:
    """Weights, optimizer, random state, records and best model are those of `whole`, and no other file is left."""
    assert same(weights(found.model), weights(whole.model))
    assert records(out, timed=False) == records(whole.folder, timed=False)
    (at, tensors), (at_whole, tensors_whole) = (checkpoints.read(complete_steps(f)[-1]) for f in (out, whole.folder))
    assert same(tensors.optimizer, tensors_whole.optimizer)
    assert dataclasses.replace(at, seconds=0, run={}) == dataclasses.replace(at_whole, seconds=0, run={})
    assert (found.best_loss, found.best_step) == (whole.best_loss, whole.best_step)
    best, best_whole = (SelfAblatingTransformer.from_pretrained(folder) for folder in (out, whole.folder))
    assert same(weights(best), weights(best_whole))
    names = {str(p.relative_to(out)) for p in out.rglob("*")}
    assert names == {str(p.relative_to(whole.folder)) for p in whole.folder.rglob("*")}


@pytest.mark.parametrize(
    ("step", "number"), [(0, signal.SIGINT), (4, signal.SIGTERM), (5, signal.SIGINT), (10, signal.SIGINT)]
)
def test_ctrl_c_saves_and_stops(
    make_run: MakeRun, tmp_path: Path, whole: TrainResult, monkeypatch: pytest.MonkeyPatch, step: int, number: int
) -> None:
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    interrupt_at(monkeypatch, step, number)
    out = tmp_path / "run"
    with pytest.raises(Interrupted, match=rf"stopped after step {step + 1}; .*--out {out} --resume") as stop:
        train(make_run(), out, progress=False)
    assert isinstance(stop.value, KeyboardInterrupt)
    assert complete_steps(out)[-1].name == f"step-{step + 1}"
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    found = train(make_run(), out, resume=True, progress=False)
    assert same(weights(found.model), weights(whole.model))
    assert records(out, timed=False) == records(whole.folder, timed=False)


@pytest.mark.parametrize("step", [2, 5, 6, 7])
def test_a_schedule_resumes_in_and_between_its_parts(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Stopped in the dense steps, at the switch and after it: the end is the same, AdamW's averages included."""
    schedule = {"dense_share": 0.5, "log_every": 4}
    uninterrupted = train(make_run(**schedule), tmp_path / "whole", progress=False)
    out = tmp_path / "run"
    interrupt_at(monkeypatch, step)
    with pytest.raises(Interrupted):
        train(make_run(**schedule), out, progress=False)
    assert_as_if_whole(out, train(make_run(**schedule), out, resume=True, progress=False), uninterrupted)


def test_a_second_ctrl_c_stops_at_once(
    make_run: MakeRun, tmp_path: Path, whole: TrainResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    def impatient(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    interrupt_at(monkeypatch, 5)
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "write", lambda *a, w=checkpoints.write: impatient() if a[1].step == 6 else w(*a))
        with pytest.raises(KeyboardInterrupt) as stop:
            train(make_run(), out, progress=False)
    assert not isinstance(stop.value, Interrupted)
    assert_as_if_whole(out, train(make_run(), out, resume=True, progress=False), whole)


@pytest.mark.slow
def test_sigkill_at_twenty_random_moments(cache: Path, tmp_path: Path, whole: TrainResult) -> None:
    """Half of the moments fall anywhere, data workers included, the others while a checkpoint or model is written."""
    report = tmp_path / "calls"
    total = {}
    for where in ("anywhere", "writing"):
        process = forked.start(child_processes.train_and_die, tiny_run(cache), tmp_path / where, where, -1, report)
        process.join()
        assert process.exitcode == 0
        total[where] = int(report.read_text())
    rng = np.random.default_rng(0)
    for trial in range(20):
        where = "anywhere" if trial % 2 else "writing"
        run = tiny_run(cache, workers=1 if trial % 5 == 0 else 0)
        out = tmp_path / f"trial-{trial}" / "run"
        moment = int(rng.integers(1, total[where]))
        process = forked.start(child_processes.train_and_die, run, out, where, moment, report)
        process.join()
        assert process.exitcode == -signal.SIGKILL, f"trial {trial}: call {moment} of {total[where]}, {where}"
        for folder in complete_steps(out):
            checkpoints.read(folder)
        found = train(run, out, resume=True, progress=False)
        assert_as_if_whole(out, found, whole)


def test_resuming_a_finished_run_changes_nothing(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(sample_tokens=4)
    first = train(run, tmp_path / "run", progress=False)
    files = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    again = train(run, tmp_path / "run", resume=True, progress=False)
    assert same(weights(again.model), weights(first.model))
    assert (again.evaluation, again.sample, again.steps) == (first.evaluation, first.sample, 12)
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == files


def half_done(run: RunConfig, out: Path, monkeypatch: pytest.MonkeyPatch, step: int = 5) -> None:
    """Leaves a run that stopped after `step + 1` steps."""
    interrupt_at(monkeypatch, step)
    with pytest.raises(Interrupted):
        train(run, out, progress=False)


def test_nothing_is_unpickled(
    make_run: MakeRun, tmp_path: Path, whole: TrainResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    half_done(make_run(), out, monkeypatch)
    assert {p.suffix for p in (out / "state").rglob("*") if p.is_file()} == {".safetensors", ".json", ""}

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("unpickled")

    for name in ("pickle.load", "pickle.loads", "torch.load"):
        monkeypatch.setattr(name, refuse)
    found = train(make_run(), out, resume=True, progress=False)
    assert same(weights(found.model), weights(whole.model))


def test_a_half_written_checkpoint_is_never_loaded(
    make_run: MakeRun, tmp_path: Path, whole: TrainResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    half_done(make_run(), out, monkeypatch)
    (out / "state" / "step-6").rename(out / "state" / ".step-6.abcdefgh.sa_lens-part")
    (out / "state" / ".step-6.abcdefgh.sa_lens-part" / "model.safetensors").write_bytes(b"half")
    (out / ".run.abcdefgh.sa_lens-part").mkdir()
    (out / ".metrics.jsonl.abcdefgh.sa_lens-part").write_text("half")
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    assert_as_if_whole(out, train(make_run(), out, resume=True, progress=False), whole)


def test_only_what_the_trainer_made_is_ever_removed(make_run: MakeRun, tmp_path: Path, whole: TrainResult) -> None:
    """Folders and files of the user whose names look like the trainer's stay, even in a checkpoint that it removes."""
    out = tmp_path / "run"
    mine = [
        *("state/step-3/notes.txt", "state/step-by-step/notes.txt", "state/step-4-good/model.safetensors"),
        *("state/step-4/notes.txt", "state/.step-4.original/model.safetensors"),
        *(".run.settings", ".config.json.original", ".run.original/a"),
    ]
    for name in mine:
        (out / name).parent.mkdir(exist_ok=True, parents=True)
        (out / name).write_text(name)
    found = train(make_run(), out, resume=True, progress=False)
    assert same(weights(found.model), weights(whole.model))
    assert [folder.name for folder in complete_steps(out)] == ["step-8", "step-12"]
    assert {name: (out / name).read_text() for name in mine} == {name: name for name in mine}
    assert [file.name for file in (out / "state" / "step-4").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "random.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_an_error(
    make_run: MakeRun, tmp_path: Path, whole: TrainResult, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    out = tmp_path / "run"
    half_done(make_run(), out, monkeypatch)
    damaged = out / "state" / "step-6" / file
    damaged.write_bytes(damaged.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"step-6 cannot be read.*Delete this folder to resume from an earlier one"):
        train(make_run(), out, resume=True, progress=False)
    shutil.rmtree(out / "state" / "step-6")
    assert_as_if_whole(out, train(make_run(), out, resume=True, progress=False), whole)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"step": "6"}, "step='6' must be a whole number"),
        ({"window": [["a"]]}, "window='a' must be a number"),
        ({"lr": None}, "lr=None must be a number"),
        ({"environment": {"device": "cpu"}}, "environment. lacks the key 'processes'"),
        ({"evaluation": {"tokens": 3}}, "evaluation. lacks the key 'clean_loss'"),
        ({"data": []}, r"data=\[\] must be a mapping"),
        ({"version": None}, "version must be of type int"),
        ({"extra": 1}, "unknown key 'extra'"),
        (None, "it must be an object"),
    ],
)
def test_a_checkpoint_whose_state_is_damaged_is_named(
    whole: TrainResult, tmp_path: Path, change: dict[str, Any] | None, fault: str
) -> None:
    folder = shutil.copytree(complete_steps(whole.folder)[-1], tmp_path / "step-12")
    values = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps([] if change is None else {**values, **change}))
    with pytest.raises(ValueError, match=rf"step-12 cannot be read: {fault}.*Delete this folder to resume from an"):
        checkpoints.read(folder)


def test_damaged_metrics_are_named(tmp_path: Path) -> None:
    """Only a last line may be cut off, as a killed trainer leaves it."""
    file = MetricsFile(tmp_path / "metrics.jsonl")
    whole_lines = [{"kind": "train", "step": step, "loss": 1.5} for step in (1, 2)]
    for bad in (
        '{"kind": "tr',
        "[]",
        '{"kind": "train"}',
        '{"kind": 3, "step": 1}',
        '{"kind": "eval", "step": 1, "loss": "a"}',
        "\xff",
    ):
        file.path.write_text("".join(json.dumps(record) + "\n" for record in whole_lines) + bad, encoding="latin-1")
        assert file.read() == whole_lines
        file.path.write_text(f"{bad}\n" + json.dumps(whole_lines[0]) + "\n", encoding="latin-1")
        with pytest.raises(ValueError, match=r"metrics\.jsonl is damaged: line 1: .*; delete this line"):
            file.read()


def test_a_changed_configuration_is_refused(make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    half_done(make_run(), out, monkeypatch)
    for changed, message in (
        (make_run(lr=0.5), r"train\.lr: 0\.01 -> 0\.5"),
        (make_run(steps=13), r"train\.steps: 12 -> 13"),
        (make_run(GateConfig(k_attn=3, k_mlp=8)), r"gates\.k_attn: 4 -> 3"),
    ):
        with pytest.raises(ValueError, match=message):
            train(changed, out, resume=True, progress=False)
    # also before there is a checkpoint
    shutil.rmtree(out / "state")
    with pytest.raises(ValueError, match=r"train\.lr"):
        train(make_run(lr=0.5), out, resume=True, progress=False)


def test_what_may_change(
    make_run: MakeRun,
    tmp_path: Path,
    whole: TrainResult,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    out = tmp_path / "run"
    half_done(make_run(), out, monkeypatch)
    again = make_run(save_every=5, log_every=4, workers=1)
    found = train(again, out, resume=True, progress=False)
    assert same(weights(found.model), weights(whole.model))
    assert not caplog.records
    half_done(make_run(), tmp_path / "other", monkeypatch)
    train(make_run(accumulate=2), tmp_path / "other", resume=True, progress=False)
    assert "not be bit for bit" in caplog.text


def test_other_conditions_are_said(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "run"
    half_done(make_run(), out, monkeypatch)
    file = out / "state" / "step-6" / "state.json"
    values = json.loads(file.read_text())
    assert values["environment"]["threads"] == 1
    assert values["position"] == 6 * 4
    values["environment"]["threads"] = 7
    file.write_text(json.dumps(values))
    with caplog.at_level(logging.WARNING):
        train(make_run(), out, resume=True, progress=False)
    assert "threads: 7 -> 1" in caplog.text


def test_a_checkpoint_of_another_model_is_refused(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gates = GateConfig(scope="global", k_attn=4, k_mlp=8)
    half_done(make_run(), tmp_path / "local", monkeypatch)
    half_done(make_run(gates), tmp_path / "global", monkeypatch)
    here, there = (tmp_path / name / "state" / "step-6" for name in ("local", "global"))
    shutil.copy(there / "model.safetensors", here / "model.safetensors")
    with pytest.raises(ValueError, match=r"does not fit this model: .*attn_gate"):
        train(make_run(), tmp_path / "local", resume=True, progress=False)
    for name in ("state.json", "optimizer.safetensors"):
        shutil.copy(there / name, here / name)
    with pytest.raises(ValueError, match=r"another configuration \(gates\.scope: global -> local\)"):
        train(make_run(), tmp_path / "local", resume=True, progress=False)


def test_changed_text_is_refused(make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"Lily had {i} red balls and Tom had {i + 7}." for i in range(300)))
    run = make_run()
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, source=str(text)))
    half_done(run, tmp_path / "run", monkeypatch)
    text.write_text(text.read_text().replace("red", "blue"))
    with pytest.raises(ValueError, match="the train text is not the one"):
        train(run, tmp_path / "run", resume=True, progress=False)


def test_a_run_is_not_overwritten(make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    half_done(make_run(), out, monkeypatch)
    files = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    with pytest.raises(FileExistsError, match="already holds a run: add --resume"):
        train(make_run(), out, progress=False)
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == files


def test_two_trainers_in_one_folder(make_run: MakeRun, tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    with FileLock(out / ".lock"), pytest.raises(RuntimeError, match="another process is training"):
        train(make_run(), out, progress=False)
    train(make_run(steps=1), out, progress=False)


class TestDiskTrouble:
    """What cannot be written is said, with what is left; the run goes on once there is room."""

    def test_full_while_saving(
        self, make_run: MakeRun, tmp_path: Path, whole: TrainResult, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out = tmp_path / "run"
        write = checkpoints.write_weights

        def full(tensors: Any, path: Path) -> None:
            if "step-8" in str(path) and path.name == "optimizer.safetensors":
                path.write_bytes(b"half")
                raise OSError(errno.ENOSPC, "No space left on device")
            write(tensors, path)

        with monkeypatch.context() as patch:
            patch.setattr(checkpoints, "write_weights", full)
            with pytest.raises(OSError, match=r"the disk is full.*step-4; make room") as error:
                train(make_run(), out, progress=False)
        assert error.value.errno == errno.ENOSPC
        assert [p.name for p in (out / "state").iterdir()] == ["step-4"]
        assert_as_if_whole(out, train(make_run(), out, resume=True, progress=False), whole)

    def test_full_while_recording(
        self, make_run: MakeRun, tmp_path: Path, whole: TrainResult, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out = tmp_path / "run"
        append = MetricsFile.append

        def full(self: MetricsFile, record: dict[str, Any]) -> None:
            if record["step"] == 9:
                with self.path.open("a") as file:
                    file.write('{"kind": "tr')
                raise OSError(errno.ENOSPC, "No space left on device")
            append(self, record)

        with monkeypatch.context() as patch:
            patch.setattr(MetricsFile, "append", full)
            with pytest.raises(OSError, match=r"the disk is full.*step-8; make room"):
                train(make_run(), out, progress=False)
        assert_as_if_whole(out, train(make_run(), out, resume=True, progress=False), whole)

    @pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
    def test_read_only_folder(self, make_run: MakeRun, tmp_path: Path) -> None:
        (tmp_path / "locked").mkdir(mode=0o555)
        with pytest.raises(PermissionError, match="you may not write there"):
            train(make_run(), tmp_path / "locked" / "run", progress=False)

    def test_read_only_file_system(self, make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: Any, **__: Any) -> None:
            raise OSError(errno.EROFS, "Read-only file system")

        monkeypatch.setattr(Path, "mkdir", refuse)
        with pytest.raises(OSError, match=r"cannot write the run folder .*read-only file system"):
            train(make_run(), tmp_path / "run", progress=False)
