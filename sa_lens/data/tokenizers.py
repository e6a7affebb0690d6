"""Tokenizers: a Hugging Face one by folder or Hub id, or a byte-level BPE trained on the corpus.

A trained one is saved as a full Hugging Face folder that `AutoTokenizer` loads and TransformerLens can reload with a
begin-of-text token. Kept words stay single tokens as whole words only: they stand in the vocabulary without a merge
that leads to them, and the model looks a whole word up before it merges (`ignore_merges`), so " Tim" is one token and
" Timothy" is cut as if " Tim" did not exist. Decoding gives back every text exactly.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sa_lens.data.disk import key_of, locked, new_folder
from sa_lens.data.hub import require_hub

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END_OF_TEXT = "<|endoftext|>"
"""The one special token of a trained tokenizer: begin, end, unknown and padding at once, with id 0."""

LOCAL_TOKENIZER = "name a tokenizer folder in data.tokenizer, or let `bpe` train one on the text"


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The Hugging Face tokenizer of a local folder.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: the folder holds no tokenizer, or one without an end-of-text token.
    """
    from transformers import AutoTokenizer

    folder = Path(folder).expanduser().resolve()
    if not folder.is_dir():
        raise FileNotFoundError(f"no tokenizer folder {folder}")
    try:
        # The absolute path becomes `name_or_path`, from which TransformerLens loads the tokenizer again.
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} holds no Hugging Face tokenizer (tokenizer.json, ...): {error}") from error
    return _with_end_of_text(tokenizer, str(folder))


