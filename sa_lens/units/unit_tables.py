"""What every unit does on a text, in one pass: firing, tokens, word classes, values, positions, co-activation.

`specialization` counts the tokens of the text, then runs the model over it once, in memory that does not grow with the
text. Rates, effective numbers, kurtosis, Hoyer and positions are exact. The Gini coefficient and co-activation come
from an evenly spaced sample of `sample_tokens` and `coactivation_tokens` tokens. All tokens but the `DISTINCT_TOKENS`
most frequent share one counter, so that effective numbers are lower bounds on texts with more different tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sa_lens.config import Stream, check_whole
from sa_lens.core.host import Host, device_of, fingerprint_of
from sa_lens.core.unit import Sublayer, Unit, unit_counts
from sa_lens.data import TokenFile
from sa_lens.data.blocks import TextBlocks
from sa_lens.data.stories.words import KIND_OF, NAMES, PART_OF_SPEECH
from sa_lens.statistics import effective_number, gini, hoyer_from_sums
from sa_lens.units.activations import UnitBatch, chosen_streams, stream_units, text_blocks
from sa_lens.units.firing import OTHER_SHARES, Thresholds, calibrate, unit_scores

if TYPE_CHECKING:
    import pandas as pd


SPELLINGS = ("word", "capitalized", "piece", "NUM", "PUNCT", "space", "special")
"""Classes by spelling, for tokens outside the lexicon: a word after a space, one with a capital, part of a word, ..."""

EXACT_IN_FLOAT32 = 2**24
"""Counts up to this number are exact in float32."""

POSITION_BINS = 16
"""Equal parts of a block in which positions are counted."""

DISTINCT_TOKENS = 8192
"""Number of tokens that have their own counter (4 bytes per token, unit and stream)."""

COACTIVATION_UNITS = 4096
"""Largest number of units of a layer whose pairs are counted, chosen at even distances."""

PARTNERS = 5
"""Number of most co-active units that the table names for each unit."""


@dataclass(frozen=True)
class Specialization:
    """What every unit of a model does on a text, from `specialization`."""

    table: pd.DataFrame
    """One row per unit and stream; docs/units.md explains the columns. `table.attrs` holds the settings and measures of
    the text."""
    coactivations: Mapping[tuple[Stream, int], CoActivation]
    """Co-activation by stream and layer."""

    def coactivation(self, layer: int, stream: Stream = "clean") -> pd.DataFrame:
        """Returns the Jaccard index of every pair of a layer's units; rows and columns are named `L0.attn.0` and so on.

        Raises:
            ValueError: no co-activation was counted in this stream or layer.
        """
        import pandas as pd

        if (stream, layer) not in self.coactivations:
            raise ValueError(
                f"co-activation of layer {layer} in the {stream} stream was not counted; choose a stream and layer of "
                f"{[*self.coactivations]}"
            )
        record = self.coactivations[stream, layer]
        return pd.DataFrame(record.jaccard().cpu().numpy(), index=record.names, columns=record.names)


def specialization(
    model: Host,
    text: TokenFile | Tensor | TextBlocks,
    calibration: TokenFile | Tensor | Mapping[Stream, Thresholds],
    streams: Stream | Sequence[Stream] | None = None,
    *,
    n_tokens: int | None = None,
    classes: TokenClasses | None = None,
    sample_tokens: int = 8192,
    coactivation_tokens: int = 500_000,
    progress: bool = True,
) -> Specialization:
    """Describes every unit of a model on a text: firing, tokens, word classes, values, positions, co-activation.

    docs/units.md explains which columns are exact and which come from a sample.

    Args:
        text: a token file, blocks `[block pos]`, or `TextBlocks`.
        calibration: another text on which the firing thresholds are determined, or thresholds from `calibrate`.
        streams: streams to read; None reads all that the model has.
        n_tokens: largest number of tokens to read; None reads all.
        classes: word classes of the tokens; None takes `word_classes` of the model's tokenizer if it has one.
        sample_tokens: tokens whose values are kept for the Gini coefficient (4 bytes per token, unit and stream).
        coactivation_tokens: tokens on which pairs are counted, in whole batches at even distances; 0 counts none.
        progress: whether to show progress bars.

    Raises:
        ValueError: an unknown stream, a text with only one distinct token or without a whole block, or sample_tokens
            below 1.
    """
    check_whole("sample_tokens", sample_tokens, 1)
    chosen = chosen_streams(model, streams)
    blocks = text_blocks(model, text, n_tokens)
    frequencies = token_frequencies(blocks, model.cfg.d_vocab)
    batches = stream_units(model, blocks, chosen, progress=progress, name="units")  # checks the streams first
    if classes is None and model.tokenizer is not None:
        classes = word_classes(model.tokenizer, model.cfg.d_vocab)
    if classes is not None and len(classes.of_token) < model.cfg.d_vocab:
        raise ValueError(
            f"classes covers {len(classes.of_token):,} tokens, fewer than the model's {model.cfg.d_vocab:,}"
        )
    rules = rules_for(model, calibration, chosen, progress)
    vocabulary = _Vocabulary.of(frequencies, device_of(model))
    tallies = {
        (stream, sublayer): _SublayerTally(sublayer, n, rules[stream], vocabulary, blocks, sample_tokens)
        for stream in chosen
        for sublayer, n in unit_counts(model).items()
    }
    coactivations = _coactivations(model, chosen) if coactivation_tokens else {}
    pairs_seen = 0
    for batch in batches:
        n = batch.tokens.numel()
        # pairs are counted whenever their share of the tokens so far is not above their share of the whole text
        with_pairs = pairs_seen * blocks.n_tokens <= coactivation_tokens * batch.first * blocks.length
        pairs_seen += n if with_pairs else 0
        for stream in chosen:
            fired = {sublayer: tallies[stream, sublayer].add(batch, stream) for sublayer in batch.values[stream]}
            for layer in range(model.cfg.n_layers) if with_pairs else ():
                if (stream, layer) in coactivations:
                    coactivations[stream, layer].add(torch.cat([fired[s] for s in fired if s.layer == layer], 1))
    parts = [tally.columns(stream, vocabulary, classes) for (stream, _), tally in tallies.items()]
    table = _table(parts, coactivations)
    rule = rules[chosen[0]]
    table.attrs = {
        "share": rule.share,
        "n_tokens": blocks.n_tokens,
        "n_calibration_tokens": rule.n_tokens,
        "n_coactivation_tokens": pairs_seen if coactivations else 0,
        "n_sample_tokens": min(sample_tokens, blocks.n_tokens),
        "share_of_other_tokens": float(frequencies[vocabulary.slot_of.cpu() == len(vocabulary.tokens)].sum())
        / blocks.n_tokens,
        "effective_tokens_of_text": float(effective_number(frequencies.double())),
        "d_vocab": model.cfg.d_vocab,
        "n_layers": model.cfg.n_layers,
        "model": fingerprint_of(model),
    }
    return Specialization(table, coactivations)


def rules_for(
    model: Host,
    calibration: TokenFile | Tensor | Mapping[Stream, Thresholds],
    streams: Sequence[Stream],
    progress: bool,
) -> Mapping[Stream, Thresholds]:
    """Returns the given thresholds after checks, or calibrates them on a text.

    Raises:
        ValueError: the given thresholds lack a stream or belong to another model.
    """
    if not isinstance(calibration, Mapping):
        return calibrate(model, calibration, streams, progress=progress)
    for stream in streams:
        if stream not in calibration:
            raise ValueError(f"the thresholds are for {[*calibration]}, not for stream={stream!r}; calibrate it too")
        calibration[stream].check_model(model)
    return calibration


def token_frequencies(blocks: TextBlocks, d_vocab: int) -> Int[Tensor, " d_vocab"]:
    """Counts how often each token occurs in the text.

    Raises:
        ValueError: the text has only one distinct token.
    """
    counts = torch.zeros(d_vocab, dtype=torch.int64)
    for first in range(0, len(blocks), 1024):
        counts += torch.bincount(blocks.rows(first, first + 1024).flatten().cpu(), minlength=d_vocab)
    if int((counts > 0).sum()) < 2:
        raise ValueError(
            f"the text repeats token {int(counts.argmax())} {blocks.n_tokens:,} times and shows nothing of what units "
            "respond to; give a text with different tokens"
        )
    return counts


@dataclass(frozen=True)
class _Vocabulary:
    """The tokens that have their own counter (slot); all others share the last slot."""

    tokens: Int[Tensor, " slot_but_last"]
    slot_of: Int[Tensor, " d_vocab"]
    exact: bool

    @classmethod
    def of(cls, frequencies: Int[Tensor, " d_vocab"], device: torch.device) -> _Vocabulary:
        order = frequencies.argsort(descending=True, stable=True)
        tokens = order[: min(DISTINCT_TOKENS, int((frequencies > 0).sum()))]
        slot_of = torch.full((len(frequencies),), len(tokens))
        slot_of[tokens] = torch.arange(len(tokens))
        other = int(frequencies.sum() - frequencies[tokens].sum())
        exact = max(int(frequencies.max()), other) < EXACT_IN_FLOAT32
        return cls(tokens, slot_of.to(device), exact)


class _SublayerTally:
    """The counts and sums of one sublayer in one stream."""

    def __init__(
        self,
        sublayer: Sublayer,
        n_units: int,
        rule: Thresholds,
        vocabulary: _Vocabulary,
        blocks: TextBlocks,
        sample: int,
    ) -> None:
        device = vocabulary.slot_of.device
        self.sublayer, self.rule, self.blocks = sublayer, rule, blocks
        self.threshold = rule.levels(sublayer).to(device)
        self.levels = {share: replace(rule, share=share).levels(sublayer).to(device) for share in OTHER_SHARES}
        self.rates = {share: torch.zeros(n_units, dtype=torch.float64, device=device) for share in OTHER_SHARES}
        self.kept: Tensor | None = None
        self.moments = Moments()
        self.tokens = TokenTally(vocabulary.slot_of, len(vocabulary.tokens) + 1, n_units, vocabulary.exact)
        bins = min(POSITION_BINS, blocks.length)
        self.bins = (torch.arange(blocks.length, device=device) * bins) // blocks.length
        self.in_bin = torch.zeros(bins, 0, device=device)
        self.positions = torch.zeros(bins, n_units, dtype=torch.float64, device=device)
        self.picked = torch.linspace(0, blocks.n_tokens - 1, min(sample, blocks.n_tokens), dtype=torch.float64).long()
        self.sample = torch.zeros(len(self.picked), n_units, device=device)

    def add(self, batch: UnitBatch, stream: Stream) -> Float[Tensor, "token unit"]:
        """Adds a batch; returns 1 where a unit fires and 0 elsewhere."""
        values = batch.values[stream][self.sublayer]
        x = values.flatten(0, 1).float()
        scores = unit_scores(self.sublayer, x)
        ones = x.new_ones(1, len(x))
        # the comparison writes floats, which the products below need
        fired = torch.gt(scores, self.threshold, out=torch.empty_like(scores))
        above = torch.empty_like(scores)
        for share, rate in self.rates.items():
            rate += (ones @ torch.gt(scores, self.levels[share], out=above))[0]
        self.moments.add(x)
        self.tokens.add(batch.tokens.flatten(), fired)
        if self.in_bin.shape[1] != len(x):
            member = torch.nn.functional.one_hot(self.bins, len(self.positions)).to(x.dtype)
            self.in_bin = member.T.repeat(1, len(values))
        self.positions += self.in_bin @ fired
        start = batch.first * self.blocks.length
        low, high = torch.searchsorted(self.picked, torch.tensor([start, start + len(x)])).tolist()
        if high > low:
            self.sample[low:high] = x[(self.picked[low:high] - start).to(x.device)]
        if stream == "ablated" and self.sublayer in batch.masks:
            mask = batch.masks[self.sublayer].flatten(0, 1).float()
            on = (ones @ torch.gt(mask, 0.5, out=above))[0].double()
            self.kept = on if self.kept is None else self.kept + on
        return fired

    def columns(self, stream: Stream, vocabulary: _Vocabulary, classes: TokenClasses | None) -> dict[str, Any]:
        n = self.blocks.n_tokens
        fires = self.positions.sum(0)
        counts = self.tokens.counts.double()
        per_bin = torch.bincount(self.bins, minlength=len(self.positions)).double()
        by_rate = self.positions / per_bin[:, None]
        centres = (torch.arange(len(self.positions), device=fires.device) + 0.5) / len(self.positions)
        top = counts[:-1].max(0)
        never = torch.full_like(fires, torch.nan)
        negligible = self.moments.negligible()
        columns = {
            "live": self.rule.live(self.sublayer),
            "mask_rate": self.kept / n if self.kept is not None else never,
            "firing_rate": fires / n,
            **{f"firing_rate_{share:g}": rate / n for share, rate in self.rates.items()},
            "threshold": self.threshold,
            "mean": self.moments.mean(),
            "std": self.moments.variance().sqrt(),
            "kurtosis": self.moments.kurtosis().masked_fill(negligible, torch.nan),
            "hoyer": self.moments.hoyer().masked_fill(negligible, torch.nan),
            "gini": gini(self.sample).masked_fill(negligible.to(self.sample.device), torch.nan),
            "effective_tokens": effective_number(counts),
            "top_token": torch.where(fires > 0, vocabulary.tokens.to(top.indices.device)[top.indices], -1),
            "top_token_share": top.values / fires,
            "effective_classes": never if classes is None else effective_number(_by_class(counts, vocabulary, classes)),
            "effective_positions": effective_number(by_rate),
            "mean_position": (by_rate * centres[:, None]).sum(0) / by_rate.sum(0),
        }
        place = {"stream": stream, **self.sublayer._asdict(), "unit": range(len(fires))}
        return {**place, **{name: column.cpu().numpy() for name, column in columns.items()}}


def _by_class(
    counts: Float[Tensor, "slot unit"], vocabulary: _Vocabulary, classes: TokenClasses
) -> Float[Tensor, "group unit"]:
    """Sums firings by word class; tokens without their own counter form one more class."""
    of_slot = torch.cat([classes.of_token[vocabulary.tokens], torch.tensor([len(classes.names)])]).to(counts.device)
    summed = counts.new_zeros(len(classes.names) + 1, counts.shape[1])
    return summed.index_add_(0, of_slot, counts)


def _coactivations(model: Host, streams: Sequence[Stream]) -> dict[tuple[Stream, int], CoActivation]:
    counts, device = unit_counts(model), device_of(model)
    coactivations = {}
    for stream in streams:
        for layer in range(model.cfg.n_layers):
            n = sum(counts[sublayer] for sublayer in counts if sublayer.layer == layer)
            units = torch.linspace(0, n - 1, min(n, COACTIVATION_UNITS), dtype=torch.float64).long().to(device)
            names = [str(Unit(*s, index)) for s, n in counts.items() if s.layer == layer for index in range(n)]
            coactivations[stream, layer] = CoActivation(units, [names[unit] for unit in units.tolist()])
    return coactivations


def _table(parts: Sequence[dict[str, Any]], coactivations: Mapping[tuple[Stream, int], CoActivation]) -> pd.DataFrame:
    import pandas as pd

    table = pd.concat([pd.DataFrame(part) for part in parts], ignore_index=True)
    table["partner"], table["partner_jaccard"] = None, float("nan")
    table["partners"] = [()] * len(table)
    for (stream, layer), record in coactivations.items():
        of_layer = (table["stream"] == stream) & (table["layer"] == layer)
        rows = table.index[of_layer][record.units.cpu().numpy()]
        values, places = (x.tolist() for x in record.partners(PARTNERS))
        partners = [
            tuple((record.names[place], value) for place, value in zip(p, v, strict=True) if value > 0)
            for p, v in zip(places, values, strict=True)
        ]
        table.loc[rows, "partners"] = pd.Series(partners, index=rows)
        table.loc[rows, "partner"] = [best[0][0] if best else None for best in partners]
        table.loc[rows, "partner_jaccard"] = [best[0][1] if best else 0.0 for best in partners]
    return table


class TokenClasses(NamedTuple):
    """The class of every token of a vocabulary."""

    names: tuple[str, ...]
    """Names of the classes."""
    of_token: Int[Tensor, " d_vocab"]
    """Index of each token's class."""


