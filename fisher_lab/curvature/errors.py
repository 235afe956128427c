"""Errors that the curvature engines raise: one line each, naming the thing that is wrong."""

from __future__ import annotations

from collections.abc import Iterable

from fisher_lab.config.fields import problems


class CurvatureError(RuntimeError):
    """Base class of every error that a curvature engine raises on purpose."""


class BatchError(CurvatureError, ValueError):
    """A batch cannot be used: no active token, no label that counts, a shape that does not fit."""


class LayerError(CurvatureError, ValueError):
    """A layer is missing, unsupported, or does not match the factors that it is given."""


class LossError(CurvatureError, ValueError):
    """No loss can be formed from what the caller gave, or its scale is not known."""


class NonFiniteError(CurvatureError, FloatingPointError):
    """Activations, gradients or factors hold NaN or infinity; names the layer, batch and side."""


class FactorFileError(CurvatureError, ValueError):
    """A factor file is cut short, of another version, or of another model."""


class RankError(CurvatureError):
    """Another rank has an error; names the rank and says what it is."""


def check_one_of(name: str, value: object, allowed: Iterable[str]) -> None:
    """Checks that an argument has one of the names that there are.

    Raises:
        CurvatureError: it has not.
    """
    allowed = tuple(allowed)
    if value not in allowed:
        raise CurvatureError(f"{name}: {value!r}; allowed: {', '.join(allowed)}")


def check_options(options: object) -> None:
    """Checks the ranges of an engine's options (a dataclass of :mod:`fisher_lab.config`).

    Raises:
        CurvatureError: one is out of range; names the first one and what is allowed.
    """
    for name, value, allowed in problems(options):
        raise CurvatureError(f"{name}: {value!r}; allowed: {allowed.replace('null', 'None')}")
