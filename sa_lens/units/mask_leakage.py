"""Leakage through the masks: what the ablated stream loses when its masks or its values carry less information.

A mask of 8 among 128 units can carry 40 bits per token and layer, and the gate that chooses it sees the clean stream.
`leakage` separates what the masks carry from what the kept values carry. How to read its tables: docs/leakage.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sa_lens.core.host import Hook, Host, device_of, gate_hook_names, has_ablated_stream, in_stream, weight
from sa_lens.data import TokenFile
from sa_lens.data.blocks import TextBlocks
from sa_lens.statistics import Interval, bootstrap_interval
from sa_lens.units.activations import text_blocks

if TYPE_CHECKING:
    import pandas as pd


PROBE_STEPS, PATIENCE = 3000, 3
"""Batches of a probe at most, and judgements without improvement before it stops."""

TOKENS_AT_ONCE = 4096
"""Tokens of a batch."""

LOGITS_AT_ONCE = 2**25
"""Largest number of logits held at a time (float32: 128 MiB)."""

CONDITIONS = {
    "clean": "the clean stream",
    "ablated": "the ablated stream as it is",
    "mean_values": "each unit's value replaced by its mean where it is kept: the mask alone speaks",
    "mean_values_shuffled": "mean values, and masks shuffled within the same token: all that a token says",
    "other_occurrence": "values kept, masks of another occurrence of the same token in another text",
    "shuffled": "values kept, masks permuted among the occurrences of the same token",
    "random": "values kept, each mask's entries permuted among the units",
    "other_seed": "values kept, masks of a model of another seed on the same text",
    "self_read": "local gates read the ablated stream instead of the clean one",
}
"""What is measured, in the order of the table."""

PER_LAYER = ("mean_values", "other_occurrence", "shuffled", "random", "self_read")
"""Conditions that are also tried in one layer at a time."""


@dataclass(frozen=True)
class Leakage:
    """What the masks carry, from `leakage`. All losses are on the second half of the sequences; means, donors and
    probes come from the first half."""

    losses: pd.DataFrame
    """One row per condition (`CONDITIONS`) and layer (`all`, or a single one): `n`, predicted tokens at which the
    condition could act (a token that occurs once has no other occurrence); `loss`, mean nats there; `ablated`, the loss
    of the unchanged ablated stream at the same tokens; `difference` of the two, with a 95 % interval over sequences."""
    probes: pd.DataFrame
    """One row per probe and layer: `nats` and `accuracy` of predicting the next token (frequent tokens, and one class
    for all others), held out, with the 95 % interval of `nats` over sequences. Probes: `frequency` (nothing is read),
    `token` (the token before the predicted one), `residual` (clean stream entering the layer; `all`: its end), `mask`,
    `mask_shuffled` (masks permuted within the token, in fit and test alike), `mask_other_seed`."""
    summary: pd.Series
    """The few numbers to look at first; see docs/leakage.md."""


def leakage(
    model: Host,
    text: TokenFile | Int[Tensor, "block pos"] | TextBlocks,
    *,
    other_seed: Host | None = None,
    n_tokens: int | None = 20_000,
    per_layer: bool = False,
    classes: int = 100,
    probe_tokens: int = 10_000,
    seed: int = 0,
    progress: bool = True,
) -> Leakage:
    """How much of the ablated stream's skill its masks carry, for gates of any scope, hard or soft.

    With soft gates the mask is the vector of weights: `random` permutes the weights of a token among the units, means
    are weighted by them.

    Args:
        model: a model with gates.
        text: a token file, or blocks `[block pos]` without padding; at least 4 blocks.
        other_seed: a model of the same shape and tokenizer trained from another seed, for the conditions and probes of
            that name; None: they are left out.
        n_tokens: tokens to read at most, both halves together; None: all.
        per_layer: also change one layer at a time (several times the cost).
        classes: number of frequent next tokens that the probes tell apart; all others are one class more.
        probe_tokens: tokens of each half that the probes read at most; 0: no probes.
        seed: of permutations, donors, probes and intervals.
        progress: a progress bar.

    Raises:
        ValueError: a model without gates, a text that does not fit or in which no token repeats, or another model that
            does not fit.
    """
    import pandas as pd
    from tqdm.auto import tqdm

    _check(model, other_seed, classes, probe_tokens)
    blocks = text_blocks(model, text, n_tokens)
    if len(blocks) < 4 or blocks.length < 2:
        raise ValueError(f"the text has {len(blocks)} blocks of {blocks.length} tokens: at least 4 of 2 are needed")
    tokens = blocks.rows(0, len(blocks)).to(device_of(model))
    generator = torch.Generator().manual_seed(seed)
    fit, held_out = tokens[: len(tokens) // 2], tokens[len(tokens) // 2 :]
    fit_masks, masks = text_masks(model, fit), text_masks(model, held_out)
    shuffled = other_occurrences(held_out, held_out, generator)
    donors = other_occurrences(held_out, fit, generator)
    if not bool((shuffled >= 0)[:, :-1].any()):
        raise ValueError("no token occurs twice in the second half of the text: give more text")
    means = mean_values(model, fit)
    changes: dict[str, _Change] = {
        "clean": _Change(stream="clean"),
        "ablated": _Change(),
        "mean_values": _Change(means=means),
        "mean_values_shuffled": _Change(means=means, masks=masks, rows=shuffled),
        "other_occurrence": _Change(masks=fit_masks, rows=donors),
        "shuffled": _Change(masks=masks, rows=shuffled),
        "random": _Change(masks=permuted_units(masks, generator)),
    }
    if other_seed is not None:
        changes["other_seed"] = _Change(masks=text_masks(other_seed, held_out.to(device_of(other_seed))))
    if model.gates.reads_local and not model.gates.reads_global:  # type: ignore[attr-defined]
        changes["self_read"] = _Change(self_read=True)
    jobs: list[tuple[str, int | None]] = [(name, None) for name in changes]
    if per_layer:
        jobs += [(name, layer) for name in PER_LAYER if name in changes for layer in range(model.cfg.n_layers)]
    nats: dict[tuple[str, int | None], Tensor] = {}
    for name, layer in tqdm(jobs, desc="leakage", unit=" passes", disable=not progress):
        nats[name, layer] = _nats(model, held_out, changes[name], layer)
    rows = []
    for (name, layer), of_condition in nats.items():
        acts = changes[name].acts(held_out)
        rows.append(
            {"condition": name, "layer": "all" if layer is None else layer}
            | _row(of_condition, nats["ablated", None], acts, seed)
        )
    losses = pd.DataFrame(rows)
    probes = pd.DataFrame()
    if probe_tokens:
        probes = _probes(model, fit, held_out, fit_masks, masks, other_seed, classes, probe_tokens, seed, progress)
    return Leakage(losses, probes, _summary(nats, (shuffled >= 0)[:, :-1], probes))


def _check(model: Host, other: Host | None, classes: int, probe_tokens: int) -> None:
    if not has_ablated_stream(model):
        raise ValueError(f"leakage needs gates, but this {type(model).__name__} has none: there is no mask to read")
    if classes < 1 or probe_tokens < 0:
        raise ValueError(f"classes={classes} must be at least 1 and probe_tokens={probe_tokens} at least 0")
    if other is None:
        return
    if other is model or not has_ablated_stream(other):
        raise ValueError("other_seed must be a second model with gates, trained from another seed")
    ours, theirs = ({n: m.hook_dict[n] for n in gate_hook_names(m)} for m in (model, other))
    shape = ("n_layers", "n_heads", "d_head", "d_mlp", "d_vocab")
    different = [n for n in shape if getattr(model.cfg, n) != getattr(other.cfg, n)]
    gates = ("k_attn", "k_mlp", "kind", "attn_unit")
    different += [n for n in gates if getattr(model.gates, n) != getattr(other.gates, n)]  # type: ignore[attr-defined]
    if different or ours.keys() != theirs.keys():
        raise ValueError(f"other_seed differs from the model in {', '.join(different)}: only its seed may")


# ----------------------------------------------------------------------------------------------------------- the edits


class _Change(NamedTuple):
    """One condition: what is put in place of masks and values."""

    stream: Any = "ablated"
    means: Mapping[str, Tensor] | None = None
    """Mean of each unit by the name of the gate's `hook_in`."""
    masks: Mapping[str, Tensor] | None = None
    """Masks `[batch pos ...]` by name."""
    rows: Int[Tensor, "batch pos"] | None = None
    """Which flattened row of `masks` each token takes, -1: the token keeps its own; None: its own row."""
    self_read: bool = False

    def acts(self, tokens: Int[Tensor, "batch pos"]) -> Bool[Tensor, "batch pred"]:
        """Predictions at which the condition can act."""
        if self.rows is None:
            return torch.ones_like(tokens[:, :-1], dtype=torch.bool)
        return (self.rows >= 0)[:, :-1]


