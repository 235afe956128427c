"""Options of the spectral engines, once each: meaning, default, range and unit.

The engines take ``LanczosConfig``, ``GroupFisherConfig`` and ``SpectralOptions`` (as
``fisher_lab.SpectralConfig``); the sections ``spectral``, ``lanczos`` and ``group_fisher`` extend
them by what ``task=analyze`` asks. Definitions are in ``docs/math.md``, sections 8 and 9. Nothing
here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, TypeVar

from fisher_lab.config.fields import Problems, above, at_least, null, one_of, setting, whole

STRUCTURES = ("layer", "module", "parameter", "full")
OPERATORS = ("empirical", "true", "hessian")
PRODUCTS = ("auto", "forward", "double_backward")
WHICH = ("largest", "smallest", "magnitude")
MAX_SEED = 2**32 - 1

Options = TypeVar("Options")


def options_of(section: object, kind: type[Options], **more: Any) -> Options:
    """Returns an engine's options out of a section that extends them.

    Args:
        section: has the options among its fields.
        kind: the class of the options.
        **more: values of fields that the section lacks.
    """
    names = [item.name for item in fields(kind) if item.name not in more]  # type: ignore[arg-type]
    return kind(**{name: getattr(section, name) for name in names}, **more)


@dataclass(kw_only=True)
class SpectralOptions:
    """How the spectra of the blocks are computed, as Python and the command line set it."""

    seed: int = setting(42, "Seed of the subsample and the sketch.", whole(0, MAX_SEED))
    sample_unit: str = setting(
        "token",
        "A row of J: a labelled token's or a sequence's gradient.",
        one_of("token", "sequence"),
    )
    eigensolve_device: str = setting(
        "auto",
        "Where matrices are decomposed; auto: the model's GPU from a side of 2048 on, else the "
        "host.",
        one_of("auto", "cpu", "cuda"),
    )
    regularization: float = setting(
        1e-10, "Added to the diagonal, relative to its mean, only after a failure.", at_least(0)
    )
    dtype_eigensolve: str = setting(
        "float64", "In which matrices are decomposed.", one_of("float64", "float32")
    )
    storage_mode: str = setting(
        "chunked",
        "How the gradients are kept; `sketch` is approximate, and there on one rank only.",
        one_of("full", "chunked", "streaming", "sketch"),
    )
    chunk_size: int = setting(32, "Gradients of one backward pass.", whole(1))
    top_k: int | None = setting(None, "Eigenvalues kept a block; null: all.", whole(1) | null)
    linear_gram: str = setting(
        "auto",
        "Linear layers without per-sample gradients where that is cheaper.",
        one_of("auto", "never"),
    )
    memory_budget_mb: float = setting(
        512.0, "MiB of gradients that may wait in memory before they go to disk.", at_least(0)
    )
    sketch_rank: int = setting(
        32, "Eigenvalues of a `sketch` a block where `top_k` is null.", whole(1)
    )

    def __post_init__(self) -> None:
        """Takes a ``torch.dtype`` by its name."""
        self.dtype_eigensolve = str(self.dtype_eigensolve).removeprefix("torch.")


@dataclass(kw_only=True)
class SpectralSection(SpectralOptions):
    """Spectra of the block-diagonal empirical Fisher matrix."""

    enabled: bool = setting(False, "Whether `task=analyze` computes them.")
    block_structure: str = setting("layer", "What a block is.", one_of(*STRUCTURES))
    n_samples: int | None = setting(None, "Samples, by a stable hash; null: all.", whole(1) | null)
    center_gradients: bool = setting(False, "Gradient covariance instead of the Fisher matrix.")

    @property
    def sketches(self) -> bool:
        """Whether a sketch is asked for, which several ranks cannot make."""
        return self.enabled and self.storage_mode == "sketch"


@dataclass
class LanczosConfig:
    """Options of ``FisherLanczos``.

    ``vector_dtype`` may also be given as a ``torch.dtype``, or None for ``auto``.
    ``FisherLanczos`` checks the ranges.
    """

    k: int = setting(10, "Eigenpairs.", whole(1))
    max_vectors: int | None = setting(
        None, "Basis vectors; null: max(2k + 10, 20).", whole(3) | null
    )
    operator: str = setting("empirical", "Which matrix.", one_of(*OPERATORS))
    tol: float = setting(1e-6, "Residual over the largest eigenvalue at convergence.", above(0))
    seed: int = setting(
        42, "Seed of the first vector and of the random vectors.", whole(0, MAX_SEED)
    )
    reorthogonalize: bool = setting(
        True, "Full reorthogonalisation; false: only with `density_probes=0`."
    )
    vector_device: str = setting("auto", "Where the basis lives.", one_of("auto", "cpu", "cuda"))
    max_products: int | None = setting(
        None, "Products at most; null: 20 a vector, 300 at least.", whole(1) | null
    )
    which: str = setting("largest", "Which end of the spectrum.", one_of(*WHICH))
    products: str = setting("auto", "How J v is formed.", one_of(*PRODUCTS))
    vector_dtype: str = setting(
        "auto", "Of the basis; auto: the parameters' own.", one_of("auto", "float64", "float32")
    )

    def __post_init__(self) -> None:
        """Takes a ``torch.dtype`` by its name."""
        name = "auto" if self.vector_dtype is None else str(self.vector_dtype)
        self.vector_dtype = name.removeprefix("torch.")

    def check(self) -> Problems:
        """Yields what concerns more than one option."""
        if self.max_products is not None and self.max_products < self.k:
            yield "max_products", f"null, or at least k = {self.k}"


@dataclass
class LanczosSection(LanczosConfig):
    """Top eigenpairs, spectral density, trace and effective dimension, matrix-free."""

    enabled: bool = setting(False, "Whether `task=analyze` runs it.")
    block: str | None = setting(None, "A block's name; null: the whole model.")
    density_probes: int = setting(
        10,
        "Random vectors behind density, trace and effective dimension; 0: eigenpairs alone.",
        whole(0),
    )
    density_steps: int = setting(30, "Lanczos steps a random vector, at least.", whole(2))
    density_max_steps: int | None = setting(
        None,
        "Steps at most while the bracket of the effective dimension is open; null: 200 in the "
        "space of the samples, `density_steps` in that of the parameters.",
        whole(2) | null,
    )
    dimension_damping: float | None = setting(
        None, "lam of tr(F (F + lam I)^-1); null: none.", above(0) | null
    )
    dimension_tol: float = setting(
        0.01, "The bracket of the effective dimension is to close to this share of it.", above(0)
    )

    def check(self) -> Problems:
        """Yields what concerns more than one key."""
        yield from super().check()
        if self.max_vectors is not None and self.max_vectors < self.k + 2:
            yield "max_vectors", f"null, or at least lanczos.k + 2 = {self.k + 2}"
        if self.enabled and not self.reorthogonalize and self.density_probes > 0:
            yield "reorthogonalize", "true, or false with lanczos.density_probes=0"


@dataclass
class GroupFisherConfig:
    """Options of ``FisherCollector``, which checks the ranges."""

    unit: str = setting(
        "batch",
        "What is squared: `batch` is cheap and not the diagonal Fisher.",
        one_of("batch", "sequence", "token"),
    )
    sequence_weight: str = setting(
        "tokens", "Weight of a sequence: its active tokens, or one.", one_of("tokens", "one")
    )
    chunk_size: int = setting(16, "Gradients of one backward pass.", whole(1))


@dataclass
class GroupFisherSection(GroupFisherConfig):
    """Running moments of squared gradients, by parameter group."""

    enabled: bool = setting(False, "Whether `task=analyze` collects them.")
    top_k: int = setting(10, "Groups in the list of the most important.", whole(1))
    share: float = setting(0.1, "Share of the entries that the overlap calls the top.", above(0))
    save_state: bool = setting(True, "Save the state, to be taken up or merged later.")
    export_dtype: str = setting(
        "float32",
        "Dtype of exported tensors; the state is float64.",
        one_of("float64", "float32", "float16"),
    )

    def check(self) -> Problems:
        """Yields what a bound from below alone does not say."""
        if self.share > 1:
            yield "share", "above 0 and at most 1"
