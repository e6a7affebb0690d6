"""Where the time went, part by part."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Seconds of the clock and of the processor for each part of a longer piece of work."""

    def __init__(self) -> None:
        self.parts: dict[str, tuple[float, float]] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Counts what happens inside for a part; one that comes again adds up."""
        began, used = time.perf_counter(), _processor_seconds()
        try:
            yield
        finally:
            seconds, processor = self.parts.get(name, (0.0, 0.0))
            self.parts[name] = (
                seconds + time.perf_counter() - began,
                processor + _processor_seconds() - used,
            )

    def table(self) -> str:
        """A line for each part, and their sum."""
        total = [sum(values) for values in zip(*self.parts.values(), strict=True)] if self.parts else [0.0, 0.0]
        width = max(map(len, [*self.parts, "together"]))
        lines = [f"{'':<{width}}  {'seconds':>8}  {'of processor':>12}"]
        for name, (seconds, processor) in [*self.parts.items(), ("together", (total[0], total[1]))]:
            lines.append(f"{name:<{width}}  {seconds:>8.1f}  {processor:>12.1f}")
        return "\n".join(lines)


def _processor_seconds() -> float:
    """Processor time of this process and of those that it has waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
