"""Embeddings, normalisation and MLPs of the decoder.

embedding      E[t]                                             positions P[i]
LN             (x - mean(x)) / sqrt(mean((x - mean(x))^2) + eps) * w + b
RMS            x / sqrt(mean(x^2) + eps) * w                    `LNPre`, `RMSPre`: w = 1, b = 0
MLP            act(x W_in + b_in) W_out + b_out
gated MLP      (act(x W_gate) * (x W_in) + b_in) W_out + b_out
unembedding    x W_U + b_U
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from sa_lens.core.decoder.hooked_transformer_config import HookedTransformerConfig
from sa_lens.core.norms_and_activations import ACTIVATIONS


def parameter(cfg: HookedTransformerConfig, *shape: int, fill: float | None = None) -> nn.Parameter:
    """Makes a parameter of the model's type, filled with one value; None leaves it uninitialised."""
    value = torch.empty(shape, dtype=cfg.dtype)
    return nn.Parameter(value if fill is None else value.fill_(fill))


def position_ids(attention_mask: Int[Tensor, "batch key"]) -> Int[Tensor, "batch key"]:
    """Returns the position of each token, not counting padding; 0 for padding before the first token."""
    return (attention_mask.long().cumsum(1) - 1).clamp(min=0)


class Norm(nn.Module):
    """LayerNorm or RMSNorm, with or without weights, in float32 or wider.

    Args:
        kind: `LN`, `LNPre`, `RMS` or `RMSPre`.
        length: size of the last axis; None: `d_model`.
    """

    w: Tensor
    b: Tensor

    def __init__(self, cfg: HookedTransformerConfig, kind: str, length: int | None = None) -> None:
        super().__init__()
        self.cfg = cfg
        self.eps = cfg.eps
        self.length = cfg.d_model if length is None else length
        self.centred = kind.startswith("LN")
        self.weighted = not kind.endswith("Pre")
        if self.weighted:
            self.w = parameter(cfg, self.length, fill=1.0)
            if self.centred:
                self.b = parameter(cfg, self.length, fill=0.0)
        self.hook_scale = HookPoint()  # [batch, pos, 1]
        self.hook_normalized = HookPoint()  # [batch, pos, length]

    def forward(self, x: Float[Tensor, "*batch length"]) -> Float[Tensor, "*batch length"]:
        wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
        if self.centred:
            wide = wide - wide.mean(-1, keepdim=True)
        scale = self.hook_scale((wide.square().mean(-1, keepdim=True) + self.eps).sqrt())
        normalized = self.hook_normalized(wide / scale).to(x.dtype)
        if not self.weighted:
            return normalized
        return normalized * self.w + self.b if self.centred else normalized * self.w


def norm(cfg: HookedTransformerConfig, kind: str | None) -> nn.Module:
    """Makes the norm of this kind; None makes a module that changes nothing."""
    return nn.Identity() if kind is None else Norm(cfg, kind)


class Embed(nn.Module):
    """The embedding of tokens, `W_E [d_vocab, d_model]`, normalised in models with `post_embedding_ln`."""

    def __init__(self, cfg: HookedTransformerConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.W_E = parameter(cfg, cfg.d_vocab, cfg.d_model)
        if cfg.post_embedding_ln:
            self.ln = Norm(cfg, "LN")

    def forward(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        embedded = F.embedding(tokens, self.W_E)
        return self.ln(embedded) if self.cfg.post_embedding_ln else embedded


class PosEmbed(nn.Module):
    """Learned positions, `W_pos [n_ctx, d_model]`."""

    def __init__(self, cfg: HookedTransformerConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.W_pos = parameter(cfg, cfg.n_ctx, cfg.d_model)

    def forward(
        self, batch: int, length: int, offset: int = 0, attention_mask: Int[Tensor, "batch key"] | None = None
    ) -> Float[Tensor, "batch pos d_model"]:
        """Returns embeddings of positions `offset` to `offset + length - 1`, not counting padding, which has none."""
        if attention_mask is None:
            # a copy, so that a hook that writes in place leaves the weights alone
            return self.W_pos[offset : offset + length].repeat(batch, 1, 1)
        new = slice(offset, offset + length)
        embedded = F.embedding(position_ids(attention_mask)[:, new], self.W_pos)
        return embedded.masked_fill(attention_mask[:, new, None] == 0, 0)


class Unembed(nn.Module):
    """The map from the final residual stream to logits."""

    W_U: Tensor

    def __init__(self, cfg: HookedTransformerConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.W_U = parameter(cfg, cfg.d_model, cfg.d_vocab_out)
        self.b_U = parameter(cfg, cfg.d_vocab_out, fill=0.0)
        self.hook_in = HookPoint()  # [batch, pos, d_model]
        self.hook_out = HookPoint()  # [batch, pos, d_vocab]

    def forward(self, residual: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_vocab"]:
        return self.hook_out(F.linear(self.hook_in(residual), self.W_U.T, self.b_U))


class MLP(nn.Module):
    """`act(x W_in + b_in) W_out + b_out`; a norm follows the activation `solu_ln`."""

    def __init__(self, cfg: HookedTransformerConfig) -> None:
        super().__init__()
        assert cfg.d_mlp is not None
        self.cfg = cfg
        self.act_fn = activation(cfg.act_fn)
        if cfg.is_layer_norm_activation():
            self.hook_mid = HookPoint()  # [batch, pos, d_mlp]
            self.ln = Norm(cfg, "LN" if cfg.normalization_type == "LN" else "LNPre", cfg.d_mlp)
        self.W_in = parameter(cfg, cfg.d_model, cfg.d_mlp)
        self.b_in = parameter(cfg, cfg.d_mlp, fill=0.0)
        self.W_out = parameter(cfg, cfg.d_mlp, cfg.d_model)
        self.b_out = parameter(cfg, cfg.d_model, fill=0.0)
        self.hook_pre = HookPoint()  # [batch, pos, d_mlp]
        self.hook_post = HookPoint()  # [batch, pos, d_mlp]

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        post = self.act_fn(self.hook_pre(F.linear(x, self.W_in.T, self.b_in)))
        if self.cfg.is_layer_norm_activation():
            post = self.ln(self.hook_mid(post))
        return F.linear(self.hook_post(post), self.W_out.T, self.b_out)


class GatedMLP(nn.Module):
    """`(act(x W_gate) * (x W_in) + b_in) W_out + b_out`."""

    def __init__(self, cfg: HookedTransformerConfig) -> None:
        super().__init__()
        assert cfg.d_mlp is not None
        self.cfg = cfg
        self.act_fn = activation(cfg.act_fn)
        self.W_in = parameter(cfg, cfg.d_model, cfg.d_mlp)
        self.W_out = parameter(cfg, cfg.d_mlp, cfg.d_model)
        self.W_gate = parameter(cfg, cfg.d_model, cfg.d_mlp)
        self.b_in = parameter(cfg, cfg.d_mlp, fill=0.0)
        self.b_out = parameter(cfg, cfg.d_model, fill=0.0)
        self.hook_pre = HookPoint()  # [batch, pos, d_mlp], x W_gate
        self.hook_pre_linear = HookPoint()  # [batch, pos, d_mlp], x W_in
        self.hook_post = HookPoint()  # [batch, pos, d_mlp]

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        gate = self.act_fn(self.hook_pre(x @ self.W_gate))
        post = self.hook_post(gate * self.hook_pre_linear(x @ self.W_in) + self.b_in)
        return F.linear(post, self.W_out.T, self.b_out)


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """Returns the activation function of this name.

    Raises:
        ValueError: there is none.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"act_fn={name!r} must be one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]
