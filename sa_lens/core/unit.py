"""Units of a model and their names: `L1.mlp.17` is neuron 17 of layer 1, `L0.attn.37` an attention unit of layer 0.

Attention units are the entries of `z`, counted over all heads of a layer: index = head * d_head + channel.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from sa_lens.config import Site
from sa_lens.core.host import Host

_SPELLING = re.compile(r"L(\d+)\.(attn|mlp)\.(\d+)")


class Sublayer(NamedTuple):
    """The attention or the MLP of one layer, whose units one gate chooses from; `str()` gives `L1.mlp`."""

    layer: int
    """Layer, from 0."""
    site: Site
    """`attn`: attention units; `mlp`: neurons."""

    def __str__(self) -> str:
        return f"L{self.layer}.{self.site}"

    @property
    def value_hook(self) -> str:
        """Hook point of the units' values: after the mask in the ablated stream."""
        return f"blocks.{self.layer}.{'attn.hook_z' if self.site == 'attn' else 'mlp.hook_post'}"

    @property
    def mask_hook(self) -> str:
        """Hook point of the units' mask; only a model with gates has it."""
        return f"blocks.{self.layer}.{self.site}_gate.hook_mask"


class Unit(NamedTuple):
    """One attention unit or neuron; `str()` gives `L1.mlp.17`, and `Unit.parse` reads that."""

    layer: int
    """Layer, from 0."""
    site: Site
    """`attn`: an attention unit; `mlp`: a neuron."""
    index: int  # type: ignore[assignment]  # a tuple has a method of that name
    """Index in the sublayer; attention units are counted over all heads: head * d_head + channel."""

    def __str__(self) -> str:
        return f"L{self.layer}.{self.site}.{self.index}"

    @property
    def sublayer(self) -> Sublayer:
        """The attention or MLP that holds it."""
        return Sublayer(self.layer, self.site)

    def place_in_heads(self, d_head: int) -> str:
        """Returns the head and channel of an attention unit, such as `head 2, channel 1`; "" for a neuron."""
        return "head {}, channel {}".format(*divmod(self.index, d_head)) if self.site == "attn" else ""

    def row(self) -> dict[str, int | str]:
        """Returns the columns that name it in a table: layer, site, unit."""
        return {"layer": self.layer, "site": self.site, "unit": self.index}

    @classmethod
    def parse(cls, text: str) -> Unit:
        """Reads a unit from a text such as `L1.mlp.17`.

        Raises:
            ValueError: the text has another form.
        """
        match = _SPELLING.fullmatch(text)
        if match is None:
            raise ValueError(f"{text!r} names no unit: write L1.mlp.17 for a neuron, L0.attn.37 for an attention unit")
        return cls(int(match[1]), match[2], int(match[3]))  # type: ignore[arg-type]


def unit_counts(model: Host) -> dict[Sublayer, int]:
    """Returns the number of units of each sublayer, layer by layer, attention first."""
    counts: dict[Sublayer, int] = {}
    for layer in range(model.cfg.n_layers):
        counts[Sublayer(layer, "attn")] = model.cfg.n_heads * model.cfg.d_head
        counts[Sublayer(layer, "mlp")] = model.cfg.d_mlp
    return {sublayer: n for sublayer, n in counts.items() if sublayer.value_hook in model.hook_dict}


def checked_unit(model: Host, unit: Unit | str | tuple[int, Site, int]) -> Unit:
    """Returns the unit, given as `Unit`, as text or as (layer, site, index), if the model has it.

    Raises:
        ValueError: the model does not have this unit, or the text has another form.
    """
    unit = Unit.parse(unit) if isinstance(unit, str) else Unit(*unit)
    counts = unit_counts(model)
    if not 0 <= unit.index < counts.get(unit.sublayer, 0):
        sizes = {sublayer.site: n for sublayer, n in counts.items()}
        allowed = " and ".join(f"L0.{site}.0 to L{model.cfg.n_layers - 1}.{site}.{n - 1}" for site, n in sizes.items())
        raise ValueError(f"this {type(model).__name__} has no unit {unit}: it has {allowed}")
    return unit
