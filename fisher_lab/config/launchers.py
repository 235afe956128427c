"""What the launchers take: the keys of ``hydra.launcher``, checked as the rest of the schema is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from fisher_lab.config.errors import ConfigError
from fisher_lab.config.fields import Problems, above, null, one_of, setting, whole
from fisher_lab.config.validate import build


@dataclass
class SerialSettings:
    """``hydra/launcher=serial``: one cell after the other, in the launching process."""

    executor: ClassVar[str] = "fisher_lab.sweeps.local:InProcess"


@dataclass
class LocalSettings:
    """``hydra/launcher=local``: a bounded pool of processes on this machine."""

    executor: ClassVar[str] = "fisher_lab.sweeps.local:LocalProcesses"
    n_jobs: int = setting(1, "How many cells run at once.", whole(1))
    threads: int | None = setting(
        None,
        "Threads a cell; null: `$OMP_NUM_THREADS`, else the processors over `n_jobs`.",
        whole(1) | null,
    )
    grace_s: float = setting(
        20.0, "Seconds between asking a cell to save and end, and killing it.", above(0)
    )


@dataclass
class WorkersSettings:
    """``hydra/launcher=workers``: the cells are left to `fisher-lab work`."""

    executor: ClassVar[str] = "fisher_lab.sweeps.workers:Workers"
    poll_s: float = setting(2.0, "Seconds between two looks at what the workers do.", above(0))


@dataclass
class SlurmSettings:
    """``hydra/launcher=slurm_cpu``, ``slurm_gpu`` and ``slurm_debug``: job arrays by submitit."""

    executor: ClassVar[str] = "fisher_lab.sweeps.slurm_workers:executor"
    cluster: str = setting(
        "slurm",
        "`local`: processes of this machine, to try things out.",
        one_of("slurm", "local"),
    )
    partition: str | None = setting(None, "sbatch --partition.")
    account: str | None = setting(None, "sbatch --account.")
    qos: str | None = setting(None, "sbatch --qos.")
    constraint: str | None = setting(None, "sbatch --constraint.")
    gres: str | None = setting(None, "sbatch --gres, such as gpu:a100:1.")
    gpus_per_node: int | None = setting(None, "sbatch --gpus-per-node.", whole(1) | null)
    nodes: int = setting(1, "sbatch --nodes.", whole(1))
    cpus_per_task: int = setting(1, "sbatch --cpus-per-task.", whole(1))
    mem_gb: float | None = setting(None, "sbatch --mem, GiB.", above(0) | null)
    timeout_min: int = setting(60, "sbatch --time, minutes.", whole(1))
    array_parallelism: int = setting(64, "How many jobs of an array run at once.", whole(1))
    max_array_size: int | None = setting(
        None, "Cells an array at most; null: what the cluster allows.", whole(1) | null
    )
    mail_user: str | None = setting(None, "sbatch --mail-user.")
    mail_type: str | None = setting(None, "sbatch --mail-type.")
    setup: list[str] = setting([], "Shell lines before the job, such as module load or activate.")
    python: str | None = setting(
        None,
        "Command that starts Python on the node, such as 'singularity exec x.sif python'; null: "
        "the one that launches.",
    )
    threads: int | None = setting(None, "Threads a cell; null: `cpus_per_task`.", whole(1) | null)
    signal_delay_s: int = setting(
        90, "Seconds before the time limit at which a cell is told to save.", whole(0)
    )
    grace_s: float = setting(20.0, "Seconds a cell has for saving its state.", above(0))
    poll_s: float = setting(2.0, "Seconds between two looks at the queue.", above(0))
    workers: int | None = setting(
        None,
        "How many workers take the cells, each in a job of its own; null: a job for each cell.",
        whole(1) | null,
    )
    additional_parameters: dict[str, Any] | None = setting(
        None, "Any other option of sbatch: {reservation: mine, nice: 100}."
    )

    def check(self) -> Problems:
        """A job of another cluster could not be asked for by its number here."""
        if {"clusters", "M"} & set(self.additional_parameters or {}):
            allowed = "without clusters: submit where SLURM_CONF is that cluster's"
            yield "additional_parameters", allowed
        if self.workers is not None and self.cluster != "slurm":
            yield "workers", "null with cluster=local, which starts processes: array_parallelism"


Settings = SerialSettings | LocalSettings | WorkersSettings | SlurmSettings

KINDS: dict[str, type[Settings]] = {
    "serial": SerialSettings,
    "local": LocalSettings,
    "workers": WorkersSettings,
    "slurm": SlurmSettings,
}
"""``kind`` in a file of ``conf/hydra/launcher/`` -> the settings, which name their executor."""


def check(kind: str, given: Mapping[str, Any]) -> Settings:
    """The typed settings of a launcher.

    Args:
        kind: a key of :data:`KINDS`.
        given: plain values.

    Raises:
        ConfigError: an unknown kind, a key that no launcher reads or a value that is not allowed.
    """
    if kind not in KINDS:
        raise ConfigError.value("hydra.launcher.kind", kind, f"one of {', '.join(KINDS)}")
    return build(KINDS[kind], given, "hydra.launcher.")
