"""How K-FAC is to be computed, as small typed choices: one dataclass a question.

Every field has its meaning and default here; ranges are checked when a choice is made, so an
illegal combination cannot be handed to the engine. ``docs/math.md`` has the definitions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

PolicyName = Literal["all", "auto", "hybrid", "small_only"]
FisherName = Literal["empirical", "mc", "true"]
TiedName = Literal["head", "embedding", "sum"]
ReduceName = Literal["none", "gather", "gram"]
DtypeName = Literal["auto", "float64", "float32"]
StorageName = Literal["auto", "fp64", "fp32", "bf16", "fp16"]
DeviceName = Literal["auto", "cuda", "cpu"]
ReductionName = Literal["subsample", "lowrank"]
UncoveredName = Literal["passthrough", "diagonal"]

STORAGE_DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
COMPUTE_DTYPES = {"float64": torch.float64, "float32": torch.float32}


class SettingError(ValueError):
    """A setting is out of range or misspelt; one line with name, value and what is allowed."""


def one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Checks that a name is one of those allowed.

    Raises:
        SettingError: it is not.
    """
    if value not in allowed:
        raise SettingError(f"{name}: {value!r}; allowed: {', '.join(allowed)}")


def in_range(
    name: str, value: Any, low: float, high: float = math.inf, *, integer: bool = False
) -> None:
    """Checks that a number is finite, ``low <= value <= high``, and whole where it has to be.

    Raises:
        SettingError: it is not.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    whole = isinstance(value, int) if integer else number
    if not number or not whole or not math.isfinite(value) or not low <= value <= high:
        kind = "a whole number" if integer else "a finite number"
        span = f">= {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
        raise SettingError(f"{name}: {value!r}; allowed: {kind} {span}")


@dataclass(frozen=True, kw_only=True)
class Damping:
    """Damping and clipping of the two factors (``docs/math.md``, section 2).

    Attributes:
        A: Tikhonov damping added to the eigenvalues of A; 0 is allowed for powers >= 0 only.
        G: the same for G.
        kappa_max: floor of the damped eigenvalues is their maximum over this; None: no floor.
    """

    A: float = 1e-4
    G: float = 1e-4
    kappa_max: float | None = 1e6

    def __post_init__(self) -> None:
        in_range("damping_A", self.A, 0.0)
        in_range("damping_G", self.G, 0.0)
        if self.kappa_max is not None:
            in_range("max_condition_number", self.kappa_max, 1.0)


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Which structure the G factor of a layer takes (``docs/math.md``, section 4).

    Attributes:
        name: ``all``, ``auto``, ``hybrid`` or ``small_only``.
        big_threshold: ``hybrid`` takes Woodbury from this many outputs on.
        auto_rho: ``auto`` takes Woodbury up to ``auto_rho * out`` columns,
        auto_t_max: and up to this many.
        max_columns: columns kept on the Woodbury path; past them they are reduced.
        max_dense_dim: no ``out x out`` matrix is formed beyond this ``out``.
        column_reduction: ``subsample`` (uniform, seeded, unbiased) or ``lowrank``.
    """

    name: PolicyName = "all"
    big_threshold: int = 4096
    auto_rho: float = 1.0
    auto_t_max: int = 8192
    max_columns: int = 8192
    max_dense_dim: int = 16384
    column_reduction: ReductionName = "subsample"

    def __post_init__(self) -> None:
        one_of("kfac_policy", self.name, ("all", "auto", "hybrid", "small_only"))
        one_of("column_reduction", self.column_reduction, ("subsample", "lowrank"))
        in_range("kfac_big_threshold", self.big_threshold, 1, integer=True)
        in_range("kfac_auto_rho", self.auto_rho, 0.0)
        in_range("kfac_auto_t_max", self.auto_t_max, 1, integer=True)
        in_range("max_columns", self.max_columns, 1, integer=True)
        in_range("max_dense_dim", self.max_dense_dim, 1, integer=True)


