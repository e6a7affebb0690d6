"""The command line: `sa-lens COMMAND ...`.

A command is a function with a typed signature, from which its flags and help are made. Only the standard library, tyro
and the configuration are imported here; each command imports what it needs when it runs.
"""

from sa_lens.cli import making, reading
from sa_lens.cli.parsing import COMMANDS, main

__all__ = ["COMMANDS", "main", "making", "reading"]
