"""K-FAC as an optimiser: ``KFACOptimizer`` steps along the natural gradient of ``fisher_lab.api``.

It knows the engine's face and nothing of configuration, runs, files or tasks.
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