def _nats(
    model: Host, tokens: Int[Tensor, "batch pos"], change: _Change, layer: int | None
) -> Float[Tensor, "batch pred"]:
    """Nats of each predicted token under a change, of one layer or (None) of all."""
    parts, done = [], 0
    for batch in text_batches(model, tokens):
        rows = slice(done, done + len(batch))
        hooks = [*_value_hooks(change, layer), *(_self_reading(model, layer) if change.self_read else ())]
        with torch.no_grad(), _stream(model, batch, change, rows, layer):
            logits = model.run_with_hooks(batch, fwd_hooks=hooks)[:, :-1].float()
        parts.append(logits.logsumexp(-1) - logits.gather(-1, batch[:, 1:, None])[..., 0])
        done += len(batch)
    return torch.cat(parts)


def _stream(model: Host, batch: Tensor, change: _Change, rows: slice, layer: int | None) -> AbstractContextManager[Any]:
    if change.masks is None:
        return in_stream(model, change.stream)
    device = batch.device
    own = text_masks(model, batch) if change.rows is not None else {}
    chosen = {}
    for name in _of_layer(change.masks, layer):
        mask = change.masks[name]
        if change.rows is None:
            taken = mask[rows]
        else:
            donors = change.rows[rows].to(mask.device)
            taken = mask.flatten(0, 1)[donors.clamp(min=0)]
            keeps = (donors < 0).reshape(*donors.shape, *[1] * (taken.ndim - 2))
            taken = torch.where(keeps, own[name].to(mask.device), taken)
        chosen[name] = taken.to(device=device, dtype=model.cfg.dtype)
    return in_stream(model, "ablated", masks=chosen)


