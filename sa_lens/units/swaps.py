"""What is put in place of masks and values: masks of other tokens, permuted masks, means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sa_lens.core.host import Host, gate_hook_names, in_stream

TOKENS_AT_ONCE = 4096
"""Tokens of a batch."""

LOGITS_AT_ONCE = 2**25
"""Largest number of logits held at a time (float32: 128 MiB)."""


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
        at = torch.searchsorted(values, wanted).clamp(max=len(values) - 1)
        drawn = (torch.rand(len(wanted), generator=generator, dtype=torch.float64) * counts[at]).long()
        chosen = torch.where(values[at] == wanted, order[starts[at] + drawn], chosen)
    return chosen.reshape(tokens.shape).to(tokens.device)


def permuted_units(masks: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Each token's mask with its entries permuted at random among the units, layer by layer."""
    permuted = {}
    for name, mask in masks.items():
        flat = mask.flatten(2)
        # a batch row at a time: the random numbers need four bytes a unit
        order = (torch.rand(row.shape, generator=generator).argsort(-1).to(flat.device) for row in flat)
        permuted[name] = torch.stack([row.gather(-1, at) for row, at in zip(flat, order, strict=True)]).view_as(mask)
    return permuted


def text_masks(model: Host, tokens: Int[Tensor, "batch pos"]) -> dict[str, Tensor]:
    """Masks of a text by hook name; those of hard gates as booleans."""
    parts: dict[str, list[Tensor]] = {}
    hard = model.gates.kind == "hard"  # type: ignore[attr-defined]
    for batch in text_batches(model, tokens):
        with torch.no_grad():
            found = model.record_masks(batch)  # type: ignore[attr-defined]
        for gate, layers in found.items():
            for layer, mask in enumerate(layers):
                parts.setdefault(f"blocks.{layer}.{gate}.hook_mask", []).append(mask.bool() if hard else mask)
    return {name: torch.cat(found) for name, found in parts.items()}


def text_batches(model: Host, tokens: Int[Tensor, "batch pos"]) -> Sequence[Tensor]:
    """Parts of the sequences that fit one pass each, by tokens and by logits."""
    at_once = min(TOKENS_AT_ONCE, LOGITS_AT_ONCE // model.cfg.d_vocab)
    return tokens.split(max(1, at_once // tokens.shape[1]))
