"""The one error of this package that is the caller's to mend."""

from __future__ import annotations


class ResultsError(ValueError):
    """What was asked for cannot be had; the text is one line that names the thing."""
