"""Reports: what a page shows of models, as frozen records, and the page, one HTML file that needs no network."""

from sa_lens.report.contents import Report
from sa_lens.report.html_file import read, save
from sa_lens.report.making import make_report

__all__ = ["Report", "make_report", "read", "save"]
