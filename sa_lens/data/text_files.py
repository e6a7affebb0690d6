r"""Texts of files: parquet, arrow, JSON (lines or one array) and plain text, the text column alone.

Other columns are never looked at, so their types may change from row to row; a row whose text is null or missing holds
no document, and a file without rows holds none. Files are read as streams, with the memory of a few rows.

Where the documents of a plain text file begin and end follows from its lines. Blank lines at its edges never count, nor
do spaces at the end of a blank or separating line, byte-order marks, or how lines end (\n, \r\n or \r):

1. between lines `<|endoftext|>`, if there is at least one;
2. else between blank lines, if there is at least one gap of blank lines for every 20 lines of text;
3. else one document on each line, and blank lines are left out.
"""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from sa_lens.data.whole_files import read_json

TEXT = "text"
KINDS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".txt": TEXT, ".arrow": "arrow"}
"""Kinds of files, by suffix."""

RULES = {kind: kind for kind in KINDS.values()} | {TEXT: "text by its lines"}
"""Part of the keys by content for each kind; it changes if the same bytes are read as other documents."""

BATCH = 1000
"""Rows read at a time."""

Opener = Callable[[], BinaryIO]
"""Opens a file, from its beginning each time."""

SEPARATOR = "<|endoftext|>"
LINES_PER_GAP = 20
"""Blank lines separate documents where there is a gap for every so many lines; fewer are strays."""

_SEPARATED, _SPACED, _LISTED = f"between lines {SEPARATOR}", "between blank lines", "one on each line"


def kind_of(file: Path) -> str:
    """Returns the kind of a file.

    Raises:
        ValueError: the kind is unknown.
    """
    kind = KINDS.get(file.suffix.lower())
    if kind is None:
        raise ValueError(f"{file}: unknown kind of file {file.suffix!r}; known: {', '.join(KINDS)}")
    return kind


def texts(files: Iterable[Path], column: str) -> Iterator[str | None]:
    """Yields the texts of files, one after another.

    Raises:
        ValueError: a damaged file, no such column in one that has rows, or a column that holds no text.
    """
    for file in files:
        # an export leaves an empty shard where it has no rows; a parquet or arrow file is never that short
        if file.stat().st_size > 0 or kind_of(file) in ("parquet", "arrow"):
            yield from file_texts(_open_later(file), kind_of(file), column, str(file))


def file_texts(opened: Opener, kind: str, column: str, name: str) -> Iterator[str | None]:
    """Yields the texts of one file; see `texts`."""
    import pyarrow as pa

    readers = {"parquet": _read_parquet, "arrow": _read_arrow, "json": _read_json, TEXT: _read_text}
    try:
        yield from (as_text(text, column, name) for text in readers[kind](opened, column, name))
    except (pa.ArrowException, OSError, EOFError, RecursionError, json.JSONDecodeError) as error:
        raise ValueError(f"cannot read {name} as {kind}: {type(error).__name__}: {error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"cannot read {name} as {kind}: it is not UTF-8 text ({error.reason}); save it as UTF-8"
        ) from error


def _open_later(file: Path) -> Opener:
    return lambda: file.open("rb")


def as_text(value: Any, column: str, name: str) -> str | None:
    """Checks a value of the text column.

    Raises:
        ValueError: it is neither text nor missing.
    """
    if value is not None and not isinstance(value, str):
        raise ValueError(f"column {column!r} of {name} holds {type(value).__name__}, not text")
    return value


def missing_column_error(name: str, column: str, columns: Iterable[str]) -> ValueError:
    """Returns the error of a text without the column that is asked for."""
    return ValueError(f"{name} has no column {column!r}; its columns: {', '.join(map(repr, columns))}")


def saved_dataset(folder: Path, choose: Callable[[list[str]], str]) -> list[Path]:
    """Returns the arrow files of a dataset written by `save_to_disk` of `datasets`.

    Args:
        choose: picks one of the splits, if it has any.

    Raises:
        ValueError: the records of the dataset are damaged.
    """
    remedy = "write the dataset again with save_to_disk"
    if (folder / "dataset_dict.json").is_file():
        splits = read_json(folder / "dataset_dict.json", remedy=remedy, keys={"splits": list}, other_keys=True)[
            "splits"
        ]
        folder = folder / choose([str(split) for split in splits])
    state = read_json(folder / "state.json", remedy=remedy, keys={"_data_files": list}, other_keys=True)
    return [folder / Path(str(part["filename"])).name for part in state["_data_files"]]


# --------------------------------------------------------------------------------------------------------------- tables


