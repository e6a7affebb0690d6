"""What every command has in common: how it is registered, its command line read, its errors told."""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import itertools
import json
import logging
import math
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from sa_lens.config import LARGEST_SEED, suggestion
from sa_lens.stopping import terminable

Run = Annotated[str, tyro.conf.arg(metavar="RUN"), tyro.conf.Positional]


@dataclass(frozen=True)
class Command:
    """A subcommand."""

    summary: str
    """One line for the list of commands."""
    example: str
    """A whole command line."""
    call: Callable[[list[str]], int | None]
    """Runs it on its arguments; returns the exit code, None for 0."""


COMMANDS: dict[str, Command] = {}

_LEAST = {
    **dict.fromkeys(("tokens", "steps", "d_sae", "stories", "max_new_tokens", "top_k", "seeds"), 1),
    **dict.fromkeys(("labels", "units", "edges", "tau", "temperature", "l1_coefficient", "seed"), 0),
}
"""Smallest value of each number that a command takes."""
_MAY_BE_EMPTY = ("prompt", "title")
"""Arguments that may be empty text."""


def command(summary: str, example: str) -> Callable[[Callable[..., int | None]], Callable[..., int | None]]:
    """Registers a function as the subcommand of its name; its parameters become arguments and flags."""

    def register(function: Callable[..., int | None]) -> Callable[..., int | None]:
        name = function.__name__.rstrip("_")

        @functools.wraps(function)
        def checked(*values: Any, **named: Any) -> int | None:
            _check_numbers(inspect.signature(function).bind(*values, **named).arguments)
            return function(*values, **named)

        def call(arguments: list[str]) -> int | None:
            about = (inspect.getdoc(function) or "").split("\nArgs:")[0].strip()
            return parse(
                checked,
                arguments,
                name,
                f"{about}\n\nExample:\n  {example}",
                config=(tyro.conf.FlagCreatePairsOff,),
            )

        COMMANDS[name] = Command(summary, example, call)
        return function

    return register


def _check_numbers(values: Mapping[str, Any]) -> None:
    """Refuses numbers out of range before anything is imported or loaded for them."""
    for name, value in values.items():
        if not isinstance(value, int | float) or isinstance(value, bool):
            continue
        least, most = _LEAST.get(name), LARGEST_SEED if name == "seed" else math.inf
        if not math.isfinite(value):
            raise ValueError(f"{name}={value} must be a finite number")
        if least is not None and value < least:
            raise ValueError(f"{name}={value} must be " + (f"at least {least}" if least else "0 or more"))
        if value > most:
            raise ValueError(f"{name}={value} must be at most {most}")


def _check_filled(name: str, arguments: Sequence[str]) -> None:
    """Refuses empty words, which an unset shell variable leaves: they never stand for the current folder."""
    positions = 0
    for before, word in zip(["", *arguments], arguments, strict=False):
        flag = before if before.startswith("-") and "=" not in before else ""
        if word.startswith("--") and word.endswith("="):
            flag, word = word[:-1], ""
        positions += not flag and not word.startswith("-")
        prompt = name == "generate" and not flag and positions == 2
        if not word.strip() and not prompt and flag.lstrip("-") not in _MAY_BE_EMPTY:
            what = flag or f"argument {positions}"
            raise ValueError(f"{what} is empty, which may come from an unset variable: name something, or leave it out")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit code: 0, 1 (training failed), 2 (bad input) or 130 (interrupted).

    Errors print one line; with `--debug`, or `SA_LENS_DEBUG` in the environment, their traceback.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments or bool(os.environ.get("SA_LENS_DEBUG"))
    arguments = [a for a in arguments if a != "--debug"]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0
    if arguments[0] == "--version":
        from sa_lens import __version__

        print(f"sa-lens {__version__}")
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        return _fail(f"no command {name!r}: choose from {', '.join(COMMANDS)}{suggestion(name, COMMANDS)}")
    logging.basicConfig(level=logging.WARNING, format="sa-lens: %(message)s")
    try:
        _check_filled(name, rest)
        with terminable():
            return COMMANDS[name].call(rest) or 0
    except BrokenPipeError:
        # the reader of our output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt as stop:
        message = str(stop) or "interrupted before it finished; run the same command again"
        print(f"sa-lens {name}: {message}", file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        if debug:
            raise
        _fail(f"{name}: {_told(error)}")
        return 1 if type(error).__name__ == "TrainingDiverged" else 2


def usage() -> str:
    """The list of commands."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {found.summary}" for name, found in COMMANDS.items()]
    return "\n".join(
        [
            "usage: sa-lens COMMAND ...",
            "",
            "Self-ablating transformers: train them, read both of their streams.",
            "",
            *lines,
            "",
            "sa-lens COMMAND --help shows a command's flags and an example; --debug shows where an error comes from.",
        ]
    )


def parse(what: Any, arguments: list[str], name: str, description: str, **options: Any) -> Any:
    """As `tyro.cli`, with its boxed complaints made one line."""
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(what, args=arguments, prog=f"sa-lens {name}", description=description, **options)
    except SystemExit as stop:
        if stop.code not in (0, None):
            message = _one_line(complaint.getvalue()).removeprefix(f"Error parsing {name}: ")
            raise SystemExit(_fail(f"{name}: {message}")) from None
        raise


def _one_line(boxed: str) -> str:
    """The first paragraph of a box drawn by tyro, in Unicode or ASCII, and the flag it suggests."""
    _title, *rows = [re.sub(r"^-{3,}$", "", re.sub(r"[│╭╮╰╯─]+", "", line).strip()) for line in boxed.splitlines()]
    paragraphs = [" ".join(group) for filled, group in itertools.groupby(rows, key=bool) if filled]
    message = paragraphs[0] if paragraphs else boxed.strip()
    wrong = re.match(r"invalid choice '(.*?)' .*Expected one of \((.*)\)", message)
    if wrong is not None:
        return message.removesuffix(".") + suggestion(wrong[1], re.findall(r"'(.*?)'", wrong[2]))
    suggested = re.search(r"Perhaps you meant:.*?(--[\w.-]+)", " ".join(paragraphs))
    return message + (f" (perhaps you meant {suggested.group(1)})" if suggested else "")


def _fail(message: str) -> int:
    print(f"sa-lens {message}", file=sys.stderr)
    return 2


def _told(error: Exception) -> str:
    """An error's message without the number that Python puts before those of the operating system."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return str(error)


def as_json(record: dict[str, Any]) -> str:
    """What `--json` prints."""
    return json.dumps(record, indent=1)
