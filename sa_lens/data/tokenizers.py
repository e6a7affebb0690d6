"""Tokenizers: a Hugging Face one by folder or Hub id, or a byte-level BPE trained on the corpus.

A trained one is saved as a full Hugging Face folder that `AutoTokenizer` loads and TransformerLens can reload with a
begin-of-text token. Kept words stay single tokens as whole words only: they stand in the vocabulary without a merge
that leads to them, and the model looks a whole word up before it merges (`ignore_merges`), so " Tim" is one token and
" Timothy" is cut as if " Tim" did not exist. Decoding gives back every text exactly.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sa_lens.data.cache import key_of, make_once, new_folder
from sa_lens.data.hub import require_hub
from sa_lens.data.long_documents import split_document
from sa_lens.places import local_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END_OF_TEXT = "<|endoftext|>"
"""The one special token of a trained tokenizer: begin, end, unknown and padding at once, with id 0."""

UNFINISHED = "\ufffd"
"""Character that a tokenizer writes for bytes that do not form a whole character."""
PART_OF_CHARACTER = re.compile("<0x[0-9A-F]{2}>")
"""How `token_text` writes such a byte."""

LOCAL_TOKENIZER = "name a tokenizer folder in data.tokenizer, or let `bpe` train one on the text"


class Boundaries(NamedTuple):
    """The tokens at the beginning and the end of a text.

    Training text, prompts, generated text and views all begin with `begin`, so that a model only ever begins with a
    token that it was trained on.
    """

    begin: int
    """Before every document and prompt."""
    end: int
    """After every document; where generated text stops."""

    @property
    def before(self) -> list[int]:
        """Tokens before a document of a training text: none if the end of the previous document suffices."""
        return [] if self.begin == self.end else [self.begin]

    @property
    def after(self) -> list[int]:
        """Tokens after a document."""
        return [self.end]


def boundary_tokens(tokenizer: Any) -> Boundaries:
    """Returns a tokenizer's begin- and end-of-text token; if it has only one of them, this is used for both.

    Raises:
        ValueError: it has neither.
    """
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    if begin is None and end is None:
        raise ValueError(
            f"tokenizer {tokenizer.name_or_path!r} has neither an end-of-text token to put between documents nor a "
            "begin-of-text token; name one as eos_token in its tokenizer_config.json, or set tokenizer.eos_token"
        )
    return Boundaries(int(end if begin is None else begin), int(begin if end is None else end))


def token_text(tokenizer: Any, token: int) -> str:
    """Returns a token as text; bytes of an incomplete character as `<0xE2>`. Without a tokenizer it is the number."""
    if tokenizer is None:
        return str(token)
    text = str(tokenizer.decode([token]))
    if UNFINISHED not in text:
        return text
    piece = tokenizer.convert_ids_to_tokens(token)
    letters = byte_letters()
    if not letters.keys() >= set(piece):
        # tokenizers that fall back to bytes write such a token as <0xE2> themselves
        return piece if PART_OF_CHARACTER.fullmatch(piece) else text
    whole = bytes(letters[letter] for letter in piece).decode(errors="surrogateescape")
    return re.sub("[\udc80-\udcff]", lambda byte: f"<0x{ord(byte[0]) - 0xDC00:02X}>", whole)


@cache
def byte_letters() -> dict[str, int]:
    """Returns the byte that each letter stands for in the vocabulary of GPT-2 and of all byte-level tokenizers."""
    same = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in same]
    return {chr(byte): byte for byte in same} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def prompt_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Returns a copy for prompts, which puts the begin token before a text and nothing else around it.

    Both boundary tokens and the padding token are set; the tokens of the text itself stay the same.

    Raises:
        ValueError: the tokenizer has no boundary token, or it is written in Python and adds other tokens by itself.
    """
    from tokenizers import processors

    begin, _ = boundary_tokens(tokenizer)
    tokenizer = copy.deepcopy(tokenizer)
    if tokenizer.bos_token_id is None:
        tokenizer.bos_token = tokenizer.eos_token
    if tokenizer.eos_token_id is None:
        tokenizer.eos_token = tokenizer.bos_token
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        # a name of our own for the token, as those with a colon do not fit into the template
        backend.post_processor = processors.TemplateProcessing(
            single="BEGIN $A",
            special_tokens=[{"id": "BEGIN", "ids": [begin], "tokens": [tokenizer.bos_token]}],
        )
    elif list(tokenizer("a")["input_ids"]) != [begin, *tokenizer("a", add_special_tokens=False)["input_ids"]]:
        raise ValueError(
            f"tokenizer {tokenizer.name_or_path!r} does not put its begin-of-text token, and that alone, before a "
            "text; use its fast version, or set add_bos_token=True and add_eos_token=False"
        )
    return tokenizer


def is_gguf(path: Path) -> bool:
    """Whether the path is a GGUF file, which holds a model and its tokenizer."""
    return path.suffix.lower() == ".gguf" and path.is_file()


