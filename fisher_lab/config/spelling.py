"""What was probably meant by a name that nobody knows."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence


def did_you_mean(word: str, known: Sequence[str] | Mapping[str, str], cutoff: float = 0.6) -> str:
    """``did you mean X?`` where a known name is close, else an empty text.

    Args:
        word: what was given.
        known: the names, or spelling -> the name that is proposed for it.
        cutoff: how similar the two must be, from 0 to 1 (:mod:`difflib`).
    """
    for near in difflib.get_close_matches(word, known, n=1, cutoff=cutoff):
        return f"did you mean {known[near] if isinstance(known, Mapping) else near}?"
    return ""
