"""What frames and their columns are called in signatures here.

They are pandas' DataFrame and Series. pandas annotates nearly every access as a union of frame,
series, array and scalar, which no code can narrow; a checker is therefore told nothing of what is
inside, and everything of what is made from it.
"""

from __future__ import annotations

from typing import Any, TypeAlias

Frame: TypeAlias = Any
"""A ``pandas.DataFrame``; with ``attrs`` as :func:`fisher_lab.results.load` gives them."""

Column: TypeAlias = Any
"""A ``pandas.Series``."""


class Shared(list[Any]):
    """A list for ``attrs`` that is never changed.

    pandas copies ``attrs`` in depth whenever it hands out a column; this is handed on as it is.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> Shared:
        return self