def _read_parquet(opened: Opener, column: str, name: str) -> Iterator[Any]:
    import pyarrow.parquet

    with opened() as file:
        table = pyarrow.parquet.ParquetFile(file)
        if table.metadata.num_rows == 0:
            return
        if column not in table.schema_arrow.names:
            raise missing_column_error(name, column, table.schema_arrow.names)
        for batch in table.iter_batches(batch_size=BATCH, columns=[column]):
            yield from batch.column(0).to_pylist()


def _read_arrow(opened: Opener, column: str, name: str) -> Iterator[Any]:
    import pyarrow as pa

    with opened() as file:

        def batches(options: pa.ipc.IpcReadOptions | None = None) -> Iterator[Any]:
            """Both of arrow's formats: the stream, which `datasets` writes, and the file."""
            file.seek(0)
            try:
                yield from pa.ipc.open_stream(file, options=options)
            except pa.ArrowInvalid:
                file.seek(0)
                table = pa.ipc.open_file(file, options=options)
                yield from (table.get_batch(i) for i in range(table.num_record_batches))

        first = next((batch for batch in batches() if batch.num_rows), None)
        if first is None:
            return
        if column not in first.schema.names:
            raise missing_column_error(name, column, first.schema.names)
        index = first.schema.names.index(column)
        for batch in batches(pa.ipc.IpcReadOptions(included_fields=[index])):
            for start in range(0, batch.num_rows, BATCH):
                yield from batch.column(0).slice(start, BATCH).to_pylist()


def _read_json(opened: Opener, column: str, name: str) -> Iterator[Any]:
    """Yields rows from one object per line, or from one array of objects in the whole file."""
    with _decode(opened) as file:
        is_array = next((c for c in iter(lambda: file.read(1), "") if not c.isspace()), "") == "["
    place = "row" if is_array else "line"
    seen: dict[str, None] = {}
    has_column = False
    with _decode(opened) as file:
        lines = ((number, line) for number, line in enumerate(file, start=1) if line.strip())
        rows = (
            enumerate(json.load(file), start=1)
            if is_array
            else ((number, _row(line, number, name)) for number, line in lines)
        )
        for number, row in rows:
            if not isinstance(row, dict):
                raise ValueError(f"{place} {number} of {name} holds {type(row).__name__}, not an object with columns")
            has_column = has_column or column in row
            if not has_column:
                seen |= dict.fromkeys(row)
            yield row.get(column)
    if seen and not has_column:
        raise missing_column_error(name, column, seen)


def _row(line: str, number: int, name: str) -> Any:
    try:
        row = json.loads(line)
        if "\\u" in line:
            json.dumps(row, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise ValueError(f"cannot read {name} as json: line {number}: {error}") from error
    except UnicodeEncodeError as error:
        raise ValueError(f"line {number} of {name} holds half of a surrogate pair, which is no character") from error
    return row


# ----------------------------------------------------------------------------------------------------------- plain text


def form(files: Sequence[Path]) -> str:
    """Says where the documents of plain text files begin and end."""
    forms = []
    for file in files:
        if file.stat().st_size > 0:
            forms.append(_form(_lines(_open_later(file), str(file))))
    return ", or ".join(dict.fromkeys(forms))


def _form(lines: Iterator[str]) -> str:
    gaps = count = 0
    blank = False
    for line in lines:
        stripped = line.strip()
        if stripped == SEPARATOR:
            return _SEPARATED
        if stripped:
            gaps, count = gaps + (blank and count > 0), count + 1
        blank = not stripped
    return _SPACED if gaps and gaps * LINES_PER_GAP >= count else _LISTED


def _read_text(opened: Opener, column: str, name: str) -> Iterator[str]:
    form = _form(_lines(opened, name))
    lines = _lines(opened, name)
    if form == _LISTED:
        yield from (line.rstrip("\n") for line in lines)
        return
    separator = SEPARATOR if form == _SEPARATED else ""
    for separates, group in itertools.groupby(lines, key=lambda line: line.strip() == separator):
        if not separates:
            yield "".join(group).strip("\n")


def _lines(opened: Opener, name: str) -> Iterator[str]:
    """Yields the lines of a text file, each with a line feed at its end, without byte-order marks."""
    with _decode(opened) as file:
        for number, line in enumerate(file, start=1):
            if "\0" in line:
                raise ValueError(
                    f"cannot read {name} as text: line {number} holds a NUL character, as UTF-16 text and binary files "
                    "do; save it as UTF-8 text"
                )
            yield line.lstrip("\ufeff")


def _decode(opened: Opener) -> TextIO:
    return io.TextIOWrapper(opened(), encoding="utf-8-sig")
