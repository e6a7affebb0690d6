"""Optional: explanations of units by a language model behind an OpenAI-compatible endpoint, and their scores.

`ChatModel` asks the endpoint, with retries, a budget and a cache on disk. `explain_by_chat` lets it explain units from
the snippets of `explain` and test its explanations on held-out snippets, by two of the scores of the trie: detection
and simulation.

`huggingface_hub.InferenceClient` is not used, because it sends the user's Hub token to any endpoint and refuses local
servers while the Hub is set to offline.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool

from sa_lens.config import check_whole
from sa_lens.data.whole_files import atomic_write
from sa_lens.units.explanations import Explanation, Snippet, correlation

if TYPE_CHECKING:
    import pandas as pd

RETRIED = (408, 409, 429, 500, 502, 503, 504)
"""Status codes after which the same question is asked again."""

SHOWN = 10
"""Number of snippets from which the model explains a unit."""

LEVELS = 10
"""Activations are shown and predicted as whole numbers from 0 to this number."""


class BudgetError(RuntimeError):
    """The budget of calls or tokens is spent; earlier answers are in the cache."""


@dataclass
class ChatModel:
    """A chat model behind an OpenAI-compatible endpoint."""

    url: str
    """Base address, to which `/chat/completions` is added, such as `http://localhost:8000/v1` for a local server."""
    model: str
    """Name of the model at the endpoint."""
    key_variable: str | None = None
    """Environment variable that holds the key; None sends no key."""
    cache_dir: str | Path | None = None
    """Folder that stores the answers, so that no question is asked twice; None stores none."""
    max_calls: int = 1_000
    """Largest number of calls by this object; retries count, answers from the cache do not."""
    max_tokens: int = 1_000_000
    """Number of tokens, of questions and answers as the endpoint counts them, after which no call is made."""
    retries: int = 4
    """How often a failed call is repeated."""
    backoff: float = 1.0
    """Seconds before the first retry; the pause doubles with each further retry."""
    timeout: float = 60.0
    """Seconds to wait for an answer."""
    calls: int = field(default=0, init=False)
    """Number of calls so far."""
    tokens: int = field(default=0, init=False)
    """Number of tokens used so far."""

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url={self.url!r} must begin with http:// or https://")
        if self.key_variable is not None and not os.environ.get(self.key_variable):
            raise ValueError(f"the environment variable {self.key_variable!r}, which should hold the key, is not set")
        for name in ("max_calls", "max_tokens", "retries"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0")
        if self.backoff < 0 or self.timeout <= 0:
            raise ValueError(f"backoff={self.backoff} must be at least 0 and timeout={self.timeout} above 0 seconds")

    def ask(self, system: str, question: str, *, answer_tokens: int = 200) -> str:
        """Returns the model's answer at temperature 0, from the cache if it is stored there.

        Args:
            system: system message.
            question: user message.
            answer_tokens: largest number of tokens of the answer.

        Raises:
            BudgetError: the budget of calls or tokens is spent.
            ConnectionError: there is no answer after all retries.
            ValueError: the endpoint refuses the question, or answers in another format.
        """
        body = {
            "model": self.model,
            "messages": [{"role": "system", "content": system}, {"role": "user", "content": question}],
            "temperature": 0,
            "max_tokens": answer_tokens,
        }
        raw = json.dumps(body, sort_keys=True).encode()
        stored = None
        if self.cache_dir is not None:
            digest = hashlib.sha256(self.url.encode() + b"\n" + raw).hexdigest()
            stored = Path(self.cache_dir) / f"{digest}.json"
            if stored.is_file():
                return str(json.loads(stored.read_text(encoding="utf-8"))["answer"])
        answer = self._post(raw)
        if stored is not None:
            stored.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(stored, json.dumps({"question": body, "answer": answer}, indent=1))
        return answer

    def _post(self, raw: bytes) -> str:
        headers = {"Content-Type": "application/json"}
        if self.key_variable is not None:
            headers["Authorization"] = f"Bearer {os.environ[self.key_variable]}"
        address = f"{self.url.rstrip('/')}/chat/completions"
        failure = ""
        for attempt in range(self.retries + 1):
            if self.calls >= self.max_calls or self.tokens >= self.max_tokens:
                raise BudgetError(
                    f"the budget is spent: {self.calls} of max_calls={self.max_calls} calls, {self.tokens} of "
                    f"max_tokens={self.max_tokens} tokens" + (f"; the last call failed: {failure}" if failure else "")
                )
            if attempt:
                time.sleep(self.backoff * 2 ** (attempt - 1))
            self.calls += 1
            try:
                request = urllib.request.Request(address, data=raw, headers=headers, method="POST")
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    return self._read(response.read())
            except urllib.error.HTTPError as error:
                with error:
                    failure = f"status {error.code}, {error.read(500).decode(errors='replace')!r}"
                if error.code not in RETRIED:
                    raise ValueError(f"{address} refuses the question: {failure}") from error
            except OSError as error:
                failure = str(error)
        raise ConnectionError(f"no answer from {address} after {self.retries + 1} calls; the last one: {failure}")

    def _read(self, raw: bytes) -> str:
        try:
            answer = json.loads(raw)
            content = answer["choices"][0]["message"]["content"]
            used = (answer.get("usage") or {}).get("total_tokens", 0)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            shown = raw[:200].decode(errors="replace")
            raise ValueError(f"the endpoint's answer is not in the format of chat completions: {shown!r}") from error
        self.tokens += int(used)
        return str(content or "")


EXPLAIN = (
    "You study units of a neural language model. Each excerpt below shows one unit; tokens on which it is active stand "
    f"as <<token>>(activation), from 1 to {LEVELS}. Say in one short sentence on what the unit is active. Answer with "
    "that sentence alone."
)
DETECT = (
    "You judge whether excerpts of text contain something that a unit of a neural language model is active on. Answer "
    "with a JSON list alone that holds 1 or 0 for each excerpt, in order."
)
SIMULATE = (
    "You predict how active a unit of a neural language model is on each token of an excerpt. Answer with a JSON list "
    f"alone that holds a whole number from 0 to {LEVELS} for each token, in order."
)


def explain_by_chat(
    chat: ChatModel,
    explanations: Sequence[Explanation],
    spell: Callable[[int], str],
    *,
    judged: int = 10,
    progress: bool = True,
) -> pd.DataFrame:
    """Asks a chat model to explain units in words, and scores its explanations on held-out snippets.

    Each unit takes one call for the explanation, one for detection and one per snippet for simulation. Units without
    snippets are left out.

    Args:
        chat: chat model to ask.
        explanations: units with their snippets, from `explain(...).units`.
        spell: function that returns the text of a token, such as `lambda token: tokenizer.decode([token])`.
        judged: number of held-out snippets on which the explanation is scored, half of them with firing.
        progress: whether to show a progress bar.

    Returns:
        One row per unit: `layer`, `site`, `unit`, `stream`; `explanation`; `detection`, the balanced accuracy of
        distinguishing snippets with firing from those without; `simulation`, the correlation of predicted and true
        activations over all tokens; and `unread`, the number of answers in another format than asked for. Scores are
        NaN without snippets or readable answers.

    Raises:
        BudgetError, ConnectionError, ValueError: see `ChatModel.ask`; ValueError also if `judged` is below 2.
    """
    import pandas as pd
    from tqdm.auto import tqdm

    check_whole("judged", judged, 2)
    rows = []
    for explanation in tqdm(explanations, desc="chat", unit=" units", disable=not progress):
        if not explanation.fitted:
            continue
        peak = max(max(snippet.scores) for snippet in explanation.fitted)
        excerpts = "\n".join(
            f"{i}. {mark_active_tokens(s, spell, peak)}" for i, s in enumerate(explanation.fitted[:SHOWN], 1)
        )
        words = chat.ask(EXPLAIN, excerpts).strip()
        firing, silent = explanation.firing[: judged // 2], explanation.silent[: judged // 2]
        order = np.random.default_rng(0).permutation(len(firing) + len(silent))
        held_out = [[*firing, *silent][i] for i in order]
        scores = _judge(chat, words, held_out, order < len(firing), spell)
        rows.append({**explanation.unit.row(), "stream": explanation.stream, "explanation": words, **scores})
    return pd.DataFrame(rows)


def _judge(
    chat: ChatModel,
    words: str,
    held_out: Sequence[Snippet],
    fires: Bool[np.ndarray, " snippet"],
    spell: Callable[[int], str],
) -> dict[str, float]:
    """Asks for detection and simulation of the snippets, and returns both scores."""
    scores = {"detection": math.nan, "simulation": math.nan, "unread": 0}
    if not len(held_out):
        return scores
    texts = "\n".join(f"{i}. {''.join(map(spell, s.tokens))}" for i, s in enumerate(held_out, 1))
    answer = chat.ask(DETECT, f"The unit: {words}\n\n{texts}", answer_tokens=20 + 4 * len(held_out))
    says = read_numbers(answer, len(held_out))
    scores["unread"] += says is None
    if says is not None and fires.any() and not fires.all():
        right = (np.array(says) > 0) == fires
        scores["detection"] = float((right[fires].mean() + right[~fires].mean()) / 2)
    predicted: list[float] = []
    true: list[float] = []
    for snippet in held_out:
        count = len(snippet.tokens)
        tokens = "\n".join(f"{i}. {spell(token)!r}" for i, token in enumerate(snippet.tokens, 1))
        answer = chat.ask(SIMULATE, f"The unit: {words}\n\n{tokens}", answer_tokens=20 + 6 * count)
        numbers = read_numbers(answer, count)
        scores["unread"] += numbers is None
        if numbers is not None:
            predicted += numbers
            true += snippet.scores
    if true:
        scores["simulation"] = correlation(np.array(predicted), np.array(true))
    return scores


def mark_active_tokens(snippet: Snippet, spell: Callable[[int], str], peak: float) -> str:
    """Writes active tokens of a snippet as `<<token>>(activation)`, with activations up to `LEVELS` at the peak."""
    parts = []
    for token, score in zip(snippet.tokens, snippet.scores, strict=True):
        shown = min(LEVELS, round(LEVELS * score / peak)) if peak > 0 else 0
        parts.append(f"<<{spell(token)}>>({shown})" if shown > 0 else spell(token))
    return "".join(parts)


def read_numbers(answer: str, count: int) -> list[float] | None:
    """Returns the JSON list of `count` numbers in an answer, with any text around it; None if there is none."""
    start, stop = answer.find("["), answer.rfind("]")
    try:
        values: Any = json.loads(answer[start : stop + 1])
    except ValueError:
        return None
    if not isinstance(values, list) or len(values) != count:
        return None
    if not all(isinstance(x, int | float) and not isinstance(x, bool) and np.isfinite(x) for x in values):
        return None
    return [float(x) for x in values]
