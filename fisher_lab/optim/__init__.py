"""K-FAC as an optimiser: ``KFACOptimizer`` steps along K-FAC's natural gradient.

It knows the public methods of the engine, and nothing of runs, files or tasks.
"""

from __future__ import annotations

from fisher_lab.optim.kfac import (
    Clipping,
    ConstantDamping,
    DampingSchedule,
    KFACOptimizer,
    LevenbergMarquardt,
)

__all__ = [
    "Clipping",
    "ConstantDamping",
    "DampingSchedule",
    "KFACOptimizer",
    "LevenbergMarquardt",
]
