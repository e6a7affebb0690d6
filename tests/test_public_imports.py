"""Documentation and examples import from the package and its subpackages alone, never from a file within."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "examples").rglob("*.ipynb")),
    *sorted((ROOT / "examples").rglob("*.py")),
]
DEEP = re.compile(r"\b(?:from|import) (sa_lens\.\w+\.[\w.]+)")


def deep_imports() -> list[tuple[str, str]]:
    """(page, module) of every import from deeper than a subpackage."""
    return [
        (str(page.relative_to(ROOT)), module)
        for page in PAGES
        for module in DEEP.findall(page.read_text(encoding="utf-8"))
    ]


def test_pages_import_from_subpackages_alone():
    assert deep_imports() == []


NAMES_OF_SUBPACKAGES = re.compile(r"^\s*from (sa_lens\.(?!config|core)\w+) import", re.MULTILINE)


def test_scripts_and_pages_name_the_subpackage_of_what_they_call():
    """`circuits.patch`, not `patch`; the notebooks and the quoted errors import names, which keeps them short."""
    for page in PAGES:
        if page.suffix != ".ipynb" and page.name != "faq.md":
            assert NAMES_OF_SUBPACKAGES.findall(page.read_text(encoding="utf-8")) == [], page


def test_deep_imports_are_recognised():
    lines = [
        "from sa_lens.circuits.graph import Circuit",
        ">>> import sa_lens.views.page",
        "from sa_lens import circuits",
    ]
    assert DEEP.findall("\n".join(lines)) == ["sa_lens.circuits.graph", "sa_lens.views.page"]
