"""Training of an SAE by SAELens on the activations of either stream; it can be stopped and resumed at any step."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from sa_lens.config import Stream
from sa_lens.core.host import Host, device_of, fingerprint_of, refuse_chosen_stream
from sa_lens.data.blocks import Text, TextBlocks
from sa_lens.data.whole_files import DamagedFile, atomic_write, read_json, remove_leftovers, staged_folder
from sa_lens.places import output_folder
from sa_lens.sae.hook_activations import ActivationBatches, hook_width, import_sae_lens, text_of
from sa_lens.sae.settings import SAESettings, resolve
from sa_lens.stopping import Interrupted, StopRequest, stop_requests

TRAINING, CHECKPOINT, FINISHED = "training.json", "checkpoint", "cfg.json"
CHECKPOINT_STEPS = 1000
"""Steps between checkpoints in the output folder."""
NORM_BATCHES = 100
"""Largest number of batches from which the mean norm of the activations is estimated."""


def train_sae(
    model: Host,
    hook: str,
    tokens: Text,
    *,
    stream: Stream = "clean",
    preset: str | SAESettings = "laptop",
    seed: int = 0,
    output: str | Path | None = None,
    resume: bool = False,
    architecture: Any = None,
    progress: bool = True,
    **changes: Any,
) -> Any:
    """Trains an SAE on the activations of a hook in one stream.

    The same arguments give the same SAE, bit for bit on a CPU, also if training was stopped and resumed. Ctrl-C stops
    training between two steps and saves its state.

    Args:
        model: any `HookedTransformer`; its weights do not change.
        hook: hook point with one vector per token, or attn.hook_q, hook_k, hook_v or hook_z, whose heads are
            concatenated. Hooks of gates, except masks, can be used in the ablated stream.
        tokens: a token file, its path, or blocks `[batch pos]`; they are read repeatedly in shuffled order.
        stream: clean, or ablated (at all positions at once).
        preset: `laptop`, `paper`, or your own settings.
        seed: seed of the initial weights and of the order of activations, at least 0.
        output: folder for the SAE, in the format of SAELens, and for checkpoints; None writes nothing.
        resume: whether to continue from the checkpoint in `output` if there is one; a finished SAE is only loaded.
        architecture: a training configuration of SAELens, such as `TopKTrainingSAEConfig`, instead of the standard SAE;
            `expansion`, `d_sae`, `l1_coefficient`, `l1_warm_up` and `normalize` then have no effect.
        progress: whether to show a progress bar.
        changes: settings that differ from the preset; see `SAESettings`.

    Returns:
        `sae_lens.SAE` in evaluation mode on the model's device. `cfg.metadata` records hook, stream, seed and settings.

    Raises:
        ImportError: SAELens is not installed.
        FileExistsError: `output` is not empty, and `resume` is False.
        FileNotFoundError: the token file does not exist.
        OSError: `output` cannot be written, for example because the disk is full; earlier checkpoints are kept.
        ValueError: an invalid hook, stream, preset or setting, a text that is too short, or a checkpoint of another
            model, text or settings.
        Interrupted: Ctrl-C or SIGTERM stopped training; the state is saved if there is an `output`.

    Source: SAELens, `SAETrainer`; the paper's SAE for `paper`. Differs: each buffer is shuffled on its own, instead of
    keeping half of it for the next one, so that one number describes the position in the text.
    """
    refuse_chosen_stream(model, "train_sae")
    sae_lens = import_sae_lens()
    settings = resolve(preset, changes)
    if seed < 0:
        raise ValueError(f"seed={seed} must be 0 or more")
    folder = None if output is None else output_folder(output)
    d_in = hook_width(model, hook, stream)
    blocks = text_of(tokens, model, settings.batch_tokens)
    cfg = _sae_config(sae_lens, architecture, settings, d_in)
    cfg.reshape_activations = "hook_z" if "hook_z" in hook else "none"
    record = {
        "hook": hook,
        "stream": stream,
        "seed": seed,
        "model": fingerprint_of(model),
        "tokens": blocks.fingerprint,
        "settings": dataclasses.asdict(settings),
        "sae": {name: value for name, value in cfg.to_dict().items() if name not in ("metadata", "device")},
    }
    for name, value in _metadata(model, blocks, record).items():
        setattr(cfg.metadata, name, value)
    if folder is not None:
        remove_leftovers(folder)
        _prepare_folder(folder, resume, record)
        if (folder / FINISHED).is_file():
            return load_sae(folder, model)

    with stop_requests() as request:

        def batches(start: int = 0) -> ActivationBatches:
            return ActivationBatches(model, blocks, hook, stream, settings, seed=seed, start=start, request=request)

        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            sae = sae_lens.TrainingSAE.from_dict({**cfg.to_dict(), "device": "cpu"})
        device = str(device_of(model))
        trainer = sae_lens.SAETrainer(_trainer_config(settings, device), sae.to(device), batches())
        checkpoint = newest_checkpoint(folder)
        if checkpoint is not None:
            sae.load_weights_from_checkpoint(checkpoint)
            trainer.load_trainer_state(checkpoint)
            trainer.data_provider = batches(trainer.n_training_steps)
        try:
            scaler = trainer.activation_scaler
            if cfg.normalize_activations == "expected_average_only_in" and scaler.scaling_factor is None:
                scaler.scaling_factor = _norm_scale(trainer.data_provider, settings.steps, d_in)
                trainer.data_provider.step = 0
            _fit(trainer, settings.steps, folder, progress, request)
        except Interrupted as stop:
            step, kept = trainer.n_training_steps, "its state is not saved, because output is None"
            if folder is not None:
                _save_checkpoint(trainer, folder)
                kept = f"its state is in {folder}. Continue with resume=True, on the command line --resume"
            raise Interrupted(
                f"stopped after step {step:,} of {settings.steps:,}; {kept}", folder=folder, step=step
            ) from stop
    return _finish(trainer, folder, model)


def _fit(trainer: Any, steps: int, folder: Path | None, progress: bool, request: StopRequest) -> None:
    """Runs the training loop of SAELens's trainer step by step, so that it can stop between two steps."""
    from tqdm.auto import tqdm

    with tqdm(total=steps, initial=trainer.n_training_steps, desc="SAE", unit=" steps", disable=not progress) as bar:
        while trainer.n_training_steps < steps:
            request.raise_if_made()
            trainer.maybe_reset_sparsity()
            out = trainer.step(next(trainer.data_provider))
            trainer.n_training_steps += 1
            bar.update()
            if progress and trainer.n_training_steps % 50 == 0:
                l0 = (out.feature_acts != 0).float().sum(-1).mean()
                bar.set_postfix_str(f"loss {out.loss.item():.3g}, L0 {l0.item():.1f}", refresh=False)
            if folder is not None and trainer.n_training_steps % CHECKPOINT_STEPS == 0:
                _save_checkpoint(trainer, folder)


