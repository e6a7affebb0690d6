"""Which label each unit responds to, on generated stories in which the labels of every word are known.

The text is divided into two halves. Each measure (F1 and mutual information of firing, AUROC of the value) chooses a
label for the unit on the first half and is computed for that label on the second half, so that a unit that responds to
no label scores at chance level.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sa_lens.config import Stream
from sa_lens.core.host import Host, device_of
from sa_lens.core.unit import Sublayer, unit_counts
from sa_lens.data import TokenFile
from sa_lens.data.stories import LABELS, Story, generate
from sa_lens.data.tokenizers import boundary_tokens
from sa_lens.statistics import auroc, effective_number
from sa_lens.units.activations import chosen_streams, stream_units, text_blocks
from sa_lens.units.firing import Thresholds, unit_scores
from sa_lens.units.unit_tables import rules_for

if TYPE_CHECKING:
    import pandas as pd

COVERED = 0.8
"""A label is covered if a unit reaches this F1 on the held-out half."""
NO_LABEL = -1
"""Value at tokens outside words and for words whose label is `none`."""


class LabelledText(NamedTuple):
    """Blocks of tokens, with the labels of each token."""

    tokens: Int[Tensor, "block pos"]
    """Tokens of the text."""
    labels: Int[Tensor, "kind block pos"]
    """Index in `names` of each token's label, for each kind of label; -1 stands for no label."""
    names: tuple[str, ...]
    """All labels, such as `role=giver`."""


