"""Hooks of the documentation's build: equations become MathML, which every browser draws without a script.

Equations are fenced blocks of LaTeX that begin with three backticks and `math`, the form that code hosts draw as well.
"""

from __future__ import annotations

from html import escape
from typing import Any

from latex2mathml.converter import convert


def on_config(config: Any) -> Any:
    """Registers the fence of equations."""
    fences = config.mdx_configs.setdefault("pymdownx.superfences", {}).setdefault("custom_fences", [])
    fences.append({"name": "math", "class": "math", "format": equation})
    return config


def equation(source: str, language: str, css_class: str, options: Any, md: Any, **kwargs: Any) -> str:
    """A block of LaTeX as MathML, one row per line."""
    rows = "".join(convert(line, display="block") for line in source.splitlines() if line.strip())
    return f'<div class="{escape(css_class)}" role="group">{rows}</div>'
