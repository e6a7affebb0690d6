"""`compare`: a grid trained, measured and written as one table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sa_lens.compare.cells import cells_of
from sa_lens.compare.costs import plan_table, plan_text
from sa_lens.compare.grids import Grid, grid_named, with_names_whole, with_text, write_names
from sa_lens.compare.report import write
from sa_lens.compare.results import Comparison, collect
from sa_lens.compare.running import run_cells
from sa_lens.compare.subject import Group
from sa_lens.places import output_folder
from sa_lens.training.processes import check_device

if TYPE_CHECKING:
    import pandas as pd

NAMES_FILE = "names.txt"
"""Names that a tokenizer trained on real text keeps whole."""


def compare(
    grid: str | Grid,
    out: str | Path,
    *,
    seeds: int | Sequence[int] | None = None,
    columns: Sequence[str] | None = None,
    text: str | None = None,
    validation: str | None = None,
    dry_run: bool = False,
    progress: bool = True,
    device: str = "auto",
) -> Comparison:
    """Trains and measures a grid under equal conditions and writes one table.

    Everything that is finished stays on disk, found again by what went into it: a stopped comparison goes on with the
    same call, a further group of columns or seed costs only itself. Several processes may share a folder; each takes
    cells that nobody else is at.

    Args:
        grid: `laptop`, `laptop-tinystories`, `paper`, `smoke`, or a `Grid` of one's own.
        out: folder of models, figures and tables.
        seeds: how many (from 0 on), or which; None: the grid's.
        columns: groups of columns to measure and show; None: all of the grid.
        text: train on this text instead: a file or folder, or a dataset id on the Hub.
        validation: its validation text; None: a part of it.
        dry_run: train and measure nothing; print cells, tokens, estimated time and what is on disk.
        progress: say what is being done.
        device: auto, cpu, cuda or mps.

    Returns:
        The comparison; after a dry run, of what is on disk already.

    Raises:
        ValueError: an unknown grid or group, bad seeds, validation without text, or what training raises.
        Interrupted: Ctrl-C or SIGTERM; everything finished is on disk.
    """
    out = output_folder(out)
    chosen, wanted, groups = _resolved(grid, out, seeds, columns, text, validation)
    check_device(device)
    cells = cells_of(chosen, wanted, out)
    if dry_run:
        print(plan_text(plan_table(cells, groups, device)))
        return collect(chosen.name, cells, groups)
    if chosen.run.data.keep_whole == str(out / NAMES_FILE):
        write_names(out / NAMES_FILE)
    run_cells(chosen, wanted, groups, out, device=device, progress=progress)
    found = collect(chosen.name, cells, groups)
    write(found, out)
    return found


def plan(
    grid: str | Grid,
    out: str | Path,
    *,
    seeds: int | Sequence[int] | None = None,
    columns: Sequence[str] | None = None,
    text: str | None = None,
    validation: str | None = None,
    device: str = "auto",
) -> pd.DataFrame:
    """What `compare` with the same arguments would do.

    Returns:
        A row for each training and each group of columns: variant, seed, what, status (`done`, `to do`, `step N of M`,
        or why it is not available), tokens of training, estimated seconds left.

    Raises:
        ValueError: as `compare`.
    """
    chosen, wanted, groups = _resolved(grid, Path(out), seeds, columns, text, validation)
    check_device(device)
    return plan_table(cells_of(chosen, wanted, Path(out)), groups, device)


def _resolved(
    grid: str | Grid,
    out: Path,
    seeds: int | Sequence[int] | None,
    columns: Sequence[str] | None,
    text: str | None,
    validation: str | None,
) -> tuple[Grid, tuple[int, ...], tuple[Group, ...]]:
    """The grid on its text, its seeds, its groups."""
    chosen = grid_named(grid)
    if validation is not None and text is None:
        raise ValueError(f"validation={validation!r} goes with text=: name the training text as well")
    if text is not None:
        chosen = with_text(chosen, text, validation)
    chosen = with_names_whole(chosen, out / NAMES_FILE)
    if seeds is None:
        seeds = chosen.seeds
    wanted = tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds)
    if not wanted or min(wanted) < 0 or len(set(wanted)) < len(wanted):
        raise ValueError(f"seeds={seeds!r} must be a number of at least 1, or different whole numbers from 0")
    known = {group.name: group for group in chosen.groups}
    if columns is not None:
        unknown = [name for name in columns if name not in known]
        if unknown or not columns:
            raise ValueError(f"columns: no group {', '.join(unknown) or 'given'}; there are {', '.join(known)}")
    return chosen, wanted, tuple(known[name] for name in known if columns is None or name in columns)
