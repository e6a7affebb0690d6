"""What several test files share: a browser that opens pages as a reader would, the site, executed notebooks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import forked
import pytest
from filelock import FileLock


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes that share the tests see."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if os.environ.get("PYTEST_XDIST_WORKER") else own


@pytest.fixture(scope="session", autouse=True)
def _own_cache(shared_folder: Path) -> Iterator[None]:
    """Tokens go into a folder of the tests, never into the home folder of whoever runs them.

    The text of the shipped models is made once for all tests.
    """
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("SA_LENS_CACHE", str(shared_folder / "cache"))
        yield


TOGETHER = {
    "tests/report/": "the report of two models",
    "tests/test_examples.py": "forked",
    "tests/training/test_resume.py": "forked",
    "tests/training/test_processes.py": "forked",
    "tests/data/test_preparation.py": "forked",
    "tests/test_sae.py": "forked",
}
"""What files whose paths begin so share: a report, or the server of `forked`, which has imported everything."""


def group_of(nodeid: str) -> str:
    """Name of the tests that run in the same process: those of the file, or of all files that share something."""
    file = nodeid.split("::", 1)[0]
    return next((shared for start, shared in TOGETHER.items() if file.startswith(start)), file)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Groups with slow tests first, then those with many: a process takes whole groups, and the last must be short."""
    weights: Counter[str] = Counter()
    for item in items:
        weights[group_of(item.nodeid)] += 100 if item.get_closest_marker("slow") else 1
    items.sort(key=lambda item: (-weights[group_of(item.nodeid)], group_of(item.nodeid)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Hands whole groups to the processes, as `--dist loadfile` hands whole files."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class LoadGroups(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    return LoadGroups(config, log)


@dataclass
class Opened:
    """A page in a browser, and all that went wrong in it."""

    page: Any
    """The playwright page."""
    errors: list[str] = field(default_factory=list)
    """Console errors and uncaught exceptions."""
    requests: list[str] = field(default_factory=list)
    """Addresses that the page asked for, its own file, data and blob addresses left out."""

    def clean(self) -> bool:
        """Whether nothing went wrong and nothing was asked for; fails with what it was."""
        assert not self.errors, self.errors
        assert not self.requests, self.requests
        return True


class Browser:
    """Chromium without a window."""

    def __init__(self, chromium: Any) -> None:
        self.chromium = chromium

    def open(self, path: str | Path, *, folder: Path | None = None, **options: Any) -> Opened:
        """Opens a file from disk; `folder`: where the page may load its own files from.

        Args:
            options: of playwright's `new_page`, such as `viewport={"width": 390, "height": 844}`.
        """
        path = Path(path).resolve()
        page = self.chromium.new_page(**options)
        opened = Opened(page)
        own = path.as_uri() if folder is None else folder.resolve().as_uri()

        def asked(request: Any) -> None:
            if not request.url.startswith(("data:", "blob:", own)):
                opened.requests.append(request.url)

        page.on("request", asked)
        page.on("pageerror", lambda error: opened.errors.append(str(error)))
        page.on("console", lambda said: opened.errors.append(said.text) if said.type == "error" else None)
        page.goto(path.as_uri())
        return opened


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Chromium; skips where it is not installed."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("needs Chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        yield Browser(chromium)
        chromium.close()


Once = Callable[[str, Callable[[Path], None]], Path]


@pytest.fixture(scope="session")
def once(shared_folder: Path) -> Once:
    """`once(name, make)`: a folder that `make` has filled, one time for all processes that share the tests."""

    def made(name: str, make: Callable[[Path], None]) -> Path:
        folder = shared_folder / name
        with FileLock(shared_folder / f"{name}.lock"):
            if not (shared_folder / f"{name}.made").exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                make(folder)
                (shared_folder / f"{name}.made").touch()
        return folder

    return made


@pytest.fixture(scope="session")
def site(once: Once) -> Path:
    """The documentation, built strictly."""
    pytest.importorskip("mkdocs")

    def build(folder: Path) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
            cwd=Path(__file__).parents[1],
            env={"PATH": "", "NO_MKDOCS_2_WARNING": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr

    return once("site", build)


@pytest.fixture(scope="session")
def executed(once: Once) -> Callable[[Path], Any]:
    """`executed(path)`: the notebook with its outputs at small size."""
    import nbformat

    def run(path: Path) -> Any:
        def execute(folder: Path) -> None:
            notebook = nbformat.read(path, as_version=4)
            small = {
                "SA_LENS_OUT": str(folder / "out"),
                "SA_LENS_PAIRS": "8",
                "SA_LENS_STEPS": "4",
                "SA_LENS_TOKENS": "2000",
                "SA_LENS_CACHE": os.environ["SA_LENS_CACHE"],
                "HF_HUB_OFFLINE": "1",
            }
            forked.execute(notebook, folder, small)
            nbformat.write(notebook, folder / path.name)

        return nbformat.read(once(f"notebook-{path.stem}", execute) / path.name, as_version=4)

    return run
