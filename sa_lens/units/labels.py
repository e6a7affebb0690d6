"""Which label each unit stands for, on generated stories whose every word carries known labels.

The text is cut in two halves. The label of a unit is chosen on the first by each measure (F1 and mutual information of
firing, AUROC of the value) and scored on the second, so that a unit that follows nothing scores what chance gives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sa_lens.config import Stream
from sa_lens.core.host import Host, device_of
from sa_lens.core.unit import Sublayer, unit_counts
from sa_lens.data import TokenFile
from sa_lens.data.stories import LABELS, Story, generate
from sa_lens.data.tokenizers import boundary_tokens
from sa_lens.statistics import auroc, effective_number
from sa_lens.units.activations import chosen_streams, stream_units, text_blocks
from sa_lens.units.firing import SHARE, Thresholds, check_share, unit_scores
from sa_lens.units.unit_tables import rules_for

if TYPE_CHECKING:
    import pandas as pd

COVERED = 0.8
"""Held-out F1 from which a unit stands for a label."""
NO_LABEL = -1
"""Value at tokens that belong to no word, and for words whose label is `none`."""


class LabelledText(NamedTuple):
    """Blocks of tokens with labels."""

    tokens: Int[Tensor, "block pos"]
    """The text."""
    labels: Int[Tensor, "kind block pos"]
    """Index of each token's label in `names`, by kind of label; -1: none."""
    names: tuple[str, ...]
    """Every label, as `role=giver`."""


