"""Commands that show where one pair of prompts, or a task, is decided: patch, attribute."""

from __future__ import annotations

import json as as_json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from sa_lens.cli.argument_checks import Run, check_run, shape_of
from sa_lens.cli.prompt_arguments import PromptArguments
from sa_lens.cli.starting import start
from sa_lens.config import Ablation, Device, Direction, Masks, NodeKind, PatchKind, Stream, kind_of

if TYPE_CHECKING:
    import pandas as pd

    from sa_lens.circuits import Experiment

Prompts = Annotated[PromptArguments, tyro.conf.arg(name="")]

SHOWN = 6
"""Rows of each stream that are printed."""
MEASURED = 20
"""Units whose exact effect is measured, where there are hundreds."""


def patch(
    run: Run,
    prompts: Prompts = PromptArguments(),  # noqa: B008 - frozen
    what: Annotated[tuple[str, ...], tyro.conf.arg(metavar="KINDS")] = ("resid_pre",),
    direction: Direction = "denoise",
    positions: str | None = None,
    stream: Stream | None = None,
    masks: Masks | None = None,
    value: Literal["normalised", "value"] = "normalised",
    out: Path | None = None,
    device: Device = "auto",
    json: bool = False,
) -> None:
    """Patch activations from one prompt into another.

    Heat maps of both streams go into one page without a network, and all values into a table.

    Example: sa-lens patch stories-local --answer " Lily" --wrong " Tom"
               --clean "One day, Lily and Tom went to the park. Tom gave the ball to"
               --corrupt "One day, Lily and Tom went to the park. Lily gave the ball to"

    Args:
        run: Run folder, shipped model or Hub id.
        prompts: Which prompts to run.
        what: resid_pre, resid_mid, resid_post, attn_out, mlp_out, heads, q, k, v, pattern, neurons, mask_attn,
            mask_mlp, ...
        direction: noise: corrupt values in the clean run.
        positions: each, named, all, or 4,end for two of them.
        stream: Stream; None: both.
        masks: Masks of the ablated stream. None: live.
        value: What colours mean.
        out: Folder to write; None: in RUN/patching.
        device: Where to run.
        json: Print one JSON object.
    """
    check_run(run)
    kinds = _kinds(run, what, PatchKind)
    needs_ablated = [f"--what {kind}" for kind in kinds if kind.startswith("mask_")]
    needs_ablated += [] if masks is None else [f"--masks {masks}"]
    if stream == "clean" and needs_ablated:
        raise ValueError(f"{needs_ablated[0]} needs the ablated stream: gates do not act in the clean stream")
    prompts.check(run)
    places = _positions(positions)
    folder = prompts.folder(run, out, "patching", (*kinds, *([] if direction == "denoise" else [direction])))
    start(f"patch: {', '.join(kinds)} of {run}")

    from sa_lens.circuits import patch as patch_table
    from sa_lens.views import patch_map

    experiments = _experiments(prompts, run, stream, device, masks=masks)
    tables: dict[str, list[pd.DataFrame]] = {}
    figures = []
    for kind, name in kinds.items():
        on = [exp for exp in experiments if exp.stream == "ablated" or not kind.startswith("mask_")]
        where = None if kind.startswith("mask_") else places
        tables[kind] = [patch_table(exp, name, direction=direction, positions=where, progress=not json) for exp in on]
        records = [patch_map(table, value, skill=_skill(exp)) for exp, table in zip(on, tables[kind], strict=True)]
        figures += _beside(records)
    _report(prompts, run, experiments, tables, figures, folder, "patching", ["value", "normalised"], json)


def attribute(
    run: Run,
    prompts: Prompts = PromptArguments(),  # noqa: B008 - frozen
    what: Annotated[tuple[str, ...], tyro.conf.arg(metavar="KINDS")] = ("heads", "neurons"),
    exact: int | None = None,
    ablation: Ablation = "resample",
    stream: Stream | None = None,
    out: Path | None = None,
    device: Device = "auto",
    json: bool = False,
) -> None:
    """Measure what each head and neuron contributes.

    Each is ablated alone: its exact effect on the logit difference is measured, and estimated by gradient. Figures of
    both streams go into one page without a network, and all values into a table. Masks are frozen.

    Example: sa-lens attribute stories-local --task ioi

    Args:
        run: Run folder, shipped model or Hub id.
        prompts: Which prompts to run.
        what: heads, mlps, attn_units, neurons.
        exact: Units whose exact effect is measured, the largest estimates first. None: every head and MLP, and 20 of
            the others.
        ablation: What an ablated unit carries.
        stream: Stream to look at; None: both.
        out: Folder to write; None: in RUN/attribution.
        device: Where to run.
        json: Print one JSON object.
    """
    check_run(run)
    kinds = _kinds(run, what, NodeKind)
    prompts.check(run)
    folder = prompts.folder(run, out, "attribution", (*kinds,))
    start(f"attribute: {', '.join(kinds)} of {run}")

    from sa_lens.circuits import attribute_nodes
    from sa_lens.views import patch_map

    experiments = _experiments(prompts, run, stream, device, ablation=ablation)
    tables: dict[str, list[pd.DataFrame]] = {}
    figures = []
    for kind in kinds:
        few = kind in ("heads", "mlps")
        measured: Any = exact if exact is not None else "all" if few else MEASURED
        tables[kind] = [attribute_nodes(exp, kind, exact=measured, progress=not json) for exp in experiments]
        # of hundreds of units, those that were measured are enough
        values = (["effect"] if measured else []) + (["estimate"] if few or not measured else [])
        for value in values:
            made = zip(experiments, tables[kind], strict=True)
            figures += _beside([patch_map(table, value, skill=_skill(exp)) for exp, table in made])
    _report(prompts, run, experiments, tables, figures, folder, "attribution", ["estimate", "effect"], json)


