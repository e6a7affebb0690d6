"""Texts as tokens, and the names of tokens, units, tasks and metrics in figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from sa_lens.circuits.metrics import SKILL_BAR
from sa_lens.core.host import Host, device_of
from sa_lens.data.tokenizers import PART_OF_CHARACTER, UNFINISHED, boundary_tokens, token_text

TASKS = {"ioi": "IOI", "pronoun": "Pronoun gender", "object": "Object recall", "repeated": "Repeated name"}
"""Names of tasks in figures."""

METHODS = {"acdc": "ACDC", "eap": "EAP", "eap-ig": "EAP-IG", "relp": "RelP", "gate": "gate circuit"}
"""Names of methods in figures."""

_METRICS = {
    "kl": "KL, nats",
    "logit_difference": "logit difference",
    "pair_accuracy": "pair accuracy",
    "top1_accuracy": "top-1 accuracy",
    "answer_rank": "rank of the answer",
    "answer_log_probability": "log-probability of the answer, nats",
}


def metric_words(name: str) -> str:
    """Returns a metric in words, with its unit where it has one."""
    return _METRICS.get(name, name.replace("_", " "))


def skill_warnings(accuracy: float | None) -> list[str]:
    """A warning where the pair accuracy says that the model does not do the task; none where nothing is known.

    Raises:
        ValueError: no share from 0 to 1.
    """
    if accuracy is not None and not 0 <= accuracy <= 1:
        raise ValueError(f"skill={accuracy} must be a pair accuracy from 0 to 1")
    if accuracy is None or accuracy >= SKILL_BAR:
        return []
    return [
        f"pair accuracy {accuracy:.2f} is below {SKILL_BAR:g}: the model cannot do this task, so what is shown "
        "explains little"
    ]


def mask_warnings(stream: object, masks: object) -> list[str]:
    """A warning about frozen masks in a circuit of the ablated stream."""
    if stream != "ablated" or masks != "frozen":
        return []
    return [
        "the frozen masks of the clean prompt bring a part of the answer, which no edge has to carry; live masks bring "
        "nothing"
    ]


def read_text(model: Host, text: str | Int[Tensor, " pos"]) -> tuple[Int[Tensor, "1 pos"], tuple[str, ...]]:
    """Returns the tokens of one text on the model's device, and the text of each.

    Args:
        text: text, which gets one begin-of-text token, or tokens, which are taken as they are.

    Raises:
        ValueError: several texts, an empty one, one longer than the context, tokens beyond the vocabulary, or text for
            a model without a tokenizer.
    """
    if isinstance(text, str) and not text:
        raise ValueError("the text is empty: give at least one character, or tokens")
    if isinstance(text, str) and model.tokenizer is None:
        raise ValueError("the model has no tokenizer: give tokens instead of text")
    tokens = torch.tensor(encode_text(model.tokenizer, text)) if isinstance(text, str) else torch.as_tensor(text)
    tokens = tokens.reshape(1, -1) if tokens.ndim < 2 or len(tokens) == 1 else tokens
    if len(tokens) != 1:
        raise ValueError(f"a view is of one text at a time, not of {len(tokens)}")
    n, d_vocab = tokens.shape[1], model.cfg.d_vocab
    if not 1 <= n <= model.cfg.n_ctx:
        raise ValueError(f"the text has {n} tokens: this model reads from 1 to n_ctx={model.cfg.n_ctx} of them")
    if int(tokens.min()) < 0 or int(tokens.max()) >= d_vocab:
        raise ValueError(
            f"tokens from {int(tokens.min())} to {int(tokens.max())} are not within the model's vocabulary of {d_vocab}"
        )
    return tokens.to(device_of(model)), token_texts(model, tokens[0].tolist())


def token_texts(model: Host, tokens: Sequence[int]) -> tuple[str, ...]:
    """Returns the text of each token; a character of several tokens stands at its last, its bytes at those before."""
    texts = [token_text(model.tokenizer, token) for token in tokens]
    start = 0
    for i, text in enumerate(texts):
        if not PART_OF_CHARACTER.search(text):
            start = i + 1
        elif i > start and UNFINISHED not in (whole := str(model.tokenizer.decode(list(tokens[start : i + 1])))):
            texts[i] = whole
            start = i + 1
    return tuple(texts)


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Returns the tokens of a text after the token that every prompt begins with."""
    return [boundary_tokens(tokenizer).begin, *tokenizer.encode(text, add_special_tokens=False)]


def visible(token: str) -> str:
    """Returns a token in which a lonely space or line break can be seen."""
    return token if token.strip() else token.replace("\n", "¶").replace(" ", "␣")


def short_label(token: str, most: int = 12) -> str:
    """Returns a token as a label of so many characters at most."""
    label = visible(token).strip()
    return label if len(label) <= most else label[: most - 1] + "…"
