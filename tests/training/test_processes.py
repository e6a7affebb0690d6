"""Several processes train the run that one trains."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import child_processes
import pytest
from accelerate.state import AcceleratorState, PartialState
from tiny_runs import MakeRun, records

from sa_lens.config import GateConfig
from sa_lens.core import SelfAblatingTransformer
from sa_lens.core.save_and_load import complete_steps
from sa_lens.training import train


def losses(out: Path, name: str = "loss", kind: str = "train") -> list[float]:
    return [record[name] for record in records(out, kind)]


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["local", "none"])
def test_two_processes_give_the_losses_of_one(make_run: MakeRun, tmp_path: Path, scope: str) -> None:
    """A gated model gets the same two micro-batches in both cases, since a rounding error may flip a mask."""
    gates = GateConfig(scope=scope, k_attn=4, k_mlp=8)  # type: ignore[arg-type]
    accumulate = 2 if gates.gated else 1
    run = make_run(
        gates, steps=40, lr=1e-3, log_every=1, eval_every=20, save_every=20, batch_size=4, accumulate=accumulate
    )
    one = train(run, tmp_path / "one", progress=False)
    child_processes.train_together(run, tmp_path / "two", 2)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-6)
    for name in ("clean_loss", "ablated_loss") if gates.gated else ("clean_loss",):
        found, expected = (losses(tmp_path / folder, name, "eval") for folder in ("two", "one"))
        assert found == pytest.approx(expected, rel=1e-6)
    # one writer: every record once, and no file that one process alone would not have written
    assert [r["step"] for r in records(tmp_path / "two", "train")] == list(range(1, 41))
    names = [{str(p.relative_to(out)) for p in out.rglob("*")} for out in (tmp_path / "two", one.folder)]
    assert names[0] == names[1]
    state = json.loads((tmp_path / "two" / "state" / "step-40" / "state.json").read_text())
    assert state["environment"]["processes"] == 2
    assert state["position"] == 160


@pytest.mark.slow
@pytest.mark.parametrize("shard", [False, True])
def test_a_schedule_on_two_processes(make_run: MakeRun, tmp_path: Path, shard: bool) -> None:
    """The gates have no gradient before the switch, which neither DDP nor FSDP may wait for or make up."""
    run = make_run(lr=1e-3, log_every=1, accumulate=2, dense_share=5 / 12, clip=100)
    train(run, tmp_path / "one", progress=False)
    child_processes.train_together(run, tmp_path / "two", 2, shard=shard)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-6)


@pytest.mark.slow
def test_a_checkpoint_resumes_on_another_number_of_processes(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(steps=12, lr=1e-3, log_every=1, accumulate=2, save_every=6)
    train(run, tmp_path / "whole", progress=False)
    for first, then in ((1, 2), (2, 1)):
        out = tmp_path / f"{first}-{then}"
        child_processes.train_together(run, out, first)
        # as if it had been stopped after step 6
        (out / "state" / "step-12" / "complete").unlink()
        child_processes.train_together(run, out, then, resume=True)
        assert losses(out) == pytest.approx(losses(tmp_path / "whole"), rel=1e-6)
        last = SelfAblatingTransformer.from_pretrained(out, which="last")
        whole = SelfAblatingTransformer.from_pretrained(tmp_path / "whole", which="last")
        for name, weight in last.named_parameters():
            assert weight.detach().numpy() == pytest.approx(whole.get_parameter(name).detach().numpy(), abs=1e-6), name


@pytest.mark.slow
def test_sharded_parameters(make_run: MakeRun, tmp_path: Path) -> None:
    """Losses, files and resumption are those of one process, which may even take over."""
    # the norm of sharded gradients is rounded otherwise; a clip beyond it keeps that out of the weights
    run = make_run(lr=1e-3, log_every=1, accumulate=2, save_every=6, clip=100, weight_decay=0.1, sample_tokens=4)
    train(run, tmp_path / "whole", progress=False)
    out = tmp_path / "sharded"
    child_processes.train_together(run, out, 2, shard=True)
    assert losses(out) == pytest.approx(losses(tmp_path / "whole"), rel=1e-6)
    for resumed_shard in (True, False):
        (out / "state" / "step-12" / "complete").unlink()
        child_processes.train_together(run, out, 2, shard=resumed_shard, resume=True)
        assert losses(out) == pytest.approx(losses(tmp_path / "whole"), rel=1e-6)
        for which in ("best", "last"):
            found, expected = (
                SelfAblatingTransformer.from_pretrained(folder, which=which)  # type: ignore[arg-type]
                for folder in (out, tmp_path / "whole")
            )
            for name, weight in found.named_parameters():
                assert weight.detach().numpy() == pytest.approx(expected.get_parameter(name).detach().numpy(), abs=1e-6)


@pytest.mark.slow
def test_the_survivor_of_a_death_says_so_and_how_to_go_on(make_run: MakeRun, tmp_path: Path) -> None:
    out, report = tmp_path / "run", tmp_path / "said"
    codes = child_processes.train_and_lose_one(make_run(steps=12, accumulate=2, save_every=4), out, 6, report)
    assert codes == [2, -signal.SIGKILL]
    said = report.read_text()
    assert said.startswith("LostProcess: process 0 cannot continue, since another process of this training has died")
    assert said.endswith(f"sa-lens train --out {out} --resume")
    assert [folder.name for folder in complete_steps(out)] == ["step-4"]


def test_the_batch_must_divide(make_run: MakeRun, tmp_path: Path) -> None:
    # TrainConfig knows nothing of processes; the loop checks before it reads a text
    run = make_run(batch_size=3)
    with pytest.raises(AssertionError):
        child_processes.train_together(run, tmp_path / "run", 2)
    assert not (tmp_path / "run" / "run.yaml").exists()


def test_accelerate_is_left_as_found(make_run: MakeRun, tmp_path: Path) -> None:
    assert not PartialState._shared_state
    train(make_run(steps=1), tmp_path / "run", progress=False)
    assert not PartialState._shared_state
    assert not AcceleratorState._shared_state
