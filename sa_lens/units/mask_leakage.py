"""How much information the masks carry: the loss of the ablated stream when masks or kept values are replaced.

A mask that keeps 8 of 128 units can carry 40 bits per token and layer, and the gate that chooses it reads the clean
stream. `leakage` separates the information in the masks from the information in the kept values. docs/leakage.md
explains its tables.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sa_lens.config import check_whole
from sa_lens.core.host import Hook, Host, device_of, gate_hook_names, has_ablated_stream, in_stream, local_scores
from sa_lens.data import TokenFile
from sa_lens.data.blocks import TextBlocks
from sa_lens.statistics import Interval, bootstrap_interval
from sa_lens.units.activations import text_blocks
from sa_lens.units.probes import fit_probe, predict_from_counts

if TYPE_CHECKING:
    import pandas as pd


PROBE_CLASSES = 100
"""Number of frequent next tokens that the probes distinguish; all other tokens form one more class."""

TOKENS_AT_ONCE = 4096
"""Tokens per batch."""

LOGITS_AT_ONCE = 2**25
"""Largest number of logits in memory at a time (128 MiB in float32)."""

CONDITIONS = {
    "clean": "the clean stream",
    "ablated": "the unchanged ablated stream",
    "mean_values": "each kept unit has its mean value, so that only the mask carries information",
    "mean_values_shuffled": "mean values, and masks permuted among the occurrences of a token: only the token is known",
    "other_occurrence": "the values are kept; the mask comes from another occurrence of the same token in another text",
    "shuffled": "the values are kept; masks are permuted among the occurrences of the same token",
    "random": "the values are kept; the entries of each mask are permuted among the units",
    "other_seed": "the values are kept; the masks come from a model of another seed on the same text",
    "self_read": "local gates read the ablated stream instead of the clean one",
}
"""The conditions that `leakage` measures, in the order of its table."""

PER_LAYER = ("mean_values", "other_occurrence", "shuffled", "random", "self_read")
"""Conditions that can also be applied in one layer at a time."""


@dataclass(frozen=True)
class Leakage:
    """How much information the masks carry, from `leakage`.

    All losses are measured on the second half of the sequences; mean values, masks of other occurrences and the
    training data of the probes come from the first half.
    """

    losses: pd.DataFrame
    """One row per condition (`CONDITIONS`) and layer (`all`, or a single one): `n`, the number of predictions that the
    condition can change (a token that occurs once has no other occurrence); `loss`, their mean loss in nats; `ablated`,
    the loss of the unchanged ablated stream at the same predictions; `difference` of the two, with its 95 % interval
    over sequences."""
    probes: pd.DataFrame
    """One row per probe and layer: the held-out `nats` and `accuracy` of predicting the next token (among the frequent
    tokens and one class for all others), with the 95 % interval of `nats` over sequences. A probe reads nothing
    (`frequency`), the current token (`token`), the clean residual stream that enters the layer, or leaves the last one
    for `all` (`residual`), the masks (`mask`), masks permuted among the occurrences of the same token in both halves
    (`mask_shuffled`), or the masks of another model (`mask_other_seed`)."""
    summary: pd.Series
    """The main results in a few numbers; see docs/leakage.md."""


def leakage(
    model: Host,
    text: TokenFile | Int[Tensor, "block pos"] | TextBlocks,
    *,
    other_seed: Host | None = None,
    n_tokens: int | None = 20_000,
    per_layer: bool = False,
    probe_tokens: int = 10_000,
    seed: int = 0,
    progress: bool = True,
) -> Leakage:
    """Measures how much of the ablated stream's skill its masks carry, for gates of any scope, hard or soft.

    The mask of a soft gate is its vector of weights: the condition `random` permutes these weights among the units, and
    mean values are weighted by them.

    Args:
        model: a model with gates.
        text: a token file, or blocks `[block pos]` without padding; at least 4 blocks.
        other_seed: a model of the same shape and tokenizer that was trained from another seed, for the condition
            `other_seed` and the probe `mask_other_seed`; None leaves them out.
        n_tokens: largest number of tokens to read, for both halves together; None reads all.
        per_layer: also changes one layer at a time, at several times the cost.
        probe_tokens: largest number of tokens of each half that the probes read; 0 trains no probes.
        seed: seed of the permutations, the choice of other occurrences, the probes and the intervals.
        progress: whether to show progress bars.

    Raises:
        ValueError: the model has no gates, the text is too short or repeats no token, or `other_seed` differs from the
            model in more than its weights.
    """
    import pandas as pd
    from tqdm.auto import tqdm

    _check(model, other_seed)
    check_whole("probe_tokens", probe_tokens, 0)
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
        "random": _Change(masks=permute_units(masks, generator)),
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
        probes = _probes(model, fit, held_out, fit_masks, masks, other_seed, probe_tokens, seed, progress)
    return Leakage(losses, probes, _summary(nats, (shuffled >= 0)[:, :-1], probes))


def _check(model: Host, other: Host | None) -> None:
    if not has_ablated_stream(model):
        raise ValueError(f"leakage needs gates, but this {type(model).__name__} has none: there is no mask to read")
    if other is None:
        return
    if other is model or not has_ablated_stream(other):
        raise ValueError("other_seed must be a second model with gates, trained from another seed")
    shape, gates = (
        ("n_layers", "n_heads", "d_head", "d_mlp", "d_vocab", "attn_only"),
        ("scope", "scores", "k_attn", "k_mlp", "kind", "attn_unit"),
    )
    different = [n for n in shape if getattr(model.cfg, n) != getattr(other.cfg, n)]
    different += [n for n in gates if getattr(model.gates, n) != getattr(other.gates, n)]  # type: ignore[attr-defined]
    if different:
        raise ValueError(f"other_seed differs from the model in {', '.join(different)}: only its weights may differ")


# ----------------------------------------------------------------------------------------------------------- the edits


class _Change(NamedTuple):
    """One condition: the masks and values that replace the model's own."""

    stream: Any = "ablated"
    means: Mapping[str, Tensor] = {}
    """Mean value of each unit by the name of the gate's `hook_in`."""
    masks: Mapping[str, Tensor] | None = None
    """Masks `[batch pos ...]` by hook name."""
    rows: Int[Tensor, "batch pos"] | None = None
    """Index of the flattened row of `masks` that each token takes; -1 keeps the token's own mask. None: all tokens take
    the row at their own position."""
    self_read: bool = False

    def acts(self, tokens: Int[Tensor, "batch pos"]) -> Bool[Tensor, "batch pred"]:
        """Returns the predictions that the condition can change."""
        if self.rows is None:
            return torch.ones_like(tokens[:, :-1], dtype=torch.bool)
        return (self.rows >= 0)[:, :-1]


