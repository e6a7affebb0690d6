"""Checks of what a user types, made before anything heavy is imported, with the nearest known name for a misspelt one.

Names that are defined elsewhere are repeated here so that nothing heavy is imported; a test compares them.
"""

from __future__ import annotations

import json
import math
import re
import sys
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from sa_lens.catalogue import CONFIG, local_folder, run_folder
from sa_lens.config import LARGEST_SEED, Task, suggestion

Run = Annotated[str, tyro.conf.arg(metavar="RUN"), tyro.conf.Positional]
"""A run folder, shipped model or Hub id, as the first argument of a command."""

argument_types = ConstructorRegistry()
"""How tyro reads text, paths and choices here: none may be empty, and a misspelt choice is met with the nearest one."""


@argument_types.primitive_rule
def _read_text_or_choice(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    kinds = get_args(info.type) if get_origin(info.type) in (Union, types.UnionType) else (info.type,)
    optional, kinds = type(None) in kinds, tuple(kind for kind in kinds if kind is not type(None))
    choices = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    if not (kinds in ((str,), (Path,)) or (choices and all(get_origin(kind) is Literal for kind in kinds))):
        return None

    def read(words: list[str]) -> str | Path | None:
        (word,) = words
        if optional and word == "None":
            return None
        if choices and word not in choices:
            raise ValueError(f"{word!r} is not one of {', '.join(choices)}{suggestion(word, choices)}")
        if not word.strip():
            raise ValueError("it is empty, perhaps from an unset variable: name something, or leave it out")
        return Path(word) if kinds == (Path,) else word

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="{" + ",".join(choices) + "}" if choices else "PATH" if kinds == (Path,) else "TEXT",
        instance_from_str=read,
        is_instance=lambda value: (value is None and optional) or isinstance(value, str | Path),
        str_from_instance=lambda value: [str(value)],
    )


MayBeEmpty = Annotated[
    str,
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="TEXT",
        instance_from_str=lambda words: words[0],
        is_instance=lambda value: isinstance(value, str),
        str_from_instance=lambda value: [value],
    ),
]
"""Text that may be empty."""

_LEAST = {
    **dict.fromkeys(("tokens", "steps", "d_sae", "stories", "max_new_tokens", "top_k", "seeds"), 1),
    **dict.fromkeys(("labels", "units", "edges", "exact", "tau", "temperature", "l1_coefficient", "seed"), 0),
}
"""Smallest value of each number that a command takes."""


def check_numbers(values: Mapping[str, Any]) -> None:
    """Refuses numbers out of range.

    Raises:
        ValueError: with the name of the argument and its range.
    """
    for name, value in values.items():
        if not isinstance(value, int | float) or isinstance(value, bool):
            continue
        least, most = _LEAST.get(name), LARGEST_SEED if name == "seed" else math.inf
        if not math.isfinite(value):
            raise ValueError(f"{name}={value} must be a finite number")
        if least is not None and value < least:
            raise ValueError(f"{name}={value} must be " + (f"at least {least}" if least else "0 or more"))
        if value > most:
            raise ValueError(f"{name}={value} must be at most {most}")


TASKS = get_args(Task)
MEASUREMENTS = (
    *("losses", "weights", "skill", "learning", "acdc", "faithfulness"),
    *("object-skill", "object-learning", "object-acdc", "object-faithfulness"),
    *("units", "labels", "explanations", "leakage", "sae"),
)
FEWEST_PROMPTS = 64
"""Prompts of a built-in task, half to find a circuit with and half to report on; means over fewer are uncertain."""
FEWEST_OWN_PROMPTS = 16
"""The same of a task in a file."""


def check_number_of_prompts(task: str, n: int) -> None:
    """Refuses a file of too few prompts to find a circuit with, and warns of one that gives uncertain figures.

    Raises:
        ValueError: fewer than `FEWEST_OWN_PROMPTS`.
    """
    if n < FEWEST_OWN_PROMPTS:
        raise ValueError(
            f"{task} has {n} usable pairs, too few to find a circuit with one half and report on the other: give at "
            f"least {FEWEST_OWN_PROMPTS}, better {FEWEST_PROMPTS}"
        )
    if n < FEWEST_PROMPTS:
        print(f"{task} has {n} usable pairs: figures of fewer than {FEWEST_PROMPTS} are uncertain", file=sys.stderr)


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
    layers = shape_of(run, "n_layers")
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


def check_run(run: str) -> None:
    """Refuses a run that is not there; a Hub id may be.

    Raises:
        FileNotFoundError: no such folder, or one that holds no model.
    """
    folder = local_folder(run)
    if folder is not None and not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder} holds no {CONFIG}: it is not a model folder")


def shape_of(run: str, name: str) -> int | None:
    """A size of a model folder's transformer, such as `n_layers`, if that can be told without loading it."""
    try:
        size = json.loads((run_folder(run) / CONFIG).read_text(encoding="utf-8"))["model"][name]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return size if isinstance(size, int) else None
