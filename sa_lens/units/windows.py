"""Where units are most active, and what they do elsewhere: windows of text with a value at every token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sa_lens.config import Stream
from sa_lens.core.host import Host, device_of
from sa_lens.core.unit import Sublayer, Unit, checked_unit, unit_counts
from sa_lens.data import TokenFile
from sa_lens.data.blocks import TextBlocks
from sa_lens.units.activations import ReadBlocks, stream_units, text_blocks
from sa_lens.units.firing import unit_scores

BEFORE = 0.75
"""Share of a window that comes before its peak, where the block has room for it."""


@dataclass(frozen=True)
class Snippets:
    """Windows of one sublayer's units, the top ones first, from `snippets`.

    Every window holds the position at which the unit's score (see `unit_scores`) is largest in its block; no two
    windows of a unit come from one block.
    """

    stream: Stream
    """Stream that was read."""
    sublayer: Sublayer
    """Where the units are."""
    units: Int[Tensor, " unit"]
    """Which units of the sublayer."""
    n_top: int
    """The first `n_top` snippets are the most active blocks, by falling score; the rest are the sample."""
    tokens: Int[Tensor, "unit snippet pos"]
    """Tokens of each window."""
    values: Float[Tensor, "unit snippet pos"]
    """The unit's value at each token."""
    peaks: Int[Tensor, "unit snippet"]
    """Place of the largest score in the window."""
    blocks: Int[Tensor, "unit snippet"]
    """Index of the block in the text."""
    starts: Int[Tensor, "unit snippet"]
    """Position of the window in its block."""
    quantiles: Float[Tensor, "unit snippet"]
    """Share of blocks whose largest score is smaller: near 1 for the top ones, spread over [0, 1) for the sample."""

    def of(self, unit: int) -> int:
        """The row of a unit.

        Raises:
            ValueError: a unit without snippets.
        """
        found = (self.units == unit).nonzero()
        if not len(found):
            raise ValueError(f"unit={unit} of {self.sublayer} has no snippets here: ask for it in units=[...]")
        return int(found[0, 0])


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
    """The most active windows of each unit and a sample over the quantiles of all others, with values at every token.

    Two passes over the text: one for the largest score of every unit in every block (4 bytes a unit and block), one
    over the blocks chosen. The sample takes, of the blocks that are not among the top ones, `n_sample` evenly spaced
    ones in the order of their largest score.

    Args:
        units: which units; None: all.
        n_top: most active windows a unit.
        n_sample: windows of the quantile sample a unit.
        length: tokens a window; windows end within their block.
        n_tokens: tokens to read at most; None: all.
        progress: show progress bars.

    Returns:
        Snippets by sublayer.

    Raises:
        ValueError: an unknown stream or unit; windows longer than the blocks; fewer blocks than snippets.
    """
    blocks = text_blocks(model, text, n_tokens)
    counts = unit_counts(model)
    chosen = (
        {sublayer: torch.arange(n) for sublayer, n in counts.items()} if units is None else _by_sublayer(model, units)
    )
    if n_top < 1 or n_sample < 0:
        raise ValueError(f"n_top={n_top} must be at least 1 and n_sample={n_sample} at least 0")
    if not 1 <= length <= blocks.length:
        raise ValueError(f"length={length} must be from 1 to the {blocks.length} tokens of a block")
    if n_top + n_sample > len(blocks):
        raise ValueError(
            f"the text has {len(blocks)} blocks, and n_top + n_sample = {n_top + n_sample} windows come from as many: "
            "give more text or ask for fewer"
        )
    sublayers = list(chosen)
    device = device_of(model)
    picked = {sublayer: index.to(device) for sublayer, index in chosen.items()}
    largest = {sublayer: torch.empty(len(blocks), len(index), device=device) for sublayer, index in chosen.items()}
    for batch in stream_units(model, blocks, stream, sublayers=sublayers, progress=progress, name="largest"):
        for sublayer, values in batch.values[stream].items():
            scores = unit_scores(sublayer, values[..., picked[sublayer]])
            largest[sublayer][batch.first : batch.first + len(values)] = scores.amax(1).float()
    found = {
        sublayer: _Windows(sublayer, stream, chosen[sublayer], largest.pop(sublayer), n_top, n_sample, length)
        for sublayer in sublayers
    }
    wanted = torch.cat([windows.blocks.flatten() for windows in found.values()]).unique()
    again = blocks
    if isinstance(blocks, ReadBlocks):
        wanted = torch.arange(len(blocks))
    else:
        again = TextBlocks(blocks.pick(wanted), model.cfg.n_ctx)
    for batch in stream_units(model, again, stream, sublayers=sublayers, progress=progress, name="snippets"):
        run = wanted[batch.first : batch.first + len(batch.tokens)]
        for sublayer, values in batch.values[stream].items():
            found[sublayer].fill(run, batch.tokens.cpu(), values[..., picked[sublayer]].cpu())
    return {sublayer: windows.snippets() for sublayer, windows in found.items()}