@dataclass(frozen=True, kw_only=True)
class Numerics:
    """Precision of the decompositions and of their application (``docs/math.md``, section 3).

    Attributes:
        core_dtype: where matrices are accumulated and decomposed.
        apply_dtype: where the decompositions are applied to a gradient.
        eps: first jitter of a failed Cholesky factorisation, relative to the mean diagonal.
        on_host: decompose on the host although the factors are on a device.
        push_through: use the identity without cancellation for the factors' own gradient.
    """

    core_dtype: torch.dtype = torch.float64
    apply_dtype: torch.dtype = torch.float64
    eps: float = 1e-6
    on_host: bool = False
    push_through: bool = True

    def __post_init__(self) -> None:
        for name in ("core_dtype", "apply_dtype"):
            if getattr(self, name) not in (torch.float64, torch.float32):
                raise SettingError(f"{name}: {getattr(self, name)}; allowed: float64, float32")
        in_range("kfac_eps", self.eps, 0.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class Storage:
    """Where and in what precision token gradients are kept (``docs/math.md``, section 3).

    Attributes:
        device: ``auto`` keeps a layer's columns and core on the device while they take less
            than ``limit_mb``, else in pinned host memory.
        dtype: ``auto`` keeps the token gradients' own dtype; 16-bit ones are scaled by a power of
            two a layer.
        limit_mb: the limit of ``auto``, in MB (1e6 bytes).
    """

    device: DeviceName = "auto"
    dtype: StorageName = "auto"
    limit_mb: float = 500.0

    def __post_init__(self) -> None:
        one_of("woodbury_store_device", self.device, ("auto", "cuda", "cpu"))
        one_of("woodbury_dtype", self.dtype, ("auto", *STORAGE_DTYPES))
        in_range("store_limit_mb", self.limit_mb, 0.0)
        if self.device == "cuda" and not torch.cuda.is_available():
            raise SettingError("woodbury_store_device: 'cuda', but no CUDA device; allowed: cpu")


@dataclass(frozen=True, kw_only=True)
class Fisher:
    """Whose expectation the token gradients stand for (``docs/math.md``, section 1).

    Attributes:
        kind: ``empirical`` (the data's labels), ``mc`` (labels drawn from the model) or ``true``
            (expectation over the model's distribution).
        n_samples: draws of ``mc``.
        seed: of the draws, and of column subsampling.
        true_max_classes: most classes for which ``true`` is exact in inner layers.
        true_head: the head's G by the diagonal-minus-low-rank form whatever ``kind`` says.
        scale: ``exact`` puts the factor T/N into the natural gradient too.
    """

    kind: FisherName = "empirical"
    n_samples: int = 1
    seed: int = 0
    true_max_classes: int = 64
    true_head: bool = False
    scale: Literal["natural", "exact"] = "natural"

    def __post_init__(self) -> None:
        one_of("fisher", self.kind, ("empirical", "mc", "true"))
        one_of("fisher_scale", self.scale, ("natural", "exact"))
        in_range("n_samples", self.n_samples, 1, integer=True)
        in_range("true_max_classes", self.true_max_classes, 1, integer=True)


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """Which parameters K-FAC covers (``docs/math.md``, section 1).

    Attributes:
        include: shell patterns of layer names; empty takes all.
        exclude: shell patterns of layer names left out.
        tied: whose factors precondition a weight shared by embedding and head.
        norm_layers: cover LayerNorm and RMSNorm by the Fisher of their per-token gradients.
        norm_max_dim: widest norm layer whose matrix is dense; beyond it, its diagonal.
        uncovered: ``passthrough`` returns the gradient, ``diagonal`` divides by the damped
            diagonal Fisher of per-sequence gradients.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    tied: TiedName = "head"
    norm_layers: bool = True
    norm_max_dim: int = 2048
    uncovered: UncoveredName = "passthrough"

    def __post_init__(self) -> None:
        one_of("tied", self.tied, ("head", "embedding", "sum"))
        one_of("uncovered", self.uncovered, ("passthrough", "diagonal"))
        in_range("norm_max_dim", self.norm_max_dim, 0, integer=True)


@dataclass(frozen=True, kw_only=True)
class KFACSettings:
    """All choices of the K-FAC engine.

    Attributes:
        damping: damping and clipping.
        policy: structure of the G factors.
        numerics: precision.
        storage: where the columns live.
        fisher: kind of Fisher matrix.
        coverage: which parameters.
        ekfac: correct the eigenvalues in the factors' basis (``docs/math.md``, section 6).
        reduce: how ranks join their factors (``docs/math.md``, section 7).
    """

    damping: Damping = field(default_factory=Damping)
    policy: Policy = field(default_factory=Policy)
    numerics: Numerics = field(default_factory=Numerics)
    storage: Storage = field(default_factory=Storage)
    fisher: Fisher = field(default_factory=Fisher)
    coverage: Coverage = field(default_factory=Coverage)
    ekfac: bool = False
    reduce: ReduceName = "gram"

    def __post_init__(self) -> None:
        one_of("kfac_distributed_reduce", self.reduce, ("none", "gather", "gram"))
