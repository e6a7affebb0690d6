"""Values and masks of all units, streamed over a text batch by batch.

Here: texts cut into blocks (`TextBlocks`), and one loop over all sublayers (`stream_units`).
What is computed from the values is elsewhere.

Axes: `unit` is one attention unit (an entry of `z`, heads flattened: unit = head * d_head + channel) or one neuron.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sa_lens.config import Stream
from sa_lens.core.fused import fused_units, reads_fused
from sa_lens.core.host import Host, at_least_float32, device_of, gate_hook_names, in_stream, streams_of
from sa_lens.core.unit import Sublayer, unit_counts
from sa_lens.data import TokenFile
from sa_lens.data.blocks import TextBlocks

MEMORY = 2**30
"""Bytes of units that `held` holds at most."""
TOKENS_AT_ONCE = {"cpu": 1024, "other": 32_768}
"""Tokens of a batch by type of device: on a CPU, what its caches hold is fastest."""


UnitValues = dict[Sublayer, Float[Tensor, "batch pos unit"]]
"""Values or masks of all units of some sublayers."""


class UnitBatch(NamedTuple):
    """The units of a batch of blocks."""

    tokens: Int[Tensor, "batch pos"]
    """What was run, on the model's device."""
    first: int
    """Index of the first block in the text."""
    values: dict[Stream, UnitValues]
    """Values by stream and sublayer; in the ablated stream after the mask."""
    masks: UnitValues
    """Masks by sublayer, those of whole heads repeated for each unit; empty unless the ablated stream is read."""


class ReadBlocks(TextBlocks):
    """Blocks whose units have been read once and are held: `stream_units` gives them again without running the model.

    Args:
        batches: what `stream_units` gave of the blocks, from the first on, with all sublayers.
    """

    def __init__(self, blocks: TextBlocks, batches: Sequence[UnitBatch]) -> None:
        self.text, self.length, self.batches = blocks.text, blocks.length, batches
        self.count = sum(len(batch.tokens) for batch in batches)

    def again(self, count: int, streams: Sequence[Stream], sublayers: Sequence[Sublayer]) -> Iterator[UnitBatch]:
        """The batches of the first `count` blocks with these streams and sublayers."""
        for batch in self.batches:
            n = count - batch.first
            if n > 0:
                yield UnitBatch(
                    batch.tokens[:n],
                    batch.first,
                    {stream: {s: batch.values[stream][s][:n] for s in sublayers} for stream in streams},
                    {s: batch.masks[s][:n] for s in sublayers if s in batch.masks and "ablated" in streams},
                )


model_streams = streams_of
"""The name by which `sa_lens.shipped` imports it."""


