"""The comparison on paper: Markdown and LaTeX, the paper's published figures beside ours."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sa_lens.compare.columns import COLUMNS, PAPER, WHOLE, family, paper_value
from sa_lens.compare.grids import BASELINE
from sa_lens.compare.results import Comparison
from sa_lens.core.checkpoints import atomic_write

if TYPE_CHECKING:
    import pandas as pd

MISSING = "n/a"
"""A cell without a value."""

RULE = (
    "A claim holds or fails only if the 95 % t interval of the paired difference over seeds excludes 0 after Holm's "
    "correction over the claims of a variant in a stream; otherwise it is undecided. The ablated stream is compared "
    "with the baseline's only stream."
)


def table(comparison: Comparison) -> pd.DataFrame:
    """The table in print: a row a column and stream, a column a variant; the paper's figures below ours."""
    import pandas as pd

    found = _rows(comparison.summary())
    n_seeds = len(comparison.seeds)
    rows = []
    for name, column in COLUMNS.items():
        for stream in ("clean", "ablated", WHOLE):
            cells = {
                variant: _cell(found[name, stream, variant], column.digits, n_seeds)
                for variant in comparison.variants
                if (name, stream, variant) in found
            }
            if cells:
                rows.append({"column": column.label, "stream": stream or "weights", **cells})
        paper = {variant: paper_value(variant, name) for variant in comparison.variants}
        if (
            rows
            and column.paper
            and any(value is not None for value in paper.values())
            and name in set(comparison.values["column"])
        ):
            shown = {variant: f"{value:g}" for variant, value in paper.items() if value is not None}
            rows.append({"column": column.label, "stream": "paper, clean", **shown})
    return pd.DataFrame(rows, columns=["column", "stream", *comparison.variants]).fillna("")


def verdict_table(comparison: Comparison, against: str = BASELINE) -> pd.DataFrame:
    """Every claim: difference with its interval and corrected p, and the verdict, for each variant."""
    import pandas as pd

    found = _rows(comparison.summary(against))
    rows = []
    for stream in ("clean", "ablated"):
        for name in family(stream):
            column = COLUMNS[name]
            at = stream if stream in column.streams else WHOLE
            cells = {
                variant: _decision(found[name, at, variant], column.digits)
                for variant in comparison.variants
                if variant != against and (name, at, variant) in found
            }
            if cells:
                sign = "higher" if column.direction > 0 else "lower"
                rows.append({"claim": f"{column.claim}: {column.label} {sign}", "stream": at or "weights", **cells})
    names = [variant for variant in comparison.variants if variant != against]
    return pd.DataFrame(rows, columns=["claim", "stream", *names]).fillna(MISSING)


def _rows(summary: pd.DataFrame) -> dict[tuple[str, str, str], dict[Any, Any]]:
    """Rows of a summary by column, stream and variant."""
    return {(row["column"], row["stream"], row["variant"]): row for row in summary.to_dict("records")}


def _cell(row: Any, digits: int, seeds: int) -> str:
    if row["n"] == 0:
        return MISSING
    shown = f"{row['mean']:,.{digits}f}"
    if math.isfinite(row["low"]):
        shown += f" ± {row['high'] - row['mean']:,.{digits}f}"
    return shown if row["n"] == seeds else f"{shown} (n={int(row['n'])})"


def _decision(row: Any, digits: int) -> str:
    if row["n_pairs"] == 0:
        return f"{row['verdict']} ({MISSING})"
    shown = f"{row['difference']:+,.{digits}f}"
    if math.isfinite(row["difference_low"]):
        shown += (
            f" [{row['difference_low']:+,.{digits}f}, {row['difference_high']:+,.{digits}f}], p {row['p_holm']:.2g}"
        )
    return f"{row['verdict']} ({shown})"


def markdown(comparison: Comparison) -> str:
    """Both tables and all notes as Markdown."""
    parts = [
        f"# Comparison {comparison.name}",
        _about(comparison),
        _markdown_table(table(comparison)),
        "## Claims",
        RULE,
        _markdown_table(verdict_table(comparison)),
    ]
    if len(comparison.notes):
        seeds: dict[tuple[str, ...], list[str]] = {}
        for row in comparison.notes.to_dict("records"):
            seeds.setdefault((row["variant"], row["group"], row["note"]), []).append(str(row["seed"]))
        parts.append("## Notes")
        parts.append("\n".join(f"- {v}, {g}, seeds {', '.join(some)}: {note}" for (v, g, note), some in seeds.items()))
    return "\n\n".join(parts) + "\n"


def _about(comparison: Comparison) -> str:
    seeds = ", ".join(map(str, comparison.seeds))
    about = f"Seeds {seeds}. Mean ± half of the 95 % t interval over seeds; n/a: no value, see the notes."
    if any(variant in PAPER for variant in comparison.variants):
        about += (
            " Rows `paper, clean` are the published figures: the paper's own models, one run each, gates removed; only "
            "their directions can be compared with ours."
        )
    if comparison.unfinished:
        about += f" **Unfinished: {comparison.unfinished} groups of columns are not measured yet.**"
    return about


def _markdown_table(frame: pd.DataFrame) -> str:
    def line(cells: Any) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(frame.columns), line(["---"] * len(frame.columns)), *map(line, frame.to_numpy())])


def latex(comparison: Comparison) -> str:
    """Both tables as LaTeX (`booktabs`)."""

    def made(frame: pd.DataFrame, caption: str) -> str:
        text = frame.to_latex(index=False, escape=True, caption=caption, column_format="l" * len(frame.columns))
        return text.replace("±", r"$\pm$").replace(">=", r"$\geq$")

    return made(table(comparison), f"Comparison {comparison.name}") + "\n" + made(verdict_table(comparison), "Claims")


def write(comparison: Comparison, out: str | Path) -> list[Path]:
    """Writes values.csv, summary.csv, table.md, table.tex, figure.json and figure.html into a folder."""
    from sa_lens.compare.figure import small_multiples
    from sa_lens.views import draw, save

    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    texts = {
        "values.csv": comparison.values.to_csv(index=False),
        "summary.csv": comparison.summary().to_csv(index=False),
        "table.md": markdown(comparison),
        "table.tex": latex(comparison),
    }
    if bool(comparison.values["value"].notna().any()):
        record = small_multiples(comparison)
        texts["figure.json"] = json.dumps(dataclasses.asdict(record), allow_nan=False)
    for name, text in texts.items():
        atomic_write(out / name, text.encode())
    written = [out / name for name in texts]
    if "figure.json" in texts:
        atomic_write(out / "figure.html", lambda path: _saved(draw(record), path, save))
        written.append(out / "figure.html")
    return written


def _saved(figure: Any, path: Path, save: Any) -> None:
    """Saves under a temporary name whose ending `save` does not know."""
    page = path.with_name(f"{path.name}.html")
    try:
        save(figure, page)
        page.replace(path)
    finally:
        page.unlink(missing_ok=True)