def word_classes(tokenizer: Any, d_vocab: int | None = None) -> TokenClasses:
    """Assigns a coarse class, such as a part of speech, to every token of a tokenizer.

    Args:
        tokenizer: a Hugging Face tokenizer.
        d_vocab: vocabulary size of the model if larger than the tokenizer's; the additional tokens are `special`.
    """
    size = max(len(tokenizer), d_vocab or 0)
    special = set(tokenizer.all_special_ids)
    lexicon = {word.lower(): tag for word, tag in PART_OF_SPEECH.items()}
    lexicon |= dict.fromkeys((noun.lower() for noun in KIND_OF), "NOUN")
    lexicon |= dict.fromkeys((name.lower() for name in NAMES), "PROPN")
    texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))], clean_up_tokenization_spaces=False)
    class_names = ["special" if i in special else _class_of(text, lexicon) for i, text in enumerate(texts)]
    class_names += ["special"] * (size - len(class_names))
    names = tuple(dict.fromkeys([*sorted(set(lexicon.values())), *SPELLINGS]))
    index = {name: i for i, name in enumerate(names)}
    return TokenClasses(names, torch.tensor([index[name] for name in class_names]))


def _class_of(text: str, lexicon: dict[str, str]) -> str:
    word = text.strip()
    if not word:
        return "space"
    if not any(letter.isalnum() for letter in word):
        return "PUNCT"
    if all(letter.isdigit() for letter in word):
        return "NUM"
    whole = text[0].isspace() or word[0].isupper()
    if whole and word.lower() in lexicon:
        return lexicon[word.lower()]
    return "capitalized" if word[0].isupper() else "word" if whole else "piece"


