"""Tied embeddings: one parameter `embed.W_E`, of which `unembed.W_U` is a view."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from sa_lens.core.base import Embed, HookedTransformer, Unembed


class TiedUnembed(Unembed):
    """Unembedding whose `W_U` is the transpose of an embedding's `W_E`.

    `state_dict()` holds both keys, so that a plain HookedTransformer loads it.
    """

    _embed: Embed

    def __init__(self, cfg: Any, embed: Embed, plain: Unembed) -> None:
        nn.Module.__init__(self)
        self.cfg = cfg
        # set around nn.Module, which would list the embedding's parameter a second time
        self.__dict__["_embed"] = embed
        self.b_U = plain.b_U
        self.hook_in = HookPoint()
        self.hook_out = HookPoint()

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:  # type: ignore[override]
        """The transposed embedding."""
        return self._embed.W_E.T

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}W_U"] = self.W_U if keep_vars else self.W_U.detach()

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        unexpected: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected, error_msgs)
        unexpected_keys += [key for key in unexpected if key != f"{prefix}W_U"]


def untie(unembed: TiedUnembed) -> Unembed:
    """Returns a plain unembedding with a copy of the tied weights."""
    plain = Unembed(unembed.cfg)
    plain.W_U = nn.Parameter(unembed.W_U.detach().clone().contiguous())
    plain.b_U = unembed.b_U
    return plain


def agree(model: HookedTransformer) -> bool:
    """Returns whether W_U is the transpose of W_E."""
    W_U, W_E = model.unembed.W_U, model.embed.W_E
    return W_U.shape == W_E.T.shape and bool(torch.equal(W_U, W_E.T))


def check_tied(state: Mapping[str, Tensor], current: Tensor) -> None:
    """Refuses a state dict whose unembedding is not the transposed embedding.

    Raises:
        ValueError: the two differ.
    """
    W_U = state.get("unembed.W_U")
    if W_U is None:
        return
    W_E = state.get("embed.W_E", current)
    if W_U.shape != W_E.T.shape or not torch.equal(W_U.to(W_E.device), W_E.T):
        raise ValueError(
            "this model ties its embeddings, but unembed.W_U is not the transpose of embed.W_E: call model.untie() "
            "before loading, or build the model with tied_embedding=False"
        )
