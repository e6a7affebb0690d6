"""Grids: which models are trained, on which text, and what is measured on them.

Every model of a grid sees the same tokens in the same order for the same number of steps. The seed sets the initial
weights and the order of the tokens; all variants of a seed share the order and the initial weights of the plain
transformer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sa_lens.circuits.tasks.tinystories import NAMES
from sa_lens.compare.learning import Learning
from sa_lens.compare.measurement import Measurement
from sa_lens.compare.model_measurements import SAE, Losses, Weights
from sa_lens.compare.task_measurements import ACDC, Faithfulness, Skill
from sa_lens.compare.unit_measurements import Explanations, Labels, Leakage, Units
from sa_lens.config import PRESETS, DataConfig, GateConfig, ModelConfig, RunConfig, TrainConfig, from_dict
from sa_lens.data.whole_files import atomic_write
from sa_lens.sae import PRESETS as SAE_PRESETS
from sa_lens.sae import SAESettings

BASELINE = "baseline"
"""The variant that all others are compared with."""

Training = Literal["whole", "gates", "none"]
"""Which part of the model is trained: all of it, its gates on the trained baseline, or nothing."""


@dataclass(frozen=True)
class Variant:
    """One way to build or train the model; it has a row in the table."""

    name: str
    """Its name. The paper's published figures belong to names such as `baseline` and `local-8`."""
    gates: GateConfig
    """Its gates; scope `none` for the baseline."""
    training: Training = "whole"
    """Which part of the model is trained."""
    train: Mapping[str, Any] = field(default_factory=dict)
    """Settings of `RunConfig.train` in which it differs from the grid, such as `{"steps": 700}`."""

    @property
    def dense(self) -> bool:
        """Whether it is a trained model without gates: the baseline, or one that is trained for fewer steps."""
        return not self.gates.gated and self.training == "whole"


@dataclass(frozen=True)
class Grid:
    """The models to train, and the measurements to make on them."""

    name: str
    """Name of the grid."""
    about: str
    """One line: what it is for."""
    run: RunConfig
    """Settings that all models share: shape, loss, text, training. Its gates and its seed are not used."""
    variants: tuple[Variant, ...]
    """The baseline first."""
    measurements: tuple[Measurement, ...]
    """Measurements on every model."""
    seeds: tuple[int, ...]
    """Seeds that are trained unless others are asked for."""
    learners: tuple[str, ...] = ()
    """Variants whose skill is measured during training, at every evaluation (`train.eval_every`); names that are no
    variant are ignored. This has no effect on the models, and a finished model is not trained again for it."""
    learning_pairs: int = 200
    """Prompt pairs of each task on which it is measured."""

    def __post_init__(self) -> None:
        names = [variant.name for variant in self.variants]
        if not names or names[0] != BASELINE or len(set(names)) < len(names):
            raise ValueError(f"variants {names}: names must differ, and the first must be {BASELINE!r}")

    def config(self, variant: Variant, seed: int, baseline: str | None = None) -> RunConfig:
        """Returns the run of a variant with a seed.

        Args:
            baseline: folder of the trained baseline of the same seed, for a variant that trains gates on it.

        Raises:
            ValueError: the variant is trained on the baseline, but its folder is not given.
        """
        train = from_dict(TrainConfig, {**variant.train, "seed": seed}, base=self.run.train, where="train.")
        if variant.training != "gates":
            return dataclasses.replace(self.run, gates=variant.gates, train=train)
        if baseline is None:
            raise ValueError(f"{variant.name} is trained on the baseline of seed {seed}: train that first")
        train = dataclasses.replace(train, freeze="base", init=baseline)
        # the shape is that of the baseline
        shape = ModelConfig(n_ctx=self.run.model.n_ctx)
        return dataclasses.replace(self.run, model=shape, gates=variant.gates, train=train)


def learned_variants(ks: Sequence[int], gates: GateConfig) -> tuple[Variant, ...]:
    """Returns variants with local and with global gates that keep k attention units and k neurons, for each k."""
    return tuple(
        Variant(f"{scope}-{k}", dataclasses.replace(gates, scope=scope, k_attn=k, k_mlp=k))
        for scope in ("local", "global")
        for k in ks
    )


def local_gates(k: int, gates: GateConfig) -> GateConfig:
    """Returns local gates that keep k attention units and k neurons."""
    return dataclasses.replace(gates, scope="local", k_attn=k, k_mlp=k)


def controls(k: int, gates: GateConfig) -> tuple[Variant, ...]:
    """The four controls, with local gates: random scores per layer, random scores per token, gates trained on the
    frozen baseline, and a model that is not trained at all."""
    local = local_gates(k, gates)
    return (
        *random_gates(k, gates),
        Variant("frozen-base", local, training="gates"),
        Variant("random-init", local, training="none"),
    )


def random_gates(k: int, gates: GateConfig, ending: str = "") -> tuple[Variant, Variant]:
    """Returns the controls with random scores per layer and per token."""
    local = local_gates(k, gates)
    return (
        Variant(f"random-static{ending}", dataclasses.replace(local, scores="random-static")),
        Variant(f"random-token{ending}", dataclasses.replace(local, scores="random-token")),
    )


