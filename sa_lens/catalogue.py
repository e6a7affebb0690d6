"""The models that are shipped with the package: their names, their folders, and what is known of them.

A shipped model is a folder under `sa_lens/shipped/` with `config.json`, `model.safetensors`, the tokenizer and
`about.json`. Every place that takes a run resolves its name here. Nothing here imports torch.
"""

from __future__ import annotations

import functools
import json
import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sa_lens.config import suggestion

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

SHIPPED = Path(__file__).parent / "shipped"
"""Where the shipped models are."""
CONFIG = "config.json"
"""Settings of a model, in its folder."""
ABOUT = "about.json"
"""What is known of a shipped model: description, text and licence, settings, seed, commit, sizes, figures."""


def shipped_names() -> tuple[str, ...]:
    """The names of the shipped models."""
    return tuple(sorted(path.parent.name for path in SHIPPED.glob(f"*/{ABOUT}")))


def shipped_folder(name: str | Path) -> Path | None:
    """The folder of the shipped model of this name; None for any other name.

    A `Path` always means a folder of the user's, and so does text with a slash in it, such as `./stories-local`. Where
    there is such a folder, a bare name still means the shipped model, and a message on standard error says so.
    """
    if not isinstance(name, str) or name not in shipped_names():
        return None
    if Path(name).is_dir():
        _say_which(name)
    return SHIPPED / name


@functools.cache
def _say_which(name: str) -> None:
    log.warning("%s is the model shipped with sa_lens, not the folder here: write ./%s for the folder", name, name)


def run_folder(run: str | Path) -> Path:
    """The folder of a run: that of the shipped model of this name, else the path itself."""
    return shipped_folder(run) or Path(run)


def local_folder(name: str | Path) -> Path | None:
    """The folder of a model on this machine: a shipped one's, or the path itself; None for a Hub id.

    Raises:
        FileNotFoundError: a file, or a name that is no folder and has not the form of a Hub id.
    """
    path = run_folder(name)
    if path.is_dir():
        return path
    if path.exists():
        raise FileNotFoundError(f"{path} is a file, not a model folder: give the folder that holds {CONFIG}")
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(name)):
        raise FileNotFoundError(
            f"no folder {str(name)!r}: give a run folder, the name of a model that sa.models() lists, or a Hub id of "
            f"the form owner/name{near_name(name)}"
        )
    return None


def results_folder(run: str | Path) -> Path:
    """Where a command keeps what it finds about a run: in the run's folder.

    For a model that is no folder of the user's, shipped or from the Hub, it is in `runs/`, so that no new folder takes
    the place of the model's name.
    """
    if shipped_folder(run) is None and Path(run).is_dir():
        return Path(run)
    return Path("runs") / str(run).replace("/", "--")


def near_name(name: str | Path) -> str:
    """`; perhaps you meant NAME` with the shipped name that is nearest to a misspelt one; empty if none is near."""
    return suggestion(name, shipped_names())


def about(name: str) -> dict[str, Any]:
    """What is known of a shipped model: the content of its `about.json`."""
    content: dict[str, Any] = json.loads((SHIPPED / name / ABOUT).read_text(encoding="utf-8"))
    return content


def models() -> pd.DataFrame:
    """The models shipped with the package, one row per model; `from_pretrained(name)` loads them without a network.

    Returns:
        Indexed by name: description; parameters; megabytes on disk; losses of both streams on the validation text, in
        nats per token; pair accuracy of each task in both streams (`ioi_clean`, `ioi_ablated`, ...). What a dense model
        has no stream for is NaN. `about.json` in the model's folder holds more.
    """
    import pandas as pd

    rows = []
    for name in shipped_names():
        known = about(name)
        figures, sizes = known["figures"], known["sizes"]
        row = {"name": name, "description": known["description"], "parameters": sizes["parameters"]}
        row["megabytes"] = round(sum(file.stat().st_size for file in (SHIPPED / name).iterdir()) / 1e6, 2)
        row |= {f"{stream}_loss": loss for stream, loss in figures["losses"].items()}
        row |= {f"{skill['task']}_{skill['stream']}": skill["pair_accuracy"] for skill in figures["skills"]}
        rows.append(row)
    return pd.DataFrame(rows).set_index("name") if rows else pd.DataFrame()