def _finish(trainer: Any, folder: Path | None, model: Host) -> Any:
    """Writes the finished SAE and returns it as loaded from its files, so that they are known to load."""
    sae, scaler = trainer.sae, trainer.activation_scaler
    if scaler.scaling_factor is not None:
        sae.fold_activation_norm_scaling_factor(scaler.scaling_factor)
        scaler.scaling_factor = None
    trainer.set_final_sae_metadata()
    if folder is None:
        with tempfile.TemporaryDirectory() as temporary:
            sae.save_inference_model(temporary)
            return load_sae(Path(temporary), model)
    # the configuration comes last: with it the folder counts as finished
    with _explain_write_errors(folder), staged_folder(folder, last=FINISHED) as temporary:
        sae.save_inference_model(temporary)
    checkpoint = newest_checkpoint(folder)
    if checkpoint is not None:
        shutil.rmtree(checkpoint)
    with suppress(OSError):
        # the folder is kept if it holds other files
        (folder / CHECKPOINT).rmdir()
    return load_sae(folder, model)


def load_sae(folder: Path, model: Host) -> Any:
    """Loads the SAE in a folder on the model's device, in evaluation mode.

    Raises:
        FileNotFoundError: the folder holds no SAE.
        ValueError: the SAE is damaged.
    """
    if not (folder / FINISHED).is_file():
        raise FileNotFoundError(f"{folder} holds no SAE (no {FINISHED})")
    remedy = "train this SAE again, in another folder"
    read_json(folder / FINISHED, remedy=remedy, keys={"architecture": str, "d_in": int, "d_sae": int}, other_keys=True)
    try:
        return import_sae_lens().SAE.load_from_disk(str(folder), device=str(device_of(model))).eval()
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, OSError, SafetensorError) as error:
        raise DamagedFile(f"{folder} cannot be read: {type(error).__name__}: {error}; {remedy}") from error


def _sae_config(sae_lens: Any, architecture: Any, settings: SAESettings, d_in: int) -> Any:
    if architecture is None:
        return sae_lens.StandardTrainingSAEConfig(
            d_in=d_in,
            d_sae=settings.latents(d_in),
            apply_b_dec_to_input=False,
            normalize_activations="expected_average_only_in" if settings.normalize else "none",
            l1_coefficient=settings.l1_coefficient,
            l1_warm_up_steps=round(settings.l1_warm_up * settings.steps),
        )
    if not isinstance(architecture, sae_lens.TrainingSAEConfig):
        raise ValueError(
            f"architecture is a {type(architecture).__name__}, but must be a training configuration of SAELens"
        )
    if architecture.d_in != d_in:
        raise ValueError(f"architecture.d_in={architecture.d_in}, but the hook holds {d_in} dimensions")
    if architecture.d_sae < 1:
        raise ValueError(f"architecture.d_sae={architecture.d_sae} must be at least 1")
    if architecture.normalize_activations == "covariance_whitening":
        raise ValueError("architecture.normalize_activations='covariance_whitening' is not supported here")
    return type(architecture).from_dict(architecture.to_dict())


