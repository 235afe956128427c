"""The schema: one dataclass a group, every key with its meaning, default and range.

Every key and its default reach Hydra from here (``store.py``); the files under ``conf/`` choose
among them. ``docs/configuration.md`` is made from this module. Nothing here imports torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from fisher_lab.config.fields import (
    Allowed,
    above,
    at_least,
    each_of,
    fraction,
    name_like,
    null,
    one_of,
    section,
    setting,
    whole,
)
from fisher_lab.config.spectra import GroupFisherConfig, LanczosConfig, SpectralConfig, on_ranks
from fisher_lab.config.workload import DataConfig, ModelConfig, OptimizerConfig, TrainConfig

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")

file_name = Allowed(
    "letters, digits, dots, dashes and underscores, beginning with a letter or a digit",
    lambda value: value is not None and _NAME.fullmatch(value) is not None,
)


@dataclass
class SweepConfig:
    """How a sweep is run (`docs/sweeps.md`)."""

    name: str | None = setting(
        None,
        "Name of the sweep's directory; null: its file's, or `adhoc-<hash>` without a file.",
        file_name | null,
    )
    dir: str = setting("results", "Where the directories of sweeps lie.")
    dry_run: bool = setting(
        False, "Compose and validate every cell, print what would be done, and stop."
    )
    detach: bool = setting(False, "Start or submit the cells and return at once.")
    max_failures: int | None = setting(
        None, "No further cell is started after this many have failed.", whole(1) | null
    )
    fail_fast: bool = setting(
        False, "The first failure also stops the cells that are running; they can be resumed."
    )
    timeout_s: float | None = setting(
        None,
        "Seconds that a cell may take; may differ between cells; not for `hydra/launcher=serial`.",
        above(0) | null,
    )
    max_requeues: int = setting(
        3, "How often a preempted job goes back to the queue before it has failed.", whole(0)
    )


@dataclass
class ResumeConfig:
    """What running a sweep again does with the cells that are there."""

    retry_failed: bool = setting(True, "Run cells that failed once more.")
    stale_after_s: float = setting(
        60.0,
        "Seconds without a sign of life after which a cell on another host counts as dead.",
        above(1),
    )


@dataclass
class DistributedConfig:
    """Several ranks: how many, where, and how long they wait for each other."""

    nproc: int = setting(
        1, "Ranks on each node; more than one are started by the run itself.", whole(1)
    )
    nodes: int = setting(
        1, "Nodes; which one this is comes from SLURM or `NODE_RANK`, `MASTER_ADDR`.", whole(1)
    )
    backend: str = setting(
        "auto",
        "What moves the data; auto: nccl between CUDA devices, else gloo.",
        one_of("auto", "gloo", "nccl"),
    )
    wrapper: str = setting(
        "ddp",
        "`task=train`: `ddp`: every rank has the whole model; `fsdp`: each has shards of it "
        "(`fully_shard`).",
        one_of("ddp", "fsdp"),
    )
    timeout_s: float = setting(
        1800.0, "A collective that waits for another rank longer than this ends the run.", above(0)
    )


POLICIES = ("all", "auto", "hybrid", "small_only")
STORAGE_DTYPES = ("auto", "fp64", "fp32", "bf16", "fp16")
CORE_DTYPES = ("float64", "float32", "auto")
TASKS = ("analyze", "train", "plan")
TRACKERS = ("wandb", "tensorboard")
MAX_SEED = 2**32 - 1


@dataclass
class KfacConfig:
    """The K-FAC engine (``docs/math.md``, sections 1 to 7)."""

    policy: str = setting(
        "auto",
        "Which layers take the Woodbury path on the G side (`docs/math.md`, section 4).",
        one_of(*POLICIES),
    )
    damping: float = setting(
        1e-4, "Tikhonov damping added to the eigenvalues of A and of G.", above(0)
    )
    damping_A: float | None = setting(
        None, "Damping of the A side alone; null: `kfac.damping`.", above(0) | null
    )
    damping_G: float | None = setting(
        None, "Damping of the G side alone; null: `kfac.damping`.", above(0) | null
    )
    max_condition_number: float | None = setting(
        1e6,
        "Damped eigenvalues are raised to the largest one over this number; null: no floor.",
        at_least(1) | null,
    )
    use_woodbury: bool = setting(True, "false: every layer dense, as with the policy `small_only`.")
    big_threshold: int = setting(
        1024, "`hybrid` sends a layer to Woodbury from this many outputs on.", whole(1)
    )
    auto_rho: float = setting(
        1.0, "`auto` takes Woodbury while tokens <= auto_rho * outputs.", above(0)
    )
    auto_t_max: int = setting(8192, "`auto` never takes Woodbury above this many tokens.", whole(1))
    eps: float = setting(
        1e-6,
        "First jitter of a Cholesky factorisation that failed, relative to the mean diagonal.",
        above(0),
    )
    true_fisher_head: bool = setting(
        False, "The exact Fisher factor of the softmax head (`docs/math.md`, section 5)."
    )
    fisher: str = setting(
        "empirical",
        "Labels from the data, sampled from the model, or their expectation.",
        one_of("empirical", "mc", "true"),
    )
    n_samples: int = setting(1, "Label draws a token for `fisher=mc`.", whole(1))
    true_max_classes: int = setting(
        64, "`fisher=true` is exact for the inner layers up to this many classes.", whole(1)
    )
    fisher_scale: str = setting(
        "natural",
        "`exact` puts the factor T/N of the mean loss into the natural gradient.",
        one_of("natural", "exact"),
    )
    tied: str = setting(
        "head",
        "Whose factors precondition a weight that head and embedding share.",
        one_of("head", "embedding", "sum"),
    )
    ekfac: bool = setting(False, "Correct the eigenvalues in the Kronecker eigenbasis (EKFAC).")
    eigenvalue_correction: bool = setting(
        True, "Damped and floored eigenvalues; false: raw damped ones."
    )
    update_freq: int = setting(10, "Steps between two refreshes of the factors.", whole(1))
    ema_decay: float = setting(
        0.99, "Decay of the legacy diagonal Fisher; never touches K-FAC factors.", fraction()
    )
    store_device: str = setting(
        "auto", "Where the Woodbury factors are kept.", one_of("auto", "cuda", "cpu")
    )
    store_limit_mb: float = setting(
        500.0, "`store_device=auto` keeps factors on the GPU below this many MB.", at_least(0)
    )
    woodbury_dtype: str = setting(
        "auto",
        "How token gradients are stored; auto: their own dtype. 16 bits where they are fewer than "
        "the outputs, else their own too.",
        one_of(*STORAGE_DTYPES),
    )
    core_dtype: str = setting("float64", "Dtype of the decompositions.", one_of(*CORE_DTYPES))
    apply_dtype: str = setting("float64", "Dtype of their application.", one_of(*CORE_DTYPES))
    push_through: bool = setting(
        True, "The form without cancellation for the factors' own gradient (section 3)."
    )
    max_columns: int = setting(
        8192, "More tokens than this are reduced on the Woodbury path.", whole(1)
    )
    max_dense_dim: int = setting(
        16384, "No square matrix of a larger side is ever formed.", whole(1)
    )
    column_reduction: str = setting(
        "subsample",
        "How columns past `kfac.max_columns` are reduced.",
        one_of("subsample", "lowrank"),
    )
    n_batches: int = setting(1, "Batches that the factors are built from.", whole(1))
    include: list[str] = setting([], "Only layers that match one of these patterns; empty: all.")
    exclude: list[str] = setting([], "Layers that match one of these patterns are left out.")
    norm_layers: bool = setting(True, "Cover the scales and shifts of normalisation layers.")
    uncovered: str = setting(
        "passthrough",
        "What happens to the gradient of parameters that K-FAC does not cover.",
        one_of("passthrough", "diagonal"),
    )
    save_factors: bool = setting(
        False, "`task=analyze`: keep the factors in `factors.safetensors` of the run directory."
    )
    reduce: str = setting(
        "gram",
        "How several processes join their factors; all equal on one process.",
        one_of("none", "gather", "gram"),
    )


@dataclass
class TaskConfig:
    """What the run does."""

    name: str = setting("analyze", "The task.", one_of(*TASKS))
    heldout_batches: int = setting(
        4, "Held-out batches on which a step along the natural gradient is judged.", whole(1)
    )


@dataclass
class TrackerConfig:
    """Where the numbers of the run are also sent."""

    sinks: list[str] = setting(
        [], "`wandb`, `tensorboard`, both, or none: `[]`.", each_of(*TRACKERS)
    )
    mode: str | None = setting(
        None,
        "`wandb`: `online`, `offline` or `disabled`; null: `$WANDB_MODE`, else online where there "
        "is a login.",
        one_of("online", "offline", "disabled") | null,
    )
    project: str = setting("fisher_lab", "`wandb`: the project.", name_like())
    entity: str | None = setting(None, "`wandb`: user or team; null: the login's own.")
    group: str | None = setting(None, "Runs that belong together; null: the sweep.")
    run_name: str | None = setting(None, "What the run is called; null: its overrides.")
    tags: list[str] = setting([], "`wandb`: tags of the run.")
    directory: str | None = setting(
        None, "Where the sinks keep their files; null: `tracker` in the run directory."
    )
    artifacts: bool = setting(
        True, "Also send tables, spectra and factor files as they lie in the run directory."
    )
    budget_s: float = setting(
        5.0, "Seconds that all sinks together may hold up the run.", at_least(0)
    )
    grace_s: float = setting(
        600.0,
        "Seconds that a sink may go on by itself after the run, to send what it has.",
        above(0),
    )


@dataclass
class Config:
    """A whole configuration."""

    seed: int = setting(
        0, "Seed of batches, sampling and everything after the checkpoint.", whole(0, MAX_SEED)
    )
    device: str = setting(
        "auto",
        "Where the model lives; auto: cuda where there is one.",
        one_of("auto", "cpu", "cuda"),
    )
    deterministic: bool = setting(False, "Only deterministic algorithms; slower.")
    threads: int | None = setting(
        None, "Threads of the numerical libraries; null: theirs.", whole(1) | null
    )
    progress: bool = setting(True, "Progress bars, where standard error is a terminal.")
    cache_dir: str | None = setting(
        None,
        "Cache of tokenizers and checkpoints; null: `$FISHER_LAB_CACHE`, else the user's cache.",
    )
    task: TaskConfig = section(TaskConfig)
    model: ModelConfig = section(ModelConfig)
    data: DataConfig = section(DataConfig)
    kfac: KfacConfig = section(KfacConfig)
    spectral: SpectralConfig = section(SpectralConfig)
    lanczos: LanczosConfig = section(LanczosConfig)
    group_fisher: GroupFisherConfig = section(GroupFisherConfig)
    optimizer: OptimizerConfig = section(OptimizerConfig)
    train: TrainConfig = section(TrainConfig)
    distributed: DistributedConfig = section(DistributedConfig)
    tracker: TrackerConfig = section(TrackerConfig)
    sweep: SweepConfig = section(SweepConfig)
    resume: ResumeConfig = section(ResumeConfig)

    def check(self):
        """What sections ask of each other."""
        ranks = self.distributed.nproc * self.distributed.nodes
        if ranks > 1 and self.task.name == "analyze":
            for key, value, allowed in on_ranks(self.spectral):
                yield f"spectral.{key}", value, allowed
        if ranks > 1 and self.distributed.backend == "nccl" and self.device == "cpu":
            yield "distributed.backend", "nccl", "gloo or auto with device=cpu"
