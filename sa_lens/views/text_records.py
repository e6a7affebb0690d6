"""Records of one text: its tokens, and what is shown of each; `sa_lens.views.records` offers them beside all others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Attention:
    """Attention patterns of heads on one text."""

    title: str
    """Heading."""
    tokens: tuple[str, ...]
    """The text, token by token."""
    heads: tuple[str, ...]
    """A name for each pattern, such as `ablated 1.3`."""
    patterns: tuple[tuple[tuple[float, ...], ...], ...]
    """For each head, for each query position, the share of attention that each key position gets."""

    def __post_init__(self) -> None:
        if len(self.heads) != len(self.patterns):
            raise ValueError(f"{self.title!r}: {len(self.heads)} names for {len(self.patterns)} patterns")


@dataclass(frozen=True)
class Track:
    """A number for each token of a text."""

    name: str
    """What the numbers are, in a few words."""
    scale: str
    """What they mean, with unit."""
    values: tuple[float | None, ...]
    """One a token; None where there is none."""
    colours: Literal["diverging", "sequential"] = "sequential"
    """`diverging`: centred at 0. `sequential`: from the smallest to the largest value."""


@dataclass(frozen=True)
class Story:
    """A text whose tokens take the colour of a number, one track of numbers at a time."""

    title: str
    """Heading."""
    note: str
    """A line below the heading."""
    tokens: tuple[str, ...]
    """The text, token by token."""
    tracks: tuple[Track, ...]
    """What to colour by; the first is shown first."""

    def __post_init__(self) -> None:
        for track in self.tracks:
            if len(track.values) != len(self.tokens):
                raise ValueError(
                    f"{self.title!r}: {len(track.values)} values of {track.name} for {len(self.tokens)} tokens"
                )


@dataclass(frozen=True)
class Guess:
    """A token that a stream expects next."""

    token: str
    """Its text."""
    log_probability: float
    """In nats."""


@dataclass(frozen=True)
class StreamPredictions:
    """What one stream expects after each token of a text."""

    stream: str
    """`clean` or `ablated`."""
    top: tuple[tuple[Guess, ...], ...]
    """The most likely next tokens at each position, the likeliest first."""
    actual: tuple[float | None, ...]
    """Log-probability of the token that does come next, nats; None at the end."""


@dataclass(frozen=True)
class Predictions:
    """What each stream expects after each token of a text."""

    title: str
    """Heading."""
    note: str
    """A line below the heading."""
    tokens: tuple[str, ...]
    """The text, token by token."""
    streams: tuple[StreamPredictions, ...]
    """One a stream."""

    def __post_init__(self) -> None:
        for one in self.streams:
            if len(one.top) != len(self.tokens) or len(one.actual) != len(self.tokens):
                raise ValueError(f"{self.title!r}: predictions of the {one.stream} stream for another number of tokens")


@dataclass(frozen=True)
class LensStream:
    """What the residual stream would predict after each layer, in one stream."""

    stream: str
    """`clean` or `ablated`."""
    top: tuple[tuple[str, ...], ...]
    """For each layer, for each position, the likeliest next token."""
    log_probability: tuple[tuple[float, ...], ...]
    """Its log-probability, nats."""
    actual: tuple[tuple[float | None, ...], ...]
    """Log-probability of the token that does come next, nats; None at the end."""


@dataclass(frozen=True)
class LogitLens:
    """What the residual stream would predict after each layer."""

    title: str
    """Heading."""
    note: str
    """A line below the heading."""
    tokens: tuple[str, ...]
    """The text, token by token."""
    layers: tuple[str, ...]
    """A name for each row, in the order of computation."""
    streams: tuple[LensStream, ...]
    """One a stream."""


@dataclass(frozen=True)
class LiveUnit:
    """A unit that a gate keeps at some tokens of a text."""

    name: str
    """Such as `layer 1 neuron 17`."""
    layer: int
    """Its layer."""
    kind: Literal["attn", "mlp"]
    """Attention unit or neuron."""
    promotes: tuple[str, ...]
    """Tokens whose logits it raises most, directly."""
    positions: tuple[int, ...]
    """Tokens at which it stays, rising."""
    values: tuple[float, ...]
    """Its value at each of them."""

    def __post_init__(self) -> None:
        if len(self.positions) != len(self.values):
            raise ValueError(f"{self.name}: {len(self.positions)} positions for {len(self.values)} values")


@dataclass(frozen=True)
class GateRaster:
    """Which units stay at each token of a text; units that never stay are left out."""

    title: str
    """Heading."""
    note: str
    """A line below the heading."""
    tokens: tuple[str, ...]
    """The text, token by token."""
    units: tuple[LiveUnit, ...]
    """Layer by layer, attention units first."""
    scale: str
    """What the values mean."""


@dataclass(frozen=True)
class UnitActivations:
    """Values of the most active units on a text, to browse one at a time."""

    title: str
    """Heading."""
    note: str
    """A line below the heading."""
    tokens: tuple[str, ...]
    """The text, token by token."""
    streams: tuple[str, ...]
    """`clean`, and `ablated` where there is such."""
    units: tuple[str, ...]
    """Names of the units, layer by layer."""
    values: tuple[tuple[tuple[float, ...], ...], ...]
    """For each token, stream and unit, the value."""
