"""fisher_lab: Fisher information of real transformers.

The public names are imported when they are first used, so that ``import fisher_lab`` and
``python -m fisher_lab --help`` do not pay for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fisher_lab.analysis import AdvancedFisherCollector as AdvancedFisherCollector
    from fisher_lab.analysis import UnifiedConfig as UnifiedConfig
    from fisher_lab.analysis import UnifiedModelAnalyzer as UnifiedModelAnalyzer
    from fisher_lab.config.spectra import SpectralConfig as SpectralConfig
    from fisher_lab.curvature.group_fisher.collector import FisherCollector as FisherCollector
    from fisher_lab.curvature.kfac.engine import KFACNaturalGradient as KFACNaturalGradient
    from fisher_lab.curvature.spectra.lanczos import FisherLanczos as FisherLanczos
    from fisher_lab.curvature.spectra.spectrum import FisherSpectral as FisherSpectral
    from fisher_lab.optim import KFACOptimizer as KFACOptimizer

__version__ = "0.1.0"

_HOMES = {
    "KFACNaturalGradient": "fisher_lab.curvature.kfac.engine",
    "KFACOptimizer": "fisher_lab.optim",
    "FisherSpectral": "fisher_lab.curvature.spectra.spectrum",
    "SpectralConfig": "fisher_lab.config.spectra",
    "FisherLanczos": "fisher_lab.curvature.spectra.lanczos",
    "FisherCollector": "fisher_lab.curvature.group_fisher.collector",
    "AdvancedFisherCollector": "fisher_lab.analysis",
    "UnifiedConfig": "fisher_lab.analysis",
    "UnifiedModelAnalyzer": "fisher_lab.analysis",
}
"""Public name -> the module that defines it."""

__all__ = ["__version__", *_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
