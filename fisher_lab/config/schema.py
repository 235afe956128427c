"""The schema: one dataclass a group, every key with its meaning, default and range.

Every key and its default reach Hydra from here (`sweep_files.register`); the files under ``conf/``
choose among them. ``docs/configuration.md`` is made from this module. Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from fisher_lab.config.fields import (
    Problems,
    above,
    at_least,
    each_above,
    each_of,
    factor,
    matching,
    null,
    one_of,
    section,
    setting,
    whole,
)
from fisher_lab.config.kfac import KFACSettings
from fisher_lab.config.spectra import GroupFisherSection, LanczosSection, SpectralSection
from fisher_lab.config.workload import DataConfig, ModelConfig, OptimizerConfig, TrainConfig

file_name = matching(
    r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}",
    "at most 128 letters, digits, dots, dashes and underscores, beginning with a letter or a digit",
)
service_name = matching(r"[A-Za-z0-9._-]{1,128}", "letters, digits, '.', '_' and '-', at most 128")

ON_RANKS = "full, chunked or streaming on several ranks (distributed.nproc=1 sketches)"
"""What ``spectral.storage_mode`` must be there."""


@dataclass
class RetryPolicy:
    """What is done about one kind of failure."""

    times: int = setting(0, "How often a cell that failed so runs again in a launch.", whole(0))
    mem_gb: str | None = setting(
        None, "By what the memory of its job is multiplied each time: `x2`.", factor | null
    )
    timeout_min: str | None = setting(
        None, "By what its time limits are multiplied each time: `x2`.", factor | null
    )

    def check(self) -> Problems:
        """More memory or time is of use to a cell that runs again alone."""
        if self.times == 0 and (self.mem_gb or self.timeout_min):
            yield "times", "at least 1 beside mem_gb or timeout_min"


@dataclass
class RetryConfig:
    """Cells that failed run again, by the kind of failure (`docs/sweeps.md`)."""

    oom: RetryPolicy = section(RetryPolicy)
    time: RetryPolicy = section(RetryPolicy)
    node: RetryPolicy = section(RetryPolicy)
    code: RetryPolicy = section(RetryPolicy)


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
    until: str | None = setting(
        None,
        "`decided`: run the first seeds, and then those cells alone that open claims need, until "
        "every claim is decided (`docs/results.md`); null: the seeds that are given.",
        one_of("decided") | null,
    )
    register: bool = setting(
        False, "Write down claims, designs and cells before the first run, and stop."
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
    retry: RetryConfig = section(RetryConfig)


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


TASKS = ("analyze", "train", "plan", "ladder")
TRACKERS = ("wandb", "tensorboard")
MAX_SEED = 2**32 - 1


@dataclass
class KfacConfig(KFACSettings):
    """The K-FAC engine (``docs/math.md``, sections 1 to 7), and what the tasks do with it."""

    n_batches: int = setting(1, "Batches that the factors are built from.", whole(1))
    save_factors: bool = setting(
        False, "`task=analyze`: keep the factors in `factors.safetensors` of the run directory."
    )
    verify: bool = setting(
        True,
        "Compare the gradient that the tokens of the first refresh give with autograd's, and end "
        "the run where they differ by more than rounding; it costs one more backward pass.",
    )


@dataclass
class TaskConfig:
    """What the run does."""

    name: str = setting("analyze", "The task.", one_of(*TASKS))
    heldout_batches: int = setting(
        4,
        "Held-out batches: half of them choose the length of a step along each direction, the "
        "other half judges it (`docs/math.md`, section 10); 0: no step is tried.",
        whole(0),
    )
    engine_batches: int | None = setting(
        None,
        "Batches of the spectral engines and of group Fisher; null: `kfac.n_batches`.",
        whole(1) | null,
    )
    damping_scan: list[float] = setting(
        [],
        "`task=analyze`: multiples of the run's dampings that are tried on the same factors, each "
        "of the A side with each of the G side, such as [0.01,0.1,1,10,100]; empty: no scan.",
        each_above(0),
    )
    ladder_damping: float = setting(
        100.0,
        "`task=ladder`: the damping of every rung, in mean eigenvalues of the Fisher matrix.",
        above(0),
    )
    ladder_tol: float = setting(
        1e-10, "`task=ladder`: relative residual of the exact answers.", above(0)
    )
    ladder_products: int = setting(
        2000, "`task=ladder`: products after which an exact answer is given up.", whole(2)
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
    project: str = setting("fisher_lab", "`wandb`: the project.", service_name)
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
    spectral: SpectralSection = section(SpectralSection)
    lanczos: LanczosSection = section(LanczosSection)
    group_fisher: GroupFisherSection = section(GroupFisherSection)
    optimizer: OptimizerConfig = section(OptimizerConfig)
    train: TrainConfig = section(TrainConfig)
    distributed: DistributedConfig = section(DistributedConfig)
    tracker: TrackerConfig = section(TrackerConfig)
    sweep: SweepConfig = section(SweepConfig)
    resume: ResumeConfig = section(ResumeConfig)

    def check(self) -> Problems:
        """What sections ask of each other."""
        if self.task.damping_scan and not self.task.heldout_batches:
            yield "task.heldout_batches", "at least 1 with task.damping_scan"
        if self.task.name == "ladder":
            if self.kfac.tied == "sum":
                yield "kfac.tied", "head or embedding with task=ladder"
            if self.distributed.nproc * self.distributed.nodes > 1:
                yield "distributed.nproc", "1 with task=ladder"
        if self.distributed.nproc * self.distributed.nodes == 1:
            return
        if self.task.name == "analyze" and self.spectral.sketches:
            yield "spectral.storage_mode", ON_RANKS
        if self.distributed.backend == "nccl" and self.device == "cpu":
            yield "distributed.backend", "gloo or auto with device=cpu"