class Moments:
    """Moments of each unit's values; sums are taken around the mean of the first batch, so that no digits are lost."""

    def __init__(self) -> None:
        self.n = 0
        self.shift: Tensor | None = None
        self.sums = torch.zeros(0)
        """`[5, unit]`: of the shifted values to the powers 1 to 4, and of the absolute values."""
        self.precision = 0.0

    def add(self, x: Float[Tensor, "token unit"]) -> None:
        if self.shift is None:
            self.shift, self.precision = x.mean(0), torch.finfo(x.dtype).eps
            self.sums = torch.zeros(5, x.shape[1], dtype=torch.float64, device=x.device)
        ones = torch.ones(1, len(x), dtype=x.dtype, device=x.device)
        # a product with ones sums columns several times faster than a reduction; d is overwritten to save memory
        d = x - self.shift
        d2 = d * d
        sums = [ones @ d, ones @ d2, ones @ d.mul_(d2), ones @ d2.mul_(d2), ones @ torch.abs(x, out=d)]
        self.sums += torch.cat(sums).double()
        self.n += len(x)

    def mean(self) -> Float[Tensor, " unit"]:
        assert self.shift is not None
        return self.shift.double() + self.sums[0] / self.n

    def variance(self) -> Float[Tensor, " unit"]:
        """Returns the population variance."""
        m = self.sums / self.n
        return (m[1] - m[0] ** 2).clamp(min=0)

    def squares(self) -> Float[Tensor, " unit"]:
        """Returns the sum of the squared values (not shifted by the mean)."""
        return self.n * (self.variance() + self.mean() ** 2)

    def absolute(self) -> Float[Tensor, " unit"]:
        """Returns the sum of the absolute values."""
        return self.sums[4]

    def hoyer(self) -> Float[Tensor, " unit"]:
        """Returns Hoyer's sparsity of the values; NaN where all are zero."""
        return hoyer_from_sums(self.n, self.absolute(), self.squares())

    def negligible(self) -> Bool[Tensor, " unit"]:
        """Whether all values of a unit are rounding errors, as those of a GELU far below zero are.

        Their root mean square is then below that of the largest unit times the precision of the values. Whether such
        values are zero, and how they are distributed, differs between processors.
        """
        size = (self.squares() / self.n).sqrt()
        return size <= 8 * self.precision * size.max()

    def kurtosis(self) -> Float[Tensor, " unit"]:
        """Returns the excess kurtosis (0 for a normal distribution).

        NaN for a unit whose value is constant, or so small that its fourth power is rounded to zero: no kurtosis is
        below -2.
        """
        m1, m2, m3, m4 = (self.sums[:4] / self.n).unbind()
        fourth = m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4
        variance = self.variance()
        varies = variance > 1e-12 * self.squares() / self.n
        kurtosis = fourth / variance**2 - 3
        return torch.where(varies & (kurtosis > -2 - 1e-6), kurtosis, torch.nan)


