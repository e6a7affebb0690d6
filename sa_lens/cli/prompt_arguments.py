"""The prompts of `sa-lens patch` and `attribute`: a pair of the user's own, or a task."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sa_lens.catalogue import local_folder, results_folder
from sa_lens.cli.argument_checks import check_task, shape_of
from sa_lens.config import Words
from sa_lens.drafts import Draft, DraftEncoder, Unusable
from sa_lens.places import output_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sa_lens.circuits import PromptPairs
    from sa_lens.core import SelfAblatingTransformer

_PLAIN_TOKENIZERS = ("TokenizersBackend", "PreTrainedTokenizerFast", "GPT2Tokenizer", "GPT2TokenizerFast")
"""Classes of tokenizers that encode as their `tokenizer.json` alone says."""


@dataclass(frozen=True)
class PromptArguments:
    """Which prompts to run."""

    clean: str | None = None
    """Clean prompt."""
    corrupt: str | None = None
    """Corrupt prompt of as many tokens."""
    answer: str | None = None
    """Answer to it: one token, with its space."""
    wrong: str | None = None
    """Answer to the corrupt prompt."""
    task: str | None = None
    """A task instead: ioi, ..., or a JSON file."""
    pairs: int = 64
    """Prompt pairs of the task."""
    seed: int = 0
    """Seed of the task's prompts."""

    @property
    def draft(self) -> Draft | None:
        """The user's own pair; None: a task is named."""
        texts = {name: getattr(self, name) for name in ("clean", "corrupt", "answer", "wrong")}
        missing = [f"--{name}" for name, text in texts.items() if text is None]
        if self.task is not None:
            if len(missing) < len(texts):
                raise ValueError("--task brings its own prompts: leave --clean, --corrupt, --answer and --wrong out")
            return None
        if missing:
            raise ValueError(
                f"{', '.join(missing)} missing: give --clean, --corrupt, --answer and --wrong, or a --task such as ioi"
            )
        return Draft(texts["clean"], texts["corrupt"], texts["answer"], texts["wrong"])

    @property
    def name(self) -> str:
        """What tables and titles call the prompts, such as `Lily or Tom`."""
        draft = self.draft
        return draft.name if draft is not None else Path(str(self.task)).stem

    def check(self, run: str) -> None:
        """Refuses prompts that the run's model cannot take, as far as can be told without loading it.

        Raises:
            ValueError: prompts that do not align, an answer of several tokens, an unknown task.
            FileNotFoundError: no such run or file.
        """
        draft = self.draft
        if draft is None:
            check_task(str(self.task))
            if self.pairs < 1:
                raise ValueError(f"pairs={self.pairs} must be at least 1")
            return
        encoder = _light_encoder(run)
        if encoder is None:
            return
        tokens = encoder.tokens(draft)
        if isinstance(tokens, Unusable):
            raise ValueError(f"{tokens.reason}: {tokens.example}")
        n_ctx = shape_of(run, "n_ctx")
        if n_ctx is not None and len(tokens.clean) + 1 > n_ctx:
            raise ValueError(f"the prompts have {len(tokens.clean) + 1} tokens, more than the model's n_ctx={n_ctx}")

    def folder(self, run: str, out: Path | None, kind: str, what: tuple[str, ...]) -> Path:
        """The folder to write, checked.

        Args:
            kind: name of the folder of such results within the run's.
        """
        return output_folder(out or results_folder(run) / kind / "-".join([*re.findall(r"[\w-]+", self.name), *what]))

    def load(self, run: str, device: str) -> tuple[SelfAblatingTransformer, PromptPairs]:
        """The model and the pairs.

        Raises:
            ValueError: a model without a tokenizer, or prompts that do not fit it.
        """
        from sa_lens.circuits import PromptPairs
        from sa_lens.circuits.tasks import make_unseen

        model, tokenizer, words = load_for_prompts(run, device)
        draft = self.draft
        if draft is not None:
            return model, PromptPairs.from_texts([draft], tokenizer)
        return model, make_unseen(str(self.task), tokenizer, self.pairs, self.seed, words=words)


def load_for_prompts(
    run: str, device: str, words: Words | Literal["auto"] = "auto"
) -> tuple[SelfAblatingTransformer, PreTrainedTokenizerBase, Words]:
    """The model of a run, its tokenizer, and the words of prompts of a task for it.

    Raises:
        ValueError: a model without a tokenizer.
    """
    from sa_lens.training.trained_run import load_run, trained_on_stories

    if words == "auto":
        words = "stories" if trained_on_stories(run) else "tinystories"
    model = load_run(run, device=device)
    if model.tokenizer is None:
        raise ValueError(f"{run} has no tokenizer, which the prompts of a task need")
    return model, model.tokenizer, words


def _light_encoder(run: str) -> DraftEncoder | None:
    """The run's tokenizer without transformers; None if that takes more than its `tokenizer.json`."""
    folder = local_folder(run)
    try:
        assert folder is not None
        settings: dict[str, Any] = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        if settings.get("tokenizer_class") not in _PLAIN_TOKENIZERS:
            return None
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception:
        # whatever is wrong with the files, the loader has the message for it
        return None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    unknown = settings.get("unk_token")
    return DraftEncoder(
        lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids),
        lambda token: str(tokenizer.decode([token])),
        tokenizer.token_to_id(unknown) if isinstance(unknown, str) else None,
    )
