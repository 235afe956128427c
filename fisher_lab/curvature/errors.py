"""Errors that the curvature engines raise: one line each, naming the thing that is wrong."""

from __future__ import annotations


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
