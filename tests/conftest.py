"""A browser that opens pages as a reader would, for every test that needs one."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest


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
        chromium = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield Browser(chromium)
        chromium.close()