def fetch_tokenizer(name: str, cache: Path) -> Path:
    """The folder of a tokenizer named by folder or Hub id; one from the Hub is saved in the cache first.

    Raises:
        FileNotFoundError: `name` looks like a path and there is no such folder.
        HubUnreachable: a Hub id that was never used with this cache, and no network.
        ValueError: the Hub has no such tokenizer.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path.resolve()
    if path.is_file():
        raise ValueError(f"data.tokenizer={name!r} is a file; name the folder that holds tokenizer.json")
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name:
        raise FileNotFoundError(f"data.tokenizer={name!r}: no such folder; {LOCAL_TOKENIZER}")
    folder = cache / "tokenizers" / name.replace("/", "--")
    if folder.is_dir():
        return folder
    with locked(folder):
        if folder.is_dir():
            return folder
        tokenizer = _from_hub(name)
        with new_folder(folder) as temporary:
            tokenizer.save_pretrained(str(temporary))
    return folder


def _from_hub(name: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError):
        # not in the Hugging Face cache
        require_hub(f"tokenizer {name!r}, no local folder but an id,", LOCAL_TOKENIZER)
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"the Hub has no tokenizer {name!r} that you may read; {LOCAL_TOKENIZER}: {error}") from error


def _with_end_of_text(tokenizer: PreTrainedTokenizerBase, name: str) -> PreTrainedTokenizerBase:
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"tokenizer {name!r} has no end-of-text token to put between documents; name one as eos_token in its "
            "tokenizer_config.json"
        )
    return tokenizer


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 (hex) of what decides the tokens of a text: rules, vocabulary and end-of-text token."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    return key_of([type(tokenizer).__name__, hashlib.sha256(rules.encode()).hexdigest(), int(tokenizer.eos_token_id)])


def read_words(path: str | Path) -> list[str]:
    """The words of a `keep_whole` file, sorted, each once.

    A text file has one word a line. A JSON file is a set of IOI prompts (`prompts` with `clean`, `corrupt`, `answers`,
    `wrong_answers`): its words are the answers, right and wrong, and all names, which are what tells a clean prompt
    from its corruption.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no words in it, or JSON of another form.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"data.keep_whole={str(path)!r}: no such file")
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix.lower() == ".json":
        try:
            words = _prompt_words(json.loads(text)["prompts"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"data.keep_whole={str(path)!r} is not IOI JSON, an object with `prompts`, each with `clean`, "
                f"`corrupt`, `answers` and `wrong_answers`: {type(error).__name__}: {error}"
            ) from error
    else:
        words = {line.strip() for line in text.splitlines()} - {""}
    if not words:
        raise ValueError(f"data.keep_whole={str(path)!r} holds no words")
    return sorted(words)


def _prompt_words(prompts: Iterable[dict[str, Any]]) -> set[str]:
    words: set[str] = set()
    for prompt in prompts:
        words.update(answer.strip() for answer in [*prompt["answers"], *prompt["wrong_answers"]])
        clean, corrupt = (set(re.findall(r"\w+", prompt[side])) for side in ("clean", "corrupt"))
        words |= clean ^ corrupt
    return words


def train_bpe(
    texts: Iterable[str], folder: Path, *, vocab_size: int, keep_whole: Iterable[str] = (), progress: bool = True
) -> None:
    """Trains a byte-level BPE with GPT-2's splitting into words and writes it as a Hugging Face folder.

    A kept word is one token with a leading space, and also without one if it occurs so in `texts` (after a quotation
    mark or at the start of a line), since a token that is never seen would stay untrained.

    Args:
        texts: documents; the same ones give the same tokenizer.
        folder: written whole or not at all.
        vocab_size: tokens at most, the end-of-text token and the 256 bytes included; fewer if the text has no more
            words to merge.
        keep_whole: words without spaces that stay single tokens.

    Raises:
        ValueError: a kept word that the splitting itself cuts ("O'Neil"), or too small a vocabulary for the kept words.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = sorted(set(keep_whole))
    kept = {_whole(split, " " + word, word) for word in words}
    bare: set[str] = set()

    def batches() -> Iterator[list[str]]:
        batch: list[str] = []
        for text in texts:
            if words:
                bare.update(_words_without_space(text))
            batch.append(text)
            if len(batch) == 1000:
                yield batch
                batch = []
        if batch:
            yield batch

    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=progress,
    )
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = split
    trained.train_from_iterator(batches(), trainer=trainer)
    kept |= {_whole(split, word, word) for word in words if word in bare}
    model = json.loads(trained.to_str())["model"]
    vocab, merges = _shortened(model["vocab"], [(left, right) for left, right in model["merges"]], kept, vocab_size)

    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT])
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "unk_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    with new_folder(folder) as temporary:
        tokenizer.save(str(temporary / "tokenizer.json"))
        (temporary / "tokenizer_config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")


def _whole(split: Any, text: str, word: str) -> str:
    """The single piece, in byte letters, that GPT-2's splitting makes of `text`."""
    pieces = [piece for piece, _ in split.pre_tokenize_str(text)]
    if len(pieces) != 1 or not word or word != word.strip():
        cut = ", ".join(repr(text[start:end]) for _, (start, end) in split.pre_tokenize_str(text))
        raise ValueError(f"data.keep_whole: {word!r} is more than one word to the tokenizer ({cut}); keep its parts")
    return pieces[0]


_BARE = re.compile(r"(?<![\w ])\w+")


def _words_without_space(text: str) -> list[str]:
    return _BARE.findall(text)


def _shortened(
    trained: dict[str, int], merges: list[tuple[str, str]], kept: set[str], vocab_size: int
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges cut so that the kept words fit.

    The first merges of a BPE are the BPE of a smaller vocabulary, so cutting the list gives what training for the
    remaining room would have given.
    """
    by_id = sorted(trained, key=trained.__getitem__)
    made = {left + right for left, right in merges}
    vocab = [token for token in by_id if token not in made]
    known, missing = set(vocab), kept - set(vocab)
    if len(vocab) + len(missing) > vocab_size:
        raise ValueError(
            f"data.vocab_size={vocab_size} is too small: {len(vocab)} bytes and special tokens and {len(missing)} "
            f"tokens for the words of data.keep_whole need {len(vocab) + len(missing)} at least"
        )
    used = []
    for left, right in merges:
        token = left + right
        if token not in known:
            if token not in missing and len(vocab) + len(missing) == vocab_size:
                break
            missing.discard(token)
            known.add(token)
            vocab.append(token)
        used.append((left, right))
    vocab += sorted(missing)
    return {token: index for index, token in enumerate(vocab)}, used
