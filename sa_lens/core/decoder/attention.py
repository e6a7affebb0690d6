"""Attention of the decoder, and positional encodings that act inside it.

    q = x_q W_Q + b_Q,  k = x_k W_K + b_K,  v = x_v W_V + b_V       for each head
    scores = q . k / scale                                          -inf where key > query, or outside the window
    pattern = softmax(scores) over keys,  z = sum over keys of pattern * v
    out = sum over heads of z W_O + b_O

Rotary positions turn pair i of the dimensions of q and k at position t by the angle `t / base^(2i / rotary_dim)`, so
that scores depend on distances alone (arXiv 2104.09864). ALiBi adds `-m_h (query - key)` to the scores of head h, with
slope `m_h = 2^(-8 (h + 1) / n_heads)` (arXiv 2108.12409).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformer_lens import FactoredMatrix
from transformer_lens.cache.key_value_cache_entry import TransformerLensKeyValueCacheEntry
from transformer_lens.hook_points import HookPoint

from sa_lens.core.decoder.hooked_transformer_config import HookedTransformerConfig
from sa_lens.core.decoder.layers import parameter, position_ids

AttentionType = Literal["global", "local"]

ROTARY_ROWS = 2048
"""Positions of the rotary tables at first; longer inputs extend them."""


def soft_cap(x: Tensor, cap: float) -> Tensor:
    """Returns `cap * tanh(x / cap)`, or `x` itself if the cap is not above 0."""
    return cap * torch.tanh(x / cap) if cap > 0 else x


def rotary_wavelengths(cfg: HookedTransformerConfig, local: bool) -> Float[Tensor, " pair"]:
    """Returns the number of positions per radian for each pair of dimensions."""
    assert cfg.rotary_dim is not None
    half = cfg.rotary_dim // 2
    precision = torch.float64 if cfg.dtype == torch.float64 else torch.float32
    base = cfg.rotary_base_local if local and cfg.rotary_base_local is not None else cfg.rotary_base
    wavelengths = base ** (torch.arange(half, dtype=precision) / half)
    if cfg.use_NTK_by_parts_rope:
        # how often a pair turns around in the context that the model was first trained with
        turns = cfg.NTK_original_ctx_len / (2 * math.pi * wavelengths)
        low, high = cfg.NTK_by_parts_low_freq_factor, cfg.NTK_by_parts_high_freq_factor
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return wavelengths / (kept + (1 - kept) / cfg.NTK_by_parts_factor)
    return wavelengths if local else wavelengths * cfg.rotary_scaling_factor


def alibi_bias(n_heads: int, queries: int, keys: int, like: Tensor) -> Float[Tensor, "head query key"]:
    """Returns ALiBi's bias of the last `queries` of `keys` positions; it is 0 for keys in the future."""
    slopes = 2.0 ** (-8.0 / n_heads * torch.arange(1, n_heads + 1, device=like.device))
    places = torch.arange(keys, device=like.device)
    distance = (places - places[keys - queries :, None]).clamp(max=0)
    return (slopes[:, None, None] * distance).to(like.dtype)


