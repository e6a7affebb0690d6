"""Trains, rounds, measures and packs the shipped models.

    python -m sa_lens.shipped.make stories-local stories-dense
    python -m sa_lens.shipped.make --text FOLDER       (all; FOLDER holds the parquet files of TinyStories)

An interrupted training goes on where it was; a finished one is only measured and packed again. The models of a pair do
not depend on one another, so they can be trained by two processes at once.
"""

from __future__ import annotations

import itertools
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from sa_lens import __version__
from sa_lens.catalogue import ABOUT, SHIPPED
from sa_lens.config import RunConfig, Words, suggestion, to_dict
from sa_lens.core import SelfAblatingTransformer, save_and_load
from sa_lens.data import PreparedData, validation_blocks
from sa_lens.data.whole_files import atomic_write, staged_folder
from sa_lens.shipped.measuring import losses_on, skills
from sa_lens.shipped.recipes import RECIPES, Recipe
from sa_lens.training import TrainResult, bytes_per_token, evaluate, run_text, train
from sa_lens.training.trained_run import text_of_run

SAMPLE = 12
"""Validation texts that are shipped with a model, with its losses on them, so that an installation can be checked."""
COMMIT = "commit.txt"
"""File of a run's folder that names the commit of the code that began it."""


def make(
    names: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[NAME ...]")] = (),
    work: Path = Path("runs/shipped"),
    text: Path | None = None,
    threads: int = 1,
    out: Path = SHIPPED,
) -> None:
    """Train, round, measure and pack the models shipped with sa_lens.

    Args:
        names: Models to make; none: all.
        work: Folder of the training runs; a run that is there goes on, or is only packed if it is finished.
        text: Folder with the files of TinyStories.
        threads: Threads of torch; small models are fastest with 1.
        out: Folder that the models' folders are written into.
    """
    for name in names:
        if name not in RECIPES:
            raise ValueError(f"no model {name!r}: choose from {', '.join(RECIPES)}{suggestion(name, RECIPES)}")
    torch.set_num_threads(threads)
    for name in names or tuple(RECIPES):
        recipe = RECIPES[name]
        run = recipe.located(text)
        result = train_model(run, work / name)
        folder = pack(name, recipe, result, out)
        figures = json.loads((folder / ABOUT).read_text(encoding="utf-8"))["figures"]
        print(f"{folder}: {size_of(folder) / 1e6:.2f} MB\n{json.dumps(figures['losses'])}")
        print("\n".join(json.dumps(row) for row in figures["skills"]))


def train_model(run: RunConfig, folder: Path, *, device: str = "cpu", progress: bool = True) -> TrainResult:
    """Trains a model into a run folder, or goes on with the run there, and notes the commit of the code."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / COMMIT).is_file():
        atomic_write(folder / COMMIT, _commit().encode())
    return train(run, folder, device=device, resume=True, progress=progress)


def pack(name: str, recipe: Recipe, result: TrainResult, out: Path) -> Path:
    """Writes a trained model as it is shipped: weights in half precision, and what was measured after that rounding.

    Args:
        name: its name.
        result: what training came to; the best model of its folder is packed.
        out: the folder to write its folder into.

    Returns:
        The folder.
    """
    run = result.folder
    model = SelfAblatingTransformer.from_pretrained(run)
    rounded = {key: weight.half() for key, weight in save_and_load.weights_of(model).items()}
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(rounded[key])
    data = text_of_run(run, model)
    settings = to_dict(recipe.run)
    known = {
        "description": recipe.description,
        "text": recipe.text,
        "settings": settings,
        "seed": recipe.run.train.seed,
        "commit": (run / COMMIT).read_text(encoding="utf-8"),
        "sa_lens": __version__,
        "training_seconds": round(result.seconds),
        "sizes": {"parameters": sum(p.numel() for p in model.parameters()), "vocabulary": int(model.cfg.d_vocab)},
        "figures": figures_of(model, recipe.run, recipe.words, data),
        "sample": _sample(model, data),
    }
    text = {**run_text.read_record(run), "paths": {}}
    config = {**save_and_load.describe(model), "stored_dtype": "float16", "run": settings, "text": text}
    out.mkdir(parents=True, exist_ok=True)
    with staged_folder(out / name, last=save_and_load.CONFIG) as temporary:
        save_and_load.save_tokenizer(model.tokenizer, temporary)
        _compact(temporary / "tokenizer.json")
        save_and_load.write_weights(rounded, temporary / save_and_load.WEIGHTS)
        _write_json(temporary / ABOUT, known)
        _write_json(temporary / save_and_load.CONFIG, config)
    return out / name


def figures_of(model: SelfAblatingTransformer, run: RunConfig, words: Words, data: PreparedData) -> dict[str, Any]:
    """Validation losses of both streams in nats per token, and the skill of both at every task."""
    blocks = validation_blocks(data.validation, run.model.n_ctx, run.train.eval_tokens)
    evaluation = evaluate(model, blocks, bytes_per_token=bytes_per_token(data.validation))
    losses = {"clean": evaluation.clean_loss, "ablated": evaluation.ablated_loss}
    return {
        "validation_tokens": evaluation.tokens,
        "losses": {stream: round(loss, 4) for stream, loss in losses.items() if loss is not None},
        "skills": skills(model, words),
    }


def size_of(folder: Path) -> int:
    """Bytes of a folder's files."""
    return sum(file.stat().st_size for file in folder.iterdir())


def _sample(model: SelfAblatingTransformer, data: PreparedData) -> dict[str, Any]:
    """Texts from the beginning of the validation text, and the losses on them."""
    texts = list(itertools.islice(data.validation.documents(data.tokenizer), SAMPLE))
    return {"texts": texts, "losses": losses_on(model, texts)}


def _commit() -> str:
    """The commit of this checkout, with a plus if files differ from it; `unknown` outside of one."""
    here = Path(__file__).parent

    def git(arguments: Sequence[str]) -> str:
        return subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git(["status", "--porcelain", "--untracked-files=no", "--", str(here.parent)])
        return git(["rev-parse", "HEAD"]) + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")


def _compact(path: Path) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")


if __name__ == "__main__":
    tyro.cli(make, prog="python -m sa_lens.shipped.make", config=(tyro.conf.FlagCreatePairsOff,))
