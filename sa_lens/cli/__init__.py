"""The command line: `sa-lens COMMAND ...`, or `python -m sa_lens COMMAND ...`.

A command is a function: its parameters are the flags, its docstring is the help. Importing this package imports the
standard library, tyro and the configuration alone; each command imports what it needs when it runs.
"""

from sa_lens.cli.program import COMMANDS, main

__all__ = ["COMMANDS", "main"]
