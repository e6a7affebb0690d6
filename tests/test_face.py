"""The face of the package: what `import sa_lens` offers, when it is imported, and as what type checkers see it."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import get_args

import pytest

import sa_lens as sa
from sa_lens import config

SUBPACKAGES = ("circuits", "compare", "data", "report", "sae", "training", "units", "views")
ROOT = Path(__file__).parent.parent
TABLE = "| name | what it answers | cost |"
"""The first row of every table of names."""


def test_every_public_name_is_there_and_listed():
    assert set(sa.__all__) == set(dir(sa))
    for name in sa.__all__:
        assert getattr(sa, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'circuit'"):
        sa.circuit  # noqa: B018


def test_subpackages_are_attributes():
    for name in SUBPACKAGES:
        package = getattr(sa, name)
        assert isinstance(package, ModuleType)
        assert package.__name__ == f"sa_lens.{name}"
        assert package is sys.modules[f"sa_lens.{name}"]


def test_every_public_name_of_the_subpackages_is_there():
    for name in SUBPACKAGES:
        package = getattr(sa, name)
        for public in package.__all__:
            assert getattr(package, public) is not None


@pytest.mark.parametrize("name", ["", *(f".{name}" for name in (*SUBPACKAGES, "core"))])
def test_the_docstring_has_a_table_of_every_public_name_in_the_order_of_the_face(name):
    package = importlib.import_module(f"sa_lens{name}")
    rows = [line for line in (package.__doc__ or "").splitlines() if line.startswith("|")]
    assert rows[0] == TABLE
    names = [public for row in rows for public in re.findall(r"`(\w+)", row.split("|")[1])]
    assert names == [public for public in package.__all__ if public != "__version__"]


API = sorted((ROOT / "docs" / "api").rglob("*.md"))


@pytest.mark.parametrize("page", API, ids=lambda page: f"{page.parent.name}/{page.stem}")
def test_every_page_of_the_api_begins_with_a_table(page):
    """The page's own, or the one in the docstring of a subpackage."""
    _, first, *_ = filter(None, page.read_text(encoding="utf-8").splitlines())
    assert first == TABLE or first.removeprefix("::: sa_lens.") in SUBPACKAGES


CALL = re.compile(r"^\| \[`([\w.]+)(?:\((.*?)\))?`\]\(#([\w.]+)\) \|", re.MULTILINE)
"""A row of a table of signatures: name, arguments, what it links to."""


@pytest.mark.parametrize("page", [page for page in API if CALL.search(page.read_text())], ids=lambda page: page.stem)
def test_tables_of_signatures_have_what_the_page_documents_and_its_arguments(page):
    text = page.read_text(encoding="utf-8")
    rows = CALL.findall(text)
    documented = re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE)
    homes = {place.rpartition(".")[0] for _, _, place in rows}
    assert documented in (list(dict.fromkeys(place for _, _, place in rows)), list(homes))
    for name, arguments, place in rows:
        home, _, first = place.rpartition(".")
        member = getattr(importlib.import_module(home), first)
        for part in name.split(".")[1:]:
            member = getattr(member, part)
        if not callable(member) or not arguments:
            continue
        shown = [argument.partition("=")[0].strip() for argument in arguments.split(", ")]
        parameters = inspect.signature(member).parameters
        given = [argument for argument in shown if argument != "..."]
        assert given == list(parameters)[: len(given)], name
        needed = [key for key, value in parameters.items() if value.default is value.empty and value.kind < 2]
        assert set(needed) <= set(given), name
        assert (shown[-1] == "...") == (len(given) < len(parameters)), name


@pytest.mark.parametrize("package", ["circuits", "circuits.tasks", "units", "data.stories"])
def test_every_public_name_is_in_a_table_of_signatures(package):
    """Of the subpackages whose names are on several pages."""
    documented = {place for page in API for _, _, place in CALL.findall(page.read_text(encoding="utf-8"))}
    public = importlib.import_module(f"sa_lens.{package}").__all__
    homes = (f"sa_lens.{package}", f"sa_lens.{package.partition('.')[0]}")
    missing = [name for name in public if not {f"{home}.{name}" for home in homes} & documented]
    assert missing in ([], ["tasks"])


def test_training_and_comparing_are_calls(tmp_path):
    assert sa.train is sa.training.train
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="is a file"):
        sa.train(sa.RunConfig(), tmp_path / "file")
    with pytest.raises(ValueError, match="grid='desk' is none of laptop"):
        sa.compare("desk", tmp_path / "grid")
    assert sa.compare.GRIDS.keys() == set(get_args(config.GridName))


def test_importing_the_package_imports_nothing_heavy():
    program = "import sys, sa_lens; dir(sa_lens); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    for heavy in ("torch", "transformers", "transformer_lens", "datasets", "accelerate", "pandas", "plotly", "numpy"):
        assert heavy not in loaded


def test_type_checkers_see_every_public_name():
    """A checker of types does not run `__getattr__`: it reads the imports, those under TYPE_CHECKING included."""
    tree = ast.parse(Path(sa.__file__).read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    imported = {alias.asname or alias.name: node.module for node in imports for alias in node.names}
    assert set(sa.__all__) - {"__version__"} <= set(imported)
    for name, module in imported.items():
        assert name not in SUBPACKAGES or module == ("sa_lens.compare" if name == "compare" else "sa_lens")


@pytest.mark.parametrize(
    ("choices", "defined"),
    [(config.PresetName, lambda: config.PRESETS), (config.SAEPreset, lambda: sa.sae.PRESETS)],
    ids=["presets", "presets of SAEs"],
)
def test_names_of_choices_are_those_that_are_defined(choices, defined):
    assert set(get_args(choices)) == set(defined())
