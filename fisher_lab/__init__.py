"""fisher_lab: Fisher information of real transformers.

The public names are imported when they are first used, so that ``import fisher_lab`` and
``python -m fisher_lab --help`` do not pay for torch.
"""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fisher_lab import results as results
    from fisher_lab.analysis import AdvancedFisherCollector as AdvancedFisherCollector
    from fisher_lab.analysis import UnifiedConfig as UnifiedConfig
    from fisher_lab.analysis import UnifiedModelAnalyzer as UnifiedModelAnalyzer
    from fisher_lab.curvature.group_fisher.collector import FisherCollector as FisherCollector
    from fisher_lab.curvature.kfac.check import ModelCheck as ModelCheck
    from fisher_lab.curvature.kfac.check import check as check
    from fisher_lab.curvature.kfac.engine import KFACNaturalGradient as KFACNaturalGradient
    from fisher_lab.curvature.spectra.lanczos import FisherLanczos as FisherLanczos
    from fisher_lab.curvature.spectra.spectrum import FisherSpectral as FisherSpectral
    from fisher_lab.curvature.spectra.spectrum import SpectralConfig as SpectralConfig
    from fisher_lab.optim import KFACOptimizer as KFACOptimizer

__version__ = "0.1.0"

_HOMES = {
    "KFACNaturalGradient": "fisher_lab.curvature.kfac.engine",
    "KFACOptimizer": "fisher_lab.optim",
    "ModelCheck": "fisher_lab.curvature.kfac.check",
    "check": "fisher_lab.curvature.kfac.check",
    "FisherSpectral": "fisher_lab.curvature.spectra.spectrum",
    "SpectralConfig": "fisher_lab.curvature.spectra.spectrum",
    "FisherLanczos": "fisher_lab.curvature.spectra.lanczos",
    "FisherCollector": "fisher_lab.curvature.group_fisher.collector",
    "AdvancedFisherCollector": "fisher_lab.analysis",
    "UnifiedConfig": "fisher_lab.analysis",
    "UnifiedModelAnalyzer": "fisher_lab.analysis",
    "results": "fisher_lab.results",
}
"""Public name -> the module that defines it, or that it is."""

__all__ = ["__version__", *_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = import_module(_HOMES[name])
    value = home if home.__name__ == f"{__name__}.{name}" else getattr(home, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


_MOVED = {
    "fisher_lab.api": "fisher_lab.curvature.kfac.engine",
    "fisher_lab.api_collector": "fisher_lab.analysis",
    "fisher_lab.api_group": "fisher_lab.curvature.group_fisher.collector",
    "fisher_lab.analyzer": "fisher_lab.analysis",
    "fisher_lab.curvature.groups": "fisher_lab.curvature.group_fisher",
    "fisher_lab.curvature.groups.ranks": "fisher_lab.curvature.group_fisher.distributed",
    "fisher_lab.curvature.settings": "fisher_lab.config.errors",
    "fisher_lab.curvature.spectral": "fisher_lab.curvature.spectra.spectrum",
    "fisher_lab.curvature.lanczos": "fisher_lab.curvature.spectra.lanczos",
    "fisher_lab.distributed.communicator": "fisher_lab.curvature.collectives",
}
"""Module of public names that had another place before -> its place; for one release."""
_RENAMED = {"merged": "merge_over_ranks", "collect_shares": "collect_slices"}


class _MovedModules:
    """Finds and loads the modules of ``_MOVED``: their names are looked up in the new place."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return ModuleSpec(name, _MovedModules(), is_package=True) if name in _MOVED else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        place = _MOVED[module.__name__]
        text = f"{module.__name__}: now {place}; the old name goes in the next release"
        warnings.warn(text, DeprecationWarning, stacklevel=2)

        def look_up(name: str) -> Any:
            return getattr(import_module(place), _RENAMED.get(name, name))

        module.__dict__["__getattr__"] = look_up


sys.meta_path.append(_MovedModules)
