"""Reading JSON files, ours and those that a user wrote, so that a damaged one is named, with its fault and a remedy."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn, get_args


class DamagedFile(ValueError):
    """A file whose content is not what it should be; the message names the file, the fault and the remedy."""


def read_json(
    path: str | Path,
    *,
    remedy: str,
    complaint: str = "is damaged",
    keys: Mapping[str, Any] | None = None,
    optional: Mapping[str, Any] | None = None,
    other_keys: bool = False,
) -> Any:
    """The content of a JSON file, checked.

    Duplicate keys, numbers that are not finite, text that is not UTF-8 and lone surrogates are refused everywhere.

    Args:
        remedy: what to do about a damaged file, in the imperative: "delete it, it will be made again".
        complaint: what the message says of the file before the fault.
        keys: the keys that the object at the top must have, with the type of their values; None: the content may be of
            any form. `float` admits whole numbers too; Boolean values are `bool` alone.
        optional: the keys that it may have.
        other_keys: whether it may have further keys.

    Raises:
        FileNotFoundError: no such file.
        IsADirectoryError: a folder.
        DamagedFile: a file that is not JSON, or whose content is of another form.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, not a JSON file: give the name of the file")
    if not path.exists():
        raise FileNotFoundError(f"no file {path}")
    try:
        content = parse_json(path.read_bytes())
        if keys is not None:
            check_object(content, keys, optional, other_keys=other_keys)
    except ValueError as error:
        raise DamagedFile(f"{path} {complaint}: {error}; {remedy}") from error
    return content


def parse_json(data: bytes | str) -> Any:
    """The content of a JSON document that has no duplicate key, no number that is not finite and only valid text.

    Raises:
        ValueError: the fault, without the name of a file.
    """
    try:
        text = data if isinstance(data, str) else data.decode("utf-8-sig")
        content = json.loads(
            text, parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_without_duplicates
        )
        if "\\u" in text:
            json.dumps(content, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8 text") from error
    except UnicodeEncodeError as error:
        raise ValueError("it holds half of a surrogate pair, which is no character") from error
    except json.JSONDecodeError as error:
        raise ValueError(str(error)) from error
    except RecursionError as error:
        raise ValueError("its lists or objects are nested too deeply") from error
    return content


def check_object(
    content: Any,
    keys: Mapping[str, Any],
    optional: Mapping[str, Any] | None = None,
    *,
    other_keys: bool = False,
    where: str = "",
) -> None:
    """Checks that a value read from JSON is an object with these keys and types; see `read_json`.

    Args:
        where: the path of the value in the file, with a dot at its end, such as "model."; empty for the whole file.

    Raises:
        ValueError: the first fault, without the name of a file.
    """
    name = where.rstrip(".") or "it"
    if not isinstance(content, dict):
        raise ValueError(f"{name} must be an object, not {_shown(content)}")
    missing = [key for key in keys if key not in content]
    if missing:
        raise ValueError(f"{name} lacks {missing[0]!r}")
    known = {**keys, **(optional or {})}
    unknown = [key for key in content if key not in known]
    if unknown and not other_keys:
        raise ValueError(f"{name} has the unknown key {unknown[0]!r}")
    for key, kind in known.items():
        if key in content and not has_type(content[key], kind):
            expected = kind.__name__ if isinstance(kind, type) else str(kind)
            raise ValueError(f"{where}{key} must be of type {expected}, not {_shown(content[key])}")


def has_type(value: Any, kind: Any) -> bool:
    """Whether a value read from JSON is of a type; whole numbers count as `float`, Boolean values as `bool` alone."""
    kinds = get_args(kind) or (kind,)
    if isinstance(value, bool):
        return bool in kinds or object in kinds
    return isinstance(value, kind) or (isinstance(value, int) and float in kinds)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a finite number")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{_shown(text)} is not a finite number")
    return number


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r} stands there twice")
    return content