def _nats(
    model: Host, tokens: Int[Tensor, "batch pos"], change: _Change, layer: int | None
) -> Float[Tensor, "batch pred"]:
    """Returns the loss in nats of each predicted token under a change in one layer, or in all layers for None."""
    parts, done = [], 0
    for batch in text_batches(model, tokens):
        rows = slice(done, done + len(batch))
        hooks = [
            (name, lambda value, hook, mean=change.means[name]: mean.to(value.device).expand_as(value))
            for name in _names_in(change.means, layer)
        ]
        if change.self_read:
            hooks += _self_read_hooks(model, layer)
        with torch.no_grad(), _changed_stream(model, batch, change, rows, layer):
            logits = model.run_with_hooks(batch, fwd_hooks=hooks)[:, :-1].float()
        parts.append(logits.logsumexp(-1) - logits.gather(-1, batch[:, 1:, None])[..., 0])
        done += len(batch)
    return torch.cat(parts)


def _changed_stream(
    model: Host, batch: Tensor, change: _Change, rows: slice, layer: int | None
) -> AbstractContextManager[Any]:
    if change.masks is None:
        return in_stream(model, change.stream)
    own = text_masks(model, batch) if change.rows is not None else {}
    masks = {}
    for name in _names_in(change.masks, layer):
        mask = change.masks[name]
        if change.rows is None:
            mask = mask[rows]
        else:
            donors = change.rows[rows].to(mask.device)
            mask = mask.flatten(0, 1)[donors.clamp(min=0)]
            keeps_own = (donors < 0).reshape(*donors.shape, *[1] * (mask.ndim - 2))
            mask = torch.where(keeps_own, own[name].to(mask.device), mask)
        masks[name] = mask.to(device=batch.device, dtype=model.cfg.dtype)
    return in_stream(model, "ablated", masks=masks)


def _names_in(names: Iterable[str], layer: int | None) -> list[str]:
    """Returns the hook names that belong to a layer, or all of them for None."""
    return [name for name in names if layer is None or name.startswith(f"blocks.{layer}.")]


