"""Values and masks of all units on a text, batch by batch.

The axis `unit` is one attention unit (an entry of `z`, heads flattened: unit = head * d_head + channel) or one neuron.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sa_lens.config import Stream
from sa_lens.core.fused import fused_units, reads_fused
from sa_lens.core.host import Host, at_least_float32, device_of, gate_hook_names, in_stream, streams_of
from sa_lens.core.unit import Sublayer, Unit, checked_unit, unit_counts
from sa_lens.data import TokenFile
from sa_lens.data.blocks import TextBlocks

MEMORY = 2**30
"""Default limit of `hold_units`, in bytes."""
TOKENS_AT_ONCE = {"cpu": 1024, "other": 32_768}
"""Tokens per batch by type of device; on a CPU, batches that fit its caches are fastest."""

UnitValues = dict[Sublayer, Float[Tensor, "batch pos unit"]]
"""Values or masks of all units of some sublayers."""


class UnitBatch(NamedTuple):
    """The units of a batch of blocks."""

    tokens: Int[Tensor, "batch pos"]
    """Tokens, on the model's device."""
    first: int
    """Index of the first block in the text."""
    values: dict[Stream, UnitValues]
    """Values by stream and sublayer; those of the ablated stream are masked."""
    masks: UnitValues
    """Masks by sublayer, those of whole heads repeated for each unit; empty unless the ablated stream is read."""


class HeldUnits(TextBlocks):
    """Blocks whose units are in memory: `stream_units` yields them without running the model.

    Args:
        columns: the units of each sublayer that are in memory, where not all are; the others are yielded as NaN.
        counts: how many units each sublayer has.
    """

    def __init__(
        self,
        blocks: TextBlocks,
        batches: Sequence[UnitBatch],
        columns: Mapping[Sublayer, Int[Tensor, " unit"]] | None,
        counts: Mapping[Sublayer, int],
    ) -> None:
        self.text, self.length, self.count, self.batches = blocks.text, blocks.length, blocks.count, batches
        self.columns, self.counts = columns, counts

    def again(self, streams: Sequence[Stream], sublayers: Sequence[Sublayer]) -> Iterator[UnitBatch]:
        """Yields the batches with these streams and sublayers.

        Raises:
            ValueError: a sublayer of which no unit is in memory.
        """
        if self.columns is not None and not set(sublayers) <= set(self.columns):
            raise ValueError(f"of these sublayers units are in memory: {', '.join(map(str, self.columns))}")
        for batch in self.batches:
            n = self.count - batch.first
            if n > 0:
                yield UnitBatch(
                    batch.tokens[:n],
                    batch.first,
                    {stream: {s: self._whole(s, batch.values[stream][s][:n]) for s in sublayers} for stream in streams},
                    {
                        s: self._whole(s, batch.masks[s][:n])
                        for s in sublayers
                        if s in batch.masks and "ablated" in streams
                    },
                )

    def _whole(self, sublayer: Sublayer, held: Float[Tensor, "batch pos held"]) -> Float[Tensor, "batch pos unit"]:
        if self.columns is None:
            return held
        whole = held.new_full((*held.shape[:2], self.counts[sublayer]), math.nan)
        whole[..., self.columns[sublayer]] = held
        return whole


def chosen_streams(model: Host, streams: Stream | Sequence[Stream] | None) -> tuple[Stream, ...]:
    """Returns the streams to read, each once; None means every stream that the model has."""
    if streams is None:
        return streams_of(model)
    return (streams,) if isinstance(streams, str) else tuple(dict.fromkeys(streams))


def text_blocks(model: Host, text: TokenFile | Tensor | TextBlocks, n_tokens: int | None = None) -> TextBlocks:
    """Returns the text, or its first `n_tokens` tokens, as blocks that the model can read.

    Raises:
        ValueError: see `TextBlocks`.
    """
    if not isinstance(text, TextBlocks):
        return TextBlocks(text, model.cfg.n_ctx, n_tokens=n_tokens, d_vocab=model.cfg.d_vocab)
    if text.length > model.cfg.n_ctx:
        raise ValueError(f"blocks of {text.length} tokens are longer than n_ctx={model.cfg.n_ctx}: cut them shorter")
    if not isinstance(text, HeldUnits):
        TextBlocks(text.text, text.length, d_vocab=model.cfg.d_vocab)  # checks the vocabulary
    return text.first(n_tokens)


