"""The tables of a comparison as DataFrames, Markdown and LaTeX, with the paper's published figures.

A row is a variant in a stream, and a table holds the columns of one theme and task, so that nine variants fit a page.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sa_lens.compare.columns import (
    PAPER,
    TASKS,
    WEIGHTS,
    claimed_direction,
    claims_of,
    column_named,
    published_value,
    sort_columns,
    task_title,
)
from sa_lens.compare.grids import BASELINE
from sa_lens.compare.learning import learning_curves
from sa_lens.compare.verdicts import MATCHED, Comparison
from sa_lens.data.whole_files import atomic_write

if TYPE_CHECKING:
    import pandas as pd

Place = tuple[str, str, str, str]
"""Task, column, stream and variant."""
MISSING = "n/a"
"""A cell without a value."""
UNDECIDED = "·"
"""The verdict `undecided` where words have no room."""
RULE = (
    "A claim holds or fails only if the 95 % t interval of the paired difference over seeds excludes 0 after Holm's "
    "correction over the claims about a variant in a stream; otherwise it is undecided. The ablated stream is compared "
    "with the baseline's only stream."
)
PAPER_ROW = "paper, clean"
"""Stream of the published figures."""
PAPER_TABLE = "The paper's columns"
"""Title of the table that holds the published figures beside ours."""


def tables(comparison: Comparison) -> dict[str, pd.DataFrame]:
    """Returns means over seeds by title: one table per theme and task, with one row per variant and stream.

    The first table, where there is anything to show in it, has the paper's columns, with its published figures below
    ours.
    """
    rows = _rows(comparison.summary())
    cells = {place: _mean(row, len(comparison.seeds)) for place, row in rows.items()}
    of_paper = [place for place in sort_columns(key[:2] for key in rows) if column_named(place[1]).paper]
    published = {
        (task, name, PAPER_ROW, variant): f"{value:g}"
        for task, name in of_paper
        for variant in comparison.variants
        if (value := published_value(variant, task, name)) is not None
    }
    made = {}
    if published:
        columns = {place[:2] for place in published}
        made[PAPER_TABLE] = _table(comparison, cells | published, [place for place in of_paper if place in columns])
    return made | _tables_by_theme(comparison, cells)


def difference_tables(comparison: Comparison, against: str = BASELINE) -> dict[str, pd.DataFrame]:
    """Returns differences from another variant by title: as `tables`, for the columns that have a claim.

    A cell is the mean paired difference, its 95 % interval, the corrected p and the verdict.

    Raises:
        ValueError: the variant does not exist.
    """
    rows = {
        place: row
        for place, row in _rows(comparison.summary(against)).items()
        if claimed_direction(*place[:2]) and place[3] != against
    }
    return _tables_by_theme(comparison, {place: _difference(row, len(comparison.seeds)) for place, row in rows.items()})


def verdict_table(comparison: Comparison, against: str = BASELINE) -> pd.DataFrame:
    """Returns verdicts: one row per claim on a column in a stream, one column per variant; n/a without a value.

    Raises:
        ValueError: `against` is no variant.
    """
    import pandas as pd

    table = comparison.summary(against)
    summary, shown = _rows(table), {*table["variant"]} - {against}
    variants = [variant for variant in comparison.variants if variant in shown]
    rows = []
    for stream in ("clean", "ablated"):
        for task, name in claims_of(stream):
            column = column_named(name)
            place = (task, name, stream if stream in column.streams else WEIGHTS)
            cells = {v: _verdict(summary[*place, v]) for v in variants if (*place, v) in summary}
            if cells:
                label = f"{column.label}: {'higher' if column.direction > 0 else 'lower'}"
                about = {"claim": column.claim, "task": TASKS.get(task, task), "column": label}
                rows.append({**about, "stream": place[2] or "weights", **dict.fromkeys(variants, MISSING), **cells})
    table = pd.DataFrame(rows, columns=["claim", "task", "column", "stream", *variants])
    first = {claim: row for row, claim in reversed([*enumerate(table["claim"])])}
    return table.sort_values("claim", key=lambda claims: claims.map(first), kind="stable", ignore_index=True)


def verdict_text(comparison: Comparison) -> str:
    """Returns verdicts as text: under each claim, one line per column and stream."""
    table, lines = verdict_table(comparison), []
    variants = [*table.columns[4:]]
    labels = [", ".join(filter(None, row)) for row in table[["task", "column", "stream"]].to_numpy().tolist()]
    width = max(map(len, labels), default=0)
    for claim, rows in table.assign(label=labels).groupby("claim", sort=False):
        lines.append(str(claim))
        for row in rows.to_dict("records"):
            by_word = {
                word: [v for v in variants if row[v] == word] for word in ("holds", "fails", "undecided", MISSING)
            }
            text = "; ".join(f"{word}: {', '.join(which)}" for word, which in by_word.items() if which)
            if len({row[variant] for variant in variants}) == 1:
                text = f"{row[variants[0]]}: all"
            lines.append(f"  {row['label']:<{width}}  {text}")
    return "\n".join(lines)


def _rows(summary: pd.DataFrame) -> dict[Place, dict[Any, Any]]:
    keys = ("task", "column", "stream", "variant")
    return {tuple(row[key] for key in keys): row for row in summary.to_dict("records")}


def _tables_by_theme(comparison: Comparison, cells: Mapping[Place, str]) -> dict[str, pd.DataFrame]:
    themes: dict[str, list[tuple[str, str]]] = {}
    for task, name in sort_columns(place[:2] for place in cells):
        themes.setdefault(task_title(column_named(name).theme, task), []).append((task, name))
    return {title: _table(comparison, cells, columns) for title, columns in themes.items()}


def _table(comparison: Comparison, cells: Mapping[Place, str], columns: Iterable[tuple[str, str]]) -> pd.DataFrame:
    """Returns the columns as a table; values of weights are in the row of the clean stream if there is one."""
    import pandas as pd

    labels = {place: column_named(place[1]).label for place in columns}
    rows = []
    for variant in comparison.variants:
        streams = [
            stream
            for stream in ("clean", WEIGHTS, "ablated", PAPER_ROW)
            if any((*place, stream, variant) in cells for place in labels)
        ]
        if "clean" in streams and WEIGHTS in streams:
            streams.remove(WEIGHTS)
        for stream in streams:
            row = {"variant": variant, "stream": stream or "weights"}
            for place, label in labels.items():
                instead = cells.get((*place, WEIGHTS, variant), "") if stream == "clean" else ""
                row[label] = cells.get((*place, stream, variant), instead)
            rows.append(row)
    return pd.DataFrame(rows, columns=["variant", "stream", *labels.values()])


def _mean(row: Mapping[Any, Any], seeds: int) -> str:
    if row["n"] == 0:
        return MISSING
    digits = column_named(row["column"]).digits
    text = f"{row['mean']:,.{digits}f}"
    if math.isfinite(row["low"]):
        text += f" ± {row['high'] - row['mean']:,.{digits}f}"
    return text if row["n"] == seeds else f"{text} (n={row['n']})"


def _difference(row: Mapping[Any, Any], seeds: int) -> str:
    if row["n_pairs"] == 0:
        return MISSING
    digits = column_named(row["column"]).digits
    text = f"{row['difference']:+,.{digits}f}"
    if math.isfinite(row["difference_low"]):
        p = f"p {row['p_holm']:.2g}" if math.isfinite(row["p_holm"]) else "no test"
        text += f" [{row['difference_low']:+,.{digits}f}, {row['difference_high']:+,.{digits}f}], {p}"
    if row["n_pairs"] < seeds:
        text += f" (n={row['n_pairs']})"
    return f"{text}: {row['verdict']}"


def _verdict(row: Mapping[Any, Any]) -> str:
    return MISSING if row["n_pairs"] == 0 else str(row["verdict"])


def _once(table: pd.DataFrame, column: str) -> pd.DataFrame:
    """Returns the table with repeated values of a column shown only in the first of their rows."""
    return table.assign(**{column: table[column].where(table[column] != table[column].shift(), "")})


def markdown(comparison: Comparison) -> str:
    """Returns verdicts, tables, differences and notes as Markdown."""
    parts = [
        f"# Comparison {comparison.name}",
        _about(comparison),
        "## Verdicts",
        RULE,
        _markdown_table(_once(verdict_table(comparison), "claim")),
    ]
    differences = difference_tables(comparison)
    for title, table in tables(comparison).items():
        parts += [f"## {title}", _markdown_table(_once(table, "variant"))]
        if title in differences:
            parts += ["Differences from the baseline:", _markdown_table(_once(differences[title], "variant"))]
    if len(comparison.notes):
        parts.append("## Notes")
        notes = comparison.notes.groupby(["variant", "measurement", "note"], sort=False)["seed"]
        parts.append("\n".join(f"- {v}, {m}, seeds {', '.join(map(str, seeds))}: {n}" for (v, m, n), seeds in notes))
    return "\n\n".join(parts) + "\n"


def _about(comparison: Comparison) -> str:
    seeds = ", ".join(map(str, comparison.seeds))
    about = f"Seeds {seeds}. Mean ± half of the 95 % t interval over seeds; n/a: no value, see the notes."
    if any(variant in PAPER for variant in comparison.variants):
        about += (
            f" Rows `{PAPER_ROW}` are the published figures: the paper's own models, one run each, gates removed; only "
            "their directions can be compared with ours."
        )
    if comparison.unfinished:
        about += f" **Unfinished: {comparison.unfinished} measurements of models are not made yet.**"
    return about


def _markdown_table(table: pd.DataFrame) -> str:
    def line(cells: Any) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(table.columns), line(["---"] * len(table.columns)), *map(line, table.to_numpy())])


def latex(comparison: Comparison) -> str:
    """Returns verdicts, tables and differences as LaTeX tables; they need the packages booktabs and array."""
    made = []
    for claim, table in verdict_table(comparison).groupby("claim", sort=False):
        short = table.drop(columns="claim").replace({"undecided": UNDECIDED})
        made.append(_latex_table(short, f"Claim: {claim} ({UNDECIDED} is undecided)", [1.2, 2.4]))
    differences = difference_tables(comparison)
    for title, table in tables(comparison).items():
        made.append(_latex_table(_once(table, "variant"), title))
        if title in differences:
            made.append(_latex_table(_once(differences[title], "variant"), f"{title}: differences from the baseline"))
    return "\n".join(made)


def _latex_table(table: pd.DataFrame, caption: str, wide: list[float] | None = None) -> str:
    """Returns a table of the page's width, in which columns of text break their lines.

    Args:
        wide: shares of the width for the first columns, the others having 1; None: two narrow columns come first.
    """
    narrow = 0 if wide else 2
    shares = [*(wide or ()), *[1.0] * (len(table.columns) - len(wide or ()) - narrow)]
    # 0.2 of the width is left for the two narrow columns in front, the rest for what separates columns
    room = (0.92 if wide else 0.72) - 0.01 * len(shares)
    breaking = "".join(rf">{{\raggedright\arraybackslash}}p{{{room * s / sum(shares):.3f}\linewidth}}" for s in shares)
    text = table.to_latex(index=False, escape=True, caption=caption, column_format="l" * narrow + breaking)
    text = text.replace("±", r"$\pm$").replace(">=", r"$\geq$").replace("||", r"$\Vert$").replace(UNDECIDED, r"$\cdot$")
    size = r"\scriptsize" if wide else r"\footnotesize"
    return text.replace(r"\begin{tabular}", f"{size}\n\\setlength{{\\tabcolsep}}{{3pt}}\n\\begin{{tabular}}")


def write(comparison: Comparison, out: str | Path) -> list[Path]:
    """Writes values.csv, summary.csv, table.md, table.tex, figure.html, and with dense models of several lengths
    matched-loss.csv, with skill during training learning.csv and learning.html, into a folder."""
    from sa_lens.views import save

    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    texts = {
        "values.csv": comparison.values.to_csv(index=False),
        "summary.csv": comparison.summary().to_csv(index=False),
        "table.md": markdown(comparison),
        "table.tex": latex(comparison),
    }
    if len(comparison.dense) > 1:
        texts["matched-loss.csv"] = comparison.summary(MATCHED).to_csv(index=False)
    for name, text in texts.items():
        atomic_write(out / name, text.encode())
    written = [out / name for name in texts]
    if bool(comparison.values["value"].notna().any()):
        written.append(save(comparison, out / "figure.html"))
    if comparison.learning is not None and len(comparison.learning):
        atomic_write(out / "learning.csv", comparison.learning.to_csv(index=False).encode())
        curves = [learning_curves(comparison.learning, what) for what in (*TASKS, "loss")]
        written += [out / "learning.csv", save(curves, out / "learning.html")]
    return written