def files_of(path: Path) -> dict[str, Any]:
    """Arguments by which `from_pretrained` of `transformers` reads a local folder or GGUF file, and nothing else.

    Raises:
        ValueError: a GGUF file, and the package that reads it is not installed.
    """
    # The absolute path becomes `name_or_path`, by which it is named in messages.
    path = path.resolve()
    if not is_gguf(path):
        return {"pretrained_model_name_or_path": str(path), "local_files_only": True}
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(f"{path.name} is a GGUF file, which needs the package gguf: pip install 'sa-lens[gguf]'")
    return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name, "local_files_only": True}


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """Loads the Hugging Face tokenizer of a local folder. Python code in the folder is never run.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: the folder holds no tokenizer, or one without a begin- or end-of-text token.
    """
    from transformers import AutoTokenizer

    folder = local_path(folder, "the name of the tokenizer folder").resolve()
    if not folder.is_dir() and not is_gguf(folder):
        raise FileNotFoundError(f"no tokenizer folder {folder}")
    files = files_of(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(**files, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare exceptions
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"the tokenizer in {folder} needs Python code of its own, which is never run; save it as a "
                "tokenizer.json without auto_map"
            ) from error
        raise ValueError(f"{folder} holds no Hugging Face tokenizer (tokenizer.json, ...): {error}") from error
    boundary_tokens(tokenizer)
    return tokenizer


def fetch_tokenizer(name: str, cache: Path) -> Path:
    """Returns the folder of a tokenizer named by folder or Hub id; one from the Hub is first saved in the cache.

    Raises:
        FileNotFoundError: `name` looks like a path and there is no such folder.
        HubUnreachable: a Hub id that was never used with this cache, and no network.
        ValueError: the Hub has no such tokenizer.
    """
    path = local_path(name, "data.tokenizer")
    if path.is_dir() or is_gguf(path):
        return path.resolve()
    if path.is_file():
        raise ValueError(f"data.tokenizer={name!r} is a file; name the folder that holds tokenizer.json")
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name:
        raise FileNotFoundError(f"data.tokenizer={name!r}: no such folder; {LOCAL_TOKENIZER}")
    folder = cache / "tokenizers" / name.replace("/", "--")

    def download() -> None:
        tokenizer = _from_hub(name)
        with new_folder(folder) as temporary:
            tokenizer.save_pretrained(str(temporary))

    make_once(folder, download)
    return folder


def _from_hub(name: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError):
        # not in the Hugging Face cache
        require_hub(f"tokenizer {name!r}, no local folder but an id,", LOCAL_TOKENIZER)
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"the Hub has no tokenizer {name!r} that you may read; {LOCAL_TOKENIZER}: {error}") from error


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns a SHA-256 (hex) of all that determines training tokens: rules, vocabulary and boundary tokens.

    How a tokenizer pads, and what it puts around a text of its own accord, have no say in them.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        rules: Any = sorted(tokenizer.get_vocab().items())
    else:
        whole = json.loads(backend.to_str())
        rules = [whole[part] for part in ("normalizer", "pre_tokenizer", "model", "added_tokens")]
    digest = hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()
    return key_of([type(tokenizer).__name__, digest, *boundary_tokens(tokenizer)])


def read_words(path: str | Path) -> list[str]:
    """Returns the words of a `keep_whole` file, sorted and without repetition.

    A text file has one word a line. A JSON file is a set of IOI prompts (`prompts` with `clean`, `corrupt`, `answers`,
    `wrong_answers`): its words are the answers, right and wrong, and all names, which are what tells a clean prompt
    from its corruption.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file holds no words, or is JSON of another form.
    """
    path = local_path(path, "data.keep_whole")
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
        ValueError: a word cannot be kept whole because the splitting divides it ("O'Neil"), or the vocabulary is too
            small for the kept words.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = sorted(set(keep_whole))
    kept = {_as_one_piece(split, " " + word, word) for word in words}
    wanted, bare = set(words), set[str]()

    def parts() -> Iterator[str]:
        for text in texts:
            if kept:
                bare.update(wanted.intersection(match.group() for match in _BARE.finditer(text)))
            # what is counted are the words of the splitting, so that cutting between two of them changes nothing
            yield from (
                piece for piece, _ in split_document(text, lambda part: [w for w, _ in split.pre_tokenize_str(part)])
            )

    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=progress,
    )
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = split
    trained.train_from_iterator(parts(), trainer=trainer)
    kept |= {_as_one_piece(split, word, word) for word in words if word in bare}
    model = json.loads(trained.to_str())["model"]
    vocab, merges = _shorten(model["vocab"], [(left, right) for left, right in model["merges"]], kept, vocab_size)

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


def _as_one_piece(split: Any, text: str, word: str) -> str:
    """Returns the single piece, in byte letters, into which GPT-2's splitting turns `text`."""
    parts = [part for part, _ in split.pre_tokenize_str(text)]
    if len(parts) != 1 or not word or word != word.strip():
        cut = ", ".join(repr(text[start:end]) for _, (start, end) in split.pre_tokenize_str(text))
        raise ValueError(f"data.keep_whole: {word!r} is more than one word to the tokenizer ({cut}); keep its parts")
    return parts[0]


_BARE = re.compile(r"(?<![\w ])\w+")


def _shorten(
    trained: dict[str, int], merges: list[tuple[str, str]], kept: set[str], vocab_size: int
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Cuts vocabulary and merges so that there is room for the words that are kept whole.

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