def _kinds(run: str, what: Sequence[str], kinds: Any) -> dict[str, str]:
    """The kinds by what was typed for each, checked against the model's layers where they can be told."""
    if not what:
        raise ValueError("--what: name at least one kind")
    named = {}
    for name in what:
        kind, layer = kind_of(name, kinds)
        layers = shape_of(run, "n_layers")
        if layer is not None and layers is not None and layer >= layers:
            raise ValueError(f"what={name!r}: the model has the layers 0 to {layers - 1}")
        named[kind] = name
    return named


def _positions(positions: str | None) -> Any:
    """The positions as `circuits.patch` takes them."""
    if positions is None or positions in ("each", "named", "all"):
        return positions
    parts = [part.strip() for part in positions.split(",")]
    return [int(part) if part.lstrip("-").isdigit() else part for part in parts if part]


def _experiments(
    prompts: PromptArguments,
    run: str,
    stream: Stream | None,
    device: str,
    *,
    masks: Masks | None = None,
    **settings: Any,
) -> list[Experiment]:
    """One experiment per stream."""
    from sa_lens.circuits import Experiment
    from sa_lens.core.host import streams_of

    model, pairs = prompts.load(run, device)
    return [
        Experiment(model, pairs, stream=chosen, masks=masks if chosen == "ablated" else None, **settings)
        for chosen in streams_of(model, stream)
    ]


def _skill(exp: Experiment) -> float | None:
    """Pair accuracy; None for a single pair, whose logit difference says it."""
    from sa_lens.circuits import METRICS

    return None if len(exp.pairs) == 1 else float(METRICS["pair_accuracy"](exp.logits(), exp.pairs).mean())


def _beside(records: Sequence[Any]) -> list[Any]:
    """Heat maps next to one another; anything else by itself."""
    from sa_lens.views import side_by_side
    from sa_lens.views.records import HeatMap

    if len(records) > 1 and all(isinstance(record, HeatMap) for record in records):
        return [side_by_side(records)]
    return [*records]


def _report(
    prompts: PromptArguments,
    run: str,
    experiments: Sequence[Experiment],
    tables: dict[str, list[pd.DataFrame]],
    figures: list[Any],
    folder: Path,
    name: str,
    values: list[str],
    json: bool,
) -> None:
    """Writes the page and the table, and prints the largest effects, or everything as JSON."""
    import pandas as pd

    from sa_lens.data.whole_files import atomic_write
    from sa_lens.views import comparison_table, save

    pairs = experiments[0].pairs
    ends = _ends(experiments).round(2)
    many = f" The first of {len(pairs)} pairs; numbers are means." if len(pairs) > 1 else ""
    head = comparison_table(
        ends,
        f"{run}: {prompts.name}",
        note=f"The logit difference between answer and wrong answer after each prompt, without any change.{many}",
    )
    whole = pd.concat([table for of_kind in tables.values() for table in of_kind], ignore_index=True)
    folder.mkdir(parents=True, exist_ok=True)
    save([head, *figures], folder / f"{name}.html")
    atomic_write(folder / f"{name}.csv", whole.to_csv(index=False).encode())
    files = f"{name}.html, {name}.csv"
    if json:
        rows = as_json.loads(whole.to_json(orient="records"))
        print(as_json.dumps({"folder": str(folder), "rows": rows}, indent=1))
        return
    print(pairs.report(), end="\n\n")
    print(ends.to_string(index=False, float_format=lambda x: f"{x:.2f}", justify="left"))
    for of_kind in tables.values():
        print()
        print(_largest(of_kind, values))
    print(f"\nIn {folder}: {files}")


def _ends(experiments: Iterable[Experiment]) -> pd.DataFrame:
    """Both prompts of the first pair, with the mean logit difference after such prompts in each stream."""
    import pandas as pd

    rows: dict[str, list[Any]] = {}
    for exp in experiments:
        pairs = exp.pairs
        rows.setdefault("prompt", [pairs.clean_texts[0], pairs.corrupt_texts[0]])
        logits = (exp.logits("clean"), exp.logits("corrupt"))
        rows[f"{exp.stream}_stream"] = [float(exp.values(of_prompt).mean()) for of_prompt in logits]
    return pd.DataFrame({"": ["clean", "corrupt"], **rows})


def _largest(tables: Sequence[pd.DataFrame], values: list[str]) -> str:
    """The rows of each stream in which most changes, as text."""
    import pandas as pd

    parts = []
    for table in tables:
        # by the second value, or by the first where an effect was not measured or nothing is there to normalise by
        size = (
            table[values[1]].fillna(table[values[0]]).abs()
            if table[values[1]].notna().any()
            else table[values[0]].abs()
        )
        parts.append(table.loc[size.sort_values(ascending=False, kind="stable").index[:SHOWN]])
    shown = pd.concat(parts, ignore_index=True)
    columns = ["stream", "what", "layer", "head", "unit", "position", "token", *values]
    kept = [name for name in columns if name in shown and shown[name].notna().any() and (shown[name] != "").any()]
    return shown[kept].to_string(index=False, na_rep="", float_format=lambda x: f"{x:.2f}")
