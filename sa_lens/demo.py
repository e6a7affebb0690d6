"""The demo: stories, two small models, and a patching experiment on both streams, on this machine alone.

Everything is seeded and offline. A model that an earlier call has finished is not trained again.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sa_lens.config import DataConfig, GateConfig, ModelConfig, RunConfig, TrainConfig, to_dict
from sa_lens.places import output_file, output_folder

if TYPE_CHECKING:
    import pandas as pd

    from sa_lens.circuits.tasks import PromptPairs
    from sa_lens.core import SelfAblatingTransformer
    from sa_lens.data import PreparedData

REPORT_UNITS = 48
"""Units of each model that the demo's report explains."""
PAIR_BAR, TOP1_BAR, LOSS_BAR = 0.95, 0.80, 1.10
"""What the demo's model must reach: IOI pair accuracy, IOI top-1 accuracy, clean loss over the baseline's."""


def demo_run(scope: str = "local", seed: int = 0) -> RunConfig:
    """The configuration of the demo's model; with scope `none`, of its dense baseline."""
    return RunConfig(
        model=ModelConfig(n_layers=3, d_model=128, n_heads=4, n_ctx=128, attn_scale=True, init="gpt2"),
        gates=GateConfig(scope=scope, k_attn=16, k_mlp=16, temperature=0.1),  # type: ignore[arg-type]
        data=DataConfig(source="stories", n_stories=20_000, vocab_size=1024),
        train=TrainConfig(
            # copying a name is learnt suddenly, after some number of optimizer steps: many small ones get there first
            steps=4_600,
            dense_share=0.65,
            batch_size=4,
            dense_lr=3e-3,
            lr=1.5e-3,
            betas=(0.9, 0.98),
            warmup_steps=100,
            eval_every=2_300,
            eval_tokens=40_000,
            save_every=1_150,
            precision="bf16",
            sample_tokens=0,
            seed=seed,
        ),
    )


def demo(out: str | Path = "runs/demo", *, seed: int = 0, device: str = "auto", progress: bool = True) -> Path:
    """Trains a baseline and a local self-ablating model, measures and patches them, writes figures and a report.

    Args:
        out: folder of the runs and figures.
        seed: of initialisation and data order.
        device: auto, cpu, cuda or mps.
        progress: show progress bars.

    Returns:
        The folder.
    """
    from sa_lens.circuits.tasks import ioi
    from sa_lens.data import prepare

    began = time.perf_counter()
    out = output_folder(out)
    for name in ("baseline", "local"):
        output_folder(out / name)
    for name in ("report.html", "training.html", "patching-resid_pre.html", "patching-heads.html"):
        output_file(out / name)
    runs = {"baseline": demo_run("none", seed), "local": demo_run("local", seed)}
    data = prepare(runs["local"].data, runs["local"].model.n_ctx, progress=progress)
    print(
        f"{data.train.n_documents:,} generated stories, {data.train.n_tokens / 1e6:.1f} M tokens, "
        f"vocabulary {data.d_vocab:,}, unigram entropy {unigram_entropy(data):.2f} nats\n"
    )
    models = {name: _trained(run, out / name, device, progress) for name, run in runs.items()}

    losses = loss_table(models, data)
    _show("Validation loss, nats a token", losses)
    pairs = ioi(data.tokenizer, n=400, seed=seed, world="stories", name_pairs="held-out")
    skills = skill_table(models, pairs)
    _show("Indirect objects, name pairs never seen together in training (95 % intervals)", _with_intervals(skills))
    _tell_stories(models["local"], seed)
    figures = write_figures(models["local"], pairs, out)
    _conclude(losses, skills, unigram_entropy(data))
    print("Figures:", *(f"  {path}" for path in figures), sep="\n")
    print(f"\nReport, to open in a browser:\n  {write_report(runs, out, seed, device, progress)}")
    print(
        f"\nDone in {(time.perf_counter() - began) / 60:.1f} minutes. Next:\n"
        f'  sa-lens generate {out / "local"} "Lily and Tom went to the park."\n'
        f"  sa-lens eval {out / 'local'}\n"
        f"  sa-lens circuit {out / 'local'} --task ioi --stream ablated\n"
        f"  sa-lens train --preset laptop --data.source stories --out runs/mine\n"
        "  jupyter lab examples/01_train_and_patch.ipynb"
    )
    return out


def unigram_entropy(data: PreparedData) -> float:
    """Entropy of single tokens of the training text, in nats: the loss of a model that ignores all context."""
    counts = np.bincount(np.asarray(data.train.tokens), minlength=data.d_vocab)
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())


