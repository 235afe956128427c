"""The screen: standard output and error, which may be gone, full, or know few characters.

What is printed is a copy of what is written down. So it ends no run: :func:`install` makes the two
streams replace characters that they cannot write, and drop what nobody takes any more. Whoever
prints for its own sake asks :func:`problem` at the end.
"""

from __future__ import annotations

import io
import os
import sys
from typing import Any

RAISING = ("strict", "surrogateescape")
"""Ways of a stream to encode that do not take every character."""


class Screen(io.TextIOWrapper):
    """A stream whose ``write`` and ``flush`` do not raise for what is wrong with the device.

    Attributes:
        problem: what was wrong first; None where everything was written.
    """

    problem: OSError | None = None

    def write(self, text: str, /) -> int:
        """Write, or drop the text."""
        try:
            return super().write(text)
        except OSError as error:
            self._drop(error)
        return len(text)

    def flush(self) -> None:
        """Flush, or drop what is left."""
        try:
            super().flush()
        except OSError as error:
            self._drop(error)

    def _drop(self, error: OSError) -> None:
        """From here on everything goes nowhere, what the buffers still hold too."""
        self.problem = self.problem or error
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)


def install() -> None:
    """Put a :class:`Screen` in the place of each stream; for the main program of a process."""
    for name in ("stdout", "stderr"):
        stream: Any = getattr(sys, name)
        if stream is None:  # it was closed before the process began
            setattr(sys, name, open(os.devnull, "w", errors="replace"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper) and not isinstance(stream, Screen):
            made = Screen(
                stream.detach(),
                encoding=stream.encoding,
                errors="replace" if stream.errors in RAISING else stream.errors,
                line_buffering=stream.line_buffering,
                write_through=stream.write_through,
            )
            setattr(sys, name, made)


def problem() -> str | None:
    """What kept standard output from being written, in words; not that its reader has gone."""
    sys.stdout.flush()
    error = getattr(sys.stdout, "problem", None)
    if error is None or isinstance(error, BrokenPipeError):
        return None
    return f"standard output cannot be written: {error.strerror}"
