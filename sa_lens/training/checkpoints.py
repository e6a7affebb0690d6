"""Exact checkpoints of a run: folders `state/step-N/` of safetensors and JSON, complete once a marker file exists.

    model.safetensors       weights, as in a model folder
    optimizer.safetensors   `<parameter>.<quantity>`: AdamW's averages and step counts
    random.safetensors      `<process>.<generator>`: states of torch's generators
    state.json              everything else
    complete                the marker

A checkpoint is written into a temporary folder, synced and renamed, so a process that dies leaves the previous ones
untouched. Only folders that have the marker are read, and only those are ever removed. Nothing is pickled. The best
model of a run is not here but in the run folder itself (`best_model`).
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from sa_lens.config import from_dict
from sa_lens.core.save_and_load import MARKER, WEIGHTS, complete_steps, write_weights
from sa_lens.data.whole_files import check_object, parse_json, remove_folder, staged_folder
from sa_lens.training.evaluation import Evaluation
from sa_lens.training.processes import Environment, flat_settings
from sa_lens.training.sharding import shard_like, whole_tensor

VERSION = 1
FILES = (WEIGHTS, "optimizer.safetensors", "random.safetensors")
STATE = "state.json"
KEPT = 2
"""Complete checkpoints that are kept."""


@dataclasses.dataclass(frozen=True)
class RunState:
    """The state of a run except for its tensors."""

    step: int
    """Optimizer steps taken."""
    position: int
    """Next position in the endless stream of shuffled blocks."""
    lr: float
    """Learning rate of the next step."""
    seconds: float
    """Time spent in the loop so far."""
    best_loss: float | None
    """Lowest selection loss so far; None before the first evaluation."""
    best_step: int | None
    """Step at which it was reached."""
    evaluation: dict[str, Any] | None
    """Figures of the last evaluation."""
    window: list[list[float]]
    """Terms of the steps since the last training record."""
    run: dict[str, Any]
    """The run's configuration."""
    data: dict[str, str]
    """Fingerprints of training and validation tokens."""
    environment: dict[str, Any]
    """See `processes.Environment`."""


@dataclasses.dataclass(frozen=True)
class Tensors:
    """The tensors of a checkpoint, on the CPU."""

    weights: dict[str, Tensor]
    """Weights of the model, as in a model folder."""
    optimizer: dict[str, Tensor]
    """See `optimizer_tensors`."""
    generators: dict[str, Tensor]
    """See `generators_of`, of all processes."""


def write(out: Path, state: RunState, tensors: Tensors) -> Path:
    """Writes `state/step-N/`, and removes all complete checkpoints except the last two.

    Raises:
        OSError: a full disk or a folder that cannot be written; earlier checkpoints are untouched.
    """
    root = out / "state"
    folder = root / f"step-{state.step}"
    if (folder / MARKER).is_file():
        return folder
    root.mkdir(parents=True, exist_ok=True)
    with staged_folder(folder, last=MARKER) as temporary:
        for name, content in zip(FILES, (tensors.weights, tensors.optimizer, tensors.generators), strict=True):
            write_weights(content, temporary / name)
        document = {"version": VERSION, **dataclasses.asdict(state)}
        (temporary / STATE).write_text(json.dumps(document, indent=1, allow_nan=False), encoding="utf-8")
        (temporary / MARKER).touch()
    for old in complete_steps(out)[:-KEPT]:
        ours = {MARKER, STATE, *FILES}
        if {entry.name for entry in old.iterdir()} <= ours:
            remove_folder(old)
        else:
            for name in sorted(ours):
                (old / name).unlink(missing_ok=True)
    return folder


def read(folder: Path) -> tuple[RunState, Tensors]:
    """Reads a complete checkpoint.

    Raises:
        ValueError: the checkpoint is damaged, or was written by a later version.
    """
    try:
        document = parse_json((folder / STATE).read_bytes())
        check_object(document, {"version": int}, other_keys=True)
        if document.pop("version") != VERSION:
            raise ValueError("its format is of another version of sa_lens")
        weights, optimizer, generators = (load_file(folder / name) for name in FILES)
        state = from_dict(RunState, document)
        from_dict(Environment, state.environment, where="environment.")
        if state.evaluation is not None:
            from_dict(Evaluation, state.evaluation, where="evaluation.")
        return state, Tensors(weights, optimizer, generators)
    except (ValueError, SafetensorError, FileNotFoundError) as error:
        raise ValueError(
            f"checkpoint {folder} cannot be read: {error}. Delete this folder to resume from an earlier one"
        ) from error


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Returns AdamW's tensors as `<parameter>.<quantity>`, whole and on the CPU, of parameters that were stepped."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        f"{names[id(p)]}.{quantity}": whole_tensor(value.detach()).cpu().contiguous()
        for p, quantities in optimizer.state.items()
        if bool(quantities["step"] > 0)
        for quantity, value in quantities.items()
    }


def restore_optimizer(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    tensors: dict[str, Tensor],
    untouched: frozenset[str] = frozenset(),
) -> None:
    """Restores the tensors that `optimizer_tensors` returned.

    Args:
        untouched: parameters that had no gradient yet, so that AdamW holds nothing for them.

    Raises:
        ValueError: the tensors belong to other parameters.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    wanted = {names[id(p)] for p in trained} - untouched
    quantities: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, quantity = key.rsplit(".", 1)
        quantities.setdefault(name, {})[quantity] = value
    if quantities and wanted != quantities.keys():
        odd = sorted(wanted ^ quantities.keys())[0]
        raise ValueError(f"the checkpoint's optimizer does not fit this run: {odd} is trained in only one of them")
    for p in trained:
        for quantity, value in quantities.get(names[id(p)], {}).items():
            # step counts stay on the CPU unless the optimizer is fused
            on_device = quantity != "step" or optimizer.defaults["fused"]
            optimizer.state[p][quantity] = shard_like(value, p) if on_device else value.clone()


def generators_of(process: int) -> dict[str, Tensor]:
    """Returns the states of torch's generators in this process, as `<process>.<device>`; training uses no others."""
    states = {f"{process}.cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states[f"{process}.cuda"] = torch.cuda.get_rng_state()
    return states


def restore_generators(process: int, states: dict[str, Tensor]) -> None:
    """Restores this process's generators, if there are states for it."""
    if f"{process}.cpu" in states:
        torch.set_rng_state(states[f"{process}.cpu"])
    if f"{process}.cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states[f"{process}.cuda"])


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Lists settings that differ, as `section.name: before -> now`."""
    old, new = flat_settings(before), flat_settings(now)
    return [f"{name}: {old.get(name)} -> {new.get(name)}" for name in {**old, **new} if old.get(name) != new.get(name)]