class Attention(nn.Module):
    """Multi-head attention; see the equations above.

    Args:
        attn_type: `local` layers look at the last `window_size` positions only.
        layer_id: number of the layer, for `scale_attn_by_inverse_layer_idx`.
    """

    W_K: Tensor
    W_V: Tensor
    b_K: Tensor
    b_V: Tensor
    rotary_sin: Tensor
    rotary_cos: Tensor

    def __init__(self, cfg: HookedTransformerConfig, attn_type: AttentionType = "global", layer_id: int = 0) -> None:
        super().__init__()
        if attn_type not in ("global", "local"):
            raise ValueError(f"attn_types[{layer_id}]={attn_type!r} must be 'global' or 'local'")
        self.cfg = cfg
        self.attn_type = attn_type
        self.layer_id = layer_id
        self.attn_scale = cfg.attn_scale if cfg.use_attn_scale else 1.0
        if cfg.scale_attn_by_inverse_layer_idx:
            self.attn_scale *= layer_id + 1
        # in the order in which initial weights are drawn
        self.W_Q = parameter(cfg, cfg.n_heads, cfg.d_model, cfg.d_head)
        self.W_O = parameter(cfg, cfg.n_heads, cfg.d_head, cfg.d_model)
        self.b_Q = parameter(cfg, cfg.n_heads, cfg.d_head, fill=0.0)
        self.b_O = parameter(cfg, cfg.d_model, fill=0.0)
        self._add_keys_and_values()
        # two constants that TransformerLens keeps in its state dict
        self.register_buffer("mask", torch.empty((0, 0), dtype=torch.bool))
        self.register_buffer("IGNORE", torch.tensor(-torch.inf))
        self.hook_k = HookPoint()  # [batch, pos, kv_head, d_head]
        self.hook_q = HookPoint()  # [batch, pos, head, d_head]
        self.hook_v = HookPoint()  # [batch, pos, kv_head, d_head]
        self.hook_z = HookPoint()  # [batch, pos, head, d_head]
        self.hook_attn_scores = HookPoint()  # [batch, head, query, key]
        self.hook_pattern = HookPoint()  # [batch, head, query, key]
        self.hook_result = HookPoint()  # [batch, pos, head, d_model]
        if cfg.positional_embedding_type == "shortformer":
            self.hook_attn_input = HookPoint()  # never fires, as in TransformerLens
        elif cfg.positional_embedding_type == "rotary":
            self.hook_rot_k = HookPoint()  # [batch, key, kv_head, d_head]
            self.hook_rot_q = HookPoint()  # [batch, pos, head, d_head]
            sin, cos = self._rotary_tables(min(cfg.n_ctx, ROTARY_ROWS))
            self.register_buffer("rotary_sin", sin)
            self.register_buffer("rotary_cos", cos)

    def _add_keys_and_values(self) -> None:
        cfg = self.cfg
        self.W_K = parameter(cfg, cfg.n_heads, cfg.d_model, cfg.d_head)
        self.W_V = parameter(cfg, cfg.n_heads, cfg.d_model, cfg.d_head)
        self.b_K = parameter(cfg, cfg.n_heads, cfg.d_head, fill=0.0)
        self.b_V = parameter(cfg, cfg.n_heads, cfg.d_head, fill=0.0)

    def _keys_and_values(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Weight and bias of keys, then of values, as the forward pass uses them."""
        return self.W_K, self.b_K, self.W_V, self.b_V

    @property
    def OV(self) -> FactoredMatrix:
        """`W_V W_O [head, d_model, d_model]`: what a head writes, as a function of what it reads at a key."""
        return FactoredMatrix(self.W_V, self.W_O)

    @property
    def QK(self) -> FactoredMatrix:
        """`W_Q W_K^T [head, d_model, d_model]`: the bilinear form of a head's scores."""
        return FactoredMatrix(self.W_Q, self.W_K.transpose(-2, -1))

    def forward(
        self,
        query_input: Float[Tensor, "batch pos d_model"] | Float[Tensor, "batch pos head d_model"],
        key_input: Float[Tensor, "batch pos d_model"] | Float[Tensor, "batch pos kv_head d_model"],
        value_input: Float[Tensor, "batch pos d_model"] | Float[Tensor, "batch pos kv_head d_model"],
        past_kv_cache_entry: TransformerLensKeyValueCacheEntry | None = None,
        attention_mask: Int[Tensor, "batch key"] | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """Returns what attention adds to the residual stream.

        Args:
            past_kv_cache_entry: keys (before rotation) and values of earlier positions; the new ones are appended.
            attention_mask: 0 for padding, those of the cache included.
        """
        W_K, b_K, W_V, b_V = self._keys_and_values()
        q = self.hook_q(_project_heads(query_input, self.W_Q, self.b_Q))
        k = self.hook_k(_project_heads(key_input, W_K, b_K))
        v = self.hook_v(_project_heads(value_input, W_V, b_V))
        offset = 0
        if past_kv_cache_entry is not None:
            offset = past_kv_cache_entry.past_keys.shape[1]
            k, v = past_kv_cache_entry.append(k, v)
        if self.cfg.positional_embedding_type == "rotary":
            q = self.hook_rot_q(self.apply_rotary(q, offset, attention_mask))
            k = self.hook_rot_k(self.apply_rotary(k, 0, attention_mask))
        k, v = self._for_each_query(k), self._for_each_query(v)
        scores = self.hook_attn_scores(self._scores(q, k, offset, attention_mask))
        pattern = scores.softmax(-1)
        # a position that sees nothing, such as padding on the left, attends to nothing
        pattern = self.hook_pattern(pattern.masked_fill(pattern.isnan(), 0)).to(v.dtype)
        z = self.hook_z((pattern @ v.transpose(1, 2)).transpose(1, 2))
        if self.cfg.use_attn_result:
            return self.hook_result(torch.einsum("bphd,hdm->bphm", z, self.W_O)).sum(2) + self.b_O
        return F.linear(z.flatten(2), self.W_O.flatten(0, 1).T, self.b_O)

    def _for_each_query(self, x: Float[Tensor, "batch key kv_head d_head"]) -> Float[Tensor, "batch key head d_head"]:
        """Repeats grouped keys or values for the queries that share them."""
        return x if x.shape[2] == self.cfg.n_heads else x.repeat_interleave(self.cfg.n_heads // x.shape[2], dim=2)

    def _scores(
        self,
        q: Float[Tensor, "batch query head d_head"],
        k: Float[Tensor, "batch key head d_head"],
        offset: int,
        attention_mask: Int[Tensor, "batch key"] | None,
    ) -> Float[Tensor, "batch head query key"]:
        scores = (q / self.attn_scale).transpose(1, 2) @ k.permute(0, 2, 3, 1)
        scores = soft_cap(scores, self.cfg.attn_scores_soft_cap)
        queries, keys = scores.shape[-2:]
        if self.cfg.positional_embedding_type == "alibi":
            scores = scores + alibi_bias(self.cfg.n_heads, queries, keys, scores)
        seen = self._make_causal_mask(queries, keys, offset, scores.device)
        if attention_mask is not None:
            seen = seen & attention_mask[:, None, None, :].bool()
        return scores.masked_fill(~seen, -torch.inf)

    def _make_causal_mask(
        self, queries: int, keys: int, offset: int, device: torch.device
    ) -> Bool[Tensor, "1 1 query key"]:
        """Returns True where a query at position `offset`, `offset + 1`, ... may attend to a key at 0, 1, ..."""
        seen = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=device).tril(offset)
        if self.attn_type == "local":
            assert self.cfg.window_size is not None
            seen = seen.triu(offset - self.cfg.window_size + 1)
        return seen

    def apply_rotary(
        self,
        x: Float[Tensor, "batch pos head d_head"],
        past_kv_pos_offset: int = 0,
        attention_mask: Int[Tensor, "batch key"] | None = None,
    ) -> Float[Tensor, "batch pos head d_head"]:
        """Rotates the leading `rotary_dim` dimensions of queries or keys by their positions.

        Args:
            past_kv_pos_offset: position of the first row.
            attention_mask: 0 for padding, which does not count as a position; None: there is none.
        """
        end = past_kv_pos_offset + x.shape[1]
        if end > len(self.rotary_sin):
            sin, cos = self._rotary_tables(min(self.cfg.n_ctx, max(end, 2 * len(self.rotary_sin))))
            self.rotary_sin, self.rotary_cos = sin.to(self.rotary_sin), cos.to(self.rotary_cos)
        rows: slice | Tensor = slice(past_kv_pos_offset, end)
        if attention_mask is not None:
            rows = position_ids(attention_mask)[:, rows]
        sin, cos = self.rotary_sin[rows].unsqueeze(-2), self.rotary_cos[rows].unsqueeze(-2)
        turned, kept = x[..., : self.cfg.rotary_dim], x[..., self.cfg.rotary_dim :]
        turned = turned * cos + self._quarter_turn(turned) * sin
        return torch.cat([turned, kept], dim=-1) if kept.shape[-1] else turned

    def _quarter_turn(self, x: Float[Tensor, "... rotary_dim"]) -> Float[Tensor, "... rotary_dim"]:
        """Maps each pair (a, b) to (-b, a)."""
        if self.cfg.rotary_adjacent_pairs:
            return torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
        a, b = x.chunk(2, dim=-1)
        return torch.cat([-b, a], dim=-1)

    def _rotary_tables(self, rows: int) -> tuple[Float[Tensor, "pos rotary_dim"], Float[Tensor, "pos rotary_dim"]]:
        """Returns sine and cosine of the angle of every dimension at positions 0, 1, ..."""
        wavelengths = rotary_wavelengths(self.cfg, self.attn_type == "local")
        angles = torch.arange(rows, dtype=wavelengths.dtype)[:, None] / wavelengths
        angles = angles.repeat_interleave(2, dim=1) if self.cfg.rotary_adjacent_pairs else angles.repeat(1, 2)
        return angles.sin().to(self.cfg.dtype), angles.cos().to(self.cfg.dtype)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """Loads weights as torch does, without constants of another length (from a model that saw longer inputs)."""
        constants = {f"{prefix}{name}": value for name, value in self.named_buffers(recurse=False)}
        own = {
            name: value
            for name, value in constants.items()
            if name in state_dict and state_dict[name].shape != value.shape
        }
        super()._load_from_state_dict({**state_dict, **own}, prefix, *args)


class GroupedQueryAttention(Attention):
    """Attention in which groups of queries share a key and a value (arXiv 2305.13245).

    The parameters `_W_K`, `_W_V`, `_b_K`, `_b_V` have `n_key_value_heads` heads; `W_K` and the like repeat them for
    each query.
    """

    def _add_keys_and_values(self) -> None:
        cfg, shared = self.cfg, self.cfg.n_key_value_heads
        assert shared is not None
        self.repeat_kv_heads = cfg.n_heads // shared
        self._W_K = parameter(cfg, shared, cfg.d_model, cfg.d_head)
        self._W_V = parameter(cfg, shared, cfg.d_model, cfg.d_head)
        self._b_K = parameter(cfg, shared, cfg.d_head, fill=0.0)
        self._b_V = parameter(cfg, shared, cfg.d_head, fill=0.0)

    def _keys_and_values(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if self.cfg.ungroup_grouped_query_attention:
            return self.W_K, self.b_K, self.W_V, self.b_V
        return self._W_K, self._b_K, self._W_V, self._b_V

    @property
    def W_K(self) -> Float[Tensor, "head d_model d_head"]:  # type: ignore[override]
        return self._W_K.repeat_interleave(self.repeat_kv_heads, dim=0)

    @property
    def W_V(self) -> Float[Tensor, "head d_model d_head"]:  # type: ignore[override]
        return self._W_V.repeat_interleave(self.repeat_kv_heads, dim=0)

    @property
    def b_K(self) -> Float[Tensor, "head d_head"]:  # type: ignore[override]
        return self._b_K.repeat_interleave(self.repeat_kv_heads, dim=0)

    @property
    def b_V(self) -> Float[Tensor, "head d_head"]:  # type: ignore[override]
        return self._b_V.repeat_interleave(self.repeat_kv_heads, dim=0)


def _project_heads(
    x: Float[Tensor, "batch pos d_model"] | Float[Tensor, "batch pos head d_model"],
    W: Float[Tensor, "head d_model d_head"],
    b: Float[Tensor, "head d_head"],
) -> Float[Tensor, "batch pos head d_head"]:
    """Returns `x W + b` for every head, from one input for all heads or one for each."""
    if x.ndim == 4:
        return torch.einsum("bphm,hmd->bphd", x, W) + b
    return F.linear(x, W.transpose(1, 2).flatten(0, 1), b.flatten()).unflatten(-1, b.shape)
