"""The slow twin of the ablated stream: a plain transformer, run on every prefix, with masks put in by ordinary hooks.

Masks are computed here from the clean residual stream and the gates' weights by a sort that can be read, sharing no
code with the package.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from sa_lens.core import HookedTransformer, SelfAblatingTransformer

Edit = Callable[[Tensor, HookPoint, int | None], Tensor]
"""(activation, hook point, position t or None for all) -> activation edited there."""


def slow_top_k(row: list[float], k: int) -> list[float]:
    """1 for the k largest, 0 elsewhere; a stable sort lets the lowest index win."""
    order = sorted(range(len(row)), key=lambda i: (-row[i], i))
    return [1.0 if i in order[:k] else 0.0 for i in range(len(row))]


def slow_surrogate(row: list[float], k: int, surrogate: str, temperature: float) -> list[float]:
    """The soft weights of the method, by scalar arithmetic."""
    if k == len(row):
        return [1.0] * k
    ranked = sorted(row, reverse=True)
    upper, lower = ranked[k - 1], ranked[k]
    g, width = (upper + lower) / 2, upper - lower
    shifted = [(s - g) / (temperature * width + 1e-12) for s in row]
    if surrogate == "sigmoid":
        v = [1 / (1 + math.exp(-x)) if x > -700 else 0.0 for x in shifted]
        return [k * x / sum(v) for x in v]
    largest = max(shifted)
    e = [math.exp(x - largest) for x in shifted]
    return [x / sum(e) for x in e]


def slow_masks(plain: HookedTransformer, model: SelfAblatingTransformer, tokens: Tensor) -> dict[str, Tensor]:
    """Masks [batch, pos, ...] by the name of the activation that they multiply."""
    cfg = model.gates
    _, cache = plain.run_with_cache(tokens)
    last = cache["resid_post", plain.cfg.n_layers - 1]
    final = plain.ln_final(last) if plain.cfg.normalization_type is not None else last
    weights = {name: p.detach() for name, p in model.named_parameters() if "_gate." in name}
    masks = {}
    for layer in range(plain.cfg.n_layers):
        for gate, k, target in (("attn_gate", cfg.k_attn, "attn.hook_z"), ("mlp_gate", cfg.k_mlp, "mlp.hook_post")):
            prefix = f"blocks.{layer}.{gate}"
            if not any(name.startswith(prefix) for name in weights):
                continue
            scores = torch.zeros(())
            if cfg.scope in ("local", "both"):
                scores = cache["resid_pre", layer] @ weights[f"{prefix}.W_local"] + weights[f"{prefix}.b_local"]
            if cfg.scope in ("global", "both"):
                scores = scores + (final @ weights[f"{prefix}.W_global"] + weights[f"{prefix}.b_global"])
            rows = scores.flatten(0, 1).tolist()
            if cfg.kind == "hard":
                mask = [slow_top_k(row, k) for row in rows]
            else:
                mask = [slow_surrogate(row, k, cfg.surrogate, cfg.temperature) for row in rows]
            shaped = torch.tensor(mask, dtype=last.dtype).reshape(scores.shape)
            if gate == "attn_gate":
                shaped = shaped.unflatten(-1, (plain.cfg.n_heads, -1))
            masks[f"blocks.{layer}.{target}"] = shaped
    return masks


def masking_hooks(masks: dict[str, Tensor], position: int) -> list[tuple[str, Callable[..., Tensor]]]:
    """Ordinary hooks that apply the masks at one position."""

    def hook_for(mask: Tensor) -> Callable[..., Tensor]:
        def hook(x: Tensor, hook: HookPoint) -> Tensor:
            x = x.clone()
            x[:, position] = x[:, position] * mask[:, position]
            return x

        return hook

    return [(name, hook_for(mask)) for name, mask in masks.items()]


def ablated_logits(
    plain: HookedTransformer,
    model: SelfAblatingTransformer,
    tokens: Tensor,
    edits: list[tuple[str, Edit]] | None = None,
) -> Tensor:
    """Ablated logits at every position: for each t the plain model on tokens[:t+1], masked (and edited) at t alone."""
    rows = []
    for t in range(tokens.shape[1]):
        prefix = tokens[:, : t + 1]
        hooks = masking_hooks(slow_masks(plain, model, prefix), t)
        for name, edit in edits or []:
            hooks.append((name, lambda x, hook, edit=edit, t=t: edit(x, hook, t)))
        rows.append(plain.run_with_hooks(prefix, fwd_hooks=hooks)[:, t])
    return torch.stack(rows, dim=1)
