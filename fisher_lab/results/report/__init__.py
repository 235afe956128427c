"""One self-contained HTML file of several sweeps, and the methods paragraph beside it."""

from .page import write_report

__all__ = ["write_report"]
