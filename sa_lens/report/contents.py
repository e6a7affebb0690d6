"""What a report holds, as data: everything that its page shows, but not how it looks.

If a view of `sa_lens.views` shows the same thing, the report holds that view's record.

A section of the page has four places: its records are here, `making` fills them, `packing` says which part of the file
holds them, and `assets/sections.js` lists the sections, each with the function that draws it.
"""

from __future__ import annotations

from dataclasses import dataclass

from sa_lens.config import Site
from sa_lens.views.records import CircuitMap, Curves, GateRaster, Histogram, Predictions, Story, Table


@dataclass(frozen=True)
class Fact:
    """A named figure of a model."""

    name: str
    """What it is."""
    value: str
    """The figure as it is read, with its unit."""
    meaning: str
    """What it means, in a sentence; may be empty."""


@dataclass(frozen=True)
class Sample:
    """Text that a stream wrote."""

    prompt: str
    """What it was given."""
    stream: str
    """`clean` or `ablated`."""
    text: str
    """What it wrote after it."""


@dataclass(frozen=True)
class Overview:
    """What a model is and how well it predicts."""

    facts: tuple[Fact, ...]
    """Shape, gates, text, training."""
    losses: Table
    """One row per stream: loss, perplexity, bits per byte, and what the gates cost."""
    samples: tuple[Sample, ...]
    """The same prompts continued by each stream."""


@dataclass(frozen=True)
class Looks:
    """The attention of one head in one stream: at each token, the earlier tokens that get the largest shares."""

    stream: str
    """`clean` or `ablated`."""
    layer: int
    """Layer of the head."""
    head: int
    """Its place in the layer."""
    positions: tuple[tuple[int, ...], ...]
    """At each token the positions that get most attention, most first."""
    shares: tuple[tuple[float, ...], ...]
    """The share of attention that each of them gets."""


@dataclass(frozen=True)
class StoryPage:
    """One story, as the explorer shows it."""

    title: str
    """Its first words."""
    tokens: tuple[str, ...]
    """Its text, token by token."""
    tracks: Story
    """Numbers to colour the tokens by."""
    predictions: Predictions
    """What each stream expects after each token."""
    gates: GateRaster | None
    """Which units stay at each token; None for a model without gates."""
    looks: tuple[Looks, ...]
    """Where each head looks."""


@dataclass(frozen=True)
class Snippet:
    """A piece of text with the values of a unit."""

    tokens: tuple[str, ...]
    """The text, token by token."""
    values: tuple[float, ...]
    """The unit's value at each token."""
    focus: int
    """Index of the token that the snippet was chosen for."""
    kind: str
    """`top`: among the largest values. `sample`: from one of the quantiles of all values."""


@dataclass(frozen=True)
class UnitStream:
    """A unit in one stream."""

    stream: str
    """`clean` or `ablated`."""
    mask_on: float | None
    """Share of tokens at which the gate keeps it; None in the clean stream."""
    firing_rate: float
    """Share of tokens at which it fires."""
    live: bool
    """Whether it fires often enough to be described."""
    effective_tokens: float | None
    """Effective number of different tokens that it fires on."""
    label: str
    """The label that its firing predicts best, chosen on other stories; empty if there is none, as without labels."""
    label_f1: float | None
    """F1 of that label on stories that it was not chosen on."""
    explanation: str = ""
    """Main patterns that it fires on; empty if there are none or the unit was not explained."""
    explanation_f1: float | None = None
    """F1 of the explanation on text that it was not made from."""
    histogram: Histogram | None = None
    """Its values; None if the unit has no details, or if the ablated stream never keeps it."""
    snippets: tuple[Snippet, ...] = ()
    """The snippets with the largest values, then a sample of all."""


@dataclass(frozen=True)
class UnitPage:
    """One unit."""

    name: str
    """As in the gate raster, such as `L1.mlp.17`."""
    layer: int
    """Its layer."""
    site: Site
    """`attn`: an attention unit; `mlp`: a neuron."""
    index: int
    """Its index in the sublayer."""
    promotes: tuple[str, ...]
    """Tokens whose logits it raises most, directly."""
    streams: tuple[UnitStream, ...]
    """One for each stream that the model has."""
    place: str = ""
    """Head and channel of an attention unit, such as `head 2, channel 1`; empty for a neuron."""


@dataclass(frozen=True)
class Ranking:
    """A circuit of any size: edges in the order in which they join it."""

    method: str
    """`ACDC`, `EAP-IG` or `gate circuit`."""
    stream: str
    """The stream that it was found in."""
    circuit: CircuitMap
    """Its edges, the most important first; the note says how they were found."""
    chosen: int
    """Number of edges that the method's own rule keeps, at which the slider starts if `circuit` has so many."""
    curve: Curves | None
    """Faithfulness by number of edges; None where it is not defined."""


@dataclass(frozen=True)
class TaskPage:
    """What a model does at a task, and through which edges."""

    task: str
    """Name of the task."""
    about: str
    """What is asked, with an example."""
    skill: Table
    """One row per stream: pair accuracy, top-1 accuracy, logit difference."""
    rankings: tuple[Ranking, ...]
    """One per method and stream; empty if no stream can do the task."""
    note: str
    """Why a stream has no circuit; empty if each stream has one."""


@dataclass(frozen=True)
class ModelPage:
    """Everything that the report shows of one model."""

    name: str
    """Name of its run, by which it is picked."""
    streams: tuple[str, ...]
    """`clean`, and `ablated` if the model has gates."""
    overview: Overview
    stories: tuple[StoryPage, ...]
    """The same stories in every model of a report."""
    tasks: tuple[TaskPage, ...]
    units: tuple[UnitPage, ...]
    """Every unit that is live in a stream or that a story mentions; `units_note` counts them."""
    units_note: str
    """How much text the units were measured on, and how many of them are shown."""


@dataclass(frozen=True)
class Report:
    """A report on one model or several."""

    title: str
    """Heading."""
    version: str
    """Version of sa_lens that made it."""
    models: tuple[ModelPage, ...]
    """At least one."""
    training: Curves | None
    """Losses during training, of the runs that recorded them; None if no run did."""
    comparison: tuple[Table, ...]
    """Tables with a column for each model; empty for one model."""
