"""Makes a report of runs: loads the models, measures each, and compares them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

from sa_lens import __version__
from sa_lens.config import ReportMethod
from sa_lens.data.cache import cache_folder
from sa_lens.data.whole_files import scratch_folder
from sa_lens.report.contents import ModelPage, Report
from sa_lens.report.effort import Effort, check_effort, effort_for
from sa_lens.report.measured_text import ModelText, Texts, encode_for, gather_texts
from sa_lens.report.model_tables import LOSSES, UNITS, Cells, comparison_tables
from sa_lens.report.overview import loss_cells, measure_losses, overview, training_of
from sa_lens.report.story_pages import story_page
from sa_lens.report.subjects import Subject, open_subjects
from sa_lens.report.task_pages import Prompts, able_streams, check_tasks, prompts_for, task_page
from sa_lens.report.unit_pages import unit_pages

ALWAYS = "ioi"
"""The task that a report shows whether a model can do it or not."""
OTHERS = ("object", "pronoun", "repeated")
"""Tasks that it shows if a stream of a model can do them."""
SECONDS = {"losses": 3.6, "stories": 0.5, "thresholds": 0.9, "units": 1.1, "closer look": 4.8, "labels": 1.9}
"""Seconds of processor time of each phase, per stream: means over the two shipped models of the stories."""
TASK_SECONDS = 1.9
"""Seconds of processor time of a task, per stream."""


def make_report(
    runs: Sequence[str | Path],
    *,
    text: str | None = None,
    column: str = "text",
    n_stories: int | None = None,
    n_units: int | None = None,
    n_tokens: int | None = None,
    tasks: Sequence[str] | None = None,
    methods: Sequence[ReportMethod] | None = None,
    title: str | None = None,
    seed: int = 0,
    device: str = "cpu",
    progress: bool = True,
) -> Report:
    """Makes a report on one trained model or several.

    All models read the same stories and do the same tasks. Everything is measured on the validation text of the first
    run, with firing thresholds from its training text; each model reads it with its own tokenizer. If the first
    model does not know its text, all of that comes from `text`. With a model of more than 20 million parameters less
    is measured where nothing else is asked for, so that its report takes minutes and not hours.

    Args:
        runs: run folders or Hub ids.
        text: path or dataset id of the stories to show, as `data.source`; None: from the first run's validation text.
        column: column of `text` that holds the text.
        n_stories: stories to show at most. None: 12, and 4 with a large model.
        n_units: units of each model to explain, with snippets and histogram; figures are given for every unit that is
            listed. None: 96, and 24 with a large model, whose explanations are also fitted on fewer snippets.
        n_tokens: tokens to measure on; a third as many set firing thresholds. None: 110,000; with a large model fewer
            in proportion, but at least 16,000.
        tasks: ioi, pronoun, object, repeated, or JSON files; None: ioi, and those others that a stream can do. They
            have 64 prompts, and 16 with a large model.
        methods: find circuits: acdc, eap-ig and gate (of the ablated stream). None: all, but acdc not with a large
            model.
        title: heading; None: the names of the runs.
        seed: of samples, prompts, intervals and explanations: same seed, same report.
        device: auto, cpu, cuda or mps.
        progress: show a progress bar.

    Raises:
        ValueError: a number out of range, an unknown task or method, no runs or one run twice, a model without a
            tokenizer, a text too short, or no text for a model that does not know its own.
        FileNotFoundError: no such run or text.
    """
    if isinstance(runs, str | Path):
        runs = [runs]
    check_effort(n_stories, methods, n_units)
    if tasks is not None:
        check_tasks(tasks)
    subjects = open_subjects(runs, device)
    effort = effort_for(subjects, n_stories, n_tokens, methods, n_units)
    texts = gather_texts(subjects, text, column, effort.n_stories, effort.n_tokens)
    with scratch_folder(cache_folder(None) / "tokens") as folder:
        encoded = [encode_for(subject, texts, folder) for subject in subjects]
        prompts = _prompts(subjects, tasks, effort.n_pairs, seed)
        pages, cells = [], []
        with closing(Phases(subjects, [task.task for task in prompts[0]], progress)) as phases:
            for subject, own, of_subject in zip(subjects, encoded, prompts, strict=True):
                page, of_page = _model(subject, texts, own, of_subject, effort, seed, partial(phases.begin, subject))
                pages.append(page)
                cells.append(of_page)
            phases.end()
    names = [subject.name for subject in subjects]
    return Report(
        title=title if title is not None else " and ".join([", ".join(names[:-1]), names[-1]] if names[1:] else names),
        version=__version__,
        models=tuple(pages),
        training=training_of(subjects),
        comparison=comparison_tables(names, cells, texts.name),
    )


def _prompts(subjects: Sequence[Subject], tasks: Sequence[str] | None, n_pairs: int, seed: int) -> list[list[Prompts]]:
    """Returns the prompts of each model, task by task; if no tasks are chosen, of the tasks that a stream can do."""
    names = list(dict.fromkeys(tasks)) if tasks is not None else [ALWAYS, *OTHERS]
    made = [[prompts_for(subject, task, n_pairs, seed) for task in names] for subject in subjects]
    kept = [
        i
        for i, task in enumerate(names)
        if tasks is not None
        or task == ALWAYS
        or any(able_streams(subject, prompts[i]) for subject, prompts in zip(subjects, made, strict=True))
    ]
    return [[prompts[i] for i in kept] for prompts in made]


def _model(
    subject: Subject,
    texts: Texts,
    text: ModelText,
    prompts: Sequence[Prompts],
    effort: Effort,
    seed: int,
    begin: Callable[[str], None],
) -> tuple[ModelPage, Cells]:
    begin("losses")
    losses = measure_losses(subject, text)
    first = overview(subject, texts, losses, effort.n_samples, seed)
    begin("stories")
    stories = tuple(story_page(subject, story) for story in texts.stories)
    cells: dict[str, dict[str, str]] = {LOSSES: loss_cells(losses)}
    tasks = []
    for of_task in prompts:
        begin(of_task.task)
        page, of_page = task_page(subject, of_task, effort.methods, seed)
        tasks.append(page)
        for title, rows in of_page.items():
            cells.setdefault(title, {}).update(rows)
    mentioned = {unit.name for page in stories if page.gates is not None for unit in page.gates.units}
    units, note, cells[UNITS] = unit_pages(subject, text, effort, mentioned, seed, begin)
    return ModelPage(subject.name, subject.streams, first, stories, tuple(tasks), units, note), cells


class Phases:
    """The progress bar of a report: which phase it is, of how many, and how much time is left.

    Args:
        subjects: the models.
        tasks: names of the tasks, the same for each.
        progress: show the bar.
    """

    def __init__(self, subjects: Sequence[Subject], tasks: Sequence[str], progress: bool) -> None:
        from tqdm.auto import tqdm

        names = ["losses", "stories", *tasks, *list(SECONDS)[2:]]
        self.seconds = {
            f"{subject.name}: {name}": SECONDS.get(name, TASK_SECONDS) * len(subject.streams)
            for subject in subjects
            for name in names
        }
        self.current = 0
        self.bar = tqdm(
            total=sum(self.seconds.values()),
            smoothing=0,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed} so far, {remaining} left",
            disable=not progress,
        )

    def begin(self, subject: Subject, name: str) -> None:
        """Ends the phase before, those left out included, and begins this one."""
        place = list(self.seconds).index(f"{subject.name}: {name}")
        self.bar.set_description_str(f"{subject.name}: {name} ({place + 1} of {len(self.seconds)})", refresh=False)
        self._fill(place)
        self.bar.refresh()

    def end(self) -> None:
        """Fills the bar to its end."""
        self._fill(len(self.seconds))

    def _fill(self, place: int) -> None:
        self.bar.update(sum(list(self.seconds.values())[self.current : place]))
        self.current = place

    def close(self) -> None:
        """Closes the bar and leaves on it what has been done."""
        self.bar.close()