def joint(k: int, gates: GateConfig, lr: float) -> Variant:
    """Returns local gates that are trained with both streams from the first step, as in the paper.

    Args:
        lr: learning rate from which it falls to 0 along half a cosine.
    """
    return Variant(f"joint-{k}", local_gates(k, gates), train={"dense_share": 0.0, "dense_lr": None, "lr": lr})


def reading_ablated(k: int, gates: GateConfig) -> Variant:
    """Returns local gates that read the ablated stream, so that masks cannot carry what this stream does not know."""
    return Variant(f"ablated-scores-{k}", dataclasses.replace(local_gates(k, gates), scores="ablated"))


def shorter_baselines(*steps: int) -> tuple[Variant, ...]:
    """Returns dense transformers that are trained for fewer steps, with the schedule of the grid made shorter.

    They show what a model without gates does at the higher loss of a self-ablating model.
    """
    return tuple(dataclasses.replace(baseline(), name=f"dense-{n}", train={"steps": n}) for n in steps)


def baseline() -> Variant:
    """Returns the dense transformer."""
    return Variant(BASELINE, GateConfig(scope="none"))


def task_measurements(skill: Skill, acdc: ACDC, faithfulness: Faithfulness) -> tuple[Measurement, ...]:
    """Returns the measurements for IOI and for object recall, the latter without the spread of ACDC over orders."""
    other = (skill, Learning(), dataclasses.replace(acdc, orders=0), faithfulness)
    of_object = (dataclasses.replace(measurement, task="object") for measurement in other)
    return skill, Learning(), acdc, faithfulness, *of_object


def _laptop(source: DataConfig, steps: int, name: str, about: str, seeds: int) -> Grid:
    gates = GateConfig(temperature=0.1)
    run = RunConfig(
        model=ModelConfig(n_layers=2, d_model=128, n_heads=4, d_mlp=256, n_ctx=128, init="gpt2", attn_scale=True),
        data=source,
        train=TrainConfig(
            steps=steps,
            # trained on both streams from the first step, small models learn to copy late or not at all
            dense_share=0.55,
            batch_size=8,
            dense_lr=3e-3,
            lr=2e-3,
            betas=(0.9, 0.98),
            warmup_steps=100,
            precision="bf16",
            eval_every=100,
            eval_tokens=4_000,
            save_every=1_000,
            sample_tokens=0,
        ),
    )
    return Grid(
        name=name,
        about=about,
        run=run,
        variants=(
            *(baseline(), *learned_variants((2, 8), gates), Variant("local-32", local_gates(32, gates))),
            *(joint(8, gates, 3e-3), reading_ablated(8, gates), *controls(8, gates)),
            *(*random_gates(2, gates, "-2"), *random_gates(32, gates, "-32")),
            *shorter_baselines(700, 1_100, 1_700, 2_700),
        ),
        measurements=(
            Losses(tokens=60_000),
            Weights(),
            *task_measurements(Skill(), ACDC(), Faithfulness(pairs=64)),
            Units(),
            Labels(),
            Explanations(units=24, tokens=30_000),
            Leakage(tokens=10_000),
            SAE(dataclasses.replace(SAE_PRESETS["laptop"], steps=400, expansion=4)),
        ),
        seeds=tuple(range(seeds)),
        learners=(BASELINE, "local-8", "local-32", "joint-8"),
    )


def laptop() -> Grid:
    """Returns the grid of a small model on generated stories."""
    stories = DataConfig(source="stories", n_stories=20_000, vocab_size=1024, validation_fraction=0.05)
    return _laptop(stories, 5_400, "laptop", "generated stories, 20 variants, 5 seeds", 5)


def laptop_tinystories() -> Grid:
    """Returns the grid of the same model on real text, which `text=` names."""
    text = DataConfig(
        source="roneneldan/TinyStories",
        streaming=True,
        max_documents=20_000,
        vocab_size=2048,
        validation_fraction=0.05,
    )
    return _laptop(text, 5_400, "laptop-tinystories", "TinyStories, 20 variants, 3 seeds", 3)


def paper() -> Grid:
    """Returns the grid of the paper's nine models at full size."""
    preset = PRESETS["paper-2024-10"]
    measurements = (
        Losses(tokens=500_000),
        Weights(),
        *task_measurements(Skill(), ACDC(), Faithfulness()),
        Units(tokens=500_000, calibration=250_000),
        Labels(),
        Explanations(units=256, tokens=200_000, calibration=250_000),
        Leakage(tokens=50_000, probe_tokens=10_000),
        SAE(SAE_PRESETS["paper"], tokens=200_000),
    )
    variants = (baseline(), *learned_variants((8, 4, 2, 1), preset.gates))
    return Grid("paper", "the paper's nine models at full size; for GPUs", preset, variants, measurements, (0,))


