"""Reports: what a page shows of models, as frozen records, and the page, one HTML file that needs no network."""

from sa_lens.report.page import write_page
from sa_lens.report.records import Report

__all__ = ["Report", "write_page"]
