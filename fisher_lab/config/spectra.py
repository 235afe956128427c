"""The spectral engines: sections ``spectral``, ``lanczos`` and ``group_fisher``.

Each is off by default and switched on by its group. Definitions in ``docs/math.md``, sections 8
and 9. Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from fisher_lab.config.fields import above, at_least, null, one_of, setting, whole

STRUCTURES = ("layer", "module", "parameter", "full")
MAX_SEED = 2**32 - 1


@dataclass
class SpectralConfig:
    """Spectra of the block-diagonal empirical Fisher matrix."""

    enabled: bool = setting(False, "Whether `task=analyze` computes them.")
    block_structure: str = setting("layer", "What a block is.", one_of(*STRUCTURES))
    sample_unit: str = setting(
        "token",
        "A row of J: a labelled token's or a sequence's gradient.",
        one_of("token", "sequence"),
    )
    n_samples: int | None = setting(None, "Samples, by a stable hash; null: all.", whole(1) | null)
    center_gradients: bool = setting(False, "Gradient covariance instead of the Fisher matrix.")
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
    eigensolve_device: str = setting(
        "auto", "Where matrices are decomposed.", one_of("auto", "cpu", "cuda")
    )
    dtype_eigensolve: str = setting(
        "float64", "In which matrices are decomposed.", one_of("float64", "float32")
    )
    sketch_rank: int = setting(
        32, "Eigenvalues of a `sketch` a block where `top_k` is null.", whole(1)
    )
    regularization: float = setting(
        1e-10, "Added to the diagonal, relative to its mean, only after a failure.", at_least(0)
    )
    seed: int = setting(42, "Seed of the subsample and the sketch.", whole(0, MAX_SEED))


def on_ranks(spectral: SpectralConfig):
    """Yields what the spectrum cannot do on several ranks: key, value and what is allowed."""
    if spectral.enabled and spectral.storage_mode == "sketch":
        allowed = "full, chunked or streaming on several ranks (distributed.nproc=1 sketches)"
        yield "storage_mode", spectral.storage_mode, allowed


@dataclass
class LanczosConfig:
    """Top eigenpairs, spectral density, trace and effective dimension, matrix-free."""

    enabled: bool = setting(False, "Whether `task=analyze` runs it.")
    k: int = setting(10, "Eigenpairs.", whole(1))
    operator: str = setting("empirical", "Which matrix.", one_of("empirical", "true", "hessian"))
    block: str | None = setting(None, "A block's name; null: the whole model.")
    max_vectors: int | None = setting(
        None, "Basis vectors; null: max(2k + 10, 20).", whole(3) | null
    )
    max_products: int | None = setting(
        None, "Products at most; null: 20 a vector, 300 at least.", whole(1) | null
    )
    tol: float = setting(1e-6, "Residual over the largest eigenvalue at convergence.", above(0))
    which: str = setting(
        "largest", "Which end of the spectrum.", one_of("largest", "smallest", "magnitude")
    )
    reorthogonalize: bool = setting(
        True, "Full reorthogonalisation; false: only with `density_probes=0`."
    )
    vector_device: str = setting("auto", "Where the basis lives.", one_of("auto", "cpu", "cuda"))
    vector_dtype: str = setting(
        "auto", "Of the basis; auto: the parameters' own.", one_of("auto", "float64", "float32")
    )
    products: str = setting(
        "auto", "How J v is formed.", one_of("auto", "forward", "double_backward")
    )
    density_probes: int = setting(
        4,
        "Random vectors behind density, trace and effective dimension; 0: eigenpairs alone.",
        whole(0),
    )
    density_steps: int = setting(20, "Lanczos steps a random vector.", whole(2))
    dimension_damping: float | None = setting(
        1e-4, "lam of tr(F (F + lam I)^-1); null: none.", above(0) | null
    )
    seed: int = setting(
        42, "Seed of the first vector and of the random vectors.", whole(0, MAX_SEED)
    )

    def check(self):
        """Yields what concerns more than one key."""
        if self.max_vectors is not None and self.max_vectors < self.k + 2:
            yield "max_vectors", self.max_vectors, f"null, or at least lanczos.k + 2 = {self.k + 2}"
        if self.enabled and not self.reorthogonalize and self.density_probes > 0:
            yield "reorthogonalize", False, "true, or false with lanczos.density_probes=0"


@dataclass
class GroupFisherConfig:
    """Running moments of squared gradients, by parameter group."""

    enabled: bool = setting(False, "Whether `task=analyze` collects them.")
    unit: str = setting(
        "sequence",
        "What is squared: `batch` is cheap and not the diagonal Fisher.",
        one_of("batch", "sequence", "token"),
    )
    sequence_weight: str = setting(
        "tokens", "Weight of a sequence: its active tokens, or one.", one_of("tokens", "one")
    )
    chunk_size: int = setting(16, "Gradients of one backward pass.", whole(1))
    top_k: int = setting(10, "Groups in the list of the most important.", whole(1))
    share: float = setting(0.1, "Share of the entries that the overlap calls the top.", above(0))
    save_state: bool = setting(True, "Save the state, to be taken up or merged later.")
    export_dtype: str = setting(
        "float32",
        "Dtype of exported tensors; the state is float64.",
        one_of("float64", "float32", "float16"),
    )

    def check(self):
        """Yields what a bound from below alone does not say."""
        if self.share > 1:
            yield "share", self.share, "above 0 and at most 1"