def _of_layer(names: Mapping[str, Any], layer: int | None) -> list[str]:
    return [name for name in names if layer is None or name.startswith(f"blocks.{layer}.")]


def _value_hooks(change: _Change, layer: int | None) -> Iterator[Hook]:
    for name in _of_layer(change.means or {}, layer):
        mean = (change.means or {})[name]
        yield name, lambda value, hook, mean=mean: mean.to(value.device).expand_as(value)


def _self_reading(model: Host, layer: int | None) -> Iterator[Hook]:
    """Hooks that compute local scores from the residual stream of the ablated pass itself."""
    seen: dict[int, Tensor] = {}
    names = gate_hook_names(model, "scores")
    for index in range(model.cfg.n_layers):
        if layer in (None, index):
            yield f"blocks.{index}.hook_resid_pre", lambda resid, hook, index=index: seen.__setitem__(index, resid)
    for name in _of_layer(dict.fromkeys(names), layer):
        gate = name.rsplit(".", 1)[0]

        def rescored(scores: Tensor, hook: Any, gate: str = gate) -> Tensor:
            resid = seen[int(gate.split(".")[1])].to(scores.dtype)
            read = resid @ weight(model, f"{gate}.W_local").to(scores.dtype)
            return (read + weight(model, f"{gate}.b_local").to(scores.dtype)).view_as(scores)

        yield name, rescored