def _by_sublayer(model: Host, units: Sequence[Unit]) -> dict[Sublayer, Int[Tensor, " unit"]]:
    if not len(units):
        raise ValueError("units is empty: name at least one unit, or None for all")
    indices: dict[Sublayer, list[int]] = {}
    for unit in units:
        indices.setdefault(unit.sublayer, []).append(checked_unit(model, unit).index)
    return {sublayer: torch.tensor(index) for sublayer, index in indices.items()}


class _Windows:
    """The windows of one sublayer: which blocks, then what is in them."""

    def __init__(
        self,
        sublayer: Sublayer,
        stream: Stream,
        units: Int[Tensor, " unit"],
        largest: Float[Tensor, "block unit"],
        n_top: int,
        n_sample: int,
        length: int,
    ) -> None:
        self.sublayer, self.stream, self.units, self.n_top, self.length = sublayer, stream, units, n_top, length
        n = len(largest)
        order = largest.T.sort(dim=1, descending=True, stable=True).indices.cpu()
        ranks = torch.arange(n_top)
        if n_sample:
            spread = torch.linspace(n_top, n - 1, n_sample, dtype=torch.float64).long()
            ranks = torch.cat([ranks, spread])
        self.blocks = order[:, ranks]
        values = largest.T.cpu().gather(1, self.blocks)
        ascending = largest.T.cpu().contiguous().sort(dim=1).values
        self.quantiles = torch.searchsorted(ascending, values.contiguous()).double() / n
        shape = (*self.blocks.shape, length)
        self.tokens = torch.zeros(shape, dtype=torch.int64)
        self.values = torch.zeros(shape)
        self.peaks = torch.zeros(self.blocks.shape, dtype=torch.int64)
        self.starts = torch.zeros(self.blocks.shape, dtype=torch.int64)

    def fill(
        self, run: Int[Tensor, " batch"], tokens: Int[Tensor, "batch pos"], values: Float[Tensor, "batch pos unit"]
    ) -> None:
        """Cuts the windows that come from the blocks just run."""
        row = torch.searchsorted(run, self.blocks.contiguous()).clamp(max=len(run) - 1)
        unit, slot = (run[row] == self.blocks).nonzero(as_tuple=True)
        at = row[unit, slot]
        of_unit = values[at, :, unit].float()
        peak = unit_scores(self.sublayer, of_unit).argmax(1)
        start = (peak - int(BEFORE * self.length)).clamp(min=0).clamp(max=tokens.shape[1] - self.length)
        places = start[:, None] + torch.arange(self.length)
        self.tokens[unit, slot] = tokens[at].gather(1, places)
        self.values[unit, slot] = of_unit.gather(1, places)
        self.peaks[unit, slot] = peak - start
        self.starts[unit, slot] = start

    def snippets(self) -> Snippets:
        return Snippets(
            self.stream,
            self.sublayer,
            self.units,
            self.n_top,
            self.tokens,
            self.values,
            self.peaks,
            self.blocks,
            self.starts,
            self.quantiles,
        )