def _trainer_config(settings: SAESettings, device: str) -> Any:
    from sae_lens.config import SAETrainerConfig

    return SAETrainerConfig(
        total_training_samples=settings.steps * settings.batch_tokens,
        train_batch_size_samples=settings.batch_tokens,
        lr=settings.lr,
        lr_end=settings.lr / 10,
        lr_decay_steps=round(settings.lr_decay * settings.steps),
        device=device,
    )


def _metadata(model: Host, blocks: TextBlocks, record: dict[str, Any]) -> dict[str, Any]:
    """Returns the metadata that SAELens's tools read from an SAE, and how this SAE was trained."""
    return {
        "hook_name": record["hook"],
        "model_name": getattr(model.cfg, "model_name", None),
        "model_class_name": "HookedTransformer",
        "context_size": blocks.length,
        "prepend_bos": False,
        "exclude_special_tokens": False,
        "stream": record["stream"],
        "seed": record["seed"],
        "model_fingerprint": record["model"],
        "tokens": record["tokens"],
        "settings": record["settings"],
    }


def _norm_scale(batches: ActivationBatches, steps: int, d_in: int) -> float:
    """Returns SAELens's factor that scales activations to a mean norm of the square root of their width."""
    norms = [batch.norm(dim=-1).mean().item() for batch in islice(batches, min(steps, NORM_BATCHES))]
    mean = sum(norms) / len(norms)
    if not (math.isfinite(mean) and mean > 0):
        raise ValueError(
            f"the activations have a mean norm of {mean}, from which no SAE can learn; choose another hook"
        )
    return math.sqrt(d_in) / mean


def check_output(folder: Path, resume: bool) -> bool:
    """Checks that an SAE can be written into a folder before long work; returns whether there is one to resume.

    Raises:
        FileExistsError: the folder holds other files, or an SAE and `resume` is False.
        OSError: the folder cannot be written, or is a file.
    """
    output_folder(folder)
    stored = folder / TRAINING
    # a training that stopped before its first checkpoint leaves only this file
    resumes = folder.is_dir() and any(path != stored for path in folder.iterdir())
    if resumes and not resume:
        raise FileExistsError(
            f"{folder} exists: choose another output, or continue with resume=True, on the command line --resume"
        )
    if resumes and not stored.is_file():
        raise FileExistsError(f"{folder} holds other files, but no SAE training to resume: choose another output")
    return resumes


def _prepare_folder(folder: Path, resume: bool, record: dict[str, Any]) -> None:
    """Creates the folder of a training, or checks that it holds the same training."""
    resumes, stored = check_output(folder, resume), folder / TRAINING
    record = json.loads(json.dumps(record))
    if resumes:
        before = read_json(stored, remedy="choose another output", keys={}, other_keys=True)
        differing = [name for name in record if before.get(name) != record[name]]
        if differing:
            raise ValueError(
                f"{folder} is the training of another SAE: {', '.join(differing)} differ; use the same model and "
                "arguments, or another output"
            )
        return
    with _explain_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(stored, json.dumps(record, indent=1).encode())


@contextmanager
def _explain_write_errors(folder: Path) -> Iterator[None]:
    """Raises OSError with the folder and the kept checkpoint, whichever library fails to write."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        shutil.rmtree(folder / CHECKPOINT / "writing", ignore_errors=True)
        why = (error.strerror if isinstance(error, OSError) else None) or str(error).partition("\n")[0]
        newest = newest_checkpoint(folder)
        kept = f"{newest} is kept: free space and continue with resume=True, on the command line --resume"
        raise OSError(
            f"cannot write the SAE in {folder}: {why}. {kept if newest else 'No checkpoint is kept'}"
        ) from error


def newest_checkpoint(folder: Path | None) -> Path | None:
    """Returns the last complete checkpoint, or None."""
    entries = (folder / CHECKPOINT).glob("step-*") if folder is not None else []
    steps = {int(path.name[5:]): path for path in entries if path.name[5:].isdecimal()}
    return steps[max(steps)] if steps else None


def _save_checkpoint(trainer: Any, folder: Path) -> None:
    """Writes a checkpoint under a temporary name, renames it, and deletes the earlier one."""
    base, step = folder / CHECKPOINT, trainer.n_training_steps
    before = newest_checkpoint(folder)
    final = base / f"step-{step}"
    if before == final:
        return
    shutil.rmtree(base / "writing", ignore_errors=True)
    with _explain_write_errors(folder):
        trainer.save_checkpoint("writing", base_path=base)
        (base / "writing").rename(final)
    if before is not None:
        shutil.rmtree(before)
