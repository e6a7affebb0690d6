"""Reports on trained models: one HTML page that needs no network, and everything that it shows as a record.

| name | what it answers | cost |
|---|---|---|
| `make_report(runs)` -> `Report` | measures models | about half a minute of processor time per small model |
| `save(report, path)` | writes it as a page (`.html`) or as a record (`.json`) | a second |
| `read(path)` | returns the `Report` of a `.json` | none |
"""

from sa_lens.report.contents import Report
from sa_lens.report.html_file import read, save
from sa_lens.report.making import make_report

__all__ = [  # noqa: RUF022 - in the order of the table
    "make_report",
    "Report",
    "save",
    "read",
]
