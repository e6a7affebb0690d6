"""Attribution patching of nodes and of what they consist of: heads, MLPs, attention units and neurons.

A row's `estimate` is the first-order estimate of the change of the metric's mean when that unit alone is ablated at all
positions (or at one): (its value when ablated - its value on the clean prompt) . d metric / d value, a mean over pairs.
`effect` is that change itself, by passes in which the unit alone is patched. Both are plain changes: under the logit
difference what helps has a negative one, while the scores of edges, as in `eap`, are positive where it helps.

In the ablated stream values are those behind the masks, and the masks are those of the unedited clean prompt; a unit
that is ablated by `resample` carries what it has on the corrupt prompt, behind that prompt's own masks.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from sa_lens.circuits.experiment import Experiment, analysis
from sa_lens.circuits.patching.activation_patching import (
    KINDS,
    Kind,
    first_order_effects,
    kind_hooks,
    sum_metric_after,
    unit_table,
)
from sa_lens.circuits.running.circuit_by_hooks import batches
from sa_lens.config import NodeKind, check_whole, kind_of

if TYPE_CHECKING:
    import pandas as pd

NODES: dict[NodeKind, Kind] = {
    "heads": KINDS["heads"],
    "mlps": KINDS["mlp_out"],
    "attn_units": Kind("attn.hook_z", ("head", "channel"), many=True),
    "neurons": KINDS["neurons"],
}
"""What can be attributed: heads and attention units (`z`), outputs of MLPs, neurons (`post`)."""

COLUMNS = (
    *("task", "what", "layer", "head", "unit", "position", "estimate", "effect"),
    *("value", "n", "metric", "ablation", "stream", "masks"),
)


class _Choice(NamedTuple):
    """One row: what is ablated alone."""

    layer: int
    place: int
    """Position, or 0 for all."""
    unit: tuple[int, ...]


@analysis
@torch.inference_mode(False)
def attribute_nodes(
    exp: Experiment,
    what: str = "heads",
    *,
    by_position: bool = False,
    exact: int | Literal["all"] = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """A table of every unit with the estimated change of the metric when it alone is ablated.

    Masks are always frozen: gates that choose again have no first-order estimate here.

    Args:
        what: one of `NODES`: `heads`, `mlps`, `attn_units` or `neurons`; or TransformerLens's name of heads, MLPs or
            neurons: `z`, `mlp_out`, `post`.
        by_position: one row for each position instead of all positions at once; needs pairs of one length.
        exact: how many of the largest estimates (absolute values) to check by patching; `all`: every one.
        progress: show a progress bar if it takes more than a few seconds.

    Returns:
        One row per unit, in the order of layers, positions, units: `layer`; `head` and `unit` (such as `L1.mlp.17`)
        where they apply; `position` (`all`, or counted from the start); `estimate`; `effect`, NaN where it was not
        asked for; `value`, the metric of the unedited clean prompts; `n`; and the settings.

    Raises:
        ValueError: an unknown choice, a metric without a gradient at the clean prompt, `masks="live"`, pairs of several
            lengths with `by_position`.

    Source: attribution patching, as in Syed et al., arXiv 2310.10348, section 2.
    """
    exp = exp.fill_in(masks="frozen")
    what, kind = _checked(exp, what, by_position, exact)
    exp.metric.require_gradient(exp.pairs, exp.model.cfg.d_vocab, "attribute_nodes")
    hooks = list(kind_hooks(exp.model, kind, range(exp.model.cfg.n_layers)).values())
    estimates, value = _estimates(exp, kind, hooks, by_position)
    choices = [
        _Choice(layer, index[0], tuple(index[1:]))
        for layer, values in enumerate(estimates)
        for index in torch.ones_like(values).nonzero().tolist()
    ]
    flat = torch.cat([layer.flatten() for layer in estimates])
    n_exact = len(choices) if exact == "all" else min(exact, len(choices))
    tried = flat.abs().sort(descending=True, stable=True).indices[:n_exact].sort().values.tolist()
    effects: dict[int, float] = {}
    if tried:
        patched = _metric_when_ablated(exp, hooks, [choices[i] for i in tried], by_position, progress)
        effects = dict(zip(tried, (patched - value).tolist(), strict=True))
    return unit_table(
        exp.model,
        kind,
        [(choice.layer, choice.unit) for choice in choices],
        COLUMNS,
        position=[choice.place if by_position else "all" for choice in choices],
        estimate=flat.tolist(),
        effect=[effects.get(i, math.nan) for i in range(len(choices))],
        **{**exp.about, "what": what, "value": value},
    )


def _checked(exp: Experiment, what: str, by_position: bool, exact: Any) -> tuple[NodeKind, Kind]:
    name, layer = kind_of(what, NodeKind)
    if layer is not None:
        raise ValueError(f"what={what!r} names layer {layer}, but all layers are attributed: give {name!r}")
    if exact != "all":
        check_whole("exact", exact, 0, "units to check, or 'all'")
    if exp.masks == "live":
        raise ValueError(
            "masks='live' has no first-order estimate for nodes: use masks='frozen', or patch(..., masks='live')"
        )
    if by_position:
        exp.pairs.require_one_length("by_position=True")
    kind = cast(NodeKind, name)
    return kind, NODES[kind]


def _estimates(
    exp: Experiment, kind: Kind, hooks: list[str], by_position: bool
) -> tuple[list[Float[Tensor, "place ..."]], float]:
    """First-order estimates of each layer by position (one entry for all) and unit; the metric of clean prompts."""
    totals: list[Any] = [0.0] * len(hooks)
    value = 0.0
    for batch in batches(exp, hooks):
        effects, total = first_order_effects(
            *(exp.model, exp.stream, batch.clean, batch.masks, batch.carried[0], hooks),
            lambda logits, batch=batch: exp.metric(logits, batch.pairs),  # type: ignore[misc]
        )
        value += total
        for layer, effect in enumerate(effects.values()):
            product = effect.sum(0).double()
            product = product if by_position else product.sum(0, keepdim=True)
            inside = tuple(range(1 + len(kind.axes), product.ndim))
            totals[layer] = totals[layer] + (product.sum(inside) if inside else product).cpu()
    n = len(exp.pairs)
    return [total / n for total in totals], value / n


def _metric_when_ablated(
    exp: Experiment, hooks: list[str], choices: list[_Choice], by_position: bool, progress: bool
) -> Float[Tensor, " choice"]:
    """Mean metric with each choice ablated alone."""
    totals = torch.zeros(len(choices), dtype=torch.float64)
    edits = [
        (hooks[choice.layer], (slice(None), choice.place if by_position else slice(None), *choice.unit))
        for choice in choices
    ]
    with (
        torch.no_grad(),
        tqdm(total=len(choices) * len(exp.pairs), desc="patching", delay=3, disable=not progress) as bar,
    ):
        for batch in batches(exp, hooks):
            totals += sum_metric_after(exp, batch.pairs, batch.clean, edits, batch.carried[0], batch.masks, bar)
    return totals / len(exp.pairs)
