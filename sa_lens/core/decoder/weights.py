"""Stacked weights, initial weights and weight processing of the decoder."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens import FactoredMatrix
from transformer_lens.utilities import (
    init_kaiming_normal_,
    init_kaiming_uniform_,
    init_xavier_normal_,
    init_xavier_uniform_,
)
from transformer_lens.weight_processing import ProcessWeights

from sa_lens.core.decoder.hooked_transformer_config import HookedTransformerConfig
from sa_lens.core.decoder.layers import norm

log = logging.getLogger(__name__)

_INITIALISERS: dict[str, Callable[..., Any]] = {
    "xavier_uniform": init_xavier_uniform_,
    "xavier_normal": init_xavier_normal_,
    "kaiming_uniform": init_kaiming_uniform_,
    "kaiming_normal": init_kaiming_normal_,
}


def _stack_layers(part: str, name: str) -> property:
    """Returns a weight of all layers as one tensor `[layer, ...]`; grouped keys and values are repeated."""
    return property(lambda self: torch.stack([getattr(getattr(block, part), name) for block in self.blocks]))


class Weights:
    """The methods of `HookedTransformer` about its weights as a whole."""

    cfg: HookedTransformerConfig
    blocks: Any
    embed: Any
    pos_embed: Any
    unembed: Any
    ln_final: Any
    setup: Callable[[], None]

    W_E = property(lambda self: self.embed.W_E, doc="Embedding of tokens `[d_vocab, d_model]`.")
    W_pos = property(lambda self: self.pos_embed.W_pos, doc="Embedding of positions `[n_ctx, d_model]`.")
    W_U = property(lambda self: self.unembed.W_U, doc="Unembedding `[d_model, d_vocab]`.")
    b_U = property(lambda self: self.unembed.b_U, doc="Bias of the logits `[d_vocab]`.")
    W_Q = _stack_layers("attn", "W_Q")  # [layer, head, d_model, d_head]
    W_K = _stack_layers("attn", "W_K")
    W_V = _stack_layers("attn", "W_V")
    W_O = _stack_layers("attn", "W_O")  # [layer, head, d_head, d_model]
    b_Q = _stack_layers("attn", "b_Q")  # [layer, head, d_head]
    b_K = _stack_layers("attn", "b_K")
    b_V = _stack_layers("attn", "b_V")
    b_O = _stack_layers("attn", "b_O")  # [layer, d_model]
    W_in = _stack_layers("mlp", "W_in")  # [layer, d_model, d_mlp]
    b_in = _stack_layers("mlp", "b_in")  # [layer, d_mlp]
    W_out = _stack_layers("mlp", "W_out")  # [layer, d_mlp, d_model]
    b_out = _stack_layers("mlp", "b_out")  # [layer, d_model]

    @property
    def W_gate(self) -> Float[Tensor, "layer d_model d_mlp"] | None:
        """None in a model whose MLPs are not gated."""
        return torch.stack([block.mlp.W_gate for block in self.blocks]) if self.cfg.gated_mlp else None

    @property
    def W_E_pos(self) -> Float[Tensor, "d_vocab_and_n_ctx d_model"]:
        """Embeddings of all tokens, then of all positions."""
        return torch.cat([self.W_E, self.W_pos])

    @property
    def QK(self) -> FactoredMatrix:
        """`W_Q W_K^T [layer, head, d_model, d_model]`."""
        return FactoredMatrix(self.W_Q, self.W_K.transpose(-2, -1))

    @property
    def OV(self) -> FactoredMatrix:
        """`W_V W_O [layer, head, d_model, d_model]`."""
        return FactoredMatrix(self.W_V, self.W_O)

    def all_head_labels(self) -> list[str]:
        """`L0H0`, `L0H1`, ... for every head."""
        return [f"L{layer}H{head}" for layer in range(self.cfg.n_layers) for head in range(self.cfg.n_heads)]

    def accumulated_bias(
        self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> Float[Tensor, " d_model"]:
        """Returns the sum of the biases that layers below `layer` add to the residual stream.

        Args:
            mlp_input: up to the MLP of `layer`, that is, with the bias of its attention.
            include_mlp_biases: with b_out as well as b_O.
        """
        total = self.W_E.new_zeros(self.cfg.d_model)
        for block in self.blocks[: layer + mlp_input]:
            total = total + block.attn.b_O
        if include_mlp_biases and not self.cfg.attn_only:
            for block in self.blocks[:layer]:
                total = total + block.mlp.b_out
        return total

    def init_weights(self) -> None:
        """Draws the matrices as `cfg.init_mode` says; biases stay zero and norms one.

        With `cfg.seed` the draws are the same each time, and torch's random state is left alone.

        Raises:
            ValueError: the mode is unknown.
        """
        assert isinstance(self, nn.Module)
        mode, size, seed = self.cfg.init_mode, self.cfg.initializer_range, self.cfg.seed
        if mode != "gpt2" and mode not in _INITIALISERS:
            raise ValueError(f"init_mode={mode!r} must be one of gpt2, {', '.join(_INITIALISERS)}")
        draw = partial(nn.init.normal_, std=size) if mode == "gpt2" else partial(_INITIALISERS[mode], gain=size)
        with torch.random.fork_rng(devices=[], enabled=seed is not None):
            if seed is not None:
                torch.default_generator.manual_seed(seed)
            for name, parameter in self.named_parameters():
                if "W_" in name:
                    draw(parameter)

    def process_weights_(
        self,
        fold_ln: bool = True,
        center_writing_weights: bool = True,
        center_unembed: bool = True,
        refactor_factored_attn_matrices: bool = False,
    ) -> None:
        """Processes the model's own weights in place; see `load_and_process_state_dict`."""
        assert isinstance(self, nn.Module)
        self.load_and_process_state_dict(
            self.state_dict(),
            fold_ln=fold_ln,
            center_writing_weights=center_writing_weights,
            center_unembed=center_unembed,
            refactor_factored_attn_matrices=refactor_factored_attn_matrices,
        )

    def load_and_process_state_dict(
        self,
        state_dict: dict[str, Tensor],
        fold_ln: bool = True,
        center_writing_weights: bool = True,
        center_unembed: bool = True,
        fold_value_biases: bool = True,
        refactor_factored_attn_matrices: bool = False,
    ) -> None:
        """Loads weights in a processed form that gives the same log-probabilities.

        Args:
            state_dict: weights under this model's names; missing ones stay as they are.
            fold_ln: weights of the norms go into the matrices behind them, so that `LN` becomes `LNPre`.
            center_writing_weights: matrices that write to the residual stream lose their mean, which LayerNorm removes.
            center_unembed: logits have mean zero over the vocabulary.
            fold_value_biases: b_V goes into b_O; patterns sum to 1, so its effect is constant.
            refactor_factored_attn_matrices: W_Q and W_K, W_V and W_O are balanced by singular value decomposition.
        """
        assert isinstance(self, nn.Module)
        state = {name: tensor.clone() for name, tensor in {**self.state_dict(), **state_dict}.items()}
        if fold_ln and self.cfg.normalization_type is None:
            log.warning("fold_ln=True has no effect on a model without norms")
            fold_ln = False
        if fold_ln and self.cfg.normalization_type in ("LN", "RMS"):
            self._drop_norm_weights(f"{self.cfg.normalization_type}Pre")
        processed = ProcessWeights.process_weights(
            state,
            self.cfg,
            fold_ln=fold_ln,
            center_writing_weights=center_writing_weights,
            center_unembed=center_unembed,
            fold_value_biases=fold_value_biases,
            refactor_factored_attn_matrices=refactor_factored_attn_matrices,
        )
        self.load_state_dict(processed, strict=False)

    def _drop_norm_weights(self, kind: str) -> None:
        self.cfg.normalization_type = kind
        self.ln_final = norm(self.cfg, kind)
        for block in self.blocks:
            block.ln1 = norm(self.cfg, kind)
            if not self.cfg.attn_only:
                block.ln2 = norm(self.cfg, kind)
                if self.cfg.is_layer_norm_activation():
                    block.mlp.ln = norm(self.cfg, kind)
        self.setup()
