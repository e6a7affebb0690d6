"""Activation and mask patching on either stream: what one prompt's value does in the other prompt's run.

`denoise` runs the corrupt prompt and puts in values of the clean one; `noise` the other way round. Frozen masks are
those of the unedited prompt that is run (its own corrupt masks when denoising). Live gates read a clean pass under the
same patch: it gets the other prompt's value of the clean stream, the ablated pass that of the ablated stream. The clean
pass has no masks, so patches of masks come to the same under both. Live gates with scores `ablated` read the patched
pass itself, where a patched mask changes those of later layers. Many pairs and many patches go through the model in one
pass.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from sa_lens.circuits.experiment import Experiment, analysis
from sa_lens.circuits.metrics import logit_difference
from sa_lens.circuits.patching.patches_by_nodes import Patch, PatchedRuns, why_not_patched_by_nodes
from sa_lens.circuits.running.recorded_passes import record
from sa_lens.circuits.tasks.pairs import PromptPairs
from sa_lens.config import Direction, PatchKind, Stream, check_choice, check_whole, kind_of
from sa_lens.core.host import (
    Hook,
    Host,
    at_least_float32,
    device_of,
    gate_hook_names,
    in_stream,
    require_hooks,
    run_to_last,
)
from sa_lens.core.unit import Unit

if TYPE_CHECKING:
    import pandas as pd

Positions = Literal["named", "each", "all"] | Sequence[str | int]


class Kind(NamedTuple):
    """A kind of thing to patch."""

    hook: str
    """Hook point within a layer."""
    axes: tuple[str, ...] = ()
    """What the axes after `batch pos` count, one unit being patched at a time; empty: the whole activation."""
    mask: bool = False
    """Whether it is a gate's mask, which acts at the metric position alone."""
    many: bool = False
    """Whether there are so many units that only the most promising are tried."""
    by_query: bool = False
    """Whether its axes are `batch head query key`, not `batch pos head ...`; a position is then that of the query."""

    @property
    def unit_axis(self) -> int:
        """The axis of an activation at which those of single units begin."""
        return 1 if self.by_query else 2


KINDS: dict[PatchKind, Kind] = {
    "resid_pre": Kind("hook_resid_pre"),
    "resid_mid": Kind("hook_resid_mid"),
    "resid_post": Kind("hook_resid_post"),
    "attn_out": Kind("hook_attn_out"),
    "mlp_out": Kind("hook_mlp_out"),
    "heads": Kind("attn.hook_z", ("head",)),
    "q": Kind("attn.hook_q", ("head",)),
    "k": Kind("attn.hook_k", ("head",)),
    "v": Kind("attn.hook_v", ("head",)),
    "pattern": Kind("attn.hook_pattern", ("head",), by_query=True),
    "neurons": Kind("mlp.hook_post", ("neuron",), many=True),
    "mask_attn": Kind("attn_gate.hook_mask", mask=True),
    "mask_mlp": Kind("mlp_gate.hook_mask", mask=True),
    "mask_heads": Kind("attn_gate.hook_mask", ("head",), mask=True),
    "mask_attn_units": Kind("attn_gate.hook_mask", ("head", "channel"), mask=True, many=True),
    "mask_mlp_units": Kind("mlp_gate.hook_mask", ("neuron",), mask=True, many=True),
}
"""What can be patched: the residual stream entering a layer, between attention and MLP, and leaving it; outputs of
attention and MLP; heads (`z`), their queries, keys, values (of grouped heads one per group) and attention patterns;
neurons (`post`); and masks of the gates: of a whole layer, of a head, or unit by unit."""

TOP_N = 64
"""Units tried by default where there are many."""

TINY = 1e-9
"""Difference between clean and corrupt below which there is nothing to normalise by."""

COLUMNS = (
    *("task", "what", "layer", "head", "unit", "position", "token", "value", "normalised"),
    *("clean", "corrupt", "n", "metric", "direction", "stream", "masks"),
)


class _Place(NamedTuple):
    """Where in the prompts a patch goes."""

    label: str | int
    token: str
    offset: Int[Tensor, " pair"] | None
    """Position of each pair, counted from the end; None: all positions."""


class _Edit(NamedTuple):
    kind: Kind
    layer: int
    hook: str
    unit: tuple[int, ...]
    place: _Place