# ---------------------------------------------------------------------------------------------------------- the tables


def _row(nats: Tensor, ablated: Tensor, acts: Bool[Tensor, "batch pred"], seed: int) -> dict[str, Any]:
    difference = _mean_over_sequences(nats - ablated, acts, seed)
    n = int(acts.sum())
    return {
        "n": n,
        "share": n / acts.numel(),
        "loss": float(nats[acts].double().mean()) if n else float("nan"),
        "ablated": float(ablated[acts].double().mean()) if n else float("nan"),
        "difference": difference[0],
        "difference_low": difference[1],
        "difference_high": difference[2],
    }


def _mean_over_sequences(nats: Float[Tensor, "batch pred"], where: Bool[Tensor, "batch pred"], seed: int) -> Interval:
    """Mean over the chosen predictions with a bootstrap interval over sequences."""
    return bootstrap_interval((nats.double() * where).sum(-1), where.double().sum(-1), resamples=1000, seed=seed)


def _summary(nats: Mapping[tuple[str, int | None], Tensor], where: Tensor, probes: pd.DataFrame) -> pd.Series:
    """`mask_share` and its parts, all at the tokens that occur twice, and what the masks tell a linear probe."""
    import pandas as pd

    loss = {
        name: float(of_condition[where].double().mean())
        for (name, layer), of_condition in nats.items()
        if layer is None
    }
    context = loss["mean_values_shuffled"] - loss["ablated"]
    summary = {name: loss[name] for name in ("clean", "ablated", "mean_values", "mean_values_shuffled")}
    summary["context_nats"] = context
    summary["mask_share"] = (
        (loss["mean_values_shuffled"] - loss["mean_values"]) / context if context > 0.01 else float("nan")
    )
    if "self_read" in loss:
        summary["self_read_cost"] = loss["self_read"] - loss["ablated"]
    if len(probes):
        whole = probes[probes["layer"] == "all"].set_index("probe")["nats"]
        summary["probe_mask_nats"] = whole["mask_shuffled"] - whole["mask"]
        summary["probe_residual_nats"] = whole["mask_shuffled"] - whole["residual"]
    return pd.Series(summary, dtype=float, name="leakage")


# ---------------------------------------------------------------------------------------------------------- the probes


