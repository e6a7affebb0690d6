"""Reports: what a page shows of models, as frozen records, and the page, one HTML file that needs no network."""

from sa_lens.report.making import make_report
from sa_lens.report.page import read, save
from sa_lens.report.records import Report

__all__ = ["Report", "make_report", "read", "save"]