def smoke() -> Grid:
    """Returns a grid of tiny models that runs in seconds, to see that everything works."""
    gates = GateConfig(temperature=0.1)
    run = RunConfig(
        model=ModelConfig(n_layers=2, d_model=16, n_heads=2, n_ctx=48, init="gpt2", attn_scale=True),
        data=DataConfig(source="stories", n_stories=300, vocab_size=1000, validation_fraction=0.2),
        train=TrainConfig(
            steps=6,
            dense_share=0.5,
            batch_size=2,
            lr=3e-3,
            eval_every=3,
            eval_tokens=256,
            save_every=3,
            log_every=3,
            sample_tokens=0,
        ),
    )
    tiny = SAESettings(expansion=1, steps=6, batch_tokens=64, buffer_tokens=512, lr=1e-3)
    return Grid(
        name="smoke",
        about="models of six steps, to see that everything runs",
        run=run,
        variants=(
            *(
                baseline(),
                *learned_variants((4,), gates),
                joint(4, gates, 3e-3),
                reading_ablated(4, gates),
                *controls(4, gates),
                *shorter_baselines(3),
            ),
        ),
        measurements=(
            Losses(tokens=256),
            Weights(),
            *task_measurements(
                Skill(pairs=16),
                ACDC(pairs=8, orders=2, bar=0.0, skill_pairs=16),
                Faithfulness(pairs=16, steps=1, bar=0.0, skill_pairs=16),
            ),
            Units(tokens=512, calibration=512),
            Labels(stories=60, calibration=512),
            Explanations(units=2, tokens=512, calibration=512),
            Leakage(tokens=512, probe_tokens=256),
            SAE(tiny, tokens=256),
        ),
        seeds=(0, 1),
        learners=(BASELINE, "local-4", "joint-4"),
        learning_pairs=16,
    )


GRIDS = {"laptop": laptop, "laptop-tinystories": laptop_tinystories, "paper": paper, "smoke": smoke}
"""Grids by name."""


def grid_named(grid: str | Grid) -> Grid:
    """Returns a grid by its name, or the given grid.

    Raises:
        ValueError: the name is unknown.
    """
    if isinstance(grid, Grid):
        return grid
    if grid not in GRIDS:
        raise ValueError(f"grid={grid!r} is none of {', '.join(GRIDS)}, nor a Grid")
    return GRIDS[grid]()


def apply_choices(
    grid: Grid,
    *,
    seeds: int | Sequence[int] | None = None,
    columns: Sequence[str] | None = None,
    variants: Sequence[str] | None = None,
    text: str | None = None,
    validation: str | None = None,
) -> Grid:
    """Returns the grid with other seeds, fewer measurements or another text; arguments as in `compare`.

    Raises:
        ValueError: bad seeds, an unknown measurement or variant, or validation without text.
    """
    if validation is not None and text is None:
        raise ValueError(f"validation={validation!r} goes with text=: name the training text as well")
    if text is not None:
        data = dataclasses.replace(grid.run.data, source=text, validation=validation)
        if text == "stories" or Path(text).expanduser().exists():
            data = dataclasses.replace(data, streaming=False, max_documents=None, validation_split=None)
        grid = dataclasses.replace(grid, run=dataclasses.replace(grid.run, data=data))
    if seeds is not None:
        chosen = tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds)
        if not chosen or min(chosen) < 0 or len(set(chosen)) < len(chosen):
            raise ValueError(f"seeds={seeds!r} must be a number of at least 1, or different whole numbers from 0")
        grid = dataclasses.replace(grid, seeds=chosen)
    if columns is not None:
        labels = [measurement.label for measurement in grid.measurements]
        unknown = [name for name in columns if name not in labels]
        if unknown or not columns:
            raise ValueError(f"columns: no measurement {', '.join(unknown) or 'given'}; there are {', '.join(labels)}")
        kept = tuple(measurement for measurement in grid.measurements if measurement.label in columns)
        grid = dataclasses.replace(grid, measurements=kept)
    if variants is not None:
        names = [variant.name for variant in grid.variants]
        unknown = [name for name in variants if name not in names]
        if unknown or not variants:
            raise ValueError(f"variants: no variant {', '.join(unknown) or 'given'}; there are {', '.join(names)}")
        wanted = tuple(variant for variant in grid.variants if variant.name in (BASELINE, *variants))
        grid = dataclasses.replace(grid, variants=wanted)
    return grid


def keep_names_whole(grid: Grid, path: Path) -> Grid:
    """Returns the grid with a tokenizer that keeps the names of the prompts whole, if it trains one on real text.

    Args:
        path: file of the names, one per line, which `write_names` writes.
    """
    data = grid.run.data
    if data.source == "stories" or data.tokenizer != "bpe" or data.keep_whole is not None:
        return grid
    data = dataclasses.replace(data, keep_whole=str(path))
    return dataclasses.replace(grid, run=dataclasses.replace(grid.run, data=data))


def write_names(path: Path) -> None:
    """Writes the names of the prompts on real text, one per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, "\n".join(NAMES).encode())
