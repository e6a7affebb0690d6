"""The two streams without hooks, layer by layer, from tokens to loss terms.

With local gates and a base that trains, both streams share one doubled batch (axis `stream`: clean, ablated), so each
weight is read once. With global gates the ablated stream starts when the clean one has ended; with a frozen base they
run one after the other too, so that nothing is computed backwards through the clean stream.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sa_lens.config import LossConfig
from sa_lens.core.fused.cross_entropy import linear_cross_entropy
from sa_lens.core.fused.linear_map import MaskOf, linear, matrices
from sa_lens.core.fused.operations import embed_and_unembed, on_cpu, rms_norm, shifted_product
from sa_lens.core.fused.selection import masked_units, scores_of
from sa_lens.core.fused.two_stream_attention import Rotary, stream_attention
from sa_lens.core.gated import GatedTransformer
from sa_lens.core.host import at_least_float32
from sa_lens.core.loss_terms import reconstruction_loss
from sa_lens.core.norms_and_activations import ACTIVATIONS, normalise

Make = Callable[..., Tensor]
"""A function of tensors alone, whose result is computed again in the backward pass."""


class StreamLosses(NamedTuple):
    """What the fused path computes; None where the ablated pass is left out, R also if it is not asked for."""

    total: Float[Tensor, ""]
    """The terms with their coefficients; the clean loss where the ablated pass is left out."""
    clean: Float[Tensor, ""]
    ablated: Float[Tensor, ""] | None
    reconstruction: Float[Tensor, ""] | None


def fused_loss(
    model: GatedTransformer,
    cfg: LossConfig,
    tokens: Int[Tensor, "batch pos"],
    targets: Int[Tensor, "batch pos"] | None,
    *,
    dtype: torch.dtype,
    recompute: bool = False,
    clean_alone: bool = False,
) -> StreamLosses:
    """Loss terms of both streams; without gates, or if asked for, of the clean stream alone.

    Args:
        targets: the token to predict at each position; None: the next token, T - 1 predictions.
        dtype: of the matrix products; scores, top-k, surrogate, softmax and losses are float32 or wider.
        recompute: keep only each layer's input and compute the layer again in the backward pass.
    """
    clean_alone = clean_alone or not model.gates.gated
    passes = Passes(model, dtype, recompute and torch.is_grad_enabled(), keep_weights=frozen(model) and not clean_alone)
    return losses_of(passes, cfg, tokens, targets, clean_alone)


def frozen(model: GatedTransformer) -> bool:
    """Whether nothing but the gates is trained."""
    return not any(p.requires_grad for p in model.base_parameters())


def losses_of(
    passes: Passes,
    cfg: LossConfig,
    tokens: Int[Tensor, "batch pos"],
    targets: Int[Tensor, "batch pos"] | None,
    clean_alone: bool,
) -> StreamLosses:
    """Runs the passes and returns the loss terms, as `fused_loss` has them."""
    model = passes.model
    if tokens.shape[1] > model.cfg.n_ctx:
        raise ValueError(f"tokens have {tokens.shape[1]} positions, more than the model's n_ctx={model.cfg.n_ctx}")
    embedded = passes.embed(tokens)
    if clean_alone:
        loss, *_ = passes.cross_entropy((passes.clean(embedded)[-1][0],), (1.0,), tokens, targets)
        return StreamLosses(loss, loss, None, None)
    if model.gates.reads_global or frozen(model):
        clean, ablated = passes.one_after_the_other(embedded)
    else:
        clean, ablated = passes.together(embedded)
    finals, coefficients = (clean[-1], ablated[-1]), (cfg.clean, cfg.ablated)
    total, clean_loss, ablated_loss = passes.cross_entropy(finals, coefficients, tokens, targets)
    if not cfg.reconstruction:
        return StreamLosses(total, clean_loss, ablated_loss, None)
    reconstruction = reconstruction_loss(clean, ablated)
    return StreamLosses(total + cfg.reconstruction * reconstruction, clean_loss, ablated_loss, reconstruction)


class _Clean(NamedTuple):
    """What the ablated stream needs of a clean layer."""

    resid_pre: Float[Tensor, "stream batch pos d_model"]
    keys_and_values: Float[Tensor, "batch pos 2_kv_head d_head"]
    """Before any rotation."""


class Passes:
    """Runs the layers of one model in one precision.

    Args:
        recompute: keep only each layer's input for the backward pass.
        keep_weights: keep weights in the precision of the products, for two passes of a base that is frozen.
    """

    def __init__(
        self, model: GatedTransformer, dtype: torch.dtype, recompute: bool, *, keep_weights: bool = False
    ) -> None:
        self.model = model
        self.cfg = model.cfg
        self.dtype = dtype
        self.recompute = recompute
        self.qkv_bias = model.qkv_bias
        self._unembedding: Tensor | None = None
        self._keep_weights = keep_weights
        self._kept: dict[int, list[Tensor]] = {}

    # ------------------------------------------------------------------------------------------------------ streams

    def embed(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        """What enters the first layer."""
        if self.model.tied and on_cpu(tokens):
            embedded, self._unembedding = embed_and_unembed(self.model.embed.W_E, tokens)
        else:
            embedded = F.embedding(tokens, self.model.embed.W_E)
        embedded = at_least_float32(embedded)
        if self.cfg.positional_embedding_type == "rotary":
            return embedded
        return embedded + at_least_float32(self.model.pos_embed.W_pos[: tokens.shape[1]])

    def clean(self, embedded: Tensor) -> list[Float[Tensor, "1 batch pos d_model"]]:
        """Each layer's output and the final normalised one, of the clean stream alone."""
        return self._clean_layers(embedded[None])[0]

    def together(self, embedded: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Layer outputs and final output of both streams, in one doubled batch; local gates only."""
        resid = torch.stack([embedded, embedded])
        outputs = []
        for block in self.model.blocks:
            resid = self._run(self._joint_layer, block, resid)
            outputs.append(resid)
        outputs.append(self.normalise(getattr(self.model, "ln_final", None), resid))
        clean, ablated = zip(*(x.unbind(0) for x in outputs), strict=True)
        return list(clean), list(ablated)

    def one_after_the_other(self, embedded: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Layer outputs and final output of both streams, the clean one first."""
        clean, records = self._clean_layers(embedded[None])
        resid = embedded[None]
        ablated = []
        for block, record in zip(self.model.blocks, records, strict=True):
            resid = self._run(self._ablated_layer, block, resid, *record, clean[-1])
            ablated.append(resid)
        ablated.append(self.normalise(getattr(self.model, "ln_final", None), resid))
        return [x[0] for x in clean], [x[0] for x in ablated]

    def _clean_layers(self, resid: Tensor) -> tuple[list[Tensor], list[_Clean]]:
        outputs, records = [], []
        for block in self.model.blocks:
            before = resid
            resid, keys_and_values = self._run(self._clean_layer, block, resid)
            records.append(_Clean(before, keys_and_values))
            outputs.append(resid)
        outputs.append(self.normalise(getattr(self.model, "ln_final", None), resid))
        return outputs, records

    def _run(self, layer: Callable[..., Any], *args: Any) -> Any:
        return checkpoint(layer, *args, use_reentrant=False) if self.recompute else layer(*args)

    # ------------------------------------------------------------------------------------------------------- layers

    def _clean_layer(self, block: Any, resid: Tensor) -> tuple[Tensor, Tensor]:
        qkv = self._qkv(block, resid)
        z = self._attend(block.attn, qkv, None)
        return self._rest(block, resid, z, None, None), qkv[0, ..., self.cfg.n_heads :, :]

    def _joint_layer(self, block: Any, resid: Tensor) -> Tensor:
        z = self._attend(block.attn, self._qkv(block, resid), None)
        return self._rest(block, resid, z, resid[-1 if self.model.gates.reads_ablated else 0], None)

    def _ablated_layer(
        self, block: Any, resid: Tensor, clean_pre: Tensor, keys_and_values: Tensor, final: Tensor
    ) -> Tensor:
        z = self._attend(block.attn, self._qkv(block, resid), keys_and_values)
        local = resid if self.model.gates.reads_ablated else clean_pre
        return self._rest(block, resid, z, local[0], final[0])

    def mask_units(
        self, block: Any, kind: Literal["attn", "mlp"], units: Tensor, local: Tensor | None, final: Tensor | None
    ) -> Float[Tensor, "stream batch pos unit"]:
        """The units of a layer, those of the last stream masked.

        Args:
            local: residual stream entering the layer, of the stream that gates read; None: a clean pass, which has no
                masks.
            final: final LayerNorm's output of the clean pass.
        """
        if local is None:
            return units
        gate = getattr(block, f"{kind}_gate")
        return masked_units(units.flatten(1, 2), self.scores(gate, local, final), gate.k, gate.cfg).view_as(units)

    def _qkv(self, block: Any, resid: Tensor) -> Float[Tensor, "stream batch pos head_and_2_kv_head d_head"]:
        """Queries, keys and values; grouped keys and values are not repeated for the heads that share them."""
        attn = block.attn
        own = "" if self.cfg.n_key_value_heads is None else "_"
        biases = [attn.b_Q, getattr(attn, f"{own}b_K"), getattr(attn, f"{own}b_V")]
        bias = torch.cat(biases).flatten() if self.qkv_bias else None
        weights = [getattr(attn, name) for name in ("W_Q", f"{own}W_K", f"{own}W_V")]
        (qkv,) = self._linear(*self._normalised(block.ln1, resid), weights, bias)
        return qkv.unflatten(-1, (-1, self.cfg.d_head))

    def _attend(self, attn: Any, qkv: Tensor, clean: Tensor | None) -> Float[Tensor, "stream batch pos head d_head"]:
        """`z` of a layer, with its scale, its window and its rotary positions."""
        window = self.cfg.window_size if attn.attn_type == "local" else None
        rotary = self._rotary(attn, qkv) if self.cfg.positional_embedding_type == "rotary" else None
        groups = self.cfg.n_key_value_heads or self.cfg.n_heads
        return stream_attention(qkv, clean, groups, 1 / attn.attn_scale, window=window, rotary=rotary)

    def _rotary(self, attn: Any, q: Float[Tensor, "stream batch pos any d_head"]) -> Rotary:
        """The rotation of a layer, read off what it makes of the first dimension of each pair."""
        assert self.cfg.rotary_dim is not None
        adjacent, n = bool(self.cfg.rotary_adjacent_pairs), self.cfg.rotary_dim // 2
        first, second = (slice(0, 2 * n, 2), slice(1, 2 * n, 2)) if adjacent else (slice(n), slice(n, 2 * n))
        probe = torch.zeros(1, q.shape[2], 1, self.cfg.d_head, dtype=self.cfg.dtype, device=q.device)
        probe[..., first] = 1
        turned = attn.apply_rotary(probe)[0, :, 0]
        return Rotary(turned[:, first], turned[:, second], adjacent)

    def _rest(self, block: Any, resid: Tensor, z: Tensor, local: Tensor | None, final: Tensor | None) -> Tensor:
        """The layer from `z` on."""
        attn = block.attn
        added = self._from_units(block, "attn", _itself, [z.flatten(-2)], local, final, attn.W_O, attn.b_O)
        after = _sum(resid, added)
        if self.cfg.attn_only:
            return after
        mlp, reads = block.mlp, resid if self.cfg.parallel_attn_mlp else after
        neurons = self._neurons(mlp, *self._normalised(block.ln2, reads))
        added = self._from_units(block, "mlp", *neurons, local, final, mlp.W_out, mlp.b_out)
        return _sum(after, added)

    def _neurons(self, mlp: Any, make: Make, inputs: list[Tensor]) -> tuple[Make, list[Tensor]]:
        """A function that makes the neurons of an MLP, and what it makes them of."""
        act = ACTIVATIONS[str(self.cfg.act_fn)]
        if not self.cfg.gated_mlp:
            return act, [*self._linear(make, inputs, [mlp.W_in], mlp.b_in)]
        gate_and_into = self._linear(make, inputs, [mlp.W_gate, mlp.W_in], None)
        return partial(_gated_neurons, act), [mlp.b_in.to(self.dtype), *gate_and_into]

    # ------------------------------------------------------------------------------------------------------- pieces

    def _linear(
        self, make: Make, inputs: list[Tensor], weights: list[Tensor], bias: Tensor | None
    ) -> tuple[Tensor, ...]:
        """`make(*inputs) @ weight + bias` in the precision of the products, for each of `matrices`."""
        if self._makes_again(inputs):
            return self._made_again(make, inputs, weights, bias, None)
        return self._product(make(*inputs), weights, bias)

    def _from_units(
        self,
        block: Any,
        kind: Literal["attn", "mlp"],
        make: Make,
        inputs: list[Tensor],
        local: Tensor | None,
        final: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
    ) -> Float[Tensor, "stream batch pos d_model"]:
        """What the units of a layer, those of the last stream masked, add to the residual stream."""
        if not self._makes_again(inputs):
            return self._product(self.mask_units(block, kind, make(*inputs), local, final), [weight], bias)[0]
        mask = None
        if local is not None:
            gate = getattr(block, f"{kind}_gate")
            mask = MaskOf(self.scores(gate, local, final), gate.k, gate.cfg)
        return self._made_again(make, inputs, [weight], bias, mask)[0]

    def _makes_again(self, inputs: list[Tensor]) -> bool:
        return torch.is_grad_enabled() and not self.recompute and on_cpu(inputs[0])

    def _made_again(
        self, make: Make, inputs: list[Tensor], weights: list[Tensor], bias: Tensor | None, mask: MaskOf | None
    ) -> tuple[Tensor, ...]:
        weights = self._matrices(weights) if self._keep_weights else weights
        return linear(make, inputs, weights, None if bias is None else bias.to(self.dtype), self.dtype, mask)

    def _product(self, x: Tensor, weights: list[Tensor], bias: Tensor | None) -> tuple[Tensor, ...]:
        x, bias = x.to(self.dtype), None if bias is None else bias.to(self.dtype)
        return tuple(F.linear(x, matrix.T, bias) for matrix in self._matrices(weights))

    def _matrices(self, weights: list[Tensor]) -> list[Float[Tensor, "in out"]]:
        """Weights in the precision of the products, of a frozen base kept for the next pass."""
        if not self._keep_weights:
            return list(matrices(weights, self.dtype))
        key = id(weights[0])
        if key not in self._kept:
            self._kept[key] = list(matrices(weights, self.dtype))
        return self._kept[key]

    def scores(self, gate: Any, local: Tensor, final: Tensor | None) -> Float[Tensor, "row score"]:
        """What `gate.project` computes, with rows of units."""
        reads = []
        for source, x, present in (("local", local, gate.cfg.reads_local), ("global", final, gate.cfg.reads_global)):
            if present and x is not None:
                matrices, bias = gate.affine_map(source)
                reads.append(scores_of(x.flatten(0, 1), matrices, bias, self.dtype))
        return reads[0] if len(reads) == 1 else reads[0] + reads[1]

    def normalise(self, norm: Any, x: Tensor) -> Tensor:
        """What the model's normalisation module computes."""
        make, inputs = self._normalised(norm, x)
        return make(*inputs)

    def _normalised(self, norm: Any, x: Tensor) -> tuple[Make, list[Tensor]]:
        """A function that computes what the model's normalisation module does, and what it computes it of."""
        kind = self.cfg.normalization_type
        parameters = {"LN": ("w", "b"), "RMS": ("w",)}.get(str(kind), ())
        return partial(_normalise, kind, self.cfg.eps), [x, *(getattr(norm, name) for name in parameters)]

    def cross_entropy(
        self, final: tuple[Tensor, ...], coefficients: tuple[float, ...], tokens: Tensor, targets: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Sum with coefficients of the mean cross-entropies of the streams' final outputs, and each of these."""
        if targets is None:
            final, targets = tuple(x[:, :-1] for x in final), tokens[:, 1:]
        unembed = self.model.unembed
        bias = unembed.b_U if self.model.unembed_bias else None
        weight = unembed.W_U if self._unembedding is None else self._unembedding
        rows = tuple(x.flatten(0, 1) for x in final)
        return linear_cross_entropy(rows, weight, bias, targets.flatten(), coefficients, self.dtype)


def _sum(resid: Tensor, added: Tensor) -> Tensor:
    # a CPU adds numbers of different precision several times slower
    return resid + added if added.dtype == resid.dtype else added.to(resid.dtype).add_(resid)


def _itself(z: Tensor) -> Tensor:
    return z


def _normalise(
    kind: str | None, eps: float, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    if kind in ("RMS", "RMSPre") and on_cpu(x):
        return rms_norm(x, weight, eps)
    return normalise(x, kind, eps, weight, bias)


def _gated_neurons(act: Callable[[Tensor], Tensor], shift: Tensor, gate: Tensor, into: Tensor) -> Tensor:
    return shifted_product(shift, act(gate), into)
