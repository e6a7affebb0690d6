"""The nodes of the computational graph as plain functions of weights, with any number of leading axes.

A pass of the whole model under hooks is the definition; these functions give one head or one MLP alone, for searches
that need it thousands of times. LayerNorm's weight and bias and the attention scale are folded into the matrices, in
the model's own precision. `why_not_single_nodes` says for which models the functions are not exact.

Also here: the switches of TransformerLens that split a layer's input by head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sa_lens.core.coverage import FEATURES, Coverage
from sa_lens.core.host import Host, weight
from sa_lens.core.norms_and_activations import ACTIVATIONS, normalise
from sa_lens.core.products import linear, packed

_SWITCHES = ("use_split_qkv_input", "use_hook_mlp_in", "ungroup_grouped_query_attention", "use_attn_in")


@contextmanager
def split_inputs(model: Host) -> Iterator[None]:
    """Gives queries, keys and values of every head, and every MLP, an input of their own to edit, within the context.

    Grouped keys and values are repeated for each head that shares them. The model's switches are restored afterwards,
    also after an exception.
    """
    cfg = model.cfg
    before = {name: getattr(cfg, name) for name in _SWITCHES}
    cfg.use_split_qkv_input = True
    cfg.use_hook_mlp_in = not cfg.attn_only
    cfg.ungroup_grouped_query_attention = cfg.n_key_value_heads is not None
    cfg.use_attn_in = False
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(cfg, name, value)


_ADDITIVE = Coverage(
    features=FEATURES.keys() - {"normalisation after the layers", "4-bit weights"},
    positions={"standard", "rotary", "shortformer", "alibi", "relative_positional_bias"},
    because={
        "normalisation after the layers": "what a head writes depends on the other heads",
        "4-bit weights": "the part of a head in the output cannot be read off them",
    },
)
"""Architectures in which the outputs of heads and MLPs add up in the residual stream."""

_SINGLE_NODES = Coverage(
    features={
        "windowed attention",
        "grouped keys and values",
        "an attention scale that falls with the layer",
        "a LayerNorm on the embedding",
        "attention and MLP in parallel",
        "no MLPs",
        "a gated MLP",
    },
    positions={"standard", "rotary"},
    dtypes={torch.float32, torch.float64},
)
"""Architectures for which `NodeFunctions` is exact."""


def why_not_additive(model: Host) -> str | None:
    """Returns why the outputs of heads and MLPs do not simply add up in the residual stream, or None if they do."""
    return _ADDITIVE.reason_against(model.cfg)


def why_not_single_nodes(model: Host) -> str | None:
    """Returns why `NodeFunctions` would not be exact for this model, or None if it is exact."""
    reason = _SINGLE_NODES.reason_against(model.cfg, weight(model, "embed.W_E").dtype)
    return None if reason is None else f"no exact recomputation of single nodes for {reason}"


_CACHED = 2**18
"""Number of neurons that are computed at a time, so that they stay in a processor's cache."""

_NEGLIGIBLE = 1e-5
"""Part of the squared change of an MLP's input that an estimate neglects, at the positions with the least of it."""

_FUSED_GELU = ("gelu_new", "gelu_fast")
"""Activations that torch computes in one operation, and TransformerLens in several."""


class InsideMLP(NamedTuple):
    """The values inside an MLP; a change of its output can be computed from the change that its input makes to them."""

    normed: Float[Tensor, "... d_model"]
    """Its input, normalised."""
    into: tuple[Float[Tensor, "... d_mlp"], ...]
    """Values before the activation; in a gated MLP those that the gate multiplies, then the gate's."""
    post: Float[Tensor, "... d_mlp"]
    """Neurons before any mask."""


class _MLPWeights(NamedTuple):
    into: list[tuple[Tensor, Tensor]]
    """W_in and, in a gated MLP, W_gate, each with its bias."""
    b_post: Tensor | None
    """Added after the activation, in a gated MLP; None if it is zero."""
    out: tuple[Tensor, Tensor]
    act: Callable[[Tensor], Tensor]


