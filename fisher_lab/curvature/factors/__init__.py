"""One class a structure: dense, Gram (Woodbury), diagonal, diagonal with a low-rank part.

Every factor is a positive semi-definite matrix ``M`` of dimension ``dim``. :meth:`Factor.damped`
gives its damped and clipped form, which applies any power of itself to a matrix.
"""

from .base import Damped, Factor, FactorReport
from .dense import DenseFactor
from .diagonal import DiagonalFactor, DiagonalLowRankFactor
from .gram import Columns, GramFactor
from .sharded import ShardedColumns

__all__ = [
    "Columns",
    "Damped",
    "DenseFactor",
    "DiagonalFactor",
    "DiagonalLowRankFactor",
    "Factor",
    "FactorReport",
    "GramFactor",
    "ShardedColumns",
]
