"""Shuffled batches of a hook's activations, in either stream."""

from __future__ import annotations

import re
from collections.abc import Iterator
from types import ModuleType

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sa_lens.config import Stream
from sa_lens.core.base import TRANSFORMER_LENS
from sa_lens.core.gate import belongs_to_gate
from sa_lens.core.host import Host, device_of, in_stream, require_hooks
from sa_lens.data import BlockOrder
from sa_lens.data.blocks import Text, TextBlocks
from sa_lens.sae.settings import SAESettings
from sa_lens.stopping import StopRequest

HEAD_HOOKS = ("hook_q", "hook_k", "hook_v", "hook_z")
"""Hooks `[batch pos head d_head]` whose heads SAELens concatenates."""


def import_sae_lens() -> ModuleType:
    """Returns SAELens.

    Raises:
        ImportError: SAELens is not installed or does not work with the installed TransformerLens.
    """
    if TRANSFORMER_LENS >= 4:
        raise ImportError(
            f"SAEs need SAELens, which needs TransformerLens 3, but TransformerLens {TRANSFORMER_LENS} is installed. "
            'In another environment, install both with: pip install "sa-lens[sae]"'
        )
    try:
        import sae_lens
    except ModuleNotFoundError as error:
        if error.name != "sae_lens":
            raise
        raise ImportError('SAEs need SAELens; install it with: pip install "sa-lens[sae]"') from error
    return sae_lens


def text_of(tokens: Text, model: Host, batch_tokens: int = 1) -> TextBlocks:
    """Returns a text as blocks for a model.

    Raises:
        FileNotFoundError: the token file does not exist.
        ValueError: the model cannot read the text, or it has fewer than `batch_tokens` tokens.
    """
    blocks = TextBlocks(tokens, model.cfg.n_ctx, d_vocab=model.cfg.d_vocab)
    if blocks.length < 2:
        raise ValueError("blocks of 1 token have no next token to predict: give blocks of at least 2")
    if blocks.n_tokens < batch_tokens:
        raise ValueError(
            f"the text has {blocks.n_tokens:,} tokens in whole blocks of {blocks.length}, fewer than one batch of "
            f"batch_tokens={batch_tokens:,}; give a longer text or set batch_tokens lower"
        )
    return blocks


def hook_width(model: Host, hook: str, stream: Stream) -> int:
    """Returns the length of the vector that a hook holds at each token, with heads concatenated.

    Raises:
        ValueError: the hook does not exist, does not fire in this stream, or holds no such vector.
    """
    require_hooks(model, [hook])
    if hook.endswith("gate.hook_mask"):
        raise ValueError(
            f"{hook!r} holds a mask of zeros and ones, which an SAE cannot decompose. Use the masked units "
            "(attn.hook_z, mlp.hook_post) or the units before the mask (mlp_gate.hook_in)"
        )
    if belongs_to_gate(hook) and stream == "clean":
        raise ValueError(f"{hook!r} fires only in the ablated stream: use stream='ablated'")
    shape, positions = _shape(model, hook, stream), 3
    if shape is None:
        raise ValueError(f"{hook!r} does not fire in the {stream} stream of this model; choose another hook")
    heads = len(shape) == 4 and any(name in hook for name in HEAD_HOOKS)
    if shape[:2] != (1, positions) or not (len(shape) == 3 or heads) or shape[-1] < 2:
        raise ValueError(
            f"{hook!r} has the shape {list(shape)} for a block of {positions} tokens. An SAE needs one vector per "
            "token: a hook [batch, pos, width], or attn.hook_q, hook_k, hook_v or hook_z, whose heads are concatenated"
        )
    return int(np.prod(shape[2:]))


def _shape(model: Host, hook: str, stream: Stream) -> tuple[int, ...] | None:
    tokens = torch.arange(3, device=device_of(model))[None] % model.cfg.d_vocab
    with torch.no_grad(), in_stream(model, stream):
        _, cache = model.run_with_cache(tokens, names_filter=[hook], stop_at_layer=_next_layer(hook))
    return tuple(cache[hook].shape) if hook in cache else None


def _next_layer(hook: str) -> int | None:
    layer = re.match(r"blocks\.(\d+)\.", hook)
    return int(layer[1]) + 1 if layer else None


@torch.no_grad()
def activations(
    model: Host, tokens: Int[Tensor, "batch pos"], hook: str, stream: Stream
) -> Float[Tensor, "token width"]:
    """Returns the activations of a hook at each token, in float32, without running later layers."""
    with in_stream(model, stream):
        _, cache = model.run_with_cache(
            tokens.to(device_of(model)), names_filter=[hook], stop_at_layer=_next_layer(hook)
        )
    return cache[hook].flatten(0, 1).flatten(1).float()


class ActivationBatches(Iterator[Tensor]):
    """An endless sequence of shuffled batches of activations, `[batch_tokens width]` each.

    A buffer is filled from consecutive blocks of the shuffled text, shuffled by (seed, number of the buffer), and
    divided into batches. The batch of a step therefore depends only on the arguments, and a sequence that starts at
    step s continues exactly as the whole one.

    Args:
        settings: how many activations a batch has, and how many are shuffled together.
        start: step of the first batch.
        request: checked between two passes of the model; `Interrupted` is raised if a stop was requested.
    """

    BLOCKS_PER_PASS = 16

    def __init__(
        self,
        model: Host,
        blocks: TextBlocks,
        hook: str,
        stream: Stream,
        settings: SAESettings,
        *,
        seed: int,
        start: int = 0,
        request: StopRequest | None = None,
    ) -> None:
        self.model, self.blocks, self.hook, self.stream = model, blocks, hook, stream
        self.batch_tokens, self.seed, self.step = settings.batch_tokens, seed, start
        self.request = request or StopRequest()
        self.order = BlockOrder(len(blocks), seed)
        least, all_steps = (-(-steps * self.batch_tokens // blocks.length) for steps in (1, settings.steps))
        self.blocks_per_buffer = max(least, min(len(blocks), settings.buffer_tokens // blocks.length, all_steps))
        self.batches_per_buffer = self.blocks_per_buffer * blocks.length // self.batch_tokens
        self._filled: int | None = None

    def __next__(self) -> Float[Tensor, "batch_tokens width"]:
        number, batch = divmod(self.step, self.batches_per_buffer)
        if number != self._filled:
            self._fill(number)
        self.step += 1
        return self._buffer[self._shuffled[batch * self.batch_tokens : (batch + 1) * self.batch_tokens]]

    def _fill(self, number: int) -> None:
        chosen = self.order.indices(number * self.blocks_per_buffer, self.blocks_per_buffer)
        parts = []
        for first in range(0, len(chosen), self.BLOCKS_PER_PASS):
            self.request.raise_if_made()
            tokens = self.blocks.pick(chosen[first : first + self.BLOCKS_PER_PASS])
            parts.append(activations(self.model, tokens, self.hook, self.stream))
        self._buffer = torch.cat(parts)
        shuffled = np.random.default_rng([self.seed, 1, number]).permutation(len(self._buffer))
        self._shuffled = torch.from_numpy(shuffled).to(self._buffer.device)
        self._filled = number
