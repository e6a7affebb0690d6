"""What a command does once its arguments are checked and before the imports that take seconds."""

from __future__ import annotations

import os
import sys


def start(doing: str, *, trains: bool = False) -> None:
    """Says on a terminal what the command is about to do, and keeps idle threads from using a processor.

    OpenMP's threads by default wait in a loop. Where other programs run on the same processors, this loop takes the
    time that the thread they wait for needs. A value that the user has set stays.

    Args:
        doing: the command and what it works on, such as `eval: runs/local`.
        trains: whether it trains for long; then OpenMP's default stays, which is made for a machine of one's own.
    """
    if not trains:
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if sys.stderr.isatty() and "torch" not in sys.modules:
        print(f"sa-lens {doing} (PyTorch and TransformerLens take some seconds to start)", file=sys.stderr, flush=True)
