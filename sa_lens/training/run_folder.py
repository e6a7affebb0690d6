"""The folder of a run: it is opened for one trainer, and a resumed run is checked to be the same run.

run.yaml            the configuration, as `--config` takes it
config.json, model.safetensors, tokenizer files      the best model so far
metrics.jsonl       see `run_log.MetricsFile`
state/              see `checkpoints`
"""

from __future__ import annotations

import errno
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sa_lens.catalogue import CONFIG
from sa_lens.config import RunConfig, read_yaml, to_dict
from sa_lens.core.save_and_load import complete_steps
from sa_lens.training.checkpoints import differences
from sa_lens.training.run_text import PATHS

log = logging.getLogger(__name__)

CONFIG_YAML, METRICS = "run.yaml", "metrics.jsonl"
_MAY_CHANGE = {
    "train.eval_every",
    "train.save_every",
    "train.log_every",
    "train.sample_tokens",
    "train.workers",
    "train.tracker",
    "data.cache_dir",
    *PATHS,
}
"""Settings that a resumed run may change without consequence for its weights; that a text is the same is checked by its
tokens, wherever it lies."""

_MAY_CHANGE_ROUNDING = {
    "train.accumulate",
    "train.path",
    "train.compile",
    "train.cuda_graph",
    "train.checkpoint_activations",
}
"""Settings that a resumed run may change at the price of bit-for-bit equality."""


def is_run(out: Path) -> bool:
    """Returns whether the folder holds a run, finished or not."""
    return any((out / name).exists() for name in (CONFIG_YAML, CONFIG, METRICS, "state"))


def check_free(out: Path, resume: bool) -> None:
    """Refuses to start in a folder that holds a run, unless it is to be resumed.

    Raises:
        FileExistsError: it holds one.
    """
    if is_run(out) and not resume:
        raise FileExistsError(f"{out} already holds a run: add --resume (resume=True) to continue it, or name another")


def check_unchanged(out: Path, before: dict[str, Any], now: RunConfig) -> None:
    """Refuses to resume with a configuration that would change the run.

    Raises:
        ValueError: a setting has changed; the message names it.
    """
    changed = [d for d in differences(before, to_dict(now)) if d.split(":")[0] not in _MAY_CHANGE]
    serious = [d for d in changed if d.split(":")[0] not in _MAY_CHANGE_ROUNDING]
    if serious:
        raise ValueError(
            f"{out} was started with another configuration ({'; '.join(serious[:5])}"
            f"{', ...' if len(serious) > 5 else ''}): resume it with the one in {out / CONFIG_YAML}, "
            "or start a new run in another folder"
        )
    if changed:
        log.warning("resuming with %s: the result will not be bit for bit that of an uninterrupted run", changed)


def stored_config(out: Path) -> RunConfig:
    """Returns the configuration with which a run was started.

    Raises:
        FileNotFoundError: no run in this folder.
    """
    if not (out / CONFIG_YAML).is_file():
        raise FileNotFoundError(
            f"{out} holds no run ({CONFIG_YAML}) to resume: check the name, or give a configuration"
        )
    return read_yaml(out / CONFIG_YAML)


@contextmanager
def sole_trainer(out: Path) -> Iterator[None]:
    """Makes the folder and locks it against a second trainer; the lock of a killed process is released.

    A folder into which nothing was written is removed again.

    Raises:
        OSError: the folder cannot be written.
        RuntimeError: another process is training in it.
    """
    from filelock import FileLock, Timeout

    with explain_write_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
        lock = FileLock(out / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise RuntimeError(f"another process is training in {out}: wait for it, or name another folder") from None
    try:
        yield
    finally:
        lock.release()
        if [entry.name for entry in out.iterdir()] in ([], [".lock"]):
            (out / ".lock").unlink(missing_ok=True)
            out.rmdir()


@contextmanager
def explain_write_errors(out: Path) -> Iterator[None]:
    """Adds to errors of the operating system what remains of the run and what to do."""
    try:
        yield
    except (FileExistsError, FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        what = {
            errno.ENOSPC: "the disk is full",
            errno.EDQUOT: "your disk quota is used up",
            errno.EROFS: "it is on a read-only file system",
            errno.EACCES: "you may not write there",
            errno.EPERM: "you may not write there",
        }.get(error.errno or 0, error.strerror or str(error))
        steps = complete_steps(out) if out.is_dir() else []
        kept = f" The last complete checkpoint is {steps[-1]}; make room and continue with --resume." if steps else ""
        raise type(error)(error.errno, f"cannot write the run folder {out}: {what}.{kept}") from error
