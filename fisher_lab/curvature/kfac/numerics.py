"""The precision in which one engine computes, and its settings with what they come to here."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cache

import torch
from typing_extensions import override

from fisher_lab.config.kfac import KFACSettings

DTYPES = {"float64": torch.float64, "float32": torch.float32}


@dataclass(frozen=True)
class Numerics:
    """Precision and place of the decompositions and of their application.

    Attributes:
        core_dtype: where matrices are accumulated and decomposed.
        apply_dtype: where the decompositions are applied to a gradient.
        eps: first jitter of a failed Cholesky factorisation, relative to the mean diagonal.
        on_host: decompose on the host although the factors are on a device.
    """

    core_dtype: torch.dtype
    apply_dtype: torch.dtype
    eps: float
    on_host: bool = False


@dataclass
class EngineSettings(KFACSettings):
    """The settings of one engine, with what the command line and the machine say beside them.

    Attributes:
        seed: of drawn labels and of the subsample of columns.
        on_host: as in :class:`Numerics`.
        scale_A: the dampings of the A sides are multiplied by this, in every ``damping_mode``.
        scale_G: those of the G sides.
    """

    seed: int = 0
    on_host: bool = False
    scale_A: float = 1.0
    scale_G: float = 1.0

    @property
    @override
    def lam_A(self) -> float:
        return super().lam_A * self.scale_A

    @property
    @override
    def lam_G(self) -> float:
        return super().lam_G * self.scale_G

    @classmethod
    def of(cls, settings: KFACSettings, *, seed: int = 0, on_host: bool = False) -> EngineSettings:
        """Returns the settings with a seed and a place."""
        options = {item.name: getattr(settings, item.name) for item in fields(KFACSettings)}
        return cls(**options, seed=seed, on_host=on_host)

    @property
    def numerics(self) -> Numerics:
        """The precision that the settings ask for; ``auto`` dtypes are measured."""
        core, apply = resolve_dtype(self.core_dtype), resolve_dtype(self.apply_dtype)
        return Numerics(core, apply, self.eps, self.on_host)


def resolve_dtype(name: str) -> torch.dtype:
    """Returns the dtype behind ``float64``, ``float32`` or ``auto``.

    ``auto`` is float64, except with a CUDA device on which a float64 product takes more than
    eight times as long as a float32 one, by measurement.
    """
    return _measured_dtype() if name == "auto" else DTYPES[name]


@cache
def _measured_dtype() -> torch.dtype:
    if not torch.cuda.is_available():
        return torch.float64
    from torch.utils.benchmark import Timer

    seconds = []
    for dtype in (torch.float64, torch.float32):
        x = torch.ones(2048, 2048, dtype=dtype, device="cuda")
        timer = Timer("x @ x", globals={"x": x})
        seconds.append(timer.blocked_autorange(min_run_time=0.05).median)
    return torch.float32 if seconds[0] > 8 * seconds[1] else torch.float64
