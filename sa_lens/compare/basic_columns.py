"""Columns of losses, of weights, and of the skill at the task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from sa_lens.circuits.metrics import SKILL_BAR, skill
from sa_lens.circuits.tasks import make_unseen
from sa_lens.circuits.tasks.pairs import PromptPairs
from sa_lens.compare.columns import WHOLE
from sa_lens.compare.subject import Group, Measured, Subject, Values, in_every_stream
from sa_lens.config import RunConfig
from sa_lens.data import validation_blocks
from sa_lens.training import bytes_per_token, evaluate
from sa_lens.units.sparsity_tables import sparsity

PROMPT_TOKENS = 32
"""About as many tokens has a prompt."""
OBJECT = "object_"
"""What names of columns on object recall begin with; those without it are on IOI."""


@dataclass(frozen=True)
class Losses(Group):
    """Validation loss and perplexity of both streams."""

    tokens: int = 100_000
    """Predicted tokens, the same of every model."""

    name: ClassVar[str] = "losses"
    columns: ClassVar[tuple[str, ...]] = ("loss", "perplexity", "units_used")

    def work(self, run: RunConfig) -> float:
        return 4.0 * self.tokens

    def measure(self, subject: Subject) -> Measured:
        file = subject.data.validation
        blocks = validation_blocks(file, subject.run.model.n_ctx, self.tokens)
        found = evaluate(subject.model, blocks, bytes_per_token=bytes_per_token(file))
        values: Values = {
            "loss": {"clean": found.clean_loss},
            "perplexity": {"clean": found.clean_perplexity},
        }
        if found.ablated_loss is not None:
            values["loss"]["ablated"] = found.ablated_loss
            values["perplexity"]["ablated"] = found.ablated_perplexity
            values["units_used"] = {"ablated": found.units_used}
        return Measured(values)


@dataclass(frozen=True)
class Weights(Group):
    """Sparsity of the weights of the plain transformer, by the paper's measure and by ones without a scale."""

    eps: float = 0.01
    """A weight is small below this share of its layer's root mean square."""

    name: ClassVar[str] = "weights"
    version: ClassVar[int] = 2
    columns: ClassVar[tuple[str, ...]] = (
        "mean_abs_weight",
        "mean_abs_weight_inner",
        "hoyer",
        "hoyer_inner",
        "gini_inner",
        "small_inner",
    )

    def work(self, run: RunConfig) -> float:
        return 1000.0

    def measure(self, subject: Subject) -> Measured:
        table = sparsity(subject.model, self.eps).set_index("weight").to_dict("index")
        where = {
            "mean_abs_weight": ("all parameters", "mean_abs"),
            "mean_abs_weight_inner": ("all parameters without embeddings", "mean_abs"),
            "hoyer": ("matrices", "hoyer"),
            "hoyer_inner": ("matrices without embeddings", "hoyer"),
            "gini_inner": ("matrices without embeddings", "gini"),
            "small_inner": ("matrices without embeddings", "share_small"),
        }
        return Measured({name: {WHOLE: float(table[row][column])} for name, (row, column) in where.items()})


class NoPrompts(ValueError):
    """The tokenizer splits the names, so that there are no prompts."""


def task_pairs(subject: Subject, n: int, task: str = "ioi") -> PromptPairs:
    """Pairs of a task, the same for every model of a grid; IOI on generated stories with names that never meet in one.

    Raises:
        NoPrompts: the tokenizer leaves too few names whole.
    """
    try:
        return make_unseen(task, subject.data.tokenizer, n, 0, world=subject.world)
    except ValueError as error:
        raise NoPrompts(f"no prompts: {error}") from error


@dataclass(frozen=True)
class Skill(Group):
    """How well both streams do IOI."""

    pairs: int = 400
    """Prompts."""

    name: ClassVar[str] = "skill"
    columns: ClassVar[tuple[str, ...]] = ("pair_accuracy", "top1_accuracy", "logit_difference")
    task: ClassVar[str] = "ioi"
    prefix: ClassVar[str] = ""

    def work(self, run: RunConfig) -> float:
        return 3.0 * self.pairs * PROMPT_TOKENS

    def measure(self, subject: Subject) -> Measured:
        values: Values = in_every_stream(self.columns, subject.streams)
        notes = []
        try:
            pairs = task_pairs(subject, self.pairs, self.task)
        except NoPrompts as error:
            return Measured(values, (str(error),))
        for stream in subject.streams:
            found: dict[Any, Any] = skill(subject.model, pairs, stream).iloc[0].to_dict()
            for name in self.columns:
                values[name][stream] = float(found[name.removeprefix(self.prefix)])
            if not found["able"]:
                notes.append(
                    f"the {stream} stream has {found['pair_accuracy']:.0%} pair accuracy: below {SKILL_BAR:.0%}"
                )
        return Measured(values, tuple(notes))


@dataclass(frozen=True)
class ObjectSkill(Skill):
    """How well both streams do object recall, which small models learn before IOI."""

    name: ClassVar[str] = "object-skill"
    columns: ClassVar[tuple[str, ...]] = (f"{OBJECT}pair_accuracy", f"{OBJECT}logit_difference")
    task: ClassVar[str] = "object"
    prefix: ClassVar[str] = OBJECT