class _Run(NamedTuple):
    """Pairs of one length with all that their patched runs need."""

    pairs: PromptPairs
    rows: Int[Tensor, " group"]
    base: Int[Tensor, "group pos"]
    source: dict[str, Tensor]
    """Activations of the other prompt in the chosen stream, by hook name."""
    clean_source: dict[str, Tensor]
    """The same in the clean stream, for the clean pass that live gates read; else empty."""
    masks: dict[str, Tensor] | None
    """Masks of the base prompt; None in the clean stream and with live masks."""
    clean: Float[Tensor, "group d_vocab"]
    corrupt: Float[Tensor, "group d_vocab"]


@analysis
def patch(
    exp: Experiment,
    what: str = "resid_pre",
    *,
    direction: Direction = "denoise",
    positions: Positions | None = None,
    layers: Sequence[int] | None = None,
    top_n: int | Literal["all"] | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """The metric after each single patch.

    In the ablated stream this is the pass of `model.ablated(position=-1)`: the masks act at the metric position, and
    information flows between positions as in any transformer. The experiment's ablation does not matter.

    Args:
        what: one of `KINDS`, or TransformerLens's name of it, such as `z`, `hook_post` or `blocks.0.attn.hook_q`, which
            chooses the layer too; masks can be patched in the ablated stream alone.
        direction: `denoise`: the corrupt prompt runs, with values of the clean one. `noise`: the other way round.
        positions: `each`: every position in turn (pairs of one length). `named`: each named position of the pairs.
            `all`: all positions at once. Or a list of names and of whole numbers (from the end if negative). Patterns
            are patched at positions of the query. Default: `all` for heads, their parts and neurons. For the residual
            stream and outputs of attention and MLP, `each` if all prompts are of one form: there is one pair, or the
            prompts have one length and at least half of their tokens in common. Otherwise `named` where the pairs have
            names, and `all` where they have none.
        layers: layers to patch; None: all.
        top_n: for kinds of many units, how many to try (default 64, `all` for all): those with the largest first-order
            effect (gradient times difference, over all positions) on the logit difference.
        progress: show a progress bar if it takes more than a few seconds.

    Returns:
        One row per patch: `layer`; `head` and `unit` (such as `L1.mlp.17`) where they apply; `position` (name, index,
        or `all`) and `token` (its text where all prompts share it); `value`, the mean metric; `normalised`, the share
        of the way from the base prompt's value (0) to the other prompt's (1), NaN where the two do not differ; `clean`
        and `corrupt`, the unpatched means; `n`; and the settings.

    Raises:
        ValueError: an unknown choice, a position or layer that is not there, masks in the clean stream, a model without
            the hook points.

    Source: the definitions of `transformer_lens.patching`, which this agrees with.
    """
    model, pairs = exp.model, exp.pairs
    what, layers = _kind_and_layers(what, layers)
    kind = _checked(exp, what, direction, top_n)
    hooks = kind_hooks(model, kind, _checked_layers(model, layers))
    places = _places(pairs, kind, what, positions)
    size = exp.light_batch_size
    runs = [_prepare(exp, group, rows, kind, list(hooks.values()), direction) for rows, group in pairs.by_length(size)]
    edits = _edits(model, runs, kind, hooks, places, top_n, exp.stream)
    totals = torch.zeros(len(edits), dtype=torch.float64)
    before = {"clean": 0.0, "corrupt": 0.0}
    with (
        torch.no_grad(),
        tqdm(total=len(edits) * len(pairs), desc=f"patching {what}", delay=3, disable=not progress) as bar,
    ):
        for run in runs:
            for prompt, logits in (("clean", run.clean), ("corrupt", run.corrupt)):
                before[prompt] += float(exp.metric(logits, run.pairs, run.clean).double().sum())
            if why_not_patched_by_nodes(exp, what) is None:
                source = (run.pairs.clean if direction == "denoise" else run.pairs.corrupt).to(run.base.device)
                patched = PatchedRuns(exp, what, run.pairs, run.base, source, run.clean)
                totals += patched.sums([_patch(edit, run) for edit in edits], bar)
                continue
            indexed = [(edit.hook, _index(edit, run)) for edit in edits]
            totals += sum_metric_after(
                *(exp, run.pairs, run.base, indexed, run.source, run.masks, bar),
                clean_source=run.clean_source,
                clean_logits=run.clean,
            )
    n = len(pairs)
    clean, corrupt = before["clean"] / n, before["corrupt"] / n
    base, other = (corrupt, clean) if direction == "denoise" else (clean, corrupt)
    span = other - base
    mean = (totals / n).tolist()
    return unit_table(
        model,
        kind,
        [(edit.layer, edit.unit) for edit in edits],
        COLUMNS,
        **{"position": [edit.place.label for edit in edits], "token": [edit.place.token for edit in edits]},
        **{"value": mean, "normalised": [(x - base) / span if abs(span) > TINY else math.nan for x in mean]},
        **{"clean": clean, "corrupt": corrupt, "direction": direction, **exp.about, "what": what},
    )


def unit_table(
    model: Host, kind: Kind, units: Sequence[tuple[int, tuple[int, ...]]], columns: Sequence[str], **values: Any
) -> pd.DataFrame:
    """A table with one row per patched unit or activation.

    Args:
        units: layer and index of each, the index along the axes of the kind.
        columns: all columns, of which `layer`, `head` and `unit` are filled in here.
        values: the other columns: a list with one value per row, or one value for all.
    """
    import pandas as pd

    of_mlp = kind.axes == ("neuron",)
    # a gate that keeps whole heads has no masks of single channels
    single = kind.many and (of_mlp or not kind.mask or model.gates.attn_unit == "channel")  # type: ignore[attr-defined]

    def name(layer: int, index: tuple[int, ...]) -> str:
        if of_mlp:
            return str(Unit(layer, "mlp", index[0]))
        return str(Unit(layer, "attn", index[0] * model.cfg.d_head + index[1]))

    rows = {
        "layer": [layer for layer, _ in units],
        "head": [index[0] if kind.axes[:1] == ("head",) else None for _, index in units],
        "unit": [name(*unit) if single else None for unit in units],
    }
    return pd.DataFrame({**rows, **values}, columns=list(columns)).astype({"head": "Int64"})


def _kind_and_layers(what: str, layers: Sequence[int] | None) -> tuple[PatchKind, Sequence[int] | None]:
    """The kind that a name means, and the layers, which a hook point's full name chooses."""
    kind, layer = kind_of(what, PatchKind)
    if layer is not None:
        if layers is not None and [*layers] != [layer]:
            raise ValueError(f"what={what!r} names layer {layer}, but layers={[*layers]}: give one of the two")
        layers = [layer]
    return cast(PatchKind, kind), layers


def _checked(exp: Experiment, what: PatchKind, direction: str, top_n: Any) -> Kind:
    kind = KINDS[what]
    check_choice("direction", direction, Direction)
    if exp.stream == "clean" and kind.mask:
        raise ValueError(f"what={what!r} needs stream='ablated': gates do not act in the clean stream")
    if top_n is not None and not kind.many:
        raise ValueError(f"top_n={top_n!r} applies to kinds of many units only, not to what={what!r}")
    if top_n not in (None, "all"):
        check_whole("top_n", top_n, 1, "units to try, or 'all'")
    return kind


def kind_hooks(model: Host, kind: Kind, layers: Iterable[int]) -> dict[int, str]:
    """Hook points of a kind, by layer.

    Raises:
        ValueError: the model does not have them, such as those of MLPs in an attention-only model.
    """
    if model.cfg.attn_only and "mlp" in kind.hook:
        raise ValueError(f"{kind.hook!r} belongs to an MLP, but this model has attention layers alone: patch 'heads'")
    hooks = {layer: f"blocks.{layer}.{kind.hook}" for layer in layers}
    require_hooks(model, hooks.values())
    return hooks


def _checked_layers(model: Host, layers: Sequence[int] | None) -> list[int]:
    n_layers = model.cfg.n_layers
    if layers is None:
        return list(range(n_layers))
    for layer in layers:
        if not _is_whole(layer) or not 0 <= layer < n_layers:
            raise ValueError(f"layer {layer!r} is not there: the model's are 0 to {n_layers - 1}")
    if not len(layers):
        raise ValueError("layers is empty: give at least one, or None for all")
    return [int(layer) for layer in layers]


def _is_whole(value: Any) -> bool:
    """Whether it is a whole number of Python, numpy or torch."""
    try:
        operator.index(value)
    except TypeError:
        return False
    return not isinstance(value, bool)


def _places(pairs: PromptPairs, kind: Kind, what: str, positions: Positions | None) -> list[_Place]:
    if kind.mask:
        if positions is not None:
            raise ValueError(f"positions do not apply to what={what!r}: masks act at the last position alone")
        return [_Place("end", _shared_token(pairs, pairs.positions["end"]), None)]
    if positions is None:
        named = "named" if len(pairs.positions) > 1 else "all"
        positions = "all" if kind.axes else "each" if _of_one_form(pairs) else named
    if positions == "all":
        return [_Place("all", "", None)]
    shortest = int(pairs.lengths.min())
    if positions == "named":
        positions = list(pairs.positions)
    elif positions == "each":
        pairs.require_one_length("positions='each'")
        positions = list(range(shortest))
    elif isinstance(positions, str):
        raise ValueError(f"positions={positions!r} must be 'named', 'each', 'all' or a list")
    places = []
    for position in positions or ():
        if isinstance(position, str):
            if position not in pairs.positions:
                raise ValueError(f"position {position!r} has no name here; names are {', '.join(pairs.positions)}")
            offset = pairs.positions[position]
        elif not _is_whole(position):
            raise ValueError(
                f"position {position!r} must be a name or a whole number, counted from the end if negative"
            )
        elif not -shortest <= position < shortest:
            raise ValueError(f"position {position} lies outside the shortest prompt of {shortest} tokens")
        else:
            offset = torch.full_like(pairs.lengths, position) - (pairs.lengths if position >= 0 else 0)
        token = _shared_token(pairs, offset) or ("" if isinstance(position, str) else _shared_name(pairs, offset))
        places.append(_Place(position, token, offset))
    if not places:
        raise ValueError("positions: give at least one")
    return places


def _of_one_form(pairs: PromptPairs) -> bool:
    """Whether a position means the same in all prompts: one pair, or one length and half of the tokens in common."""
    if not pairs.uniform:
        return False
    shared = (pairs.clean == pairs.clean[:1]).all(0)
    return 2 * int(shared.sum()) >= len(shared)


def _shared_token(pairs: PromptPairs, offset: Int[Tensor, " pair"]) -> str:
    """The token there if all clean prompts share it, else empty."""
    tokens = {texts[int(position)] for texts, position in zip(pairs.token_texts, offset, strict=True)}
    return tokens.pop() if len(tokens) == 1 else ""


def _shared_name(pairs: PromptPairs, offset: Int[Tensor, " pair"]) -> str:
    return next((name for name, other in pairs.positions.items() if torch.equal(other, offset)), "")


def _prepare(
    exp: Experiment, pairs: PromptPairs, rows: Int[Tensor, " group"], kind: Kind, hooks: list[str], direction: Direction
) -> _Run:
    """Runs both prompts once: logits, the source's activations in each stream that is patched, the base's masks."""
    model, device = exp.model, device_of(exp.model)
    clean, corrupt = pairs.clean.to(device), pairs.corrupt.to(device)
    base, source = (corrupt, clean) if direction == "denoise" else (clean, corrupt)
    names = gate_hook_names(model) if exp.masks == "frozen" else []
    with torch.no_grad():
        with in_stream(model, exp.stream, position=-1):
            base_logits, masks = record(model, base, names)
            source_logits, values = record(model, source, hooks)
        clean_values: dict[str, Tensor] = {}
        if exp.edits_clean_pass and not kind.mask:
            with in_stream(model, "clean"):
                _, clean_values = record(model, source, hooks)
    logits = (source_logits, base_logits) if direction == "denoise" else (base_logits, source_logits)
    return _Run(pairs, rows, base, values, clean_values, masks or None, *logits)


def _edits(
    model: Host,
    runs: list[_Run],
    kind: Kind,
    hooks: dict[int, str],
    places: list[_Place],
    top_n: int | Literal["all"] | None,
    stream: Stream,
) -> list[_Edit]:
    """Every patch to make, in order of layer, unit, position."""
    units = [
        (layer, unit)
        for layer, hook in hooks.items()
        for unit in product(*map(range, runs[0].source[hook].shape[kind.unit_axis :][: len(kind.axes)]))
    ]
    keep = len(units) if not kind.many or top_n == "all" else top_n or TOP_N
    if keep < len(units):
        sums = torch.zeros(len(units))
        for run in runs:
            # with frozen masks, whatever the patches will use: it only ranks
            effects, _ = first_order_effects(
                *(model, stream, run.base, run.masks, run.source, list(hooks.values())),
                lambda logits, run=run: logit_difference(logits, run.pairs),  # type: ignore[misc]
            )
            sums += torch.cat([effect.sum((0, 1)).flatten().cpu() for effect in effects.values()])
        best = sums.abs().sort(descending=True, stable=True).indices[:keep].sort().values
        units = [units[int(i)] for i in best]
    return [_Edit(kind, layer, hooks[layer], unit, place) for layer, unit in units for place in places]


def first_order_effects(
    model: Host,
    stream: Stream,
    tokens: Int[Tensor, "prompt pos"],
    masks: Mapping[str, Tensor] | None,
    source: Mapping[str, Tensor],
    hooks: Sequence[str],
    metric: Callable[[Float[Tensor, "prompt d_vocab"]], Float[Tensor, " prompt"]],
) -> tuple[dict[str, Float[Tensor, "prompt pos *rest"]], float]:
    """Gradient of the metric's sum times (source - value) at each hook point, by its name; and that sum."""
    base: dict[str, Tensor] = {}
    leaves: dict[str, Tensor] = {}

    def probe(x: Tensor, hook: Any) -> Tensor:
        base[hook.name] = x.detach()
        leaves[hook.name] = torch.zeros_like(x, requires_grad=True)
        return x + leaves[hook.name]

    with torch.enable_grad(), in_stream(model, stream, position=-1, masks=masks):
        total = metric(run_to_last(model, tokens, [(hook, probe) for hook in hooks])).sum()
    gradients = torch.autograd.grad(total, [leaves[hook] for hook in hooks])
    effects = {
        hook: at_least_float32(gradient) * (at_least_float32(source[hook]) - at_least_float32(base[hook]))
        for hook, gradient in zip(hooks, gradients, strict=True)
    }
    return effects, float(total.detach().double())


def _patch(edit: _Edit, run: _Run) -> Patch:
    """The same patch for runs by nodes."""
    offset = edit.place.offset
    position = None if offset is None else (offset[run.rows] + run.base.shape[1]).to(run.base.device)
    return Patch(edit.layer, edit.unit[0] if edit.unit else None, position)


def _index(edit: _Edit, run: _Run) -> tuple[Any, ...]:
    """Where in an activation `[prompt, pos, ...]`, or `[prompt, head, query, key]`, an edit puts its value."""
    offset = edit.place.offset
    prompts: Any = slice(None)
    position: Any = slice(None)
    if offset is not None:
        group, length = run.base.shape
        position = (offset[run.rows] + length).to(run.base.device)
        prompts = torch.arange(group, device=position.device)
    return (prompts, *edit.unit, position) if edit.kind.by_query else (prompts, position, *edit.unit)


def sum_metric_after(
    exp: Experiment,
    pairs: PromptPairs,
    tokens: Int[Tensor, "prompt pos"],
    edits: Sequence[tuple[str, tuple[Any, ...]]],
    source: Mapping[str, Tensor],
    masks: Mapping[str, Tensor] | None,
    bar: tqdm[Any],
    *,
    clean_source: Mapping[str, Tensor] | None = None,
    clean_logits: Tensor | None = None,
) -> Float[Tensor, " edit"]:
    """The metric's sum over prompts after each edit alone; a pass holds a copy of the prompts for each of its edits.

    Args:
        edits: (hook point, where to put the value in) of each.
        source: values to put in, by hook point.
        masks: given masks of the prompts; None: those that the gates choose.
        bar: gets the number of prompts done.
        clean_source: values for the clean pass that live gates read.
    """

    def put_in(chunk: Sequence[tuple[str, tuple[Any, ...]]], values: Mapping[str, Tensor]) -> list[Hook]:
        def put(x: Tensor, hook: Any) -> Tensor:
            x = x.unflatten(0, (len(chunk), len(tokens))).clone()
            for copy, (name, where) in zip(x, chunk, strict=True):
                if name == hook.name:
                    copy[where] = values[name][where]
            return x.flatten(0, 1)

        return [(name, put) for name in dict.fromkeys(name for name, _ in chunk) if name in values]

    sums: list[float] = []
    size = max(1, exp.light_batch_size // len(pairs))
    for first in range(0, len(edits), size):
        chunk = edits[first : first + size]
        given = {name: torch.cat([mask] * len(chunk)) for name, mask in masks.items()} if masks else None
        with exp.in_edited_pass(given, put_in(chunk, clean_source or {})):
            logits = run_to_last(exp.model, tokens.repeat(len(chunk), 1), put_in(chunk, source))
        parts = logits.split(len(tokens))
        sums += [float(exp.metric(part, pairs, clean_logits).double().sum()) for part in parts]
        bar.update(len(chunk) * len(pairs))
    return torch.tensor(sums, dtype=torch.float64)
