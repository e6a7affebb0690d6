"""Grids: equal conditions for every variant, and the variants that are promised."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from sa_lens.compare.columns import COLUMNS, PAPER, TASKS
from sa_lens.compare.grids import GRIDS, Grid, Variant, apply_choices, baseline, grid_named, keep_names_whole
from sa_lens.compare.model_folder import ModelFolder
from sa_lens.compare.model_measurements import sae_hook
from sa_lens.compare.task_measurements import Skill
from sa_lens.config import GateConfig, ModelConfig, RunConfig, to_dict
from sa_lens.core import SelfAblatingTransformer


@pytest.mark.parametrize("name", GRIDS)
def test_variants_differ_in_their_gates_alone(name):
    grid = GRIDS[name]()
    reference = to_dict(grid.config(grid.variants[0], seed=3))
    for variant in grid.variants:
        run = to_dict(grid.config(variant, 3, "folder"))
        different = {key for key in reference if run[key] != reference[key]}
        if variant.train:
            assert run["train"] == reference["train"] | dict(variant.train)
            assert different <= {"gates", "train"}
        elif variant.training == "gates":
            assert different <= {"gates", "model", "train"}
            assert run["train"] == reference["train"] | {"freeze": "base", "init": "folder"}
            assert run["model"]["n_ctx"] == reference["model"]["n_ctx"]
        else:
            assert different <= {"gates"}


def test_a_seed_gives_every_variant_the_same_transformer():
    grid = GRIDS["smoke"]()
    shape = dataclasses.replace(grid.run.model, d_vocab=50)
    models = [SelfAblatingTransformer(shape, v.gates, seed=4, device="cpu") for v in grid.variants]
    first = dict(models[0].named_parameters())
    for model in models[1:]:
        for name, value in first.items():
            assert torch.equal(dict(model.named_parameters())[name], value), name


def test_the_laptop_grids_have_baseline_local_global_and_all_controls():
    for name, seeds in (("laptop", 5), ("laptop-tinystories", 3)):
        grid = GRIDS[name]()
        assert [v.name for v in grid.variants] == [
            *("baseline", "local-2", "local-8", "global-2", "global-8", "local-32", "joint-8", "ablated-scores-8"),
            *("random-static", "random-token", "frozen-base", "random-init", "random-static-2", "random-token-2"),
            *("random-static-32", "random-token-32"),
            *("dense-700", "dense-1100", "dense-1700", "dense-2700"),
        ]
        assert [v.name for v in grid.variants if v.dense] == [
            *("baseline", "dense-700", "dense-1100", "dense-1700", "dense-2700"),
        ]
        assert len(grid.seeds) == seeds
        by_name = {v.name: v for v in grid.variants}
        assert by_name["ablated-scores-8"].gates == dataclasses.replace(by_name["local-8"].gates, scores="ablated")
        assert grid.config(by_name["joint-8"], 0).train.dense_steps == 0
        assert grid.config(by_name["dense-700"], 0).train.dense_steps == 385
        for k in (2, 8, 32):
            of_k = [by_name[name + ("" if k == 8 else f"-{k}")].gates for name in ("random-static", "random-token")]
            assert of_k == [dataclasses.replace(by_name[f"local-{k}"].gates, scores=g.scores) for g in of_k]
        assert by_name["random-static"].gates.scores == "random-static"
        assert by_name["random-token"].gates.scores == "random-token"
        assert by_name["frozen-base"].training == "gates"
        assert by_name["random-init"].training == "none"
        assert {by_name[c].gates.k_mlp for c in ("random-static", "random-token", "frozen-base", "random-init")} == {8}


def test_the_paper_grid_is_the_papers_nine_cells():
    grid = GRIDS["paper"]()
    assert {v.name for v in grid.variants} == {*PAPER}
    assert (grid.run.model, grid.run.train.steps, grid.run.train.batch_size) == (ModelConfig(), 400_000, 24)


@pytest.mark.parametrize("name", GRIDS)
def test_every_column_of_every_measurement_is_in_the_table(name):
    measurements = GRIDS[name]().measurements
    columns = [(measurement.task, column) for measurement in measurements for column in measurement.columns]
    assert len(columns) == len(set(columns))
    assert set(columns) == {(task, column.name) for column in COLUMNS.values() for task in column.tasks}
    assert {task for task, _ in columns} == {"", *TASKS}
    for measurement in measurements:
        assert measurement.work(RunConfig(gates=GateConfig(scope="local"))) > 0


def test_the_sae_sits_where_the_papers_does():
    assert [sae_hook(n) for n in (8, 2, 1)] == [f"blocks.{layer}.hook_mlp_out" for layer in (6, 1, 0)]


def test_a_grid_begins_with_its_baseline():
    local = Variant("local-1", GateConfig(k_attn=1, k_mlp=1))
    for variants in ((local,), (local, baseline()), (baseline(), local, local), ()):
        with pytest.raises(ValueError, match="first must be 'baseline'"):
            Grid("bad", "", RunConfig(), variants, (), (0,))


def test_settings_of_a_variant_must_exist():
    grid = GRIDS["smoke"]()
    odd = dataclasses.replace(grid.variants[1], train={"step": 3})
    with pytest.raises(ValueError, match=r"unknown key train\.'step'.*steps"):
        grid.config(odd, 0)


def test_gates_on_a_baseline_need_one():
    grid = GRIDS["smoke"]()
    frozen = next(v for v in grid.variants if v.training == "gates")
    with pytest.raises(ValueError, match="train that first"):
        grid.config(frozen, 0)


def test_an_unknown_grid_is_refused():
    with pytest.raises(ValueError, match="grid='desk' is none of laptop"):
        grid_named("desk")


def test_another_text_keeps_all_else(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("once upon a time\n")
    grid = GRIDS["laptop-tinystories"]()
    assert grid.run.data.streaming
    here = apply_choices(grid, text=str(file)).run.data
    assert (here.source, here.streaming, here.max_documents) == (str(file), False, None)
    there = apply_choices(grid, text="someone/stories", validation="someone/others").run.data
    assert (there.source, there.validation, there.streaming) == ("someone/stories", "someone/others", True)
    assert here.vocab_size == there.vocab_size == grid.run.data.vocab_size


def test_a_tokenizer_trained_on_real_text_keeps_the_names_whole(tmp_path):
    path = tmp_path / "names.txt"
    assert keep_names_whole(GRIDS["laptop"](), path).run.data.keep_whole is None
    assert keep_names_whole(GRIDS["laptop-tinystories"](), path).run.data.keep_whole == str(path)
    assert keep_names_whole(GRIDS["paper"](), path).run.data.keep_whole is None


def test_the_keys_of_finished_models_stay(tmp_path):
    """If a new setting of the configuration changes them, models of earlier versions would be trained again: a setting
    without effect on the last step belongs into `_NO_CONSEQUENCE`, any other into the values below."""
    grid = GRIDS["laptop"]()
    keys = {v.name: ModelFolder(grid, v, 0, tmp_path).key[:10] for v in grid.variants}
    assert {name: keys[name] for name in ("baseline", "local-8", "joint-8", "frozen-base")} == {
        **{"baseline": "3120155ae3", "local-8": "fbb20e2c0d", "joint-8": "0110125b97", "frozen-base": "bb979d0f4f"},
    }


def test_a_measurement_of_another_task_has_its_own_files_and_reads_columns_with_the_task_in_front(tmp_path):
    grid = GRIDS["smoke"]()
    folder = ModelFolder(grid, grid.variants[0], 0, tmp_path)
    ioi, other = Skill(pairs=16), Skill(pairs=16, task="object")
    assert (ioi.label, other.label) == ("skill", "object-skill")
    assert other.inputs == {"group": "object-skill", "version": Skill.version, "settings": {"pairs": 16}}
    trained = {"weights": "abc", "text": {"train": "t", "validation": "v"}, "seconds": 1.5}
    assert folder.result_file(ioi, trained) != folder.result_file(other, trained)
    folder.path.mkdir(parents=True)
    (folder.path / "done.json").write_text(json.dumps(trained))
    values = {"object_pair_accuracy": {"clean": 0.9}, "logit_difference": {"clean": 1.0}}
    folder.result_file(other, trained).write_text(json.dumps({"values": values, "notes": [], "seconds": 1.0}))
    result = folder.result(other)
    assert result is not None
    assert set(result.values) == {"pair_accuracy", "logit_difference"}
    assert folder.result(ioi) is None
