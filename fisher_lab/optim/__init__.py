"""K-FAC as an optimiser: ``KFACOptimizer`` steps along K-FAC's natural gradient.

It uses the public methods of the engine alone, and no runs, files or tasks.
"""

from __future__ import annotations

from fisher_lab.optim.clipping import Clipping
from fisher_lab.optim.damping import ConstantDamping, DampingSchedule, LevenbergMarquardt
from fisher_lab.optim.kfac import KFACOptimizer

__all__ = [
    "Clipping",
    "ConstantDamping",
    "DampingSchedule",
    "KFACOptimizer",
    "LevenbergMarquardt",
]
