"""`PromptPairs`: pairs of prompts whose tokens align, with a right and a wrong next token.

Prompts of several lengths are stored in one tensor, padded on the left, but padding never reaches a model:
`by_length()` yields groups of prompts of one length without padding. So no attention mask is needed, results equal
those of the prompts one by one, and the last position is -1 for all. Named positions count from the end (-1 is the
last), so that they are valid with and without padding.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from sa_lens.config import check_whole
from sa_lens.data.tokenizers import boundary_tokens, token_text
from sa_lens.drafts import Draft, DraftEncoder, Unusable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False, repr=False)
class PromptPairs:
    """Pairs of a clean and a corrupt prompt of equal length, with answers that are single tokens.

    The metric position is the last one, -1.
    """

    task: str
    """Name of the task."""
    clean: Int[Tensor, "pair pos"]
    """Clean prompts with their begin-of-text token, padded on the left."""
    corrupt: Int[Tensor, "pair pos"]
    """Corrupt prompts, aligned token by token with the clean ones."""
    answers: Int[Tensor, " pair"]
    """Token that should follow the clean prompt."""
    wrong_answers: Int[Tensor, " pair"]
    """Token that the answer is compared with."""
    lengths: Int[Tensor, " pair"]
    """Number of tokens of each prompt, with begin-of-text and without padding."""
    positions: Mapping[str, Int[Tensor, " pair"]]
    """Named positions that every pair has, counted from the end; `end` is -1."""
    clean_texts: tuple[str, ...]
    """Clean prompts as text."""
    corrupt_texts: tuple[str, ...]
    """Corrupt prompts as text."""
    token_texts: tuple[tuple[str, ...], ...]
    """Each token of the clean prompts as text."""
    dropped: Mapping[str, int] = field(default_factory=dict)
    """Number of pairs that were left out when these were made, by reason."""

    @classmethod
    def from_tokens(
        cls,
        clean: Int[Tensor, "pair pos"] | Sequence[Sequence[int]],
        corrupt: Int[Tensor, "pair pos"] | Sequence[Sequence[int]],
        answers: Int[Tensor, " pair"] | Sequence[int],
        wrong_answers: Int[Tensor, " pair"] | Sequence[int],
        *,
        lengths: Int[Tensor, " pair"] | Sequence[int] | None = None,
        positions: Mapping[str, Int[Tensor, " pair"] | Sequence[int]] | None = None,
        task: str = "tokens",
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> PromptPairs:
        """Makes pairs of your own tokens.

        Args:
            clean: tensor of clean prompts, padded on the left if they differ in length, or a list of lists of tokens.
            corrupt: corrupt prompts, aligned token by token with the clean ones.
            answers: token that should follow each clean prompt.
            wrong_answers: token that the answer is compared with.
            lengths: number of tokens of each prompt without padding; None if tensors hold no padding or lists are
                given.
            positions: named positions, counted from the end; `end` is always there.
            task: name in tables and files.
            tokenizer: tokenizer that spells the tokens in figures; without one they show numbers.

        Raises:
            ValueError: prompts do not align, or numbers are no tokens.
        """
        if lengths is None:
            lengths = [len(prompt) for prompt in clean]
        sides = [x if isinstance(x, Tensor) else _pad_left([list(prompt) for prompt in x]) for x in (clean, corrupt)]
        sizes = torch.as_tensor(lengths)
        prompts = [
            [row[len(row) - n :] for row, n in zip(side.tolist(), sizes.tolist(), strict=False)] for side in sides
        ]
        texts = [tuple(str(tokenizer.decode(prompt)) if tokenizer else "" for prompt in side) for side in prompts]
        named = {name: torch.as_tensor(offset) for name, offset in (positions or {}).items()}
        return cls(
            task=task,
            clean=sides[0],
            corrupt=sides[1],
            answers=torch.as_tensor(answers),
            wrong_answers=torch.as_tensor(wrong_answers),
            lengths=sizes,
            positions={**named, "end": torch.full_like(sizes, -1)},
            clean_texts=texts[0],
            corrupt_texts=texts[1],
            token_texts=tuple(tuple(token_text(tokenizer, token) for token in prompt) for prompt in prompts[0]),
        )

    @classmethod
    def from_texts(
        cls,
        drafts: Iterable[Draft | tuple[str, str, str, str]],
        tokenizer: PreTrainedTokenizerBase,
        *,
        task: str | None = None,
        minimum: int = 1,
        wanted: int | None = None,
        length: int | None = None,
    ) -> PromptPairs:
        """Makes pairs of your own texts: those whose two prompts align and whose answers are single tokens.

        A begin-of-text token is put before each prompt. No clean prompt is used twice. `.dropped` and `.report()` say
        which pairs were left out, and why.

        Args:
            drafts: (clean prompt, corrupt prompt, answer, wrong answer), answers with their leading space; or `Draft`s.
            task: name in tables and files; None: both answers of a single pair, such as `Lily or Tom`, or `texts`.
            minimum: smallest number of pairs.
            wanted: number of pairs after which no more drafts are read; None reads all drafts.
            length: number of tokens of each prompt, with the begin-of-text token; None allows all lengths.

        Raises:
            ValueError: there are fewer pairs than `minimum` (the message gives the reasons with an example each), or
                the tokenizer has neither a begin- nor an end-of-text token.
        """
        encoder, begin = _encoder(tokenizer), boundary_tokens(tokenizer).begin
        rows: dict[str, _Row] = {}
        dropped: Counter[str] = Counter()
        examples: dict[str, str] = {}
        for given in drafts:
            if wanted is not None and len(rows) == wanted:
                break
            draft = Draft(*given)
            row: _Row | Unusable
            if draft.clean in rows:
                row = Unusable("clean prompt already there", repr(draft.clean))
            else:
                row = _row(draft, encoder, begin, length)
            if isinstance(row, _Row):
                rows[draft.clean] = row
            else:
                dropped[row.reason] += 1
                examples.setdefault(*row)
        if len(rows) < max(minimum, 1):
            why = "".join(f"\n  {n} dropped: {reason}, such as {examples[reason]}" for reason, n in dropped.items())
            remedies = {
                "Add pairs": not dropped,
                "Use a tokenizer that keeps these words whole (data.keep_whole), or other words": any(
                    reason.endswith("is not one token") for reason in dropped
                ),
                "Change these prompts": bool(dropped),
            }
            remedy = next(remedy for remedy, applies in remedies.items() if applies)
            smaller = ", or ask for a smaller `minimum`" if minimum > 1 else ""
            raise ValueError(
                f"{task or 'texts'}: {len(rows)} usable pairs with this tokenizer, {max(minimum, 1)} needed{why}\n"
                f"{remedy}{smaller}"
            )
        kept = list(rows.values())
        shared = [name for name in kept[0].positions if all(name in row.positions for row in kept)]
        pairs = cls.from_tokens(
            *([getattr(row, name) for row in kept] for name in ("clean", "corrupt", "answer", "wrong_answer")),
            positions={name: [row.positions[name] for row in kept] for name in shared},
            task=task or (kept[0].draft.name if len(kept) == 1 else "texts"),
            tokenizer=tokenizer,
        )
        return replace(
            pairs,
            clean_texts=tuple(row.draft.clean for row in kept),
            corrupt_texts=tuple(row.draft.corrupt for row in kept),
            dropped=dict(dropped),
        )

    def __post_init__(self) -> None:
        tokens = {name: getattr(self, name) for name in ("clean", "corrupt", "answers", "wrong_answers", "lengths")}
        shapes = {name: tuple(x.shape) for name, x in {**tokens, **self.positions}.items()}
        if len(shapes["clean"]) != 2 or 0 in shapes["clean"] or shapes["corrupt"] != shapes["clean"]:
            raise ValueError(
                f"{self.task}: clean prompts {shapes.pop('clean')} and corrupt prompts {shapes.pop('corrupt')} do not "
                "align: make them equal in length, token by token, and give at least one pair"
            )
        n, width = shapes["clean"]
        for name, shape in shapes.items():
            if name not in ("clean", "corrupt") and shape != (n,):
                raise ValueError(f"{self.task}: {name} has the shape {shape}, but there are {n} pairs: give one each")
        for name, x in tokens.items():
            if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool or int(x.min()) < 0:
                raise ValueError(f"{self.task}: {name} must be whole numbers of 0 or more, not {x.dtype} {x.tolist()}")
        if int(self.lengths.min()) < 1 or int(self.lengths.max()) > width:
            raise ValueError(f"{self.task}: lengths must be from 1 to the {width} tokens of the padded prompts")

    def __len__(self) -> int:
        return len(self.answers)

    @property
    def uniform(self) -> bool:
        """Whether all prompts have the same length."""
        return bool((self.lengths == self.lengths[0]).all())

    def __repr__(self) -> str:
        return f"<PromptPairs {self.report()}>"

    def report(self) -> str:
        """Says how many pairs were kept, and why others were left out."""
        offered = len(self) + sum(self.dropped.values())
        reasons = "".join(f"; {count} dropped: {reason}" for reason, count in self.dropped.items())
        return f"{self.task}: kept {len(self)} of {offered} pairs{reasons}"

    def subset(self, rows: Sequence[int] | Int[Tensor, " chosen"]) -> PromptPairs:
        """Returns the chosen pairs in the given order, with no more padding than they need."""
        index = torch.as_tensor(rows, dtype=torch.long).reshape(-1)
        if not len(index):
            raise ValueError(f"no pair of {self.task} chosen: a set of pairs holds at least one")
        lengths = self.lengths[index]
        longest = int(lengths.max())
        return replace(
            self,
            clean=self.clean[index, -longest:],
            corrupt=self.corrupt[index, -longest:],
            answers=self.answers[index],
            wrong_answers=self.wrong_answers[index],
            lengths=lengths,
            positions={name: offset[index] for name, offset in self.positions.items()},
            clean_texts=tuple(self.clean_texts[i] for i in index),
            corrupt_texts=tuple(self.corrupt_texts[i] for i in index),
            token_texts=tuple(self.token_texts[i] for i in index),
        )

    def by_length(self, at_most: int | None = None) -> Iterator[tuple[Int[Tensor, " group"], PromptPairs]]:
        """Yields groups of pairs of one length, shortest first, each with the indices of its pairs.

        Args:
            at_most: largest number of pairs in a group; None sets no limit.
        """
        for length in self.lengths.unique(sorted=True):
            rows = (self.lengths == length).nonzero()[:, 0]
            for part in rows.split(at_most or len(rows)):
                yield part, self.subset(part)

    def require_one_length(self, setting: str) -> None:
        """Checks that all prompts have the same length.

        Args:
            setting: setting that needs it, for the message.

        Raises:
            ValueError: the prompts have several lengths.
        """
        if not self.uniform:
            lengths = ", ".join(str(int(length)) for length in self.lengths.unique())
            raise ValueError(
                f"{setting} needs prompts of one length, these have {lengths} tokens: make the pairs with length=..., "
                "or take a group of pairs.by_length()"
            )

    def split(self, seed: int = 0, share: float = 0.5) -> tuple[PromptPairs, PromptPairs]:
        """Splits the pairs at random into two sets: one to find a circuit on, one to report on.

        Args:
            share: share of the pairs in the first set.

        Raises:
            ValueError: share is outside (0, 1), or there are too few pairs for two sets.
        """
        first = round(share * len(self))
        if not 0 < share < 1 or not 0 < first < len(self):
            raise ValueError(f"share={share} of {len(self)} pairs leaves one of the two sets empty")
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return self.subset(order[:first].sort().values), self.subset(order[first:].sort().values)

    def check_fits(self, cfg: Any, batch_size: int = 1) -> None:
        """Checks that a model can read these pairs.

        Args:
            cfg: configuration of the model, with `d_vocab` and `n_ctx`.

        Raises:
            ValueError: a token is beyond the vocabulary, a prompt is longer than the context, or batch_size is below 1.
        """
        check_whole("batch_size", batch_size, 1, "the prompts in one pass")
        highest = max(int(t.max()) for t in (self.clean, self.corrupt, self.answers, self.wrong_answers))
        if highest >= cfg.d_vocab:
            raise ValueError(
                f"{self.task}: token {highest} is beyond the model's vocabulary of {cfg.d_vocab}: make the pairs with "
                "the model's own tokenizer"
            )
        longest = int(self.lengths.max())
        if longest > cfg.n_ctx:
            raise ValueError(f"{self.task}: a prompt of {longest} tokens is longer than n_ctx={cfg.n_ctx}")


class _Row(NamedTuple):
    draft: Draft
    clean: list[int]
    corrupt: list[int]
    answer: int
    wrong_answer: int
    positions: dict[str, int]


def _encoder(tokenizer: PreTrainedTokenizerBase) -> DraftEncoder:
    def encode(text: str) -> list[int]:
        ids: Any = tokenizer.encode(text, add_special_tokens=False)
        return list(ids)

    return DraftEncoder(encode, lambda token: token_text(tokenizer, token), tokenizer.unk_token_id)


def _row(draft: Draft, encoder: DraftEncoder, begin: int, length: int | None) -> _Row | Unusable:
    """The row of a draft, or the reason why there is none and an example."""
    tokens = encoder.tokens(draft)
    if isinstance(tokens, Unusable):
        return tokens
    clean, corrupt, answer, wrong = tokens
    if length is not None and len(clean) + 1 != length:
        return Unusable(f"not {length} tokens long", f"{draft.clean!r} ({len(clean) + 1})")
    positions = {}
    for name, word, index in draft.marks:
        if word is None:
            places = [i for i, (a, b) in enumerate(zip(clean, corrupt, strict=True)) if a != b]
        else:
            # a name at the very beginning of a text is another token than after a space
            forms = (encoder.encode(word), encoder.encode(word.lstrip()))
            places = [i for i, token in enumerate(clean) if [token] in forms]
        if -len(places) <= index < len(places):
            positions[name] = places[index] - len(clean)
    positions["end"] = -1
    return _Row(draft, [begin, *clean], [begin, *corrupt], answer, wrong, positions)


def _pad_left(prompts: list[list[int]]) -> Int[Tensor, "prompt pos"]:
    """Stacks prompts, padded on the left with their first token; padding never enters a model."""
    longest = max(map(len, prompts))
    return torch.tensor([prompt[:1] * (longest - len(prompt)) + prompt for prompt in prompts])
