"""Loading of a trained model, its settings and its text by the name of its run."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import torch

from sa_lens.catalogue import CONFIG, about, run_folder, shipped_folder
from sa_lens.config import DataConfig, RunConfig, Which, from_dict
from sa_lens.core import SelfAblatingTransformer
from sa_lens.core.save_and_load import read_config
from sa_lens.data import PreparedData, prepare
from sa_lens.training import run_text
from sa_lens.training.processes import check_device

log = logging.getLogger(__name__)


def load_run(run: str, *, which: Which = "best", device: str = "auto") -> SelfAblatingTransformer:
    """Loads the model of a run folder, shipped name or Hub id onto a device.

    Args:
        device: auto, cpu, cuda or mps.
    """
    check_device(device)
    if device == "auto":
        mps = torch.backends.mps.is_available()
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    return SelfAblatingTransformer.from_pretrained(run, which=which, device=device)


def trained_on_stories(run: str) -> bool:
    """Returns whether a run's model was trained on the generated stories; False for a model from the Hub."""
    settings = settings_of(run)
    return settings is not None and settings.data.source == "stories"


def text_of_run(
    run: str | Path,
    model: SelfAblatingTransformer,
    text: str | None = None,
    *,
    column: str = "text",
    progress: bool = True,
) -> PreparedData:
    """Returns training and validation text of a run in its model's tokens, from the cache if they are there.

    The files are looked for from the current folder and from the run folder. Generated stories that another version of
    their generator writes differently are taken as they are today, with a warning.

    Args:
        text: path or dataset id of another text, one half of whose documents then stands for the training text.
        column: column of `text` that holds the text.
        progress: show progress bars while tokens are made.

    Raises:
        ValueError: a model that was not saved by a training run or whose text is not shipped, and no other text; or a
            text that has changed since.
        FileNotFoundError: a text that is not there.
    """
    settings, folder = settings_of(run), run_folder(run)
    if text is not None:
        if model.tokenizer is None:
            raise ValueError(f"{run} has no tokenizer, so it cannot read text")
        tokenizer = str(folder) if folder.is_dir() else str(model.tokenizer.name_or_path)
        n_ctx = model.cfg.n_ctx if settings is None else min(settings.model.n_ctx, model.cfg.n_ctx)
        half = DataConfig(
            source=text, column=column, tokenizer=tokenizer, validation_fraction=0.5, max_documents=50_000
        )
        return prepare(half, n_ctx, progress=progress)
    if settings is None:
        raise ValueError(f"{run} does not say on what text it was trained: name one with --text")
    if shipped_folder(run) is not None and settings.data.source != "stories":
        raise ValueError(
            f"the text of {run}, {about(str(run))['text']['name']}, is not shipped with sa_lens: name a text with "
            "--text, such as a parquet file of roneneldan/TinyStories or its Hub id"
        )
    recorded = run_text.read_record(folder)
    n_ctx = min(settings.model.n_ctx, model.cfg.n_ctx)
    data = None
    for candidate in run_text.candidates(settings, folder, recorded, ("data.source", "data.validation")):
        # the run's own tokenizer, and never a cache that a configuration from elsewhere chooses
        config = dataclasses.replace(candidate.data, tokenizer=str(folder), keep_whole=None, cache_dir=None)
        data = prepare(config, n_ctx, progress=progress)
        if not run_text.differing_texts(data, recorded):
            return data
    assert data is not None, "there is a candidate, or none exists and candidates raises"
    if settings.data.source != "stories":
        raise ValueError(
            f"{settings.data.source} is not the text that {run} was trained on (its tokens differ), so that its "
            "validation part may hold what the model has seen: restore it, or name another text where the command "
            "takes one (--text)"
        )
    log.warning(
        "%s was trained on stories of another version of their generator: figures are of those of today, of which the "
        "model may have seen some",
        run,
    )
    return data


def settings_of(run: str | Path) -> RunConfig | None:
    """Returns the settings of a run from its `config.json`; None if it has none, and for a model from the Hub."""
    folder = run_folder(run)
    if not (folder / CONFIG).is_file():
        return None
    values = read_config(folder).get("run")
    return None if values is None else from_dict(RunConfig, values)
