"""The demo: what makes its figures the same everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sa_lens import demo
from sa_lens.config import write_yaml
from sa_lens.training.run_folder import CONFIG_YAML


def test_models_are_trained_on_one_thread_and_the_number_is_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def train(*arguments: Any, **options: Any) -> None:
        seen.append(torch.get_num_threads())
        raise KeyboardInterrupt

    monkeypatch.setattr("sa_lens.training.train", train)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(KeyboardInterrupt):
            demo._trained(demo.demo_run(), tmp_path / "run", "cpu", progress=False)
        assert seen == [1]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_both_models_see_the_same_text_in_the_same_order() -> None:
    baseline, local = demo.demo_run("none"), demo.demo_run("local")
    assert (baseline.model, baseline.data, baseline.train) == (local.model, local.data, local.train)
    assert not baseline.gates.gated
    assert local.gates.gated


def test_models_of_another_seed_are_not_taken_for_these(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = demo.demo_run()
    write_yaml(run, tmp_path / CONFIG_YAML)
    monkeypatch.setattr("sa_lens.core.checkpoints.complete_steps", lambda folder: [folder / f"step-{run.train.steps}"])
    monkeypatch.setattr("sa_lens.core.SelfAblatingTransformer.from_pretrained", lambda folder: folder)
    assert demo._trained(run, tmp_path, "cpu", progress=False) == tmp_path
    with pytest.raises(ValueError, match=r"train\.seed"):
        demo._trained(demo.demo_run(seed=7), tmp_path, "cpu", progress=False)