def _probes(
    model: Host,
    fit: Int[Tensor, "batch pos"],
    held_out: Int[Tensor, "batch pos"],
    fit_masks: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    other: Host | None,
    classes: int,
    limit: int,
    seed: int,
    progress: bool,
) -> pd.DataFrame:
    import pandas as pd
    from tqdm.auto import tqdm

    count = max(2, limit // fit.shape[1])
    halves = [fit[:count], held_out[:count]]
    generator = torch.Generator().manual_seed(seed + 1)
    rows = [other_occurrences(half, half, generator) for half in halves]
    places = [(row >= 0)[:, :-1] for row in rows]
    if min(int(place.sum()) for place in places) < 2:
        raise ValueError("too few tokens occur twice in each half of the text for the probes: give more text")
    labels = _labels(halves, places, classes)
    inputs = _Inputs(
        [fit_masks, masks], rows, places, [text_masks(other, h.to(device_of(other))) for h in halves] if other else None
    )
    residuals = [_residuals(model, half) for half in halves]
    sequences = [torch.arange(len(place), device=place.device)[:, None].expand_as(place)[place] for place in places]
    read = [half[:, :-1][place] for half, place in zip(halves, places, strict=True)]
    predictions: list[tuple[str, int | str, Tensor]] = [
        ("frequency", "all", smoothed_counts([torch.zeros_like(r) for r in read], labels)),
        ("token", "all", smoothed_counts(read, labels)),
    ]
    layers: list[int | str] = [*range(model.cfg.n_layers), "all"]
    for layer in tqdm(layers, desc="probes", unit=" layers", disable=not progress):
        features = inputs.of_layer(layer)
        features["residual"] = [
            r[-1 if layer == "all" else int(layer)][p] for r, p in zip(residuals, places, strict=True)
        ]
        for probe, (train, test) in features.items():
            predictions.append((probe, layer, fit_probe(train, labels[0], test, groups=sequences[0], seed=seed)))
    table = []
    for probe, layer, log_probabilities in predictions:
        spread = torch.zeros(places[1].shape, dtype=torch.float64)
        spread[places[1].cpu()] = -log_probabilities.gather(-1, labels[1][:, None])[:, 0].double().cpu()
        nats, low, high = _mean_over_sequences(spread, places[1].cpu(), seed)
        accuracy = float((log_probabilities.argmax(-1) == labels[1]).double().mean())
        table.append(
            {"probe": probe, "layer": layer, "n": len(labels[1]), "nats": nats, "nats_low": low, "nats_high": high}
            | {"accuracy": accuracy}
        )
    return pd.DataFrame(table)


class _Inputs(NamedTuple):
    """Masks of both halves as the probes read them."""

    masks: list[Mapping[str, Tensor]]
    rows: list[Int[Tensor, "batch pos"]]
    places: list[Bool[Tensor, "batch pred"]]
    other: list[dict[str, Tensor]] | None

    def of_layer(self, layer: int | str) -> dict[str, list[Float[Tensor, "token unit"]]]:
        """Training and test features of every probe that reads masks."""
        names = _of_layer(self.masks[0], None if layer == "all" else int(layer))
        features: dict[str, list[Tensor]] = {"mask": [], "mask_shuffled": []}
        if self.other is not None:
            features["mask_other_seed"] = []
        for half, (rows, place) in enumerate(zip(self.rows, self.places, strict=True)):
            flat = torch.cat([self.masks[half][name][: len(rows)].flatten(2) for name in names], -1)
            features["mask"].append(flat[:, :-1][place].float())
            features["mask_shuffled"].append(flat.flatten(0, 1)[rows[:, :-1][place]].float())
            if self.other is not None:
                flat = torch.cat([self.other[half][name].flatten(2) for name in names], -1)
                features["mask_other_seed"].append(flat[:, :-1].to(place.device)[place].float())
        return features


def _residuals(model: Host, tokens: Int[Tensor, "batch pos"]) -> list[Float[Tensor, "batch pred d_model"]]:
    """Clean residual stream entering each layer, and leaving the last."""
    last = model.cfg.n_layers - 1
    names = [*(f"blocks.{layer}.hook_resid_pre" for layer in range(last + 1)), f"blocks.{last}.hook_resid_post"]
    parts: dict[str, list[Tensor]] = {name: [] for name in names}
    for batch in text_batches(model, tokens):
        with torch.no_grad(), in_stream(model, "clean"):
            _, cache = model.run_with_cache(batch, names_filter=lambda name: name in parts)
        for name in names:
            parts[name].append(cache[name][:, :-1].float())
    return [torch.cat(parts[name]) for name in names]


def _labels(halves: list[Tensor], places: list[Tensor], classes: int) -> list[Int[Tensor, " token"]]:
    """The next token among the most frequent of the first half, numbered from 1; 0 for all others."""
    following = [half[:, 1:][place] for half, place in zip(halves, places, strict=True)]
    values, counts = following[0].unique(return_counts=True)
    frequent = values[counts.argsort(descending=True, stable=True)[:classes]]
    return [
        (tokens[:, None] == frequent).int().argmax(-1) + (tokens[:, None] == frequent).any(-1) for tokens in following
    ]


def mean_values(model: Host, tokens: Int[Tensor, "batch pos"]) -> dict[str, Float[Tensor, " ..."]]:
    """Mean value of each unit in the ablated stream where it is kept (weighted by a soft mask), by the name of the
    gate's `hook_in`; a unit that is never kept has its mean over all tokens."""
    sums: dict[str, list[Tensor]] = {}
    names = {*gate_hook_names(model), *gate_hook_names(model, "in")}
    for batch in text_batches(model, tokens):
        with torch.no_grad(), in_stream(model, "ablated"):
            _, cache = model.run_with_cache(batch, names_filter=lambda name: name in names)
        for name in gate_hook_names(model, "in"):
            value = cache[name].double()
            mask = cache[name.replace("hook_in", "hook_mask")].double().expand_as(value)
            parts = [
                (mask * value).sum((0, 1)),
                mask.sum((0, 1)),
                value.sum((0, 1)),
                torch.ones_like(value).sum((0, 1)),
            ]
            sums[name] = [a + b for a, b in zip(sums[name], parts, strict=True)] if name in sums else parts
    return {
        name: torch.where(kept > 0, weighted / kept.clamp(min=1e-12), value / n).to(model.cfg.dtype)
        for name, (weighted, kept, value, n) in sums.items()
    }


def other_occurrences(
    tokens: Int[Tensor, "batch pos"], among: Int[Tensor, "batch2 pos2"], generator: torch.Generator
) -> Int[Tensor, "batch pos"]:
    """For each token, the flattened index in `among` of an occurrence of the same token; -1 where there is none.

    Where both are the same text (the same object), the answer is a random permutation within each token that leaves no
    occurrence in its place; otherwise each occurrence draws its donor at random.
    """
    wanted, pool = tokens.flatten().cpu(), among.flatten().cpu()
    order = torch.randperm(len(pool), generator=generator)
    order = order[pool[order].sort(stable=True).indices]  # by token, at random within it
    values, counts = pool[order].unique_consecutive(return_counts=True)
    starts = counts.cumsum(0) - counts
    chosen = torch.full_like(wanted, -1)
    if among is tokens:
        group = torch.repeat_interleave(torch.arange(len(values)), counts)
        place = torch.arange(len(pool)) - starts[group]
        following = order[starts[group] + (place + 1) % counts[group]]
        chosen[order] = torch.where(counts[group] > 1, following, -1)
    else:
        group_of = torch.searchsorted(values, wanted).clamp(max=len(values) - 1)
        drawn = (torch.rand(len(wanted), generator=generator, dtype=torch.float64) * counts[group_of]).long()
        chosen = torch.where(values[group_of] == wanted, order[starts[group_of] + drawn], chosen)
    return chosen.reshape(tokens.shape).to(tokens.device)


def permuted_units(masks: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Each token's mask with its entries permuted at random among the units, layer by layer."""
    permuted = {}
    for name, mask in masks.items():
        flat = mask.flatten(2)
        # a batch row at a time: the random numbers need four bytes a unit
        order = (torch.rand(row.shape, generator=generator).argsort(-1).to(flat.device) for row in flat)
        permuted[name] = torch.stack(
            [row.gather(-1, permutation) for row, permutation in zip(flat, order, strict=True)]
        ).view_as(mask)
    return permuted


def text_masks(model: Host, tokens: Int[Tensor, "batch pos"]) -> dict[str, Tensor]:
    """Masks of a text by hook name; those of hard gates as booleans."""
    parts: dict[str, list[Tensor]] = {}
    hard = model.gates.kind == "hard"  # type: ignore[attr-defined]
    for batch in text_batches(model, tokens):
        with torch.no_grad():
            recorded = model.record_masks(batch)  # type: ignore[attr-defined]
        for gate, layers in recorded.items():
            for layer, mask in enumerate(layers):
                parts.setdefault(f"blocks.{layer}.{gate}.hook_mask", []).append(mask.bool() if hard else mask)
    return {name: torch.cat(recorded) for name, recorded in parts.items()}


def text_batches(model: Host, tokens: Int[Tensor, "batch pos"]) -> Sequence[Tensor]:
    """Parts of the sequences that fit one pass each, by tokens and by logits."""
    at_once = min(TOKENS_AT_ONCE, LOGITS_AT_ONCE // model.cfg.d_vocab)
    return tokens.split(max(1, at_once // tokens.shape[1]))


def smoothed_counts(
    read: list[Int[Tensor, " token"]], labels: list[Int[Tensor, " token"]]
) -> Float[Tensor, "test classes"]:
    """Log-probabilities of the test labels given the token read: `(n(x, y) + a p(y)) / (n(x) + a)`, with the strength a
    that predicts the training tokens best when each is left out in turn."""
    n_classes, n_values = int(max(part.max() for part in labels)) + 1, int(max(part.max() for part in read)) + 1
    pairs = torch.zeros(n_values, n_classes, dtype=torch.float64, device=labels[0].device)
    pairs.index_put_((read[0], labels[0]), torch.ones_like(labels[0], dtype=torch.float64), accumulate=True)
    # one more of each class, so that no probability is zero
    share = (pairs.sum(0) + 1) / (len(labels[0]) + n_classes)

    def left_out(strength: float) -> float:
        others = pairs[read[0], labels[0]] - 1 + strength * share[labels[0]]
        return float((others / (pairs[read[0]].sum(-1) - 1 + strength)).log().mean())

    best = max((1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0), key=left_out)
    chosen = pairs[read[1]]
    return ((chosen + best * share) / (chosen.sum(-1, keepdim=True) + best)).log()


def fit_probe(
    train: Float[Tensor, "token feature"],
    labels: Int[Tensor, " token"],
    test: Float[Tensor, "test feature"],
    *,
    groups: Int[Tensor, " token"],
    seed: int = 0,
) -> Float[Tensor, "test classes"]:
    """Log-probabilities of a multinomial logistic regression on the test features.

    Adam with a small weight decay from zero weights, over at most `PROBE_STEPS` batches of 256 tokens. It is judged by
    the loss on the last fifth of the groups, every 50 batches, or after every pass over the tokens if that is more. It
    stops after more than `PATIENCE` judgements without improvement, and keeps the weights of the best one. Features are
    centred and scaled by their deviation on the training tokens (by at least a tenth of the typical deviation, so that
    a nearly constant unit is not blown up).

    Args:
        groups: sequence of each training token; a sequence is wholly in the fit or wholly in the stopping part.
    """
    centre, deviation = train.mean(0), train.std(0, correction=0)
    scale = deviation.clamp(min=0.1 * float(deviation.square().mean().sqrt()) + 1e-12)
    train, test = (train - centre) / scale, (test - centre) / scale
    stopping = groups > groups.min() + (groups.max() - groups.min()) * 0.8
    fitting = (~stopping).nonzero()[:, 0] if bool(stopping.any() & ~stopping.all()) else torch.arange(len(labels))
    n_classes = int(labels.max()) + 1
    share = (torch.bincount(labels, minlength=n_classes) + 1.0) / (len(labels) + n_classes)
    weights = torch.zeros(train.shape[1], n_classes, device=train.device, requires_grad=True)
    bias = share.log().to(train).requires_grad_()
    adam = torch.optim.AdamW([weights, bias], lr=2e-3, weight_decay=0.01)
    generator = torch.Generator().manual_seed(seed)
    best, best_loss, waited = [weights.detach().clone(), bias.detach().clone()], float("inf"), 0
    judged = stopping if bool(stopping.any()) else torch.ones_like(stopping)
    batches = max(1, math.ceil(len(fitting) / 256))
    passes = max(1, math.ceil(50 / batches))
    with torch.enable_grad():
        for _ in range(max(1, PROBE_STEPS // (passes * batches))):
            with torch.no_grad():
                loss = float(torch.nn.functional.cross_entropy(train[judged] @ weights + bias, labels[judged]))
            waited = 0 if loss < best_loss else waited + 1
            if waited == 0:
                best_loss, best = loss, [weights.detach().clone(), bias.detach().clone()]
            if waited > PATIENCE:
                break
            for _ in range(passes):
                for batch in fitting[torch.randperm(len(fitting), generator=generator).to(fitting.device)].split(256):
                    adam.zero_grad()
                    torch.nn.functional.cross_entropy(train[batch] @ weights + bias, labels[batch]).backward()
                    adam.step()
    return (test @ best[0] + best[1]).log_softmax(-1)
