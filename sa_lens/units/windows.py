"""Snippets of text on which units are most active, and a sample of the others, with a value at every token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sa_lens.config import Stream
from sa_lens.core.host import Host, device_of, refuse_chosen_stream
from sa_lens.core.unit import Sublayer, Unit, unit_counts
from sa_lens.data import TokenFile
from sa_lens.data.blocks import TextBlocks
from sa_lens.units.activations import HeldUnits, columns_of, stream_units, text_blocks
from sa_lens.units.firing import unit_scores

BEFORE = 0.75
"""Share of a window that precedes its peak, if the block is long enough."""


@dataclass(frozen=True)
class Snippets:
    """Snippets of the units of one sublayer, the most active first, from `snippets`.

    Every snippet is a window around the position at which the unit's score (see `unit_scores`) is largest in its block.
    No two snippets of a unit come from the same block.
    """

    stream: Stream
    """Stream in which the units were read."""
    sublayer: Sublayer
    """Sublayer of the units."""
    units: Int[Tensor, " unit"]
    """Indices of the units in the sublayer."""
    n_top: int
    """The first `n_top` snippets have the largest scores, in falling order; the others are the sample."""
    tokens: Int[Tensor, "unit snippet pos"]
    """Tokens of each window."""
    values: Float[Tensor, "unit snippet pos"]
    """The unit's value at each token."""
    peaks: Int[Tensor, "unit snippet"]
    """Index of the largest score in the window."""
    blocks: Int[Tensor, "unit snippet"]
    """Index of the block in the text."""
    starts: Int[Tensor, "unit snippet"]
    """Position in the block at which the window starts."""
    quantiles: Float[Tensor, "unit snippet"]
    """Share of blocks whose largest score is smaller: near 1 at the top, spread over [0, 1) in the sample."""

    def of(self, unit: int) -> int:
        """Returns the row of a unit, by its index in the sublayer.

        Raises:
            ValueError: the unit has no snippets here.
        """
        rows = (self.units == unit).nonzero()
        if not len(rows):
            raise ValueError(f"unit={unit} of {self.sublayer} has no snippets here: ask for it in units=[...]")
        return int(rows[0, 0])


def snippets(
    model: Host,
    text: TokenFile | Tensor | TextBlocks,
    stream: Stream = "clean",
    *,
    units: Sequence[Unit] | None = None,
    n_top: int = 20,
    n_sample: int = 20,
    length: int = 64,
    n_tokens: int | None = 500_000,
    progress: bool = True,
) -> dict[Sublayer, Snippets]:
    """Finds the snippets on which each unit is most active and a sample of the others, with values at every token.

    The model runs twice: over the whole text for the largest score of every unit in every block (4 bytes per unit and
    block), and over the chosen blocks. For the sample, the other blocks are sorted by their largest score, and
    `n_sample` of them are taken at even distances.

    Args:
        text: a token file, blocks `[block pos]`, or `TextBlocks`.
        stream: stream to read.
        units: units to read; None reads all.
        n_top: number of most active snippets per unit.
        n_sample: number of sampled snippets per unit.
        length: tokens per snippet; a snippet lies within one block.
        n_tokens: largest number of tokens to read; None reads all.
        progress: whether to show progress bars.

    Returns:
        Snippets by sublayer.

    Raises:
        ValueError: an unknown stream or unit, snippets longer than the blocks, or fewer blocks than snippets.
    """
    refuse_chosen_stream(model, "snippets")
    blocks = text_blocks(model, text, n_tokens)
    counts = unit_counts(model)
    chosen = (
        {sublayer: torch.arange(n) for sublayer, n in counts.items()} if units is None else columns_of(model, units)
    )
    if n_top < 1 or n_sample < 0:
        raise ValueError(f"n_top={n_top} must be at least 1 and n_sample={n_sample} at least 0")
    if not 1 <= length <= blocks.length:
        raise ValueError(f"length={length} must be from 1 to the {blocks.length} tokens of a block")
    if n_top + n_sample > len(blocks):
        raise ValueError(
            f"the text has {len(blocks)} blocks, fewer than the n_top + n_sample = {n_top + n_sample} snippets of a "
            "unit, which come from different blocks; give more text or ask for fewer snippets"
        )
    device = device_of(model)
    indices = {sublayer: index.to(device) for sublayer, index in chosen.items()}
    options = {"sublayers": list(chosen), "progress": progress}
    largest = {sublayer: torch.empty(len(blocks), len(index), device=device) for sublayer, index in chosen.items()}
    for batch in stream_units(model, blocks, stream, **options, name="largest"):  # type: ignore[arg-type]
        for sublayer, values in batch.values[stream].items():
            scores = unit_scores(sublayer, values[..., indices[sublayer]])
            largest[sublayer][batch.first : batch.first + len(values)] = scores.amax(1).float()
    records = {s: _choose_blocks(s, stream, chosen[s], largest.pop(s), n_top, n_sample, length) for s in chosen}
    # the second pass reads only the chosen blocks, unless the units are in memory
    numbers = torch.arange(len(blocks))
    if not isinstance(blocks, HeldUnits):
        numbers = torch.cat([record.blocks.flatten() for record in records.values()]).unique()
        blocks = TextBlocks(blocks.pick(numbers), model.cfg.n_ctx)
    for batch in stream_units(model, blocks, stream, **options, name="snippets"):  # type: ignore[arg-type]
        read = numbers[batch.first : batch.first + len(batch.tokens)]
        for sublayer, values in batch.values[stream].items():
            _fill(records[sublayer], read, batch.tokens.cpu(), values[..., indices[sublayer]].cpu())
    return records


