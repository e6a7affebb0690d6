"""The comparison on paper: Markdown and LaTeX, the paper's published figures beside ours.

A row is a variant in a stream and a table holds the columns of one theme, so that nine variants fit a page.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sa_lens.compare.columns import PAPER, WHOLE, column_named, family, in_order, paper_value
from sa_lens.compare.grids import BASELINE
from sa_lens.compare.results import Comparison
from sa_lens.data.writing import atomic_write

if TYPE_CHECKING:
    import pandas as pd

Found = dict[tuple[str, str, str], dict[Any, Any]]
"""Rows of a summary by column, stream and variant."""

MISSING = "n/a"
"""A cell without a value."""
UNDECIDED = "·"
"""How the verdict `undecided` is written where words have no room."""

RULE = (
    "A claim holds or fails only if the 95 % t interval of the paired difference over seeds excludes 0 after Holm's "
    "correction over the claims of a variant in a stream; otherwise it is undecided. The ablated stream is compared "
    "with the baseline's only stream."
)


PAPER_ROW = "paper, clean"
"""Stream of the published figures."""
THE_PAPERS = "The paper's columns"
"""Title of the table that holds the published figures beside ours."""


def tables(comparison: Comparison) -> dict[str, pd.DataFrame]:
    """The tables in print, by title: a row a variant and stream, a column a column of the theme.

    The first, where there is anything to show in it, has the paper's columns, its published figures below ours.
    """
    found = _rows(comparison.summary())
    present = in_order(key[0] for key in found)
    made = {}
    paper = [name for name in present if column_named(name).paper]
    if any(paper_value(variant, name) is not None for variant in comparison.variants for name in paper):
        made[THE_PAPERS] = _means(comparison, found, paper, published=True)
    for theme, names in _by_theme(present).items():
        made[theme] = _means(comparison, found, names)
    return made


def difference_tables(comparison: Comparison, against: str = BASELINE) -> dict[str, pd.DataFrame]:
    """Differences from another variant in print, by theme: a row a variant and stream, a column a column with a claim.

    A cell is the mean paired difference, its 95 % interval, the corrected p and the verdict.

    Raises:
        ValueError: no such variant.
    """
    found = _rows(comparison.summary(against))
    claimed = [name for name in in_order(key[0] for key in found) if column_named(name).direction]
    n_seeds, made = len(comparison.seeds), {}
    for theme, names in _by_theme(claimed).items():
        cells = {
            (variant, stream, name): _decision(row, column_named(name).digits, n_seeds)
            for (name, stream, variant), row in found.items()
            if name in names and variant != against
        }
        made[theme] = _frame(comparison, cells, names)
    return made


def verdict_table(comparison: Comparison, against: str = BASELINE) -> pd.DataFrame:
    """Every claim in a row: what it says, of which column and stream, and its verdict for each variant; n/a: no value.

    Raises:
        ValueError: `against` is no variant.
    """
    import pandas as pd

    found = _rows(comparison.summary(against))
    names = [variant for variant in comparison.variants if variant != against]
    rows = []
    for stream in ("clean", "ablated"):
        for name in family(stream):
            column = column_named(name)
            at = stream if stream in column.streams else WHOLE
            cells = {variant: _word(found[name, at, variant]) for variant in names if (name, at, variant) in found}
            if cells:
                sign = "higher" if column.direction > 0 else "lower"
                place = {"claim": column.claim, "column": f"{column.label}: {sign}", "stream": at or "weights"}
                rows.append({**place, **dict.fromkeys(names, MISSING), **cells})
    frame = pd.DataFrame(rows, columns=["claim", "column", "stream", *names])
    in_turn = {claim: place for place, claim in enumerate(dict.fromkeys(frame["claim"]))}
    return frame.sort_values("claim", key=lambda claims: claims.map(in_turn), kind="stable", ignore_index=True)


def verdict_text(comparison: Comparison) -> str:
    """The verdicts in short: under each claim a line for each column and stream."""
    frame, lines = verdict_table(comparison), []
    names = [*frame.columns[3:]]
    width = max((len(f"{row['column']}, {row['stream']}") for row in frame.to_dict("records")), default=0)
    for claim, some in frame.groupby("claim", sort=False):
        lines.append(str(claim))
        for row in some.to_dict("records"):
            by_word = {word: [n for n in names if row[n] == word] for word in ("holds", "fails", "undecided", MISSING)}
            told = "; ".join(f"{word}: {', '.join(which)}" for word, which in by_word.items() if which)
            if len({row[name] for name in names}) == 1:
                told = f"{row[names[0]]}: all"
            lines.append(f"  {row['column'] + ', ' + row['stream']:<{width}}  {told}")
    return "\n".join(lines)


def _by_theme(names: Sequence[str]) -> dict[str, list[str]]:
    by_theme: dict[str, list[str]] = {}
    for name in names:
        by_theme.setdefault(column_named(name).theme, []).append(name)
    return by_theme


def _means(comparison: Comparison, found: Found, names: Sequence[str], published: bool = False) -> pd.DataFrame:
    n_seeds = len(comparison.seeds)
    cells = {
        (variant, stream, name): _cell(row, column_named(name).digits, n_seeds)
        for (name, stream, variant), row in found.items()
        if name in names
    }
    if published:
        figures = {(v, PAPER_ROW, name): paper_value(v, name) for v in comparison.variants for name in names}
        cells |= {place: f"{value:g}" for place, value in figures.items() if value is not None}
    return _frame(comparison, cells, names)


def _frame(comparison: Comparison, cells: dict[tuple[str, str, str], str], names: Sequence[str]) -> pd.DataFrame:
    """Cells by variant, stream and column, as rows of variants and streams; figures of weights stand with the clean
    stream where that has a row."""
    import pandas as pd

    rows = []
    for variant in comparison.variants:
        streams = [
            s for s in ("clean", WHOLE, "ablated", PAPER_ROW) if any((variant, s, name) in cells for name in names)
        ]
        if "clean" in streams and WHOLE in streams:
            streams.remove(WHOLE)
        for stream in streams:
            also = WHOLE if stream == "clean" else stream
            row = {
                column_named(n).label: cells.get((variant, stream, n), cells.get((variant, also, n), "")) for n in names
            }
            rows.append({"variant": variant, "stream": stream or "weights", **row})
    return pd.DataFrame(rows, columns=["variant", "stream", *(column_named(name).label for name in names)])


def _rows(summary: pd.DataFrame) -> Found:
    """Rows of a summary by column, stream and variant."""
    return {(row["column"], row["stream"], row["variant"]): row for row in summary.to_dict("records")}


def _cell(row: Any, digits: int, seeds: int) -> str:
    if row["n"] == 0:
        return MISSING
    shown = f"{row['mean']:,.{digits}f}"
    if math.isfinite(row["low"]):
        shown += f" ± {row['high'] - row['mean']:,.{digits}f}"
    return shown if row["n"] == seeds else f"{shown} (n={int(row['n'])})"


def _word(row: Any) -> str:
    return MISSING if row["n_pairs"] == 0 else str(row["verdict"])


def _decision(row: Any, digits: int, seeds: int) -> str:
    if row["n_pairs"] == 0:
        return MISSING
    shown = f"{row['difference']:+,.{digits}f}"
    if math.isfinite(row["difference_low"]):
        p = f"p {row['p_holm']:.2g}" if math.isfinite(row["p_holm"]) else "no test"
        shown += f" [{row['difference_low']:+,.{digits}f}, {row['difference_high']:+,.{digits}f}], {p}"
    if row["n_pairs"] < seeds:
        shown += f" (n={int(row['n_pairs'])})"
    return f"{shown}: {row['verdict']}"


def markdown(comparison: Comparison) -> str:
    """Verdicts, tables, differences and notes as Markdown."""
    parts = [
        f"# Comparison {comparison.name}",
        _about(comparison),
        "## Verdicts",
        RULE,
        _markdown_table(_once(verdict_table(comparison), "claim")),
    ]
    differences = difference_tables(comparison)
    for theme, frame in tables(comparison).items():
        parts += [f"## {theme}", _markdown_table(_once(frame, "variant"))]
        if theme in differences:
            parts += ["Differences from the baseline:", _markdown_table(_once(differences[theme], "variant"))]
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
            f" Rows `{PAPER_ROW}` are the published figures: the paper's own models, one run each, gates removed; only "
            "their directions can be compared with ours."
        )
    if comparison.unfinished:
        about += f" **Unfinished: {comparison.unfinished} groups of columns are not measured yet.**"
    return about


def _once(frame: pd.DataFrame, column: str) -> pd.DataFrame:
    """The frame with a value of the column shown in its first row alone."""
    return frame.assign(**{column: frame[column].where(frame[column] != frame[column].shift(), "")})


def _markdown_table(frame: pd.DataFrame) -> str:
    def line(cells: Any) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(frame.columns), line(["---"] * len(frame.columns)), *map(line, frame.to_numpy())])


def latex(comparison: Comparison) -> str:
    """Verdicts claim by claim, tables and differences as LaTeX, a `table` each; needs packages booktabs and array."""
    made = []
    for claim, frame in verdict_table(comparison).groupby("claim", sort=False):
        short = frame.drop(columns="claim").replace({"undecided": UNDECIDED})
        made.append(_latex_table(short, f"Claim: {claim} ({UNDECIDED} is undecided)", 1))
    differences = difference_tables(comparison)
    for theme, frame in tables(comparison).items():
        made.append(_latex_table(_once(frame, "variant"), theme))
        if theme in differences:
            made.append(_latex_table(_once(differences[theme], "variant"), f"{theme}: differences from the baseline"))
    return "\n".join(made)


def _latex_table(frame: pd.DataFrame, caption: str, wide: int = 0) -> str:
    """A table as wide as a page: columns of text break their lines, the first `wide` ones get more room."""
    fixed = 0 if wide else 2
    shares = [2.4] * wide + [1.0] * (len(frame.columns) - wide - fixed)
    # 0.2 of the width is left for the two narrow columns in front, the rest for what separates columns
    room = (0.92 if wide else 0.72) - 0.01 * len(shares)
    breaking = "".join(rf">{{\raggedright\arraybackslash}}p{{{room * s / sum(shares):.3f}\linewidth}}" for s in shares)
    text = frame.to_latex(index=False, escape=True, caption=caption, column_format="l" * fixed + breaking)
    text = text.replace("±", r"$\pm$").replace(">=", r"$\geq$").replace("||", r"$\Vert$").replace(UNDECIDED, r"$\cdot$")
    size = r"\scriptsize" if wide else r"\footnotesize"
    return text.replace(r"\begin{tabular}", f"{size}\n\\setlength{{\\tabcolsep}}{{3pt}}\n\\begin{{tabular}}")


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
