"""Names that a user types, checked before anything heavy is imported, with the nearest known one when misspelt.

The lists repeat what the packages behind the commands define; a test compares them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import get_args

from sa_lens.catalogue import run_folder
from sa_lens.config import Task, suggestion

TASKS = get_args(Task)
MEASUREMENTS = (
    *("losses", "weights", "skill", "acdc", "faithfulness", "object-skill", "object-acdc", "object-faithfulness"),
    *("units", "labels", "explanations", "leakage", "sae"),
)
FEWEST_PROMPTS = 64

_LAYER = "resid_pre resid_mid resid_post attn_in attn_out mlp_in mlp_out q_input k_input v_input"
_NORM = "hook_scale hook_normalized"
_ATTENTION = "attn_input q k v z rot_q rot_k attn_scores pattern result"
_GATE = "hook_in hook_scores hook_mask"
HOOKS = (
    *("hook_tokens", "hook_embed", "hook_pos_embed", "embed.ln.hook_scale", "embed.ln.hook_normalized"),
    *(f"blocks.0.hook_{name}" for name in _LAYER.split()),
    *(f"blocks.0.{norm}.{name}" for norm in ("ln1", "ln2", "mlp.ln") for name in _NORM.split()),
    *(f"blocks.0.{norm}.{name}" for norm in ("ln1_post", "ln2_post") for name in _NORM.split()),
    *(f"blocks.0.attn.hook_{name}" for name in _ATTENTION.split()),
    *(f"blocks.0.attn.{norm}.{name}" for norm in ("q_norm", "k_norm") for name in _NORM.split()),
    *(f"blocks.0.mlp.hook_{name}" for name in ("pre", "pre_linear", "mid", "post")),
    *(f"blocks.0.{gate}.{name}" for gate in ("attn_gate", "mlp_gate") for name in _GATE.split()),
    *(f"ln_final.{name}" for name in _NORM.split()),
    *(f"unembed.{name}" for name in ("hook_in", "hook_out")),
)
"""Hook points of any model here; those of every layer are written as those of layer 0."""


def check_task(task: str) -> None:
    """Refuses what is neither a task nor a JSON file that is there.

    Raises:
        ValueError: an unknown name.
        FileNotFoundError: no such file.
    """
    if task in TASKS:
        return
    if not task.endswith(".json"):
        raise ValueError(
            f"task={task!r} is none of {', '.join(TASKS)}, nor a .json file of prompt pairs{suggestion(task, TASKS)}"
        )
    if not Path(task).is_file():
        raise FileNotFoundError(f"no file of prompt pairs at {task}")


def check_hook(hook: str, run: str) -> None:
    """Refuses a hook point that no model has, or a layer that this one does not have.

    Raises:
        ValueError: with the nearest hook point.
    """
    layer = re.match(r"blocks\.(\d+)\.", hook)
    layers = _layers(run)
    if layer is not None and layers is not None and int(layer[1]) >= layers:
        raise ValueError(f"hook={hook!r}: the model has the layers 0 to {layers - 1}")
    number = layer[1] if layer is not None else "0"
    known = [name.replace("blocks.0.", f"blocks.{number}.") for name in HOOKS]
    if hook not in known:
        raise ValueError(f"hook={hook!r} is no hook point of a model{suggestion(hook, known)}")


def check_measurements(names: Iterable[str]) -> None:
    """Refuses names that are no measurement of any comparison.

    Raises:
        ValueError: with the nearest one.
    """
    for name in names:
        if name not in MEASUREMENTS:
            near = suggestion(name, MEASUREMENTS)
            raise ValueError(f"columns: no measurement {name}; there are {', '.join(MEASUREMENTS)}{near}")


def _layers(run: str) -> int | None:
    """Layers of a model folder, if that can be told without loading it."""
    try:
        layers = json.loads((run_folder(run) / "config.json").read_text(encoding="utf-8"))["model"]["n_layers"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return layers if isinstance(layers, int) else None