def stream_units(
    model: Host,
    text: TokenFile | Tensor | TextBlocks,
    streams: Stream | Sequence[Stream] = "clean",
    *,
    sublayers: Sequence[Sublayer] | None = None,
    n_tokens: int | None = None,
    progress: bool = True,
    name: str = "units",
) -> Iterator[UnitBatch]:
    """Runs a text through the model without gradients and yields the units of each batch.

    The model reads each block from its first token, without a begin-of-text token. Both streams together cost little
    more than the ablated stream alone, because it includes a clean pass. Only one batch is in memory at a time.

    Args:
        text: a token file, blocks `[block pos]`, or `TextBlocks`.
        streams: one stream or several. The ablated stream is read at all positions at once.
        sublayers: sublayers whose units are read; None reads all.
        n_tokens: largest number of tokens to read; None reads all.
        progress: whether to show a progress bar.
        name: title of the progress bar.

    Raises:
        ValueError: an unknown stream or sublayer, the ablated stream of a model without gates, or a text that does not
            fit the model.
    """
    chosen = chosen_streams(model, streams)
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
                f"this {type(model).__name__} has no units at {sublayer}; it has {', '.join(map(str, known))}"
            )
    blocks = text_blocks(model, text, n_tokens)
    if isinstance(blocks, HeldUnits):
        return blocks.again(chosen, sublayers)
    tokens_at_once = TOKENS_AT_ONCE["cpu" if device_of(model).type == "cpu" else "other"]
    return _batches(model, blocks, chosen, sublayers, max(1, tokens_at_once // blocks.length), progress, name)


def hold_units(
    model: Host,
    blocks: TextBlocks,
    streams: Sequence[Stream],
    *,
    units: Sequence[Unit] | None = None,
    n_tokens: int | None = None,
    memory: int = MEMORY,
    progress: bool = True,
) -> TextBlocks:
    """Reads the units of a text once and keeps them in memory, so that several analyses run the model only once.

    Args:
        units: those to keep; None keeps all.
        memory: limit in bytes; a text whose units need more is returned without them.
    """
    blocks = text_blocks(model, blocks, n_tokens)
    counts = unit_counts(model)
    columns = None if units is None else columns_of(model, units)
    n_units = sum(counts.values()) if columns is None else sum(map(len, columns.values()))
    # the masks are as many numbers as the values of one stream
    numbers = blocks.n_tokens * n_units * (len(streams) + ("ablated" in streams))
    if isinstance(blocks, HeldUnits) or 4 * numbers > memory:
        return blocks
    batches = stream_units(
        model, blocks, streams, sublayers=None if columns is None else list(columns), progress=progress, name="reading"
    )
    if columns is not None:
        batches = (_with_columns(batch, columns) for batch in batches)
    return HeldUnits(blocks, list(batches), columns, counts)


def columns_of(model: Host, units: Sequence[Unit]) -> dict[Sublayer, Int[Tensor, " unit"]]:
    """Returns indices of units by sublayer, in the order in which they are named.

    Raises:
        ValueError: no unit, or a unit that the model does not have.
    """
    if not len(units):
        raise ValueError("units is empty: name at least one unit, or None for all")
    indices: dict[Sublayer, list[int]] = {}
    for unit in units:
        indices.setdefault(unit.sublayer, []).append(checked_unit(model, unit).index)
    return {sublayer: torch.tensor(index) for sublayer, index in indices.items()}


def _with_columns(batch: UnitBatch, columns: Mapping[Sublayer, Int[Tensor, " unit"]]) -> UnitBatch:
    """Returns a batch with these units alone."""

    def cut(units: UnitValues) -> UnitValues:
        return {s: x[..., columns[s].to(x.device)] for s, x in units.items()}

    values = {stream: cut(of_stream) for stream, of_stream in batch.values.items()}
    return batch._replace(values=values, masks=cut(batch.masks))


def _batches(
    model: Host,
    blocks: TextBlocks,
    streams: Sequence[Stream],
    sublayers: Sequence[Sublayer],
    batch: int,
    progress: bool,
    name: str,
) -> Iterator[UnitBatch]:
    from tqdm.auto import tqdm

    with tqdm(total=blocks.n_tokens, desc=name, unit=" tokens", unit_scale=True, disable=not progress) as bar:
        for first in range(0, len(blocks), batch):
            tokens = blocks.rows(first, first + batch).to(device_of(model))
            yield UnitBatch(tokens, first, *read_units(model, tokens, streams, sublayers))
            bar.update(tokens.numel())


def read_units(
    model: Host, tokens: Int[Tensor, "batch pos"], streams: Sequence[Stream], sublayers: Sequence[Sublayer]
) -> tuple[dict[Stream, UnitValues], UnitValues]:
    """Returns values by stream and sublayer, and masks by sublayer, of one batch, in float32 or wider.

    If the model and its state allow it, they are computed without hooks, which is several times faster and gives the
    same values up to rounding.
    """
    read = _read_without_hooks if reads_fused(model) else read_by_hooks
    values, masks = read(model, tokens, streams, sublayers)
    wide: dict[Stream, UnitValues] = {
        stream: {s: at_least_float32(x) for s, x in of_stream.items()} for stream, of_stream in values.items()
    }
    return wide, {s: at_least_float32(mask) for s, mask in masks.items()}


def _read_without_hooks(
    model: Any, tokens: Tensor, streams: Sequence[Stream], sublayers: Sequence[Sublayer]
) -> tuple[dict[Stream, UnitValues], UnitValues]:
    read = fused_units(model, tokens, "ablated" if "ablated" in streams else "clean")
    values = {"clean": read.clean, "ablated": read.ablated}
    of_streams: dict[Stream, UnitValues] = {stream: {s: values[stream][s] for s in sublayers} for stream in streams}
    return of_streams, masks_of_units(model, {s: read.masks[s] for s in sublayers if s in read.masks})


def read_by_hooks(
    model: Host, tokens: Int[Tensor, "batch pos"], streams: Sequence[Stream], sublayers: Sequence[Sublayer]
) -> tuple[dict[Stream, UnitValues], UnitValues]:
    """Returns what `read_units` returns, for any model with hook points."""
    values: dict[Stream, UnitValues] = {stream: {} for stream in streams}
    masks: UnitValues = {}
    stop = model.cfg.n_layers

    def keep(sublayer: Sublayer, into: UnitValues) -> Callable[..., None]:
        return lambda x, hook: into.__setitem__(sublayer, x.flatten(2))

    clean_readers = [(s.value_hook, keep(s, values["clean"])) for s in sublayers if "clean" in streams]
    with torch.no_grad():
        if "ablated" in streams:
            gated = set(gate_hook_names(model))
            hooks = [(s.value_hook, keep(s, values["ablated"])) for s in sublayers]
            hooks += [(s.mask_hook, keep(s, masks)) for s in sublayers if s.mask_hook in gated]
            with in_stream(model, "ablated", clean_hooks=clean_readers):
                model.run_with_hooks(tokens, fwd_hooks=hooks, stop_at_layer=stop)
        else:
            with in_stream(model, "clean"):
                model.run_with_hooks(tokens, fwd_hooks=clean_readers, stop_at_layer=stop)
    return values, masks_of_units(model, masks)


def masks_of_units(model: Host, masks: UnitValues) -> UnitValues:
    """Returns masks with one entry for each unit: those of whole heads are repeated for each unit of the head."""
    times = {s: n // masks[s].shape[-1] for s, n in unit_counts(model).items() if s in masks}
    return {s: mask if times[s] == 1 else mask.repeat_interleave(times[s], -1) for s, mask in masks.items()}
