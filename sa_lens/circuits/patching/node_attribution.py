"""Attribution patching of nodes and of what they consist of: heads, MLPs, attention units and neurons.

A row's `estimate` is the first-order estimate of the change of the metric's mean when that unit alone is ablated at all
positions (or at one): (its value when ablated - its value on the clean prompt) . d metric / d value, a mean over pairs.
`effect` is that change itself, by passes in which the unit alone is patched. Both are plain changes: under the logit
difference what helps has a negative one, while the scores of edges, in `attribution.py`, are positive where it helps.

In the ablated stream values are those behind the masks, and the masks are those of the unedited clean prompt; a unit
that is ablated by `resample` carries what it has on the corrupt prompt, behind that prompt's own masks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from sa_lens.circuits.discovery.gradients_by_hooks import Batch, batches, check_differentiable, needs_gradient_at_clean
from sa_lens.circuits.metrics import Metric, metric_named
from sa_lens.circuits.patching.activation_patching import KINDS, Kind, kind_hooks
from sa_lens.circuits.running.circuit_by_hooks import Ablation, Gates, check_choices
from sa_lens.circuits.tasks.pairs import PromptPairs
from sa_lens.config import Stream
from sa_lens.core.host import Hook, Host, at_least_float32, in_stream, run_to_last

if TYPE_CHECKING:
    import pandas as pd

NODES: dict[str, Kind] = {
    "heads": KINDS["heads"],
    "mlps": KINDS["mlp_out"],
    "attn_units": Kind("attn.hook_z", ("head", "channel"), many=True),
    "neurons": KINDS["neurons"],
}
"""What can be attributed: heads and attention units (`z`), outputs of MLPs, neurons (`post`)."""

COLUMNS = (
    *("task", "what", "layer", "head", "channel", "neuron", "position", "estimate", "effect"),
    *("value", "n", "metric", "ablation", "stream", "gates"),
)


class _Choice(NamedTuple):
    """One row: what is ablated alone."""

    layer: int
    place: int
    """Position, or 0 for all."""
    unit: tuple[int, ...]


@torch.inference_mode(False)
def attribute_nodes(
    model: Host,
    pairs: PromptPairs,
    what: str = "heads",
    metric: str | Metric = "logit_difference",
    *,
    by_position: bool = False,
    exact: int | Literal["all"] = 0,
    ablation: Ablation = "resample",
    stream: Stream = "clean",
    gates: Gates | None = None,
    batch_size: int = 64,
    progress: bool = True,
) -> pd.DataFrame:
    """A table of every unit with the estimated change of the metric when it alone is ablated.

    Args:
        what: one of `NODES`: `heads`, `mlps`, `attn_units` or `neurons`.
        metric: as in `eap`: it needs a gradient at the clean prompt.
        by_position: a row for each position instead of all positions at once; needs pairs of one length.
        exact: how many of the largest estimates (absolute values) to check by patching; `all`: every one.
        ablation: what an ablated unit carries: its value on the corrupt prompt, zero, or the mean over the corrupt
            prompts of the same length, position by position.
        gates: in the ablated stream `frozen`, the default. `patch(..., gates="live")` patches under live gates.
        batch_size: prompts in one pass, patched copies counted.
        progress: a progress bar, where it takes more than a few seconds.

    Returns:
        A row a unit, in the order of layers, positions, units: `layer`; `head`, `channel`, `neuron` where they apply;
        `position` (`all`, or counted from the start); `estimate`; `effect`, NaN where it was not asked for; `value`,
        the metric of the unedited clean prompts; `n`; and the settings.

    Raises:
        ValueError: an unknown choice, a metric without a gradient, pairs of several lengths with `by_position`.

    Source: attribution patching, as in Syed et al., arXiv 2310.10348, section 2.
    """
    import pandas as pd

    kind = _checked(model, pairs, what, by_position, exact, gates)
    needs_gradient_at_clean("attribute_nodes", metric)
    gates_name = check_choices(model, pairs, ablation, stream, gates, batch_size)
    name = check_differentiable(metric, pairs, model.cfg.d_vocab)
    run = _Run(model, pairs, metric, kind, by_position, ablation, stream, gates_name, batch_size)
    estimates, value = run.estimates()
    choices = _choices(estimates)
    flat = torch.cat([layer.flatten() for layer in estimates])
    n_exact = len(choices) if exact == "all" else min(exact, len(choices))
    tried = flat.abs().sort(descending=True, stable=True).indices[:n_exact].sort().values.tolist()
    effects = (run.effects([choices[i] for i in tried], progress) - value).tolist() if tried else []
    found: dict[int, float] = dict(zip(tried, effects, strict=True))
    rows = [
        {
            **dict.fromkeys(COLUMNS),
            **dict(zip(kind.unit, choice.unit, strict=True)),
            **{"task": pairs.task, "what": what, "layer": choice.layer},
            "position": choice.place if by_position else "all",
            **{"estimate": float(flat[i]), "effect": found.get(i, float("nan")), "value": value},
            **{"n": len(pairs), "metric": name, "ablation": ablation, "stream": stream, "gates": gates_name},
        }
        for i, choice in enumerate(choices)
    ]
    whole = dict.fromkeys(("head", "channel", "neuron"), "Int64")
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype(whole)


def _checked(model: Host, pairs: PromptPairs, what: str, by_position: bool, exact: Any, gates: Any) -> Kind:
    if what not in NODES:
        raise ValueError(f"what={what!r} is none of {', '.join(NODES)}")
    if exact != "all" and (isinstance(exact, bool) or not isinstance(exact, int) or exact < 0):
        raise ValueError(f"exact={exact!r} must be a number of units, 0 or more, or 'all'")
    if gates == "live":
        raise ValueError(
            "gates='live' has no first-order estimate for nodes: use gates='frozen', or patch(..., gates='live')"
        )
    if by_position and not pairs.uniform:
        lengths = ", ".join(str(int(length)) for length in pairs.lengths.unique())
        raise ValueError(
            f"by_position=True needs prompts of one length, these have {lengths} tokens: make the pairs with "
            "length=..., or take a group of pairs.by_length()"
        )
    kind_hooks(model, NODES[what], range(model.cfg.n_layers))
    return NODES[what]


def _choices(estimates: list[Float[Tensor, "place ..."]]) -> list[_Choice]:
    return [
        _Choice(layer, index[0], tuple(index[1:]))
        for layer, found in enumerate(estimates)
        for index in torch.ones_like(found).nonzero().tolist()
    ]


class _Run:
    """All passes for one kind of unit."""

    def __init__(
        self,
        model: Host,
        pairs: PromptPairs,
        metric: str | Metric,
        kind: Kind,
        by_position: bool,
        ablation: Ablation,
        stream: Stream,
        gates: str,
        batch_size: int,
    ) -> None:
        self.model, self.pairs, self.kind, self.by_position = model, pairs, kind, by_position
        self.metric = metric_named(metric, None)[1]
        self.ablation, self.stream, self.gates, self.batch_size = ablation, stream, gates, batch_size
        self.hooks = [f"blocks.{layer}.{kind.hook}" for layer in range(model.cfg.n_layers)]

    def _batches(self) -> Any:
        return batches(self.model, self.pairs, self.stream, self.gates, self.batch_size)

    def _carried(self, batch: Batch) -> dict[str, Tensor]:
        """What the units carry when ablated: a row a prompt, or one for all."""
        prompts = batch.over(self.ablation)
        parts = prompts[:1].split(1) if self.ablation == "zero" else prompts.split(self.batch_size)
        seen: dict[str, list[Tensor]] = {name: [] for name in self.hooks}

        def keep(x: Tensor, hook: Any) -> None:
            seen[hook.name].append(x)

        with torch.no_grad(), in_stream(self.model, self.stream, position=-1):
            for part in parts:
                run_to_last(self.model, part, [(name, keep) for name in self.hooks])
        found = {name: torch.cat(values) for name, values in seen.items()}
        if self.ablation == "zero":
            return {name: torch.zeros_like(x) for name, x in found.items()}
        return {name: x.mean(0, keepdim=True) for name, x in found.items()} if self.ablation == "mean" else found

    def estimates(self) -> tuple[list[Float[Tensor, "place ..."]], float]:
        """First-order estimates of each layer by position (one entry for all) and unit; the metric of clean prompts."""
        totals: list[Any] = [0.0] * len(self.hooks)
        value = 0.0
        for batch in self._batches():
            carried = self._carried(batch)
            values: dict[str, Tensor] = {}

            def start(x: Tensor, hook: Any) -> Tensor:
                return x.detach().clone().requires_grad_()

            def keep(x: Tensor, hook: Any, values: dict[str, Tensor] = values) -> None:
                values[hook.name] = x

            hooks: list[Hook] = [("blocks.0.hook_resid_pre", start), *((name, keep) for name in self.hooks)]
            with torch.enable_grad():
                with in_stream(self.model, self.stream, position=-1, masks=batch.masks):
                    logits = run_to_last(self.model, batch.clean, hooks)
                score = self.metric(logits, batch.pairs).sum()
                gradients = torch.autograd.grad(score, [values[name] for name in self.hooks])
            value += float(score.detach().double())
            for layer, (name, gradient) in enumerate(zip(self.hooks, gradients, strict=True)):
                change = at_least_float32(carried[name]) - at_least_float32(values[name].detach())
                product = (at_least_float32(gradient) * change).sum(0).double()
                product = product if self.by_position else product.sum(0, keepdim=True)
                inside = tuple(range(1 + len(self.kind.unit), product.ndim))
                totals[layer] = totals[layer] + (product.sum(inside) if inside else product).cpu()
        n = len(self.pairs)
        return [total / n for total in totals], value / n

    def effects(self, choices: list[_Choice], progress: bool) -> Float[Tensor, " choice"]:
        """Mean metric with each choice ablated alone: passes with a copy of the prompts for each."""
        totals = torch.zeros(len(choices), dtype=torch.float64)
        with (
            torch.no_grad(),
            tqdm(total=len(choices) * len(self.pairs), desc="patching", delay=3, disable=not progress) as bar,
        ):
            for batch in self._batches():
                carried = self._carried(batch)
                copies = max(1, self.batch_size // len(batch.pairs))
                for at in range(0, len(choices), copies):
                    chunk = choices[at : at + copies]
                    for i, logits in enumerate(self._patched(batch, carried, chunk)):
                        totals[at + i] += float(self.metric(logits, batch.pairs).double().sum())
                    bar.update(len(chunk) * len(batch.pairs))
        return totals / len(self.pairs)

    def _patched(
        self, batch: Batch, carried: dict[str, Tensor], choices: list[_Choice]
    ) -> Float[Tensor, "choice pair d_vocab"]:
        shape = (len(choices), len(batch.pairs))

        def put(x: Tensor, hook: Any) -> Tensor:
            x = x.unflatten(0, shape).clone()
            for copy, choice in zip(x, choices, strict=True):
                if self.hooks[choice.layer] == hook.name:
                    position = choice.place if self.by_position else slice(None)
                    where = (slice(None), position, *choice.unit)
                    copy[where] = carried[hook.name][where]
            return x.flatten(0, 1)

        def repeated(x: Tensor) -> Tensor:
            return x.repeat(len(choices), *[1] * (x.ndim - 1))

        masks = {name: repeated(mask) for name, mask in batch.masks.items()} if batch.masks else None
        tokens: Int[Tensor, "copy pos"] = repeated(batch.clean)
        names = dict.fromkeys(self.hooks[choice.layer] for choice in choices)
        with in_stream(self.model, self.stream, position=-1, masks=masks):
            logits = run_to_last(self.model, tokens, [(name, put) for name in names])
        return logits.unflatten(0, shape)
