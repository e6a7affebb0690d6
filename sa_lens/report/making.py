"""A report from run folders: loads the models, looks at each, and sets them side by side."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

from sa_lens import __version__
from sa_lens.data.disk import cache_folder
from sa_lens.data.writing import scratch_folder
from sa_lens.report.comparison import Figures, comparison
from sa_lens.report.overview import measured, overview
from sa_lens.report.phases import Phases
from sa_lens.report.records import ModelPage, Report
from sa_lens.report.stories import story_page
from sa_lens.report.subjects import Subject, open_subjects
from sa_lens.report.tasks import Prompts, able_streams, check_tasks, prompts_for, task_page
from sa_lens.report.texts import ModelText, Texts, encode_for, gather
from sa_lens.report.units import unit_pages

ALWAYS = "ioi"
"""The task that a report shows whether a model can do it or not."""
OTHERS = ("object", "pronoun", "repeated")
"""Tasks that it shows where a stream of a model can do them."""


def make_report(
    runs: Sequence[str | Path],
    *,
    text: str | None = None,
    column: str = "text",
    n_stories: int = 12,
    n_units: int = 96,
    tasks: Sequence[str] | None = None,
    title: str | None = None,
    seed: int = 0,
    device: str = "cpu",
    progress: bool = True,
) -> Report:
    """A report on one trained model or several.

    All models read the same stories and do the same tasks. Everything is measured on the validation text of the first
    run, with firing thresholds from its training text; each model reads it with its own tokenizer. Where the first
    model does not know its text, all of that comes from `text`.

    Args:
        runs: run folders or Hub ids.
        text: path or dataset id of the stories to show, as `data.source`; None: from the first run's validation text.
        column: column of `text` that holds the text.
        n_stories: stories to show at most.
        n_units: units of each model to explain, with snippets and histogram; figures are given for every unit.
        tasks: ioi, pronoun, object, repeated, or JSON files; None: ioi, and those others that a stream can do.
        title: heading; None: the names of the runs.
        seed: of samples, prompts, intervals and explanations: same seed, same report.
        device: auto, cpu, cuda or mps.
        progress: show a progress bar.

    Raises:
        ValueError: a number out of range, an unknown task, no runs or one run twice, a model without a tokenizer, a
            text too short, or no text for a model that does not know its own.
        FileNotFoundError: no such run or text.
    """
    if isinstance(runs, str | Path):
        runs = [runs]
    if n_stories < 1:
        raise ValueError(f"n_stories={n_stories} must be at least 1")
    if n_units < 0:
        raise ValueError(f"n_units={n_units} must be 0 or more")
    if tasks is not None:
        check_tasks(tasks)
    subjects = open_subjects(runs, device)
    texts = gather(subjects, text, column, n_stories)
    with scratch_folder(cache_folder(None) / "tokens") as folder:
        encoded = [encode_for(subject, texts, folder, progress=False) for subject in subjects]
        prompts = _prompts(subjects, tasks, seed)
        pages, figures = [], []
        with closing(Phases(subjects, [asked.task for asked in prompts[0]], progress)) as phases:
            for subject, own, asked in zip(subjects, encoded, prompts, strict=True):
                page, found = _model(subject, texts, own, asked, n_units, seed, phases)
                pages.append(page)
                figures.append(found)
            phases.end()
    names = [subject.name for subject in subjects]
    return Report(
        title=title if title is not None else " and ".join([", ".join(names[:-1]), names[-1]] if names[1:] else names),
        version=__version__,
        models=tuple(pages),
        comparison=comparison(figures, texts.name),
    )


def _prompts(subjects: Sequence[Subject], tasks: Sequence[str] | None, seed: int) -> list[list[Prompts]]:
    """The prompts of each model, task by task; without a choice, those tasks that some stream can do."""
    asked = list(dict.fromkeys(tasks)) if tasks is not None else [ALWAYS, *OTHERS]
    made = [[prompts_for(subject, task, seed) for task in asked] for subject in subjects]
    if tasks is not None:
        return made
    kept = [
        i
        for i, task in enumerate(asked)
        if task == ALWAYS or any(able_streams(s, of[i]) for s, of in zip(subjects, made, strict=True))
    ]
    return [[of[i] for i in kept] for of in made]


def _model(
    subject: Subject,
    texts: Texts,
    text: ModelText,
    prompts: Sequence[Prompts],
    n_units: int,
    seed: int,
    phases: Phases,
) -> tuple[ModelPage, Figures]:
    phases.begin(subject, "losses")
    losses = measured(subject, text)
    first = overview(subject, texts, losses, seed)
    phases.begin(subject, "stories")
    stories = tuple(story_page(subject, story) for story in texts.stories)
    done = []
    for asked in prompts:
        phases.begin(subject, asked.task)
        done.append(task_page(subject, asked, seed, progress=False))
    mentioned = {unit.name for page in stories if page.gates is not None for unit in page.gates.units}
    begin = partial(phases.begin, subject)
    units, note, unit_figures = unit_pages(subject, text, n_units, mentioned, seed, begin)
    page = ModelPage(
        name=subject.name,
        streams=subject.streams,
        overview=first,
        stories=stories,
        tasks=tuple(page for page, _ in done),
        units=units,
        units_note=note,
    )
    return page, Figures(subject.name, losses, tuple(found for _, found in done), unit_figures)