def label_stories(tokenizer: Any, n_stories: int, n_ctx: int, *, seed: int = 1) -> LabelledText:
    """Generated stories as blocks; every token carries the labels of the word that it is part of.

    The value `none` counts as no label: it tells nothing of a word.

    Args:
        tokenizer: the model's tokenizer, a fast Hugging Face one.
        n_stories: stories; each stands between its boundary tokens, as in training.
        n_ctx: tokens per block; what is left over at the end is dropped.
        seed: of the stories; another one than the training text's.

    Raises:
        ValueError: a tokenizer without offsets or end-of-text token, or stories that do not fill two blocks.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"labels need a fast Hugging Face tokenizer, not {type(tokenizer).__name__}")
    boundary = boundary_tokens(tokenizer)
    names = tuple(f"{kind}={value}" for kind, values in LABELS.items() for value in values if value != "none")
    index = {name: i for i, name in enumerate(names)}
    tokens: list[int] = []
    labels: list[tuple[int, ...]] = []
    nothing = (NO_LABEL,) * len(LABELS)
    for story in generate(n_stories, seed):
        encoded = tokenizer(story.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        tokens += [*boundary.before, *encoded["input_ids"], *boundary.after]
        inside = _labels_of(story, encoded["offset_mapping"], index)
        labels += [*(nothing for _ in boundary.before), *inside, *(nothing for _ in boundary.after)]
    count = len(tokens) // n_ctx
    if count < 2:
        raise ValueError(
            f"{n_stories} stories are {len(tokens)} tokens, fewer than two blocks of {n_ctx}: ask for more"
        )
    flat = torch.tensor(labels[: count * n_ctx]).T
    return LabelledText(torch.tensor(tokens[: count * n_ctx]).view(count, n_ctx), flat.reshape(-1, count, n_ctx), names)


def _labels_of(story: Story, spans: Sequence[tuple[int, int]], index: Mapping[str, int]) -> list[tuple[int, ...]]:
    """The labels of each token: those of the last word that its characters reach into."""
    labels, words, index_of_word = [], story.words, 0
    for start, end in spans:
        while index_of_word + 1 < len(words) and words[index_of_word + 1].start < end:
            index_of_word += 1
        word = words[index_of_word]
        inside = word.start < end and start < word.end
        labels.append(
            tuple(index.get(f"{kind}={getattr(word, kind)}", NO_LABEL) if inside else NO_LABEL for kind in LABELS)
        )
    return labels


@dataclass(frozen=True)
class Selectivity:
    """Units against labels, from `selectivity`."""

    table: pd.DataFrame
    """One row per unit and stream: for each measure the chosen label and its score on the held-out half."""
    coverage: pd.DataFrame
    """One row per label and stream: the unit chosen for it, its held-out F1, and whether that is at least 0.8."""


def selectivity(
    model: Host,
    text: LabelledText,
    calibration: TokenFile | Tensor | Mapping[Stream, Thresholds],
    streams: Stream | Sequence[Stream] | None = None,
    *,
    share: float = SHARE,
    min_tokens: int = 30,
    sample_tokens: int = 16_384,
    progress: bool = True,
) -> Selectivity:
    """The best label of each unit and the best unit of each label, chosen on one half and scored on the other.

    F1 and mutual information (bits, of firing and label) are exact; AUROC is of an even sample of `sample_tokens`
    tokens of each half, exact on texts with no more. Labels with fewer than `min_tokens` tokens in either half are
    left out. Dead units have no label; their scores are NaN.

    Args:
        text: from `label_stories`.
        calibration: another text, or thresholds from `calibrate`.
        streams: None: all that the model has.
        share: firing level as a share of the 99.9th percentile.
        min_tokens: tokens that a label must have in each half.
        sample_tokens: tokens of each half whose values are kept for AUROC (4 bytes each per unit and stream).
        progress: show progress bars.

    Raises:
        ValueError: an unknown stream, a text of one block, no label with enough tokens, a share outside (0, 1].
    """
    check_share(share)
    if sample_tokens < 2 or min_tokens < 1:
        raise ValueError(f"sample_tokens={sample_tokens} must be at least 2 and min_tokens={min_tokens} at least 1")
    chosen = chosen_streams(model, streams)
    if len(text.tokens) < 2:
        raise ValueError("the labelled text has one block; the label is chosen on one half and scored on the other")
    half = len(text.tokens) // 2
    kept = _frequent(text, half, min_tokens)
    rules = rules_for(model, calibration, chosen, progress)
    halves = [
        _count(model, text, slice(0, half), kept, rules, chosen, share, sample_tokens, progress, "labels: choice"),
        _count(model, text, slice(half, None), kept, rules, chosen, share, sample_tokens, progress, "labels: held out"),
    ]
    names = [text.names[i] for i in kept.tolist()]
    return _scored(halves, rules, names, chosen, unit_counts(model))


def _frequent(text: LabelledText, half: int, min_tokens: int) -> Int[Tensor, " label"]:
    """Indices of the labels with enough tokens in both halves."""
    enough = torch.ones(len(text.names), dtype=torch.bool)
    for part in (text.labels[:, :half], text.labels[:, half:]):
        enough &= torch.bincount(part[part >= 0].flatten(), minlength=len(text.names)) >= min_tokens
    if not enough.any():
        raise ValueError(f"no label has min_tokens={min_tokens} tokens in each half: give more text or ask for fewer")
    return enough.nonzero()[:, 0]


class _Half(NamedTuple):
    """What one half of the text says."""

    n: int
    of_label: Float[Tensor, " label"]
    """Tokens of each label."""
    together: dict[tuple[Stream, Sublayer], Float[Tensor, "label_and_all unit"]]
    """Tokens with the label at which the unit fires; the last row: all at which it fires."""
    auroc: dict[tuple[Stream, Sublayer], Float[Tensor, "label unit"]]


def _count(
    model: Host,
    text: LabelledText,
    part: slice,
    kept: Int[Tensor, " label"],
    rules: Mapping[Stream, Thresholds],
    streams: Sequence[Stream],
    share: float,
    sample_tokens: int,
    progress: bool,
    name: str,
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
    for batch in stream_units(model, blocks, streams, progress=progress, name=name):
        start = batch.first * blocks.length
        size = batch.tokens.numel()
        # a member of every label of each kind; the spare column takes those that are not kept
        member = torch.zeros(size, len(kept) + 1).scatter_(1, column[labels[:, start : start + size].T], 1.0)
        member[:, -1] = 1
        of_label += member[:, :-1].sum(0)
        low, high = torch.searchsorted(picked, torch.tensor([start, start + size])).tolist()
        rows = picked[low:high] - start
        members[low:high] = member[rows, :-1]
        member = member.to(device)
        for stream, sublayer in keys:
            scores = unit_scores(sublayer, batch.values[stream][sublayer].flatten(0, 1).float())
            fired = torch.gt(scores, rules[stream].levels(sublayer, share).to(device), out=torch.empty_like(scores))
            together[stream, sublayer] += member.T @ fired
            sample[stream, sublayer][low:high] = scores[rows.to(device)]
    areas = {key: auroc(sample.pop(key), members.to(device)) for key in keys}
    return _Half(n, of_label.to(device), together, areas)


class _Scores(NamedTuple):
    """Measures of firing against labels in one half."""

    f1: Float[Tensor, "label unit"]
    precision: Float[Tensor, "label unit"]
    recall: Float[Tensor, "label unit"]
    mutual_information: Float[Tensor, "label unit"]


def firing_scores(
    both: Float[Tensor, "label unit"], fires: Float[Tensor, " unit"], of_label: Float[Tensor, " label"], n: int
) -> _Scores:
    """F1, precision, recall and mutual information (bits) from the tokens with both, either and all."""
    fires, of_label = fires[None].expand_as(both), of_label[:, None].expand_as(both)
    cells = torch.stack([both, fires - both, of_label - both, n - fires - of_label + both]) / n
    marginal = torch.stack(
        [fires * of_label, fires * (n - of_label), (n - fires) * of_label, (n - fires) * (n - of_label)]
    ) / (n * n)
    bits = torch.where(cells > 0, cells * (cells / marginal).log2(), 0).sum(0).clamp(min=0)
    return _Scores(
        f1=2 * both / (fires + of_label),
        precision=torch.nan_to_num(both / fires),
        recall=both / of_label,
        mutual_information=bits,
    )


def _scored(
    halves: Sequence[_Half],
    rules: Mapping[Stream, Thresholds],
    names: Sequence[str],
    streams: Sequence[Stream],
    counts: Mapping[Sublayer, int],
) -> Selectivity:
    import pandas as pd

    parts, covered = [], []
    choice, held = halves
    always = 2 * held.of_label / (held.n + held.of_label)
    for stream in streams:
        everywhere: list[tuple[Sublayer, _Scores, _Scores]] = []
        for sublayer, n_units in counts.items():
            key = (stream, sublayer)
            before, after = (
                firing_scores(h.together[key][:-1], h.together[key][-1], h.of_label, h.n) for h in (choice, held)
            )
            everywhere.append((sublayer, before, after))
            unit = torch.arange(n_units, device=before.f1.device)
            live = rules[stream].live(sublayer).to(unit.device)
            columns: dict[str, Any] = {"live": live}
            pairs = {
                "f1": (before.f1, after.f1),
                "mutual_information": (before.mutual_information, after.mutual_information),
                "auroc": (choice.auroc[key].nan_to_num(0), held.auroc[key]),
            }
            for name, (first, second) in pairs.items():
                best = first.argmax(0)
                columns[f"{name}_label"] = best
                columns[name] = second[best, unit]
                columns[f"{name}_when_chosen"] = first[best, unit]
                if name == "f1":
                    columns["precision"], columns["recall"] = after.precision[best, unit], after.recall[best, unit]
                    columns["f1_if_always_firing"] = always[best]
            of_pos = [i for i, label in enumerate(names) if label.startswith("pos=")]
            columns["effective_parts_of_speech"] = effective_number(
                choice.together[key][of_pos] + held.together[key][of_pos]
            )
            part = pd.DataFrame(
                {"stream": stream, **sublayer._asdict(), "unit": range(n_units)}
                | {name: column.cpu().numpy() for name, column in columns.items()}
            )
            for name in pairs:
                label = part[f"{name}_label"].map(lambda i: names[i]).astype(object)
                part[f"{name}_label"] = label.where(part["live"], None)
            scores = [c for c in columns if c != "live" and not c.endswith("_label")]
            part[scores] = part[scores].where(part["live"], float("nan"))
            parts.append(part)
        covered.append(_coverage(stream, everywhere, names, held))
    return Selectivity(pd.concat(parts, ignore_index=True), pd.concat(covered, ignore_index=True))


def _coverage(
    stream: Stream, everywhere: Sequence[tuple[Sublayer, _Scores, _Scores]], names: Sequence[str], held: _Half
) -> pd.DataFrame:
    """For each label the unit with the highest F1 on the choice half, and its F1 on the held-out one."""
    import pandas as pd

    before = torch.cat([scores.f1 for _, scores, _ in everywhere], 1)
    after = torch.cat([scores.f1 for _, _, scores in everywhere], 1)
    places = [(sublayer, unit) for sublayer, scores, _ in everywhere for unit in range(scores.f1.shape[1])]
    best = before.argmax(1)
    rows = []
    for i, label in enumerate(names):
        sublayer, unit = places[int(best[i])]
        f1 = float(after[i, best[i]])
        rows.append(
            {
                "stream": stream,
                "label": label,
                "n_tokens": int(held.of_label[i]),
                **sublayer._asdict(),
                "unit": unit,
                "f1": f1,
                "covered": f1 >= COVERED,
            }
        )
    return pd.DataFrame(rows)