def label_stories(tokenizer: Any, n_stories: int, n_ctx: int, *, seed: int = 1) -> LabelledText:
    """Generates stories and cuts them into blocks; every token carries the labels of the word that it belongs to.

    A word whose label is `none` counts as a word without a label of that kind.

    Args:
        tokenizer: the model's tokenizer, which must be a fast Hugging Face tokenizer.
        n_stories: number of stories. Each stands between boundary tokens, as in training.
        n_ctx: tokens per block; an incomplete last block is dropped.
        seed: seed of the stories, different from that of the training text.

    Raises:
        ValueError: the tokenizer gives no character offsets or has no end-of-text token, or the stories fill fewer than
            two blocks.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"labels need a fast Hugging Face tokenizer, not {type(tokenizer).__name__}")
    boundary = boundary_tokens(tokenizer)
    names = tuple(f"{kind}={value}" for kind, values in LABELS.items() for value in values if value != "none")
    index = {name: i for i, name in enumerate(names)}
    tokens: list[int] = []
    labels: list[tuple[int, ...]] = []
    no_labels = (NO_LABEL,) * len(LABELS)
    for story in generate(n_stories, seed):
        encoded = tokenizer(story.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        tokens += [*boundary.before, *encoded["input_ids"], *boundary.after]
        labels += [no_labels] * len(boundary.before)
        labels += _labels_of(story, encoded["offset_mapping"], index)
        labels += [no_labels] * len(boundary.after)
    count = len(tokens) // n_ctx
    if count < 2:
        raise ValueError(
            f"{n_stories} stories are {len(tokens)} tokens, fewer than two blocks of {n_ctx}; ask for more stories"
        )
    flat = torch.tensor(labels[: count * n_ctx]).T
    return LabelledText(torch.tensor(tokens[: count * n_ctx]).view(count, n_ctx), flat.reshape(-1, count, n_ctx), names)


def _labels_of(story: Story, spans: Sequence[tuple[int, int]], index: Mapping[str, int]) -> list[tuple[int, ...]]:
    """Returns the labels of each token: those of the last word that it overlaps."""
    labels, words, current = [], story.words, 0
    for start, end in spans:
        while current + 1 < len(words) and words[current + 1].start < end:
            current += 1
        word = words[current]
        names = [f"{kind}={getattr(word, kind)}" if word.start < end and start < word.end else "" for kind in LABELS]
        labels.append(tuple(index.get(name, NO_LABEL) for name in names))
    return labels


@dataclass(frozen=True)
class Selectivity:
    """How well units follow labels, from `selectivity`."""

    table: pd.DataFrame
    """One row per unit and stream: for each measure, the chosen label and its score on the held-out half."""
    coverage: pd.DataFrame
    """One row per label and stream: the unit chosen for it, its held-out F1, and whether that is at least 0.8."""


def selectivity(
    model: Host,
    text: LabelledText,
    calibration: TokenFile | Tensor | Mapping[Stream, Thresholds],
    streams: Stream | Sequence[Stream] | None = None,
    *,
    min_tokens: int = 30,
    sample_tokens: int = 16_384,
    progress: bool = True,
) -> Selectivity:
    """Finds the best label of each unit and the best unit of each label, on one half, and scores them on the other.

    F1 and the mutual information (in bits) of firing and label are exact. AUROC is computed on an evenly spaced sample
    of `sample_tokens` tokens of each half. Labels with fewer than `min_tokens` tokens in either half are left out. Dead
    units get no label, and their scores are NaN.

    Args:
        text: labelled text from `label_stories`.
        calibration: another text, or thresholds from `calibrate`.
        streams: streams to read; None reads all that the model has.
        min_tokens: smallest number of tokens that a label must have in each half.
        sample_tokens: tokens of each half whose values are kept for AUROC (4 bytes per token, unit and stream).
        progress: whether to show progress bars.

    Raises:
        ValueError: an unknown stream, a text of one block, or no label with enough tokens.
    """
    if sample_tokens < 2 or min_tokens < 1:
        raise ValueError(f"sample_tokens={sample_tokens} must be at least 2 and min_tokens={min_tokens} at least 1")
    chosen = chosen_streams(model, streams)
    if len(text.tokens) < 2:
        raise ValueError(
            "the labelled text has one block, but needs two: labels are chosen on one half and scored on the other"
        )
    half = len(text.tokens) // 2
    kept = _frequent_labels(text, half, min_tokens)
    rules = rules_for(model, calibration, chosen, progress)
    choice, held_out = (
        _count(model, text, part, kept, rules, chosen, sample_tokens, progress)
        for part in (slice(0, half), slice(half, None))
    )
    return _tabulate(choice, held_out, rules, [text.names[i] for i in kept.tolist()])


def _frequent_labels(text: LabelledText, half: int, min_tokens: int) -> Int[Tensor, " label"]:
    """Returns the indices of the labels with enough tokens in both halves."""
    enough = torch.ones(len(text.names), dtype=torch.bool)
    for part in (text.labels[:, :half], text.labels[:, half:]):
        enough &= torch.bincount(part[part >= 0].flatten(), minlength=len(text.names)) >= min_tokens
    if not enough.any():
        raise ValueError(
            f"no label has min_tokens={min_tokens} tokens in each half: give more text or set min_tokens lower"
        )
    return enough.nonzero()[:, 0]


class _Half(NamedTuple):
    """Counts and AUROC of one half of the text."""

    n: int
    of_label: Float[Tensor, " label"]
    """Number of tokens of each label."""
    together: dict[tuple[Stream, Sublayer], Float[Tensor, "label_and_all unit"]]
    """Number of tokens with the label at which the unit fires; the last row counts all tokens at which it fires."""
    auroc: dict[tuple[Stream, Sublayer], Float[Tensor, "label unit"]]


def _count(
    model: Host,
    text: LabelledText,
    part: slice,
    kept: Int[Tensor, " label"],
    rules: Mapping[Stream, Thresholds],
    streams: Sequence[Stream],
    sample_tokens: int,
    progress: bool,
) -> _Half:
    device = device_of(model)
    blocks = text_blocks(model, text.tokens[part])
    labels = text.labels[:, part].flatten(1)
    n = blocks.n_tokens
    column = torch.full((len(text.names) + 1,), len(kept))
    column[kept] = torch.arange(len(kept))
    picked = torch.linspace(0, n - 1, min(sample_tokens, n), dtype=torch.float64).long()
    counts = unit_counts(model)
    keys = [(stream, sublayer) for stream in streams for sublayer in counts]
    together = {k: torch.zeros(len(kept) + 1, counts[k[1]], dtype=torch.float64, device=device) for k in keys}
    sample = {key: torch.zeros(len(picked), counts[key[1]], device=device) for key in keys}
    of_label = torch.zeros(len(kept), dtype=torch.float64)
    members = torch.zeros(len(picked), len(kept))
    for batch in stream_units(model, blocks, streams, progress=progress, name="labels"):
        start = batch.first * blocks.length
        size = batch.tokens.numel()
        # the last column collects labels that are not kept, then counts all tokens
        member = torch.zeros(size, len(kept) + 1).scatter_(1, column[labels[:, start : start + size].T], 1.0)
        member[:, -1] = 1
        of_label += member[:, :-1].sum(0)
        low, high = torch.searchsorted(picked, torch.tensor([start, start + size])).tolist()
        rows = picked[low:high] - start
        members[low:high] = member[rows, :-1]
        member = member.to(device)
        for stream, sublayer in keys:
            scores = unit_scores(sublayer, batch.values[stream][sublayer].flatten(0, 1).float())
            fired = torch.gt(scores, rules[stream].levels(sublayer).to(device), out=torch.empty_like(scores))
            together[stream, sublayer] += member.T @ fired
            sample[stream, sublayer][low:high] = scores[rows.to(device)]
    areas = {key: auroc(sample.pop(key), members.to(device)) for key in keys}
    return _Half(n, of_label.to(device), together, areas)


class _Scores(NamedTuple):
    """How well firing agrees with labels in one half."""

    f1: Float[Tensor, "label unit"]
    precision: Float[Tensor, "label unit"]
    recall: Float[Tensor, "label unit"]
    mutual_information: Float[Tensor, "label unit"]


def firing_scores(
    both: Float[Tensor, "label unit"], fires: Float[Tensor, " unit"], of_label: Float[Tensor, " label"], n: int
) -> _Scores:
    """Returns F1, precision, recall and mutual information (bits) of firing and label.

    Args:
        both: number of tokens with the label at which the unit fires.
        fires: number of tokens at which the unit fires.
        of_label: number of tokens with the label.
        n: number of tokens.
    """
    fires, of_label = fires[None].expand_as(both), of_label[:, None].expand_as(both)
    cells = torch.stack([both, fires - both, of_label - both, n - fires - of_label + both]) / n
    independent = torch.stack(
        [fires * of_label, fires * (n - of_label), (n - fires) * of_label, (n - fires) * (n - of_label)]
    ) / (n * n)
    bits = torch.where(cells > 0, cells * (cells / independent).log2(), 0).sum(0).clamp(min=0)
    return _Scores(
        f1=2 * both / (fires + of_label),
        precision=torch.nan_to_num(both / fires),
        recall=both / of_label,
        mutual_information=bits,
    )


def _tabulate(choice: _Half, held_out: _Half, rules: Mapping[Stream, Thresholds], names: Sequence[str]) -> Selectivity:
    import pandas as pd

    tables, coverage = [], []
    for stream in dict.fromkeys(stream for stream, _ in choice.together):
        of_sublayers, f1_chosen, f1 = [], [], []
        for sublayer in [sublayer for of_stream, sublayer in choice.together if of_stream == stream]:
            key = (stream, sublayer)
            before, after = (
                firing_scores(half.together[key][:-1], half.together[key][-1], half.of_label, half.n)
                for half in (choice, held_out)
            )
            live = rules[stream].live(sublayer).to(before.f1.device)
            of_sublayers.append(_table_of(stream, sublayer, live, choice, held_out, before, after, names))
            f1_chosen.append(before.f1)
            f1.append(after.f1)
        table = pd.concat(of_sublayers, ignore_index=True)
        best = torch.cat(f1_chosen, 1).argmax(1, keepdim=True)
        units = table.loc[best[:, 0].tolist(), ["layer", "site", "unit"]].reset_index(drop=True)
        counts = {"stream": stream, "label": names, "n_tokens": held_out.of_label.long().tolist()}
        units["f1"] = torch.cat(f1, 1).gather(1, best)[:, 0].tolist()
        units["covered"] = units["f1"] >= COVERED
        coverage.append(pd.concat([pd.DataFrame(counts), units], axis=1))
        tables.append(table)
    return Selectivity(pd.concat(tables, ignore_index=True), pd.concat(coverage, ignore_index=True))


def _table_of(
    stream: Stream,
    sublayer: Sublayer,
    live: Bool[Tensor, " unit"],
    choice: _Half,
    held_out: _Half,
    before: _Scores,
    after: _Scores,
    names: Sequence[str],
) -> pd.DataFrame:
    """Returns the rows of one sublayer's units; `before` and `after` are the scores on the two halves."""
    import pandas as pd

    key, unit = (stream, sublayer), torch.arange(len(live), device=live.device)
    always = 2 * held_out.of_label / (held_out.n + held_out.of_label)
    pairs = {
        "f1": (before.f1, after.f1),
        "mutual_information": (before.mutual_information, after.mutual_information),
        "auroc": (choice.auroc[key].nan_to_num(0), held_out.auroc[key]),
    }
    columns: dict[str, Tensor] = {"live": live}
    for name, (chosen_by, scored_by) in pairs.items():
        best = chosen_by.argmax(0)
        columns[f"{name}_label"] = best
        columns[name], columns[f"{name}_when_chosen"] = scored_by[best, unit], chosen_by[best, unit]
        if name == "f1":
            columns["precision"], columns["recall"] = after.precision[best, unit], after.recall[best, unit]
            columns["f1_if_always_firing"] = always[best]
    parts_of_speech = [i for i, label in enumerate(names) if label.startswith("pos=")]
    together = choice.together[key][parts_of_speech] + held_out.together[key][parts_of_speech]
    columns["effective_parts_of_speech"] = effective_number(together)
    table = pd.DataFrame(
        {"stream": stream, **sublayer._asdict(), "unit": range(len(live))}
        | {name: column.cpu().numpy() for name, column in columns.items()}
    )
    for name in columns:
        if name.endswith("_label"):
            table[name] = table[name].map(lambda i: names[i]).astype(object).where(table["live"], None)
        elif name != "live":
            table[name] = table[name].where(table["live"], float("nan"))
    return table
