"""Reports: one HTML file from a run or a comparison, and the comparison's table for terminals and pages."""

from limbeck.report.build import build
from limbeck.report.table import caption, columns, markdown_table, rows

__all__ = ["build", "caption", "columns", "markdown_table", "rows"]