class _Rotation(NamedTuple):
    """The rotation of queries and keys by their positions: a vector times `cos`, plus its partners times `sin`."""

    cos: Float[Tensor, "pos d_head"]
    sin: Float[Tensor, "pos d_head"]
    partner: Int[Tensor, " d_head"]
    """The entry with which each entry is rotated."""
    halves: bool
    """Whether the partner of each entry is half of the vector away."""


class NodeFunctions:
    """The nodes of one model as functions of their inputs.

    Args:
        model: any host for which `why_not_single_nodes` is None.
        length: tokens of the prompts, for the causal mask.
    """

    def __init__(self, model: Host, length: int) -> None:
        cfg = model.cfg
        self.cfg = cfg
        self.length = length
        self.group = cfg.n_heads // (cfg.n_key_value_heads or cfg.n_heads)
        """Number of heads that share keys and values."""
        layers = range(cfg.n_layers)
        heads: list[tuple[Tensor, Tensor]] = []
        for layer in layers:
            ln = f"blocks.{layer}.ln1"
            folded = [self._fold(model, ln, *self._qkv(model, layer, port)) for port in "QKV"]
            heads.append((torch.stack([w.mT for w, _ in folded]), torch.stack([b for _, b in folded])))
        self.W_qkv: list[Float[Tensor, "port head d_head d_model"]] = [w for w, _ in heads]
        self.b_qkv: list[Float[Tensor, "port head d_head"]] = [b for _, b in heads]
        outputs = [(weight(model, f"blocks.{i}.attn.W_O"), weight(model, f"blocks.{i}.attn.b_O")) for i in layers]
        self.W_O: list[Float[Tensor, "head d_head d_model"]] = [w.detach() for w, _ in outputs]
        self.b_O: list[Float[Tensor, " d_model"]] = [b.detach() for _, b in outputs]
        self._masks = [self._causal(model, layer) for layer in layers]
        self._rotations = [self._rotation(model, layer) for layer in layers]
        self._mlps = [] if cfg.attn_only else [self._mlp_weights(model, layer) for layer in layers]
        self._rounded_mlps: dict[tuple[int, torch.dtype], tuple[list[Tensor], Tensor]] = {}
        W_U, b_U = weight(model, "unembed.W_U").detach(), weight(model, "unembed.b_U").detach()
        self.W_U, self.b_U = self._fold(model, "ln_final", W_U, b_U)
        """Unembedding with the final LayerNorm's weight and bias folded in."""

    def normalise(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        """Applies LayerNorm or RMSNorm without weight and bias; returns `x` itself in a model without norms."""
        return normalise(x, self.cfg.normalization_type, self.cfg.eps)

    def logits(self, final: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_vocab"]:
        """Returns the logits of the residual stream above the top layer."""
        return linear(self.normalise(final), self.W_U.T, self.b_U)

    def project(
        self, layer: int, port: int, head: int, x: Float[Tensor, "... row d_model"], position: Int[Tensor, " row"]
    ) -> Float[Tensor, "... row d_head"]:
        """Returns the query (port 0), key (1) or value (2) of a head from its input in the residual stream.

        Args:
            position: that of each row, by which rotary models rotate.
        """
        y = linear(self.normalise(x), self.W_qkv[layer][port, head], self.b_qkv[layer][port, head])
        return self.rotate(layer, port, y, position)

    def project_each(
        self, layer: int, ports: Sequence[int], heads: Sequence[int], x: Float[Tensor, "any row d_model"]
    ) -> Float[Tensor, "any row d_head"]:
        """Returns the same for one port and head per entry of the first axis, at any rows, before any rotation."""
        chosen = torch.tensor(ports), torch.tensor(heads)
        W, b = self.W_qkv[layer][chosen], self.b_qkv[layer][chosen]
        return torch.baddbmm(b[:, None], self.normalise(x), W.mT)

    def project_all(
        self, layer: int, x: Float[Tensor, "row d_model"] | Float[Tensor, "port head row d_model"], first: int = 0
    ) -> Sequence[Float[Tensor, "head row d_head"]]:
        """Returns queries, keys and values of all heads of a layer from one or three inputs, before any rotation.

        Args:
            first: first port to compute.
        """
        if x.ndim == 4:
            W, b = self.W_qkv[layer][first:], self.b_qkv[layer][first:]
            return (self.normalise(x[first:]) @ W.mT + b[:, :, None]).unbind()
        normed, ports = self.normalise(x), []
        for port in range(first, 3):
            # heads of a group share keys and values
            size = self.group if port else 1
            W, b = self.W_qkv[layer][port, ::size], self.b_qkv[layer][port, ::size]
            y = linear(normed, W.flatten(0, 1), b.flatten()).view(len(x), *b.shape)
            ports.append(y.repeat_interleave(size, 1).transpose(0, 1) if size > 1 else y.transpose(0, 1))
        return ports

    def rotate(
        self, layer: int, port: int, y: Float[Tensor, "... row d_head"], position: Int[Tensor, ...] | None = None
    ) -> Float[Tensor, "... row d_head"]:
        """Rotates queries (port 0) or keys (1) by their positions in a rotary model; else returns them unchanged.

        Args:
            position: that of each row, one for all axes before or one for each; None: rows at positions 0, 1, ...
        """
        rotation = self._rotations[layer]
        if rotation is None or port == 2:
            return y
        where = slice(y.shape[-2]) if position is None else position
        other = y.roll(y.shape[-1] // 2, -1) if rotation.halves else y[..., rotation.partner]
        return torch.addcmul(y * rotation.cos[where], other, rotation.sin[where])

    def attend(
        self,
        layer: int,
        q: Float[Tensor, "... query d_head"],
        k: Float[Tensor, "... pos d_head"],
        v: Float[Tensor, "... pos d_head"],
        position: Tensor | None = None,
    ) -> Float[Tensor, "... query d_head"]:
        """Returns a head's `z` before any mask.

        Args:
            position: that of each prompt's only query; None: queries at all positions.
        """
        mask = self._masks[layer]
        if position is not None:
            mask = mask[position][:, None]
        scores = torch.matmul(q, k.transpose(-1, -2))
        return torch.matmul(torch.softmax(scores.masked_fill_(mask, -torch.inf), dim=-1), v)

    def mlp(
        self, layer: int, x: Float[Tensor, "... pos d_model"], mask: Float[Tensor, "prompt pos d_mlp"] | None
    ) -> Float[Tensor, "... pos d_model"]:
        """Returns an MLP's output from its input in the residual stream, with its neurons times the mask."""
        post = self.neurons(layer, x)
        return self.mlp_output(layer, post if mask is None else post * mask)

    def neurons(self, layer: int, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_mlp"]:
        """Returns an MLP's neurons before any mask."""
        return self.inside_mlp(layer, x).post

    def inside_mlp(self, layer: int, x: Float[Tensor, "... d_model"]) -> InsideMLP:
        """Returns the values inside an MLP from its input in the residual stream."""
        normed = self.normalise(x)
        into = tuple(linear(normed, W, b) for W, b in self._mlps[layer].into)
        return InsideMLP(normed, into, self._activate(layer, *into))

    def _activate(self, layer: int, x: Tensor, gate: Tensor | None = None) -> Float[Tensor, "... d_mlp"]:
        weights = self._mlps[layer]
        post = weights.act(x) if gate is None else weights.act(gate) * x
        return post if weights.b_post is None else post + weights.b_post

    def mlp_change(
        self,
        layer: int,
        before: InsideMLP,
        x: Float[Tensor, "any row d_model"] | None,
        masks: tuple[Float[Tensor, "row d_mlp"] | None, Float[Tensor, "... row d_mlp"] | None],
        dtype: torch.dtype,
        always: Int[Tensor, " few"] | None = None,
    ) -> Float[Tensor, "any row d_model"]:
        """Returns about how much an MLP's output changes if its input becomes `x`.

        Only the products are rounded to `dtype`, and only the change enters them. So the error is that of rounding
        the change, not the values themselves.

        Args:
            before: the values inside the MLP before the change.
            x: None: the input stays as it is.
            masks: its mask before and after the change, the same object if it stays as it is; None: no mask.
            always: rows that are computed however little they change; None: all rows. If products are rounded, the
                change of other rows may be returned as zero, see `_NEGLIGIBLE`.
        """
        W_into, W_out = self._rounded(layer, dtype)
        mask, again = masks
        into: list[Tensor] = []
        if x is not None:
            change = self.normalise(x) - before.normed
            if always is not None and mask is again and dtype != x.dtype:
                rows = _rows_that_change(change, always)
                if len(rows) < len(before.normed):
                    few = InsideMLP(before.normed[rows], tuple(y[rows] for y in before.into), before.post[rows])
                    mask = None if mask is None else mask[rows]
                    changed = self.mlp_change(layer, few, x[:, rows], (mask, mask), dtype)
                    return torch.zeros_like(x).index_copy_(1, rows, changed)
            change = change.to(dtype)
            into = [linear(change, W) for W in W_into]
        several = x if x is not None else again
        assert several is not None
        post = torch.empty(*several.shape[:-1], before.post.shape[-1], dtype=dtype, device=several.device)
        n = max(1, _CACHED // before.post.numel())
        for part in (slice(i, i + n) for i in range(0, len(several), n)):
            now = before.post
            if into:
                now = self._activate(layer, *(was + moved[part] for was, moved in zip(before.into, into, strict=True)))
            if mask is None or again is None or again is mask:
                now = now - before.post
                post[part] = now if mask is None else now * mask
            else:
                post[part] = now * (again if again.ndim == mask.ndim else again[part]) - before.post * mask
        return linear(post, W_out).to(before.post.dtype)

    def _rounded(self, layer: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
        """Returns the matrices of an MLP in another type, which are kept."""
        if (layer, dtype) not in self._rounded_mlps:
            weights = self._mlps[layer]
            self._rounded_mlps[layer, dtype] = (
                [packed(W, dtype) for W, _ in weights.into],
                packed(weights.out[0], dtype),
            )
        return self._rounded_mlps[layer, dtype]

    def mlp_output(self, layer: int, post: Float[Tensor, "... d_mlp"]) -> Float[Tensor, "... d_model"]:
        """Returns what an MLP writes, given its neurons."""
        return linear(post, *self._mlps[layer].out)

    def _fold(self, model: Host, ln: str, W: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Returns matrix `... d_model out` and bias that read the normalised stream without its weight and bias."""
        kind = self.cfg.normalization_type
        if kind not in ("LN", "RMS"):
            return W, b
        if kind == "LN":
            b = b + weight(model, f"{ln}.b").detach() @ W
        return weight(model, f"{ln}.w").detach()[:, None] * W, b

    def _qkv(self, model: Host, layer: int, port: str) -> tuple[Tensor, Tensor]:
        attn = f"blocks.{layer}.attn"
        scale = _block(model, layer).attn.attn_scale if port == "Q" else 1.0
        W, b = weight(model, f"{attn}.W_{port}").detach(), weight(model, f"{attn}.b_{port}").detach()
        return W / scale, b / scale

    def _mlp_weights(self, model: Host, layer: int) -> _MLPWeights:
        mlp, ln = f"blocks.{layer}.mlp", f"blocks.{layer}.ln2"

        def read(name: str, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
            W = weight(model, f"{mlp}.{name}").detach()
            W, b = self._fold(model, ln, W, W.new_zeros(W.shape[-1]) if bias is None else bias)
            return W.T.contiguous(), b

        b_in = weight(model, f"{mlp}.b_in").detach()
        W_out, b_out = (weight(model, f"{mlp}.{name}").detach() for name in ("W_out", "b_out"))
        gated = self.cfg.gated_mlp
        return _MLPWeights(
            into=[read("W_in"), read("W_gate")] if gated else [read("W_in", b_in)],
            b_post=b_in if gated and bool(b_in.any()) else None,
            out=(W_out.T.contiguous(), b_out),
            # the fused form of GELU equals TransformerLens's up to rounding; other activations are the module's own
            act=ACTIVATIONS[self.cfg.act_fn] if self.cfg.act_fn in _FUSED_GELU else _block(model, layer).mlp.act_fn,
        )

    def _causal(self, model: Host, layer: int) -> Bool[Tensor, "query key"]:
        """Returns True where a query may not attend."""
        attn = _block(model, layer).attn
        allowed = attn._make_causal_mask(self.length, self.length, 0, self.W_O[layer].device)
        return ~allowed[0, 0]

    def _rotation(self, model: Host, layer: int) -> _Rotation | None:
        if self.cfg.positional_embedding_type != "rotary":
            return None
        # what the model's own function makes of each basis vector at each position
        basis = torch.eye(self.cfg.d_head, device=self.W_O[layer].device, dtype=self.W_O[layer].dtype)
        rows = basis[:, None, None].expand(-1, self.length, 1, -1)
        turned = _block(model, layer).attn.apply_rotary(rows)[:, :, 0].detach()
        off = turned * (1 - basis[:, None])
        partner = off.abs().amax(1).argmax(0)
        every = torch.arange(len(partner), device=partner.device)
        halves = torch.equal(partner, every.roll(len(partner) // 2))
        return _Rotation(turned[every, :, every].T.contiguous(), off[partner, :, every].T.contiguous(), partner, halves)


def _rows_that_change(
    change: Float[Tensor, "any row d_model"], always: Int[Tensor, " few"]
) -> Int[Tensor, " rows_that_change"]:
    """Returns the rows that hold all but a negligible part of each change, or all rows if they are nearly all."""
    size = torch.linalg.vector_norm(change, dim=-1).square()
    share = (size / size.sum(-1, keepdim=True).clamp_min(torch.finfo(size.dtype).tiny)).amax(0)
    share[always] = torch.inf
    by_size = share.sort()
    n = int((by_size.values.cumsum(0) < _NEGLIGIBLE).sum())
    # to gather the others costs time
    return by_size.indices[n if 8 * n > len(share) else 0 :].sort().values


def gate_masks(
    model: Host, layer: int, local: Float[Tensor, "prompt d_model"], final: Float[Tensor, "prompt d_model"] | None
) -> tuple[Float[Tensor, "prompt head width"] | None, Float[Tensor, "prompt d_mlp"] | None]:
    """Returns the masks of a layer's attention units and neurons at one position of each prompt; None without a gate.

    Args:
        local: residual stream that enters the layer, of the stream that the gates read.
        final: clean residual stream at the end; needed by gates that read it.
    """
    block = _block(model, layer)
    if final is not None and model.cfg.normalization_type is not None:
        final = model.ln_final(final)  # type: ignore[attr-defined]
    masks = []
    for name in ("attn_gate", "mlp_gate"):
        gate = getattr(block, name, None)
        scores = None if gate is None else gate.project(local[:, None], None if final is None else final[:, None])
        masks.append(None if gate is None else gate.select(scores)[:, 0].to(local.dtype))
    return masks[0], masks[1]


def _block(model: Host, layer: int) -> Any:
    return model.blocks[layer]  # type: ignore[attr-defined]