def text_blocks(model: Host, text: TokenFile | Tensor | TextBlocks, n_tokens: int | None = None) -> TextBlocks:
    """The text as blocks that the model can read, at most `n_tokens` of it.

    Raises:
        ValueError: see `TextBlocks`.
    """
    if isinstance(text, ReadBlocks):
        read = ReadBlocks(text, text.batches)
        read.count = text.count if n_tokens is None else min(text.count, max(1, n_tokens // text.length))
        return read
    if isinstance(text, TextBlocks):
        count = text.count
        text = TextBlocks(text.text, text.length, n_tokens=n_tokens, d_vocab=model.cfg.d_vocab)
        text.count = min(count, text.count)
        if text.length > model.cfg.n_ctx:
            raise ValueError(
                f"blocks of {text.length} tokens are longer than n_ctx={model.cfg.n_ctx}: cut them shorter"
            )
        return text
    return TextBlocks(text, model.cfg.n_ctx, n_tokens=n_tokens, d_vocab=model.cfg.d_vocab)


def stream_units(
    model: Host,
    text: TokenFile | Tensor | TextBlocks,
    streams: Stream | Sequence[Stream] = "clean",
    *,
    sublayers: Sequence[Sublayer] | None = None,
    n_tokens: int | None = None,
    tokens_at_once: int | None = None,
    progress: bool = True,
    name: str = "units",
) -> Iterator[UnitBatch]:
    """Runs a text through the model without gradients and yields the units of each batch.

    Each block is read from its first token on, without a begin-of-text token. Both streams together cost little more
    than the ablated one alone, whose clean pass is read as it goes by. Memory is that of one batch.

    Args:
        text: a token file, blocks `[block pos]`, or `TextBlocks`.
        streams: one stream or several. The ablated stream is at all positions at once.
        sublayers: which units; None: all.
        n_tokens: tokens to read at most; None: all.
        tokens_at_once: tokens a batch; at least one block is run. None: 1,024 on a CPU, 32,768 elsewhere.
        progress: show a progress bar.
        name: its title.

    Raises:
        ValueError: an unknown stream or sublayer, the ablated stream without gates, or a text that does not fit.
    """
    chosen: tuple[Stream, ...] = (streams,) if isinstance(streams, str) else tuple(dict.fromkeys(streams))
    if not chosen:
        raise ValueError("streams is empty: name 'clean', 'ablated' or both")
    for stream in chosen:
        with in_stream(model, stream):
            pass
    known = list(unit_counts(model))
    sublayers = known if sublayers is None else list(sublayers)
    for sublayer in sublayers:
        if sublayer not in known:
            raise ValueError(
                f"this {type(model).__name__} has no units at {sublayer}: layers 0 to {model.cfg.n_layers - 1}"
            )
    blocks = text_blocks(model, text, n_tokens)
    if isinstance(blocks, ReadBlocks):
        return blocks.again(blocks.count, chosen, sublayers)
    if tokens_at_once is None:
        tokens_at_once = TOKENS_AT_ONCE["cpu" if device_of(model).type == "cpu" else "other"]
    return _batches(model, blocks, chosen, sublayers, max(1, tokens_at_once // blocks.length), progress, name)


def held(
    model: Host,
    blocks: TextBlocks,
    streams: Sequence[Stream],
    *,
    n_tokens: int | None = None,
    memory: int = MEMORY,
    progress: bool = True,
) -> TextBlocks:
    """The text with its units read once and held, for several looks at them; as it is where they are too many.

    Args:
        memory: bytes that may be held.
    """
    blocks = text_blocks(model, blocks, n_tokens)
    # masks are a stream's worth of numbers
    numbers = blocks.n_tokens * sum(unit_counts(model).values()) * (len(streams) + ("ablated" in streams))
    if 4 * numbers > memory:
        return blocks
    return ReadBlocks(blocks, list(stream_units(model, blocks, streams, progress=progress, name="reading")))


def _batches(
    model: Host,
    blocks: TextBlocks,
    streams: tuple[Stream, ...],
    sublayers: Sequence[Sublayer],
    batch: int,
    progress: bool,
    name: str,
) -> Iterator[UnitBatch]:
    from tqdm.auto import tqdm

    device = device_of(model)
    with tqdm(total=blocks.n_tokens, desc=name, unit=" tokens", unit_scale=True, disable=not progress) as bar:
        for first in range(0, len(blocks), batch):
            tokens = blocks.rows(first, first + batch).to(device)
            yield UnitBatch(tokens, first, *read_units(model, tokens, streams, sublayers))
            bar.update(tokens.numel())


def read_units(
    model: Host, tokens: Int[Tensor, "batch pos"], streams: Sequence[Stream], sublayers: Sequence[Sublayer]
) -> tuple[
    dict[Stream, dict[Sublayer, Float[Tensor, "batch pos unit"]]], dict[Sublayer, Float[Tensor, "batch pos unit"]]
]:
    """Values by stream and sublayer, and masks by sublayer, of one batch, in float32 or wider; see `UnitBatch`.

    Without hooks where the model and its state allow it, several times faster; the same values up to rounding.
    """
    read = _without_hooks if reads_fused(model) else read_by_hooks
    values, masks = read(model, tokens, streams, sublayers)
    wide: dict[Stream, dict[Sublayer, Tensor]] = {stream: _wide(found) for stream, found in values.items()}
    return wide, _wide(masks)


def _wide(found: dict[Sublayer, Tensor]) -> dict[Sublayer, Tensor]:
    return {sublayer: at_least_float32(x) for sublayer, x in found.items()}


def _without_hooks(
    model: Any, tokens: Tensor, streams: Sequence[Stream], sublayers: Sequence[Sublayer]
) -> tuple[dict[Stream, dict[Sublayer, Tensor]], dict[Sublayer, Tensor]]:
    found = fused_units(model, tokens, "ablated" if "ablated" in streams else "clean")
    read = {"clean": found.clean, "ablated": found.ablated}
    values: dict[Stream, dict[Sublayer, Tensor]] = {
        stream: {sublayer: read[stream][sublayer] for sublayer in sublayers} for stream in streams
    }
    masks = {sublayer: found.masks[sublayer] for sublayer in sublayers if sublayer in found.masks}
    return values, {sublayer: _widened(mask, values["ablated"][sublayer]) for sublayer, mask in masks.items()}


def read_by_hooks(
    model: Host, tokens: Int[Tensor, "batch pos"], streams: Sequence[Stream], sublayers: Sequence[Sublayer]
) -> tuple[
    dict[Stream, dict[Sublayer, Float[Tensor, "batch pos unit"]]], dict[Sublayer, Float[Tensor, "batch pos unit"]]
]:
    """What `read_units` gives, of any model with hook points."""
    values: dict[Stream, dict[Sublayer, Tensor]] = {stream: {} for stream in streams}
    masks: dict[Sublayer, Tensor] = {}
    stop = model.cfg.n_layers
    clean_readers = [
        (sublayer.value_hook, _keep_at(sublayer, values["clean"])) for sublayer in sublayers if "clean" in streams
    ]
    with torch.no_grad():
        if "ablated" in streams:
            gated = set(gate_hook_names(model))
            masked = [sublayer for sublayer in sublayers if sublayer.mask_hook in gated]
            hooks = [
                *((sublayer.value_hook, _keep_at(sublayer, values["ablated"])) for sublayer in sublayers),
                *((sublayer.mask_hook, _keep_at(sublayer, masks)) for sublayer in masked),
            ]
            with in_stream(model, "ablated", clean_hooks=clean_readers):
                model.run_with_hooks(tokens, fwd_hooks=hooks, stop_at_layer=stop)
            masks = {sublayer: _widened(mask, values["ablated"][sublayer]) for sublayer, mask in masks.items()}
        else:
            with in_stream(model, "clean"):
                model.run_with_hooks(tokens, fwd_hooks=clean_readers, stop_at_layer=stop)
    return values, masks


def _keep_at(sublayer: Sublayer, into: dict[Sublayer, Tensor]) -> Callable[..., None]:
    def keep(x: Tensor, hook: Any) -> None:
        into[sublayer] = x.flatten(2)

    return keep


def _widened(mask: Float[Tensor, "batch pos some"], values: Float[Tensor, "batch pos unit"]) -> Tensor:
    times = values.shape[-1] // mask.shape[-1]
    return mask if times == 1 else mask.repeat_interleave(times, dim=-1)