class TokenTally:
    """How often each unit fires on each token: one counter (slot) per frequent token and one for all other tokens.

    Args:
        slot_of: slot of each token of the vocabulary.
        n_slots: number of slots; the last one is for all other tokens.
        exact: whether float32 represents every count exactly.
    """

    def __init__(self, slot_of: Int[Tensor, " d_vocab"], n_slots: int, n_units: int, exact: bool) -> None:
        dtype = torch.float32 if exact else torch.float64
        self.slot_of = slot_of
        self.counts = torch.zeros(n_slots, n_units, dtype=dtype, device=slot_of.device)

    def add(self, tokens: Int[Tensor, " token"], fired: Float[Tensor, "token unit"]) -> None:
        self.counts.index_add_(0, self.slot_of[tokens], fired.to(self.counts.dtype))


class CoActivation:
    """How often two units of a layer fire at the same token.

    Args:
        units: indices of the units that are counted, among the layer's attention units and then its neurons.
        names: names of these units, such as `L1.mlp.17`.
    """

    def __init__(self, units: Int[Tensor, " unit"], names: Sequence[str]) -> None:
        self.units, self.names = units, list(names)
        self.counts = torch.zeros(len(units), len(units), dtype=torch.float64, device=units.device)
        self.n_tokens = 0

    def add(self, fired: Float[Tensor, "token unit_of_layer"]) -> None:
        chosen = fired if len(self.units) == fired.shape[1] else fired[:, self.units]
        self.counts += chosen.T @ chosen
        self.n_tokens += len(fired)

    def jaccard(self) -> Float[Tensor, "unit unit"]:
        """Returns the number of tokens at which both fire over that at which either fires; 0 if neither ever does."""
        fires = self.counts.diagonal()
        either = fires[:, None] + fires[None] - self.counts
        return torch.where(either > 0, self.counts / either.clamp(min=1), 0)

    def partners(self, n: int) -> tuple[Float[Tensor, "unit partner"], Int[Tensor, "unit partner"]]:
        """Returns the `n` largest Jaccard indices of each unit, and the indices in `units` of these other units.

        Among equal ones the lower index comes first, on every device.
        """
        other = self.jaccard().clone()
        other.fill_diagonal_(-1)
        values, index = other.sort(dim=1, descending=True, stable=True)
        n = min(n, len(other) - 1)
        return values[:, :n], index[:, :n]