def _choose_blocks(
    sublayer: Sublayer,
    stream: Stream,
    units: Int[Tensor, " unit"],
    largest: Float[Tensor, "block unit"],
    n_top: int,
    n_sample: int,
    length: int,
) -> Snippets:
    """Chooses blocks by the largest score of each unit in each block; `_fill` adds tokens and values."""
    scores = largest.T.contiguous()
    order = scores.sort(dim=1, descending=True, stable=True).indices.cpu()
    sample = torch.linspace(n_top, len(largest) - 1, n_sample, dtype=torch.float64).long()
    blocks = order[:, torch.cat([torch.arange(n_top), sample])]
    scores = scores.cpu()
    rank = torch.searchsorted(scores.sort(dim=1).values, scores.gather(1, blocks))
    shape = (*blocks.shape, length)
    return Snippets(
        *(stream, sublayer, units, n_top),
        tokens=torch.zeros(shape, dtype=torch.int64),
        values=torch.zeros(shape),
        peaks=torch.zeros(blocks.shape, dtype=torch.int64),
        blocks=blocks,
        starts=torch.zeros(blocks.shape, dtype=torch.int64),
        quantiles=rank.double() / len(largest),
    )


def _fill(
    record: Snippets,
    read: Int[Tensor, " batch"],
    tokens: Int[Tensor, "batch pos"],
    values: Float[Tensor, "batch pos unit"],
) -> None:
    """Cuts the windows that lie in the blocks of a batch; `read` holds the numbers of these blocks, rising."""
    length = record.tokens.shape[-1]
    place = torch.searchsorted(read, record.blocks.contiguous()).clamp(max=len(read) - 1)
    unit, slot = (read[place] == record.blocks).nonzero(as_tuple=True)
    row = place[unit, slot]
    of_unit = values[row, :, unit].float()
    peak = unit_scores(record.sublayer, of_unit).argmax(1)
    start = (peak - int(BEFORE * length)).clamp(min=0).clamp(max=tokens.shape[1] - length)
    positions = start[:, None] + torch.arange(length)
    record.tokens[unit, slot] = tokens[row].gather(1, positions)
    record.values[unit, slot] = of_unit.gather(1, positions)
    record.peaks[unit, slot] = peak - start
    record.starts[unit, slot] = start
