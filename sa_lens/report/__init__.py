"""Reports: what a page shows of models, as frozen records, and the page, one HTML file that needs no network."""

from sa_lens.report.making import make_report
from sa_lens.report.page import write_page
from sa_lens.report.records import Report
from sa_lens.report.serial import from_json, to_json

__all__ = ["Report", "from_json", "make_report", "to_json", "write_page"]
