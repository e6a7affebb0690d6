"""Gates that begin near the largest units of a pretrained model, by least squares.

Drawn gates keep units at random, and a pretrained model in which most units are missing at random predicts worse than
no model: its ablated loss lies above that of a uniform guess, and the gradient of a mask that is wrong everywhere says
little. Least squares needs no gradient.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sa_lens.core import SelfAblatingTransformer
from sa_lens.core.gate import Gate

TOKENS_AT_ONCE = 2048
"""Tokens of a batch."""

RIDGE = 1e-2
"""What is added to the second moment of each direction of the residual stream, as a share of it."""


class _Moments:
    """Sums over the tokens of a text that least squares needs for the gates of a layer."""

    def __init__(self) -> None:
        self.tokens: Tensor = torch.empty(0)
        self.inputs: Any = 0
        """Second moments of the residual stream and a constant 1."""
        self.products: dict[str, Any] = {}
        """Their products with the sizes of the units, by kind of gate."""
        self.size: Any = 0
        """Sum of the mean absolute entry of the residual stream."""


@torch.no_grad()
def fit_gates(model: SelfAblatingTransformer, blocks: Int[Tensor, "block pos"]) -> None:
    """Fits local gates to a text: the score of a unit becomes a least-squares estimate of the size of its value.

    A gate then keeps about the k units with the largest values in the clean stream, as far as a linear map of what it
    reads can tell. The target is the square root of the absolute value (of a head: of the norm of `z`), which is less
    ruled by few large values. Scores have the size of those of drawn gates; a gate of low rank gets the best map of
    that rank. Nothing else of the model changes.

    Args:
        model: a pretrained model with learned local gates.
        blocks: a text, on any device.

    Raises:
        ValueError: the gates are not local or not learned, or the text has fewer tokens than the model has dimensions.
    """
    gates = model.gates
    if gates.scope != "local" or not gates.learned:
        raise ValueError(
            f"gates of scope {gates.scope!r} with scores {gates.scores!r} cannot be fitted to the units' values: only "
            "local gates that are learned can"
        )
    if blocks.numel() <= model.cfg.d_model:
        raise ValueError(
            f"{blocks.numel()} tokens are too few for a fit of {model.cfg.d_model} dimensions: give at least ten times "
            "as many"
        )
    modules = {name: module for name, module in model.named_modules() if isinstance(module, Gate)}
    moments = [_Moments() for _ in range(model.cfg.n_layers)]
    hooks: list[Any] = []
    for layer, of in enumerate(moments):
        hooks.append((f"blocks.{layer}.hook_resid_pre", partial(_add_inputs, of)))
        for kind, point in (("attn_gate", "attn.hook_z"), ("mlp_gate", "mlp.hook_post")):
            if (gate := modules.get(f"blocks.{layer}.{kind}")) is not None:
                hooks.append((f"blocks.{layer}.{point}", partial(_add_products, of, kind, gate)))
    device = model.W_E.device
    with model.clean():
        for batch in blocks.split(max(1, TOKENS_AT_ONCE // blocks.shape[1])):
            model.run_with_hooks(batch.to(device), return_type=None, fwd_hooks=hooks)
    for name, gate in modules.items():
        _, layer, kind = name.split(".")
        _fill(gate, moments[int(layer)], kind, blocks.numel())


def _add_inputs(of: _Moments, resid: Float[Tensor, "batch pos d_model"], hook: Any) -> None:
    x = resid.flatten(0, 1).double()
    of.tokens = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
    of.inputs = of.inputs + of.tokens.T @ of.tokens
    of.size = of.size + x.abs().mean(1).sum()


def _add_products(of: _Moments, kind: str, gate: Gate, values: Tensor, hook: Any) -> None:
    heads = values.ndim == 4 and gate.unit_shape[-1] == 1
    sizes = (values.norm(dim=-1) if heads else values.abs().flatten(2)).flatten(0, 1).double().sqrt()
    of.products[kind] = of.products.get(kind, 0) + of.tokens.T @ sizes


def _fill(gate: Gate, of: _Moments, kind: str, n_tokens: int) -> None:
    """Solves the normal equations of a gate and puts the solution into it."""
    ridge = RIDGE * of.inputs.diagonal()
    ridge[-1] = 0
    # a direction in which the stream is always 0 has no second moment
    solution = torch.linalg.solve(of.inputs + torch.diag(ridge + 1e-12 * of.inputs.diagonal().max()), of.products[kind])
    # scores with mean 0, and with a deviation over tokens and units as of drawn gates: the mean entry of the stream
    solution[-1] -= (of.inputs[-1] @ solution).mean() / n_tokens
    variance = (solution * (of.inputs @ solution)).sum() / n_tokens / gate.n_units
    solution *= of.size / n_tokens / variance.sqrt()
    weight, bias = solution[:-1], solution[-1]
    if gate.cfg.rank is None:
        gate.W_local.copy_(weight)
    else:
        mean = of.inputs[-1, :-1] / n_tokens
        directions = _widest(weight, of.inputs[:-1, :-1] / n_tokens - torch.outer(mean, mean), gate.cfg.rank)
        factor = weight @ directions
        bias = bias + mean @ (weight - factor @ directions.T)
        # B has the size of a drawn one
        size = math.sqrt(gate.n_units / gate.cfg.rank)
        gate.A_local.copy_(factor / size)
        gate.B_local.copy_(directions.T * size)
    gate.b_local.copy_(bias)


def _widest(
    weight: Float[Tensor, "d_model unit"], covariance: Float[Tensor, "d_model d_model"], rank: int
) -> Float[Tensor, "unit rank"]:
    """The orthonormal directions in which the scores `x @ weight` vary most."""
    sizes, axes = torch.linalg.eigh(covariance)
    stretched = (axes * sizes.clamp(min=0).sqrt()).T @ weight
    # a decomposition of d_model x d_model is several times faster than that of the whole matrix
    widest = torch.linalg.eigh(stretched @ stretched.T).eigenvectors[:, -rank:]
    return torch.linalg.qr(stretched.T @ widest).Q
