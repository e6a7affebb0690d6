"""The layers of the package: a module imports only from the layers below its own, and no imports go in a circle.

The source is read, not run, so that imports within functions and those for type checkers count too.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parent.parent
FACE = {"sa_lens", "sa_lens.__main__"}
"""The face and the entry point, which may import every layer; any layer may ask the face for the version."""
LAYERS = [
    {"config", "catalogue", "drafts", "places", "statistics", "stopping", "launching"},
    {"data"},
    {"core"},
    {"training", "circuits", "units", "sae"},
    {"views"},
    {"compare", "report", "shipped"},
    {"demo"},
    {"cli"},
]
"""Modules and packages, from the lowest layer to the highest, as CONTRIBUTING.md has them."""
HEIGHT = {name: height for height, names in enumerate(LAYERS) for name in names}


def modules() -> dict[str, Path]:
    """Every module of the package, by its full name."""
    paths = sorted((ROOT / "sa_lens").rglob("*.py"))
    return {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in paths}


MODULES = modules()


def imported(path: Path) -> Iterator[str]:
    """The modules of the package that a file imports, at any place in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module in MODULES:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else node.module


IMPORTS = {name: set(imported(path)) - {name, *FACE} for name, path in MODULES.items() if name not in FACE}


def layer(module: str) -> str:
    """The module or package right below `sa_lens` that a module belongs to."""
    return module.split(".")[1]


def test_every_module_belongs_to_a_layer():
    assert {layer(module) for module in IMPORTS} == HEIGHT.keys()


def may_import(module: str, other: str) -> bool:
    """Whether the layers allow an import; modules of the lowest layer may import one another."""
    height, height_of_other = HEIGHT[layer(module)], HEIGHT[layer(other)]
    return layer(module) == layer(other) or height_of_other < height or height_of_other == height == 0


def test_modules_import_from_lower_layers_alone():
    wrong = [f"{m} imports {other}" for m, others in IMPORTS.items() for other in others if not may_import(m, other)]
    assert wrong == []
    assert not may_import("sa_lens.units.firing", "sa_lens.circuits.graph")
    assert not may_import("sa_lens.core.gate", "sa_lens.views.theme")


def test_no_imports_go_in_a_circle():
    try:
        TopologicalSorter(IMPORTS).prepare()
    except CycleError as error:
        raise AssertionError("imports in a circle: " + " <- ".join(error.args[1])) from None


def test_the_guide_for_contributors_has_the_same_layers():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (guide,) = re.findall(r"\*\*Layers\.\*\* `([^`]+)`", text)
    assert [set(re.split(r"[,|\s]+", names.strip())) for names in guide.split("<")] == LAYERS
