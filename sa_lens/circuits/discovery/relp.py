"""RelP: EAP with propagation rules in place of the derivative.

The rules are hooks that leave every value as it is and change what gradients pass on. Each makes an operation linear in
its input, with coefficients that are constants of the pass.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sa_lens.circuits.discovery.eap import estimate_effects
from sa_lens.circuits.experiment import Experiment, analysis
from sa_lens.circuits.graph import Circuit
from sa_lens.config import Stream
from sa_lens.core.host import Hook, Host, require_hooks, weight


@analysis
def relp(exp: Experiment, *, fix_attention: bool = False, progress: bool = True) -> Circuit:
    """Estimates the effect of every edge by relevance patching: EAP with propagation rules in place of the derivative.

    The denominator of every LayerNorm is a constant (LN-rule), a neuron is its input times the constant ratio of output
    to input (identity rule), and of a product of two neurons each gets half (half rule). Masks are always frozen: gates
    that choose again have no propagation rule.

    Args:
        fix_attention: attention patterns are constants too (AH-rule). Edges into queries and keys then score 0.
            The authors' example leaves this rule out.
        progress: show a progress bar if it takes more than a few seconds.

    Returns, Raises: as `eap`, and ValueError for `masks="live"`.

    Source: Rezaei Jafari et al., arXiv 2508.21258, and the authors' repository.
    """
    exp = exp.fill_in(masks="frozen")
    if exp.masks == "live":
        raise ValueError("masks='live' has no propagation rule: use relp with masks='frozen', or eap with masks='live'")
    exp.metric.require_gradient(exp.pairs, exp.model.cfg.d_vocab, "relp")
    rules = propagation_rules(exp.model, exp.stream, fix_attention)
    return estimate_effects(exp, "relp", [1.0], {"fix_attention": fix_attention}, rules, progress=progress)


def propagation_rules(model: Host, stream: Stream, fix_attention: bool = False) -> list[Hook]:
    """Returns hooks under which one pass follows the propagation rules.

    Denominators of LayerNorms are constants. A neuron is its input times the constant ratio of output to input; with a
    gated MLP, whose neuron is a product of two factors, each factor passes on half. A gate's mask, a constant, stays
    between the neuron and what reads it.

    Args:
        stream: the stream in which the pass runs.
        fix_attention: attention patterns are constants.

    Raises:
        ValueError: an MLP whose neurons have no hook points of their own.

    Source: the rules LN, identity, half and AH of Rezaei Jafari et al., arXiv 2508.21258.
    """
    cfg = model.cfg
    hooks: list[Hook] = [(name, _constant) for name in model.hook_dict if name.endswith("hook_scale")]
    if fix_attention:
        hooks += [(f"blocks.{layer}.attn.hook_pattern", _constant) for layer in range(cfg.n_layers)]
    for layer in range(0 if cfg.attn_only else cfg.n_layers):
        hooks += _Neurons(model, layer, stream).hooks()
    return hooks


def _constant(x: Tensor, hook: Any) -> Tensor:
    return x.detach()


class _Neurons:
    """Applies the rules to the neurons of one MLP."""

    def __init__(self, model: Host, layer: int, stream: Stream) -> None:
        mlp, gate = f"blocks.{layer}.mlp", f"blocks.{layer}.mlp_gate.hook_in"
        self.into = [f"{mlp}.hook_pre"]
        self.bias: Tensor | None = None
        if model.cfg.gated_mlp:
            self.into.append(f"{mlp}.hook_pre_linear")
            self.bias = weight(model, f"{mlp}.b_in").detach()
        # where the neurons' own values are: before their LayerNorm, and before the gate masks them
        if f"{mlp}.hook_mid" in model.hook_dict:
            self.out = f"{mlp}.hook_mid"
        else:
            self.out = gate if stream == "ablated" and gate in model.hook_dict else f"{mlp}.hook_post"
        require_hooks(model, [*self.into, self.out])
        self.seen: list[Float[Tensor, "pair pos d_mlp"]] = []

    def hooks(self) -> list[Hook]:
        return [*((name, self._keep) for name in self.into), (self.out, self._share)]

    def _keep(self, x: Float[Tensor, "pair pos d_mlp"], hook: Any) -> None:
        self.seen.append(x)

    def _share(self, x: Float[Tensor, "pair pos d_mlp"], hook: Any) -> Float[Tensor, "pair pos d_mlp"]:
        """Returns the same value, made linear in each factor with the ratio of the product to that factor."""
        product = x.detach() if self.bias is None else x.detach() - self.bias
        out = x.detach()
        for factor in self.seen:
            fixed = factor.detach()
            ratio = torch.where(fixed == 0, 0.0, product / fixed) / len(self.seen)
            out = out + ratio * (factor - fixed)
        self.seen = []
        return out