def _trained(run: RunConfig, folder: Path, device: str, progress: bool) -> SelfAblatingTransformer:
    from sa_lens.core import SelfAblatingTransformer
    from sa_lens.core.checkpoints import complete_steps
    from sa_lens.training import train
    from sa_lens.training.run_folder import check_unchanged, stored_config

    finished = [f for f in complete_steps(folder) if f.name == f"step-{run.train.steps}"]
    if finished:
        check_unchanged(folder, to_dict(stored_config(folder)), run)
    else:
        what = "dense baseline" if not run.gates.gated else f"{run.gates.scope} self-ablating model"
        print(f"Training the {what}: {run.train.steps} steps of {run.train.batch_size} x {run.model.n_ctx} tokens")
        with _one_thread():
            train(run, folder, device=device, resume=folder.exists(), progress=progress)
    return SelfAblatingTransformer.from_pretrained(folder)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums in one order on any number of cores: at which step a small model learns to copy names hangs on rounding."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def loss_table(models: dict[str, SelfAblatingTransformer], data: PreparedData) -> pd.DataFrame:
    """Validation losses, a row a model and stream."""
    import pandas as pd

    from sa_lens.data import validation_blocks
    from sa_lens.training import bytes_per_token, evaluate

    rows = []
    for name, model in models.items():
        blocks = validation_blocks(data.validation, model.cfg.n_ctx, 40_000)
        found = evaluate(model, blocks, bytes_per_token=bytes_per_token(data.validation))
        for stream, loss in (("clean", found.clean_loss), ("ablated", found.ablated_loss)):
            if loss is not None:
                rows.append({"model": name, "stream": stream, "loss": loss, "perplexity": float(np.exp(loss))})
    return pd.DataFrame(rows)


def skill_table(models: dict[str, SelfAblatingTransformer], pairs: PromptPairs) -> pd.DataFrame:
    """Task skill of every model and stream."""
    import pandas as pd

    from sa_lens.circuits.metrics import skill

    tables = []
    for name, model in models.items():
        table = skill(model, pairs)
        table.insert(0, "model", name)
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def _with_intervals(skills: pd.DataFrame) -> pd.DataFrame:
    """The table as people read it: each mean with its 95 % interval in one cell."""
    import pandas as pd

    shown = pd.DataFrame({"model": skills["model"], "stream": skills["stream"], "prompts": skills["n"]})
    for metric in ("pair_accuracy", "top1_accuracy", "logit_difference"):
        cells = zip(skills[metric], skills[f"{metric}_low"], skills[f"{metric}_high"], strict=True)
        shown[metric.replace("_", " ")] = [f"{mean:.3f} [{low:.3f}, {high:.3f}]" for mean, low, high in cells]
    return shown


def _show(title: str, table: pd.DataFrame) -> None:
    print(f"\n{title}\n{table.to_string(index=False, float_format=lambda x: f'{x:.3f}')}")


def _tell_stories(model: SelfAblatingTransformer, seed: int) -> None:
    from sa_lens.training import sample, side_by_side

    print("\nA story from each stream of the local model")
    print(side_by_side(sample(model, max_new_tokens=70, seed=seed)))


def write_figures(
    model: SelfAblatingTransformer, pairs: PromptPairs, out: Path, *, progress: bool = True
) -> list[Path]:
    """Patches both streams on the pairs of the commonest length and draws the results and the training curves."""
    from sa_lens.circuits.patching import patch
    from sa_lens.views import draw, save, side_by_side, to_record, training_curves

    common = max((group for _, group in pairs.by_length()), key=len)
    written = []
    for what, title in (("resid_pre", "residual streams"), ("heads", "heads")):
        tables = [patch(model, common, what, stream, progress=progress) for stream in ("clean", "ablated")]
        figure = side_by_side(
            [to_record(table, "value") for table in tables],
            f"Which {title} carry the indirect object?",
            names=["clean", "ablated"],
        )
        written.append(save(figure, out / f"patching-{what}.html"))
    curves = draw(training_curves([out / "baseline", out / "local"]))
    written.append(save(curves, out / "training.html"))
    return written


def write_report(runs: Iterable[str], out: Path, seed: int, device: str, progress: bool) -> Path:
    """Writes one page about the models: their stories token by token, circuits, units, side by side."""
    from sa_lens.report import make_report, write_page

    folders = [out / name for name in reversed([*runs])]
    made = make_report(
        folders, title="The demo's models", n_units=REPORT_UNITS, seed=seed, device=device, progress=progress
    )
    return write_page(made, out / "report.html")


def _conclude(losses: pd.DataFrame, skills: pd.DataFrame, entropy: float) -> None:
    """Says in words what was found, each claim beside its bar."""
    loss = {(row["model"], row["stream"]): float(row["loss"]) for row in losses.to_dict("records")}
    clean, ablated, baseline = loss["local", "clean"], loss["local", "ablated"], loss["baseline", "clean"]
    print("\nWhat was found")
    _say(clean <= LOSS_BAR * baseline, f"clean loss {clean / baseline:.3f} x the baseline's (bar: {LOSS_BAR:.2f})")
    _say(ablated < entropy / 2, f"ablated loss {ablated:.3f}, unigram entropy {entropy:.3f} (bar: half of it)")
    skill = {(row["model"], row["stream"]): row for row in skills.to_dict("records")}
    for metric, name, bar in (("pair_accuracy", "pair", PAIR_BAR), ("top1_accuracy", "top-1", TOP1_BAR)):
        in_clean, in_ablated = (float(skill["local", stream][metric]) for stream in ("clean", "ablated"))
        found = f"{name} accuracy {in_clean:.1%} (bar: {bar:.0%}), ablated stream {in_ablated:.1%}"
        _say(in_clean >= bar, f"IOI on held-out name pairs: {found}")
    print()


def _say(reached: bool, what: str) -> None:
    print(f"  {'yes' if reached else 'NO '}  {what}")
