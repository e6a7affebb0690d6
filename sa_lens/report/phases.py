"""Progress of a report: one bar over all phases of the work, whose shares of the time are known beforehand."""

from __future__ import annotations

from collections.abc import Sequence

from sa_lens.report.subjects import Subject

SHARES = {
    "losses": 3.6,
    "stories": 0.5,
    "task": 1.9,
    "thresholds": 0.9,
    "units": 1.1,
    "closer look": 4.8,
    "labels": 1.9,
}
"""Seconds of processor time that each phase takes for a stream: means over the two shipped models of the stories."""


class Phases:
    """The bar of a report: which phase it is, of how many, and how much time is left.

    Args:
        subjects: the models.
        tasks: names of the tasks, the same for each.
        progress: show the bar.
    """

    def __init__(self, subjects: Sequence[Subject], tasks: Sequence[str], progress: bool) -> None:
        from tqdm.auto import tqdm

        self.shares = {
            f"{subject.name}: {name}": SHARES.get(name, SHARES["task"]) * len(subject.streams)
            for subject in subjects
            for name in ("losses", "stories", *tasks, *list(SHARES)[3:])
        }
        self.begun = 0
        self.bar = tqdm(
            total=sum(self.shares.values()),
            smoothing=0,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed} so far, {remaining} left",
            disable=not progress,
        )

    def begin(self, subject: Subject, name: str) -> None:
        """Ends the phase before, those left out included, and begins this one."""
        place = list(self.shares).index(f"{subject.name}: {name}")
        done = list(self.shares.values())[self.begun : place]
        self.begun = place
        self.bar.set_description_str(f"{subject.name}: {name} ({place + 1} of {len(self.shares)})", refresh=False)
        self.bar.update(sum(done))
        self.bar.refresh()

    def end(self) -> None:
        """Fills the bar."""
        self.bar.update(sum(list(self.shares.values())[self.begun :]))

    def close(self) -> None:
        """Leaves the bar as it is, whatever has been done."""
        self.bar.close()
