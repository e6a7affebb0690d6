"""The decoder's block, and its `HookedTransformer`.

    x_0 = E[t] + P[i]                                               rotary, ALiBi, shortformer: E[t]
    x_mid = x_l + Attention(LN_1(x_l)),  x_(l+1) = x_mid + MLP(LN_2(x_mid))
    parallel blocks: x_(l+1) = x_l + Attention(LN_1(x_l)) + MLP(LN_2(x_l))
    logits = Unembed(LN_final(x_L))

In shortformer models P[i] is added to the normalised inputs of queries and keys instead of the embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens import ActivationCache, HookedRootModule
from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache
from transformer_lens.cache.key_value_cache_entry import TransformerLensKeyValueCacheEntry
from transformer_lens.hook_points import HookPoint
from transformer_lens.utilities import get_attention_mask, lm_cross_entropy_loss
from transformers import AutoTokenizer

from sa_lens.core.decoder.attention import Attention, GroupedQueryAttention, soft_cap
from sa_lens.core.decoder.generation import Generation
from sa_lens.core.decoder.hooked_transformer_config import HookedTransformerConfig
from sa_lens.core.decoder.layers import MLP, Embed, GatedMLP, PosEmbed, Unembed, norm
from sa_lens.core.decoder.text import Text
from sa_lens.core.decoder.weights import Weights

Input = str | list[str] | Tensor
"""Text, or tokens `[batch, pos]` or `[pos]`."""

_FLAG_OF = {
    "hook_result": "use_attn_result",
    "hook_q_input": "use_split_qkv_input",
    "hook_k_input": "use_split_qkv_input",
    "hook_v_input": "use_split_qkv_input",
    "hook_attn_in": "use_attn_in",
    "hook_mlp_in": "use_hook_mlp_in",
}
"""Hook points that fire only with a flag of the configuration."""


class Output(NamedTuple):
    """Result of `forward(..., return_type="both")`."""

    logits: Float[Tensor, "batch pos d_vocab"]
    loss: Tensor
    """Mean loss, or the loss of each prediction `[batch, pos - 1]`."""


class Block(nn.Module):
    """One layer: attention and MLP, which read the normalised residual stream and add to it."""

    hook_out_is_single_residual_stream = True
    """Tells TransformerLens's logit lens that `hook_resid_post` of the last layer is what is unembedded."""

    def __init__(self, cfg: HookedTransformerConfig, layer: int) -> None:
        super().__init__()
        self.cfg = cfg
        self.ln1 = norm(cfg, cfg.normalization_type)
        if not cfg.attn_only:
            self.ln2 = norm(cfg, cfg.normalization_type)
        kind: Any = cfg.attn_types[layer] if cfg.use_local_attn and cfg.attn_types is not None else "global"
        self.attn = (Attention if cfg.n_key_value_heads is None else GroupedQueryAttention)(cfg, kind, layer)
        if not cfg.attn_only:
            self.mlp = (GatedMLP if cfg.gated_mlp else MLP)(cfg)
        self.hook_attn_in = HookPoint()  # [batch, pos, head, d_model]
        self.hook_q_input = HookPoint()  # [batch, pos, head, d_model]
        self.hook_k_input = HookPoint()  # [batch, pos, kv_head, d_model]
        self.hook_v_input = HookPoint()  # [batch, pos, kv_head, d_model]
        self.hook_mlp_in = HookPoint()  # [batch, pos, d_model]
        self.hook_attn_out = HookPoint()  # [batch, pos, d_model]
        self.hook_mlp_out = HookPoint()  # [batch, pos, d_model]
        self.hook_resid_pre = HookPoint()  # [batch, pos, d_model]
        if not cfg.attn_only and not cfg.parallel_attn_mlp:
            self.hook_resid_mid = HookPoint()  # [batch, pos, d_model]
        self.hook_resid_post = HookPoint()  # [batch, pos, d_model]

    def forward(
        self,
        resid_pre: Float[Tensor, "batch pos d_model"],
        shortformer_pos_embed: Float[Tensor, "batch pos d_model"] | None = None,
        past_kv_cache_entry: TransformerLensKeyValueCacheEntry | None = None,
        attention_mask: Int[Tensor, "batch key"] | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """Returns the residual stream after this layer; see `Attention.forward` for the arguments."""
        cfg = self.cfg
        resid_pre = self.hook_resid_pre(resid_pre)
        query_input, key_input, value_input = self._attention_inputs(resid_pre)
        q, k, v = self.ln1(query_input), self.ln1(key_input), self.ln1(value_input)
        if shortformer_pos_embed is not None:
            positions = shortformer_pos_embed if q.ndim == 3 else shortformer_pos_embed.unsqueeze(2)
            q, k = q + positions, k + positions
        attn_out = self.hook_attn_out(self.attn(q, k, v, past_kv_cache_entry, attention_mask))
        if cfg.attn_only:
            return self.hook_resid_post(resid_pre + attn_out)
        if cfg.parallel_attn_mlp:
            return self.hook_resid_post(resid_pre + attn_out + self._mlp_out(resid_pre))
        resid_mid = self.hook_resid_mid(resid_pre + attn_out)
        return self.hook_resid_post(resid_mid + self._mlp_out(resid_mid))

    def _attention_inputs(self, resid_pre: Float[Tensor, "batch pos d_model"]) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the inputs of queries, keys and values, one for each head if the configuration asks for it."""
        cfg = self.cfg

        def repeated(heads: int) -> Float[Tensor, "batch pos head d_model"]:
            return resid_pre.unsqueeze(2).repeat(1, 1, heads, 1)

        attn_in = self.hook_attn_in(repeated(cfg.n_heads)) if cfg.use_attn_in else resid_pre
        if not cfg.use_split_qkv_input:
            return attn_in, attn_in, attn_in
        kv_heads = cfg.n_heads if cfg.ungroup_grouped_query_attention else cfg.n_key_value_heads or cfg.n_heads
        return (
            self.hook_q_input(repeated(cfg.n_heads)),
            self.hook_k_input(repeated(kv_heads)),
            self.hook_v_input(repeated(kv_heads)),
        )

    def _mlp_out(self, resid: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        # a copy, so that a hook that writes in place leaves the residual stream alone
        mlp_in = self.hook_mlp_in(resid.clone()) if self.cfg.use_hook_mlp_in else resid
        return self.hook_mlp_out(self.mlp(self.ln2(mlp_in)))


class HookedTransformer(Text, Generation, Weights, HookedRootModule):
    """A decoder-only transformer with a hook point at every activation; see the module for its equations.

    Args:
        cfg: the configuration, or its fields. The model keeps it and writes to it.
        tokenizer: a Hugging Face tokenizer; None: that of `cfg.tokenizer_name`, else none, and inputs are tokens.
        move_to_device: whether the model goes to `cfg.device`; otherwise it stays on the CPU.
        default_padding_side: `left` or `right`; None: the tokenizer's own.

    Raises:
        ValueError: an architecture that the decoder cannot run, or no vocabulary size.
    """

    def __init__(
        self,
        cfg: HookedTransformerConfig | Mapping[str, Any],
        tokenizer: Any = None,
        move_to_device: bool = True,
        default_padding_side: Literal["left", "right"] | None = None,
    ) -> None:
        super().__init__()
        self.cfg = cfg if isinstance(cfg, HookedTransformerConfig) else HookedTransformerConfig.from_dict(cfg)
        self.cfg.check_supported()
        self.tokenizer = None
        if tokenizer is None and self.cfg.tokenizer_name is not None:
            tokenizer = AutoTokenizer.from_pretrained(self.cfg.tokenizer_name, trust_remote_code=False)
        if tokenizer is not None:
            self.set_tokenizer(tokenizer, default_padding_side=default_padding_side)
        if self.cfg.d_vocab == -1:
            raise ValueError("d_vocab=-1: give the vocabulary size, or a tokenizer to take it from")
        self.embed = Embed(self.cfg)
        self.hook_embed = HookPoint()  # [batch, pos, d_model]
        if self.cfg.positional_embedding_type != "rotary":
            # ALiBi models have unused weights here, as in TransformerLens
            self.pos_embed = PosEmbed(self.cfg)
            self.hook_pos_embed = HookPoint()  # [batch, pos, d_model]
        if self.cfg.use_hook_tokens:
            self.hook_tokens = HookPoint()  # [batch, pos]
        self.blocks = nn.ModuleList(Block(self.cfg, layer) for layer in range(self.cfg.n_layers))
        kind = self.cfg.normalization_type
        if kind is not None:
            self.ln_final = norm(self.cfg, kind.replace("LN", "RMS") if self.cfg.final_rms else kind)
        self.unembed = Unembed(self.cfg)
        if self.cfg.init_weights:
            self.init_weights()
        if move_to_device:
            nn.Module.to(self, self.cfg.device)
        self.setup()

    def forward(
        self,
        input: Input,
        return_type: Literal["logits", "loss", "both"] | None = "logits",
        loss_per_token: bool = False,
        prepend_bos: bool | None = None,
        padding_side: Literal["left", "right"] | None = None,
        start_at_layer: int | None = None,
        tokens: Int[Tensor, "batch pos"] | None = None,
        shortformer_pos_embed: Float[Tensor, "batch pos d_model"] | None = None,
        attention_mask: Int[Tensor, "batch pos"] | None = None,
        stop_at_layer: int | None = None,
        past_kv_cache: TransformerLensKeyValueCache | None = None,
    ) -> Any:
        """Returns logits, loss, or the residual stream at a layer.

        Args:
            input: text, tokens, or with `start_at_layer` the residual stream that enters that layer.
            return_type: `logits`, `loss` (mean nats per predicted token), `both`, or None to stop before the logits.
            loss_per_token: the loss of each prediction, `[batch, pos - 1]`, instead of the mean.
            prepend_bos: whether a begin-of-text token is put before a text; None: `cfg.default_prepend_bos`.
            padding_side: side on which texts of different lengths are padded; None: the tokenizer's.
            start_at_layer: layer to begin with; negative numbers count from the end.
            tokens: the tokens, for the loss; only with `start_at_layer`.
            shortformer_pos_embed: positions of a shortformer model; only with `start_at_layer`.
            attention_mask: 0 for padding; None: found by the tokenizer's padding token if padding is on the left.
                With `start_at_layer` and a cache it covers the cached positions too.
            stop_at_layer: layer to stop before; the residual stream that enters it is returned.
            past_kv_cache: keys and values of earlier positions, to which the new ones are added.

        Raises:
            ValueError: `return_type` is unknown, or a loss is asked for without tokens.
        """
        if return_type not in ("logits", "loss", "both", None):
            raise ValueError(f"return_type={return_type!r} must be 'logits', 'loss', 'both' or None")
        if start_at_layer is None:
            residual, tokens, shortformer_pos_embed, attention_mask = self.input_to_embed(
                input, prepend_bos, padding_side, attention_mask, past_kv_cache
            )
        elif isinstance(input, Tensor):
            residual = input
        else:
            raise ValueError(f"start_at_layer={start_at_layer} needs a residual stream, not a {type(input).__name__}")
        layers = list(enumerate(self.blocks))[: self.cfg.n_layers]
        for layer, block in layers[start_at_layer:stop_at_layer]:
            entry = None if past_kv_cache is None else past_kv_cache[layer]
            residual = block(residual, shortformer_pos_embed, entry, attention_mask)
        if stop_at_layer is not None:
            return residual
        if self.cfg.normalization_type is not None:
            residual = self.ln_final(residual)
        if return_type is None:
            return None
        logits = soft_cap(self.unembed(residual), self.cfg.output_logits_soft_cap)
        if return_type == "logits":
            return logits
        if tokens is None:
            raise ValueError(f"return_type={return_type!r} with start_at_layer needs tokens=...")
        loss = self.loss_fn(logits, tokens, attention_mask, per_token=loss_per_token)
        return loss if return_type == "loss" else Output(logits, loss)

    def input_to_embed(
        self,
        input: Input,
        prepend_bos: bool | None = None,
        padding_side: Literal["left", "right"] | None = None,
        attention_mask: Int[Tensor, "batch pos"] | None = None,
        past_kv_cache: TransformerLensKeyValueCache | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Returns what enters the first layer.

        Returns:
            The residual stream, the tokens, the positions of a shortformer model, and the attention mask with that of
            the cache before it; the last two may be None.

        Raises:
            ValueError: there are more positions than `n_ctx`, or the attention mask has another shape.
        """
        if isinstance(input, Tensor):
            tokens = input if input.ndim == 2 else input[None]
        else:
            tokens = self.to_tokens(input, prepend_bos, padding_side)
        tokens = tokens.to(self.embed.W_E.device)
        side = padding_side or getattr(self.tokenizer, "padding_side", None)
        if attention_mask is None and self.tokenizer is not None and (side == "left" or past_kv_cache is not None):
            bos = self.cfg.default_prepend_bos if prepend_bos is None else prepend_bos
            attention_mask = get_attention_mask(self.tokenizer, tokens, bos, padding_side=side)
        if attention_mask is not None and attention_mask.shape != tokens.shape:
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}, but the tokens have {tuple(tokens.shape)}"
            )
        offset = 0
        if past_kv_cache is not None:
            offset = past_kv_cache[0].past_keys.shape[1]
            new_mask = torch.ones_like(tokens) if attention_mask is None else attention_mask
            attention_mask = past_kv_cache.append_attention_mask(new_mask)
        if attention_mask is not None:
            attention_mask = attention_mask.to(tokens.device)
        length = offset + tokens.shape[1]
        if length > self.cfg.n_ctx and self.cfg.positional_embedding_type != "alibi":
            raise ValueError(f"tokens have {length} positions, more than the model's n_ctx={self.cfg.n_ctx}")
        if self.cfg.use_hook_tokens:
            tokens = self.hook_tokens(tokens)
        residual = self.hook_embed(self.embed(tokens))
        if self.cfg.positional_embedding_type not in ("standard", "shortformer"):
            return residual, tokens, None, attention_mask
        positions = self.hook_pos_embed(self.pos_embed(*tokens.shape, offset, attention_mask))
        if self.cfg.positional_embedding_type == "shortformer":
            return residual, tokens, positions, attention_mask
        return residual + positions, tokens, None, attention_mask

    def loss_fn(
        self,
        logits: Float[Tensor, "batch pos d_vocab"],
        tokens: Int[Tensor, "batch pos"],
        attention_mask: Int[Tensor, "batch pos"] | None = None,
        per_token: bool = False,
    ) -> Tensor:
        """Returns the cross-entropy of each next token in nats: the mean, or `[batch, pos - 1]`."""
        return lm_cross_entropy_loss(logits, tokens.to(logits.device), attention_mask, per_token)

    def run_with_cache(
        self, *args: Any, return_cache_object: bool = True, remove_batch_dim: bool = False, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Runs the model and records activations; see `HookedRootModule.run_with_cache` for the arguments.

        Args:
            return_cache_object: an `ActivationCache`; otherwise a dict of activations by hook name.
        """
        out, cache = super().run_with_cache(*args, remove_batch_dim=remove_batch_dim, **kwargs)
        if return_cache_object:
            return out, ActivationCache(cache, self, has_batch_dim=not remove_batch_dim)
        return out, cache

    def check_hooks_to_add(self, hook_point: Any, hook_point_name: str, *args: Any, **kwargs: Any) -> None:
        """Refuses a hook at a hook point that does not fire under the configuration.

        Raises:
            ValueError: the hook point does not fire; the message names the flag that enables it.
        """
        flag = _FLAG_OF.get(hook_point_name.rsplit(".", 1)[-1])
        if flag is not None and not getattr(self.cfg, flag):
            raise ValueError(f"{hook_point_name} does not fire now: call model.set_{flag}(True) first")

    def set_use_attn_result(self, use_attn_result: bool) -> None:
        """Sets whether each head's output has a hook point of its own, `hook_result [batch, pos, head, d_model]`."""
        self.cfg.use_attn_result = use_attn_result

    def set_use_split_qkv_input(self, use_split_qkv_input: bool) -> None:
        """Sets whether queries, keys and values of each head have their own inputs, `hook_q_input` etc."""
        self.cfg.use_split_qkv_input = use_split_qkv_input

    def set_use_attn_in(self, use_attn_in: bool) -> None:
        """Sets whether each head has an input of its own, `hook_attn_in`; not with grouped queries.

        Raises:
            ValueError: the model has grouped queries.
        """
        if use_attn_in and self.cfg.n_key_value_heads is not None:
            raise ValueError("use_attn_in does not fit grouped queries: use set_use_split_qkv_input(True)")
        self.cfg.use_attn_in = use_attn_in

    def set_use_hook_mlp_in(self, use_hook_mlp_in: bool) -> None:
        """Sets whether the MLP's input has a hook point of its own, `hook_mlp_in`.

        Raises:
            ValueError: the model has no MLPs.
        """
        if self.cfg.attn_only:
            raise ValueError("use_hook_mlp_in needs MLPs, but this model has attn_only=True")
        self.cfg.use_hook_mlp_in = use_hook_mlp_in

    def set_ungroup_grouped_query_attention(self, ungroup_grouped_query_attention: bool) -> None:
        """Sets whether shared keys and values are computed for each query, so that hooks see all heads."""
        self.cfg.ungroup_grouped_query_attention = ungroup_grouped_query_attention

    def to(self, *args: Any, print_details: bool = True, **kwargs: Any) -> HookedTransformer:
        """Moves or casts the model as torch does; the configuration follows. TransformerLens's argument is accepted."""
        return nn.Module.to(self, *args, **kwargs)

    def mps(self) -> HookedTransformer:
        """Moves the model to Apple's GPU."""
        return self.to("mps")

    def _apply(self, fn: Any, recurse: bool = True) -> HookedTransformer:
        """Moves or casts the model as torch does for `to`, `half`, `double`, `cuda`, ...; the configuration follows."""
        super()._apply(fn, recurse)
        self.cfg.dtype, self.cfg.device = self.embed.W_E.dtype, str(self.embed.W_E.device)
        return self
