"""`main`: reads a command line with tyro, runs the command, and reports its errors."""

from __future__ import annotations

import functools
import inspect
import io
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import tyro

from sa_lens.cli import analysis_commands, model_commands, patching_commands
from sa_lens.cli.argument_checks import argument_types, check_numbers
from sa_lens.stopping import stop_requests

Command = Callable[..., "int | None"]

COMMANDS: dict[str, Command] = {
    "train": model_commands.train,
    "demo": model_commands.demo,
    "eval": model_commands.evaluate,
    "generate": model_commands.generate,
    "patch": patching_commands.patch,
    "attribute": patching_commands.attribute,
    "circuit": analysis_commands.circuit,
    "units": analysis_commands.units,
    "sae": analysis_commands.sae,
    "compare": analysis_commands.compare,
    "report": analysis_commands.report,
    "export": model_commands.export,
    "models": model_commands.models,
}
"""The commands, in the order in which `sa-lens --help` lists them."""

DESCRIPTION = """Self-ablating transformers: train them, and analyse both of their streams.

`sa-lens COMMAND --help` shows a command's flags and an example; `--debug` shows where an error comes from."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit code: 0, 1 (training failed), 2 (bad input) or 130 (interrupted).

    Errors print one line; with `--debug`, or `SA_LENS_DEBUG` in the environment, their traceback.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments or bool(os.environ.get("SA_LENS_DEBUG"))
    arguments = [word for word in arguments if word != "--debug"]
    if arguments[:1] == ["--version"]:
        from sa_lens import __version__

        print(f"sa-lens {__version__}")
        return 0
    logging.basicConfig(level=logging.WARNING, format="sa-lens: %(message)s")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # help pages and tables have characters that an ASCII terminal lacks
            stream.reconfigure(errors="replace")
    name = arguments[0] if arguments else ""
    try:
        command = parse(arguments)
        check_numbers(command.keywords)
        with stop_requests(at_once=True):
            return command() or 0
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
        print(f"sa-lens {name}: {_message(error)}", file=sys.stderr)
        return 1 if type(error).__name__ == "TrainingDiverged" else 2


def parse(arguments: list[str]) -> functools.partial[int | None]:
    """The command that a command line calls, with its arguments.

    Raises:
        SystemExit: help was printed (code 0), or tyro's complaint (code 2).
    """
    commands = dict(COMMANDS)
    if arguments[:1] == ["train"]:
        arguments, commands["train"] = model_commands.train_from(arguments)
    # settings of a training have a flag for yes and one for no, those of other commands for what is not the default
    config = () if arguments[:1] == ["train"] else (tyro.conf.FlagCreatePairsOff,)
    options: dict[str, Any] = {"config": config, "registry": argument_types}
    if arguments and arguments[0] in commands:
        # by itself, so that a complaint names the help of this command
        name, *rest = arguments
        bound = tyro.cli(_bind_later(commands[name]), prog=f"sa-lens {name}", args=rest, **options)
    else:
        app = tyro.extras.SubcommandApp()
        for name, command in commands.items():
            summary = (inspect.getdoc(command) or "").split("\n")[0]
            app.command(name=name, help=summary)(_bind_later(command))
        bound = app.cli(prog="sa-lens", description=DESCRIPTION, args=arguments or ["--help"], **options)
    return bound


def _bind_later(command: Command) -> Callable[..., functools.partial[int | None]]:
    """A function with the signature of a command that returns the call instead of making it."""

    @functools.wraps(command)
    def bind(**values: object) -> functools.partial[int | None]:
        return functools.partial(command, **values)

    return bind


def _message(error: Exception) -> str:
    """An error's message without the number that Python puts before those of the operating system."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return str(error)
