"""The demo: what it shows of two models, and the trainings that it runs."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_shelf import fill, tiny

from sa_lens import catalogue, cli
from sa_lens.circuits.metrics import METRICS
from sa_lens.core.save_and_load import complete_steps
from sa_lens.demo import pair, tour
from sa_lens.demo.printing import Clock
from sa_lens.shipped import measuring, recipes
from sa_lens.shipped.measuring import stories_bars
from sa_lens.stopping import Interrupted


@pytest.fixture(scope="module")
def tiny_shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shelf = tmp_path_factory.mktemp("shelf")
    fill(shelf, tmp_path_factory.mktemp("work"))
    return shelf


@pytest.fixture
def shelf(tiny_shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Tiny models take the place of the shipped ones, in the current folder and its sizes."""
    monkeypatch.setattr(catalogue, "SHIPPED", tiny_shelf)
    monkeypatch.setattr(pair, "SHORT", tiny("stories-local").run)
    monkeypatch.setattr(measuring, "PROMPTS", 20)
    monkeypatch.chdir(tmp_path)
    return tiny_shelf


def test_the_tour_shows_everything_and_says_what_to_do_next(
    shelf: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All but the report, which has tests of its own."""
    asked: dict[str, Any] = {}

    def make_report(runs: list[str], **options: Any) -> str:
        asked.update(options, runs=runs)
        return "report"

    def save(report: str, path: Path) -> Path:
        path.write_text(report)
        return path

    for name, value in (("PROMPTS", 4), ("SKILL_PROMPTS", 8), ("UNIT_TOKENS", 200), ("SHORT_STEPS", 2)):
        monkeypatch.setattr(tour, name, value)
    # a model that has learnt nothing tells clean and corrupt prompts apart by next to nothing
    for name, metric in METRICS.items():
        monkeypatch.setitem(METRICS, name, dataclasses.replace(metric, minimum_gap=1e-9))
    monkeypatch.setattr(tour, "make_report", make_report)
    monkeypatch.setattr(tour, "save_report", save)
    threads = torch.get_num_threads()
    assert cli.main(["demo", "--device", "cpu"]) == 0
    assert torch.get_num_threads() == threads
    assert asked["runs"] == ["stories-local", "stories-dense"]
    out = Path("runs/demo")
    for name in ("patching-resid_pre", "patching-heads", "circuits", "training", "report"):
        assert (out / f"{name}.html").is_file()
    said = capsys.readouterr().out
    for heading in (
        "Pair accuracy",
        "A story of",
        "Circuits",
        "live masks",
        "Units",
        "Validation loss",
        "What was found",
    ):
        assert heading in said
    assert said.index("Where the time went") < said.index("Next:")
    assert "runs/demo/report.html" in said
    assert [step.name for step in complete_steps(out / "short")] == ["step-2"]


def test_the_short_training_is_that_of_the_pair_with_fewer_steps() -> None:
    whole, short = pair.pair_run(seed=3), tour.short_run(3)
    assert (short.model, short.gates, short.loss) == (whole.model, whole.gates, whole.loss)
    assert short.train.steps < whole.train.steps / 3
    assert (short.model, short.gates) == (recipes.SHORT.model, recipes.SHORT.gates)
    assert short.train.dense_steps / short.train.steps == pytest.approx(whole.train.dense_share, abs=0.01)


def test_both_models_see_the_same_text_in_the_same_order() -> None:
    dense, local = pair.pair_run("none"), pair.pair_run("local")
    assert (dense.model, dense.data, dense.train) == (local.model, local.data, local.train)
    assert not dense.gates.gated
    assert local.gates.gated


class InProcess:
    """Stands for a process that is spawned: runs at once, in this one."""

    def __init__(self, target: Callable[..., None], args: tuple[Any, ...], name: str) -> None:
        self.target, self.args, self.name, self.exitcode = target, args, name, 0

    def start(self) -> None:
        try:
            self.target(*pickle.loads(pickle.dumps(self.args)))
        except SystemExit as stop:
            self.exitcode = 1 if isinstance(stop.code, str) else int(stop.code or 0)

    def terminate(self) -> None: ...

    def is_alive(self) -> bool:
        return False

    def join(self) -> None: ...


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    context = SimpleNamespace(Process=InProcess)
    monkeypatch.setattr(pair.multiprocessing, "get_context", lambda method: context)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_the_pair_is_trained_and_told_beside_its_bars(
    shelf: Path, in_process: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["demo", "--train", "--device", "cpu"]) == 1
    for name in ("dense", "local"):
        assert [step.name for step in complete_steps(Path("runs/demo") / name)] == ["step-4"]
    said = capsys.readouterr().out
    assert said.count("  NO   IOI on held-out name pairs") == 2
    assert "Where the time went" in said


def test_a_training_that_fails_is_named(shelf: Path, in_process: None, tmp_path: Path) -> None:
    (tmp_path / "local").mkdir()
    run = pair.pair_run()
    odd = dataclasses.replace(run, model=dataclasses.replace(run.model, n_ctx=10**6))
    with pytest.raises(RuntimeError, match=r"the training of local in .*local failed"):
        pair.train_both({"dense": run, "local": odd}, tmp_path, device="cpu", progress=False)


def test_both_trainings_are_told_to_stop_and_the_runs_go_on(
    shelf: Path, in_process: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    def stopped(*arguments: object) -> None:
        raise KeyboardInterrupt

    run = pair.pair_run()
    with monkeypatch.context() as patched:
        patched.setattr(pair, "_watch", stopped)
        patched.setattr(pair, "train_model", lambda run, folder, **options: None)
        patched.setattr(InProcess, "terminate", lambda process: told.append(process.name))
        with pytest.raises(Interrupted, match="the same command goes on"):
            pair.train_both({"dense": run, "local": run}, tmp_path, device="cpu", progress=False)
    assert told == ["dense", "local"]


def test_each_bar_is_the_figure_of_the_right_stream() -> None:
    """Figures that pass by little, and each of them failing alone."""

    def figures(clean: float, ablated: float, ioi_clean: float, ioi_ablated: float) -> dict[str, Any]:
        accuracies = {"clean": ioi_clean, "ablated": ioi_ablated}
        other = [{"task": "object", "stream": stream, "pair_accuracy": 0.1} for stream in accuracies]
        ioi = [{"task": "ioi", "stream": stream, "pair_accuracy": value} for stream, value in accuracies.items()]
        return {"losses": {"clean": clean, "ablated": ablated}, "skills": other + ioi}

    dense = {"losses": {"clean": 0.80}, "skills": []}
    passing = (0.83, 0.91, 0.96, 0.91)
    assert all(bar.reached for bar in stories_bars(figures(*passing), dense))
    for place, failing in enumerate((0.85, 0.93, 0.94, 0.89)):
        values = [*passing[:place], failing, *passing[place + 1 :]]
        assert [bar.reached for bar in stories_bars(figures(*values), dense)].count(False) == 1


def test_the_clock_adds_up_parts_of_one_name(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 2.0, 10.0, 13.0])
    processor = iter([0.0, 1.0, 1.0, 5.0])
    monkeypatch.setattr("sa_lens.demo.printing.time", SimpleNamespace(perf_counter=lambda: next(times)))
    monkeypatch.setattr("sa_lens.demo.printing._processor_seconds", lambda: next(processor))
    clock = Clock()
    for _ in range(2):
        with clock.part("reading"):
            pass
    assert clock.parts == {"reading": (5.0, 5.0)}
    assert clock.table().splitlines()[-1].split() == ["together", "5.0", "5.0"]
