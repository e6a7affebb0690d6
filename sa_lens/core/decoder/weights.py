"""Stacked weights, initial weights and weight processing of the decoder."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens import FactoredMatrix
from transformer_lens.utilities import (
    composition_scores,
    init_kaiming_normal_,
    init_kaiming_uniform_,
    init_xavier_normal_,
    init_xavier_uniform_,
)
from transformer_lens.weight_processing import ProcessWeights

from sa_lens.core.decoder.config import HookedTransformerConfig
from sa_lens.core.decoder.layers import norm

log = logging.getLogger(__name__)

_INITIALISERS: dict[str, Callable[..., Any]] = {
    "xavier_uniform": init_xavier_uniform_,
    "xavier_normal": init_xavier_normal_,
    "kaiming_uniform": init_kaiming_uniform_,
    "kaiming_normal": init_kaiming_normal_,
}


class Weights:
    """The part of `HookedTransformer` that is about its weights as a whole."""

    cfg: HookedTransformerConfig
    blocks: Any
    embed: Any
    pos_embed: Any
    unembed: Any
    ln_final: Any
    setup: Callable[[], None]

    # ---------------------------------------------------------------------------------------------------- stacked

    def _stacked(self, name: str) -> Tensor:
        part, leaf = name.split(".")
        return torch.stack([getattr(getattr(block, part), leaf) for block in self.blocks])

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        return self.embed.W_E

    @property
    def W_pos(self) -> Float[Tensor, "n_ctx d_model"]:
        return self.pos_embed.W_pos

    @property
    def W_E_pos(self) -> Float[Tensor, "d_vocab_and_n_ctx d_model"]:
        """Embeddings of all tokens, then of all positions."""
        return torch.cat([self.W_E, self.W_pos])

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        return self.unembed.W_U

    @property
    def b_U(self) -> Float[Tensor, " d_vocab"]:
        return self.unembed.b_U

    @property
    def W_Q(self) -> Float[Tensor, "layer head d_model d_head"]:
        return self._stacked("attn.W_Q")

    @property
    def W_K(self) -> Float[Tensor, "layer head d_model d_head"]:
        return self._stacked("attn.W_K")

    @property
    def W_V(self) -> Float[Tensor, "layer head d_model d_head"]:
        return self._stacked("attn.W_V")

    @property
    def W_O(self) -> Float[Tensor, "layer head d_head d_model"]:
        return self._stacked("attn.W_O")

    @property
    def b_Q(self) -> Float[Tensor, "layer head d_head"]:
        return self._stacked("attn.b_Q")

    @property
    def b_K(self) -> Float[Tensor, "layer head d_head"]:
        return self._stacked("attn.b_K")

    @property
    def b_V(self) -> Float[Tensor, "layer head d_head"]:
        return self._stacked("attn.b_V")

    @property
    def b_O(self) -> Float[Tensor, "layer d_model"]:
        return self._stacked("attn.b_O")

    @property
    def W_in(self) -> Float[Tensor, "layer d_model d_mlp"]:
        return self._stacked("mlp.W_in")

    @property
    def W_gate(self) -> Float[Tensor, "layer d_model d_mlp"] | None:
        """None in a model whose MLPs are not gated."""
        return self._stacked("mlp.W_gate") if self.cfg.gated_mlp else None

    @property
    def b_in(self) -> Float[Tensor, "layer d_mlp"]:
        return self._stacked("mlp.b_in")

    @property
    def W_out(self) -> Float[Tensor, "layer d_mlp d_model"]:
        return self._stacked("mlp.W_out")

    @property
    def b_out(self) -> Float[Tensor, "layer d_model"]:
        return self._stacked("mlp.b_out")

    @property
    def QK(self) -> FactoredMatrix:
        """`W_Q W_K^T [layer, head, d_model, d_model]`."""
        return FactoredMatrix(self.W_Q, self.W_K.transpose(-2, -1))

    @property
    def OV(self) -> FactoredMatrix:
        """`W_V W_O [layer, head, d_model, d_model]`."""
        return FactoredMatrix(self.W_V, self.W_O)

    @property
    def n_params_total(self) -> int:
        """Number of parameters, embeddings, biases and norms included."""
        assert isinstance(self, nn.Module)
        return sum(parameter.numel() for parameter in self.parameters())

    def all_head_labels(self) -> list[str]:
        """`L0H0`, `L0H1`, ... for every head."""
        return [f"L{layer}H{head}" for layer in range(self.cfg.n_layers) for head in range(self.cfg.n_heads)]

    def accumulated_bias(
        self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> Float[Tensor, " d_model"]:
        """Sum of the biases that layers below `layer` add to the residual stream.

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

    def all_composition_scores(self, mode: Literal["Q", "K", "V"]) -> Float[Tensor, "layer head layer head"]:
        """How much each head reads, by its queries, keys or values, of what an earlier head writes; 0 for later ones.

        Source: Elhage et al., A Mathematical Framework for Transformer Circuits (2021).
        """
        if mode not in ("Q", "K", "V"):
            raise ValueError(f"mode={mode!r} must be 'Q', 'K' or 'V'")
        reader = {"Q": self.QK, "K": self.QK.T, "V": self.OV}[mode]
        scores = composition_scores(self.OV, reader, broadcast_dims=True)
        layers = torch.arange(self.cfg.n_layers, device=scores.device)
        return scores.masked_fill(layers[:, None, None, None] >= layers[:, None], 0)

    # ------------------------------------------------------------------------------------------- initial, processed

    def init_weights(self) -> None:
        """Draws the matrices as `cfg.init_mode` says; biases are zero and norms one from the start.

        With `cfg.seed` the draws are the same each time, and torch's random state is left alone.

        Raises:
            ValueError: an unknown mode.
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
        """Simplifies the model's own weights; see `load_and_process_state_dict`."""
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
        """Loads weights in a simpler form that gives the same log-probabilities.

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
