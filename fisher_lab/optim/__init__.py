"""K-FAC as an optimiser: ``KFACOptimizer`` steps along the natural gradient of ``fisher_lab.api``.

It knows the engine's face and nothing of configuration, runs, files or tasks.
"""

from __future__ import annotations

from .clipping import Clipping
from .damping import ConstantDamping, DampingSchedule, LevenbergMarquardt
from .kfac import KFACOptimizer

__all__ = [
    "Clipping",
    "ConstantDamping",
    "DampingSchedule",
    "KFACOptimizer",
    "LevenbergMarquardt",
]
