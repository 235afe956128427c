"""One self-contained HTML file of several sweeps, and the methods paragraph beside it."""

from fisher_lab.results.report.page import write_report

__all__ = ["write_report"]