def _self_read_hooks(model: Host, layer: int | None) -> Iterator[Hook]:
    """Yields hooks that compute the local scores from the residual stream of the ablated pass itself."""
    residuals: dict[int, Tensor] = {}
    for index in range(model.cfg.n_layers):
        if layer in (None, index):
            yield f"blocks.{index}.hook_resid_pre", lambda resid, hook, index=index: residuals.update({index: resid})
    for name in _names_in(gate_hook_names(model, "scores"), layer):
        gate = name.rsplit(".", 1)[0]

        def compute_scores(scores: Tensor, hook: Any, gate: str = gate) -> Tensor:
            return local_scores(model, gate, residuals[int(gate.split(".")[1])])

        yield name, compute_scores


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
    """Returns the mean over the chosen predictions with a bootstrap interval over sequences."""
    return bootstrap_interval((nats.double() * where).sum(-1), where.double().sum(-1), resamples=1000, seed=seed)


def _summary(nats: Mapping[tuple[str, int | None], Tensor], where: Tensor, probes: pd.DataFrame) -> pd.Series:
    """Returns `mask_share` and its parts, at tokens that occur twice, and what linear probes learn from the masks."""
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
    limit: int,
    seed: int,
    progress: bool,
) -> pd.DataFrame:
    import pandas as pd
    from tqdm.auto import tqdm

    count, generator = max(2, limit // fit.shape[1]), torch.Generator().manual_seed(seed + 1)
    halves = [
        _ProbedHalf.of(model, tokens[:count], masks_of_half, other, generator)
        for tokens, masks_of_half in ((fit, fit_masks), (held_out, masks))
    ]
    if min(int(half.where.sum()) for half in halves) < 2:
        raise ValueError("too few tokens occur twice in each half of the text for the probes: give more text")
    labels = _labels([half.tokens[:, 1:][half.where] for half in halves])
    current = [half.tokens[:, :-1][half.where] for half in halves]
    where = halves[0].where
    sequences = torch.arange(len(where), device=where.device)[:, None].expand_as(where)[where]
    predictions: list[tuple[str, int | str, Tensor]] = [
        ("frequency", "all", predict_from_counts([torch.zeros_like(tokens) for tokens in current], labels)),
        ("token", "all", predict_from_counts(current, labels)),
    ]
    for layer in tqdm([*range(model.cfg.n_layers), None], desc="probes", unit=" layers", disable=not progress):
        train, test = (half.features(layer) for half in halves)
        predictions += [
            (name, "all" if layer is None else layer, fit_probe(x, labels[0], test[name], groups=sequences, seed=seed))
            for name, x in train.items()
        ]
    rows, where = [], halves[1].where.cpu()
    for probe, layer, log_probabilities in predictions:
        nats = torch.zeros(where.shape, dtype=torch.float64)
        nats[where] = -log_probabilities.gather(-1, labels[1][:, None])[:, 0].double().cpu()
        mean, low, high = _mean_over_sequences(nats, where, seed)
        accuracy = float((log_probabilities.argmax(-1) == labels[1]).double().mean())
        rows.append(
            {"probe": probe, "layer": layer, "n": len(labels[1]), "nats": mean, "nats_low": low, "nats_high": high}
            | {"accuracy": accuracy}
        )
    return pd.DataFrame(rows)


class _ProbedHalf(NamedTuple):
    """What the probes read of one half of the text: the predictions after tokens that occur twice in it."""

    tokens: Int[Tensor, "batch pos"]
    where: Bool[Tensor, "batch pred"]
    rows: Int[Tensor, "batch pos"]
    masks: Mapping[str, Tensor]
    other_masks: Mapping[str, Tensor] | None
    residuals: list[Float[Tensor, "batch pred d_model"]]

    @classmethod
    def of(
        cls,
        model: Host,
        tokens: Int[Tensor, "batch pos"],
        masks: Mapping[str, Tensor],
        other: Host | None,
        generator: torch.Generator,
    ) -> _ProbedHalf:
        rows = other_occurrences(tokens, tokens, generator)
        other_masks = None if other is None else text_masks(other, tokens.to(device_of(other)))
        return cls(tokens, (rows >= 0)[:, :-1], rows, masks, other_masks, _residuals(model, tokens))

    def features(self, layer: int | None) -> dict[str, Float[Tensor, "token feature"]]:
        """Returns the input of each probe that reads the model, for one layer or for all (None)."""

        def concatenate(masks: Mapping[str, Tensor]) -> Float[Tensor, "batch pos unit"]:
            names = _names_in(masks, layer)
            flat = torch.cat([masks[name][: len(self.tokens)].flatten(2) for name in names], -1)
            return flat.to(self.tokens.device)

        masks = concatenate(self.masks)
        features = {
            "mask": masks[:, :-1][self.where],
            "mask_shuffled": masks.flatten(0, 1)[self.rows[:, :-1][self.where]],
        }
        if self.other_masks is not None:
            features["mask_other_seed"] = concatenate(self.other_masks)[:, :-1][self.where]
        features["residual"] = self.residuals[-1 if layer is None else layer][self.where]
        return {name: x.float() for name, x in features.items()}


def _residuals(model: Host, tokens: Int[Tensor, "batch pos"]) -> list[Float[Tensor, "batch pred d_model"]]:
    """Returns the clean residual stream that enters each layer, and the one that leaves the last layer."""
    last = model.cfg.n_layers - 1
    names = [*(f"blocks.{layer}.hook_resid_pre" for layer in range(last + 1)), f"blocks.{last}.hook_resid_post"]
    parts: dict[str, list[Tensor]] = {name: [] for name in names}
    for batch in text_batches(model, tokens):
        with torch.no_grad(), in_stream(model, "clean"):
            _, cache = model.run_with_cache(batch, names_filter=lambda name: name in parts)
        for name in names:
            parts[name].append(cache[name][:, :-1].float())
    return [torch.cat(parts[name]) for name in names]


def _labels(next_tokens: Sequence[Int[Tensor, " token"]]) -> list[Int[Tensor, " token"]]:
    """Numbers the most frequent next tokens of the first half from 1; all other tokens get 0."""
    values, counts = next_tokens[0].unique(return_counts=True)
    frequent = values[counts.argsort(descending=True, stable=True)[:PROBE_CLASSES]]
    matches = [tokens[:, None] == frequent for tokens in next_tokens]
    return [match.int().argmax(-1) + match.any(-1) for match in matches]


def mean_values(model: Host, tokens: Int[Tensor, "batch pos"]) -> dict[str, Float[Tensor, " ..."]]:
    """Returns each unit's mean value over the tokens that keep it, by the name of the gate's `hook_in`.

    Values are those of the ablated stream, weighted by the mask if it is soft. A unit that is never kept has its mean
    over all tokens.
    """
    sums: dict[str, list[Tensor]] = {}
    names = {*gate_hook_names(model), *gate_hook_names(model, "in")}
    for batch in text_batches(model, tokens):
        with torch.no_grad(), in_stream(model, "ablated"):
            _, cache = model.run_with_cache(batch, names_filter=lambda name: name in names)
        for name in gate_hook_names(model, "in"):
            value = cache[name].double()
            mask = cache[name.replace("hook_in", "hook_mask")].double().expand_as(value)
            parts = [x.sum((0, 1)) for x in (mask * value, mask, value, torch.ones_like(value))]
            sums[name] = [a + b for a, b in zip(sums[name], parts, strict=True)] if name in sums else parts
    return {
        name: torch.where(kept > 0, weighted / kept.clamp(min=1e-12), value / n).to(model.cfg.dtype)
        for name, (weighted, kept, value, n) in sums.items()
    }


def other_occurrences(
    tokens: Int[Tensor, "batch pos"], among: Int[Tensor, "batch2 pos2"], generator: torch.Generator
) -> Int[Tensor, "batch pos"]:
    """Returns, for each token, the flattened index in `among` of an occurrence of the same token, or -1 without one.

    If both texts are the same object, the indices are a random permutation of the occurrences of each token that leaves
    none in its place. Otherwise each occurrence is drawn at random.
    """
    wanted, pool = tokens.flatten().cpu(), among.flatten().cpu()
    order = torch.randperm(len(pool), generator=generator)
    order = order[pool[order].sort(stable=True).indices]  # sorted by token, in random order within each token
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


def permute_units(masks: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Returns masks whose entries are permuted at random among the units, for each token and layer separately."""
    permuted = {}
    for name, mask in masks.items():
        # one sequence at a time, since the random numbers take four bytes per unit
        sequences = [
            sequence.gather(-1, torch.rand(sequence.shape, generator=generator).argsort(-1).to(mask.device))
            for sequence in mask.flatten(2)
        ]
        permuted[name] = torch.stack(sequences).view_as(mask)
    return permuted


def text_masks(model: Host, tokens: Int[Tensor, "batch pos"]) -> dict[str, Tensor]:
    """Returns the masks of a text by hook name; those of hard gates are booleans."""
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
    """Splits the sequences into batches, limited by their tokens and by their logits."""
    at_once = min(TOKENS_AT_ONCE, LOGITS_AT_ONCE // model.cfg.d_vocab)
    return tokens.split(max(1, at_once // tokens.shape[1]))
