"""The environment of the programs that are started: nothing in it rules what the user did not say.

``SBATCH_TIMELIMIT`` goes before a time limit in a job script, ``SQUEUE_PARTITION`` hides jobs, the
``SLURM_*`` of an allocation contradict the options of a job that is submitted inside it, and
``WANDB_SWEEP_ID`` moves a run to another project. Every child process, every submission and every
question to SLURM gets its environment from :func:`child`.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

SCHEDULER = re.compile(r"S(BATCH|LURM|LURMD|QUEUE|RUN|ALLOC|CANCEL|CONTROL|ACCT|INFO)_|SUBMITIT_")
"""Beginnings of the variables in which SLURM's programs, and submitit, look for options."""

ACCESS = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT", "SLURM_SACK_SOCKET")
"""How SLURM's programs find and enter the cluster; these are kept."""

TRACKED = (
    "WANDB_JOB_TYPE", "WANDB_NAME", "WANDB_PROJECT", "WANDB_RESUME", "WANDB_RUN_GROUP",
    "WANDB_RUN_ID", "WANDB_SWEEP_ID", "WANDB_SWEEP_PARAM_PATH", "WANDB_TAGS",
)  # fmt: skip
"""Variables by which W&B would choose another run, project or name than the configuration."""

OUTPUT = "utf-8:backslashreplace"
"""How Python writes into the logs of the processes that are started here."""


def python_path(root: Path | None = None) -> str:
    """``PYTHONPATH`` with which another process imports this very package, wherever it is run.

    Args:
        root: another directory that the package lies in.
    """
    first = str(root or Path(__file__).resolve().parents[2])
    known = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return os.pathsep.join([first, *(path for path in known if path and path != first)])


def is_ignored(name: str) -> bool:
    """Whether a variable is one of :data:`SCHEDULER` and not of :data:`ACCESS`."""
    return bool(SCHEDULER.match(name)) and name not in ACCESS


def child(
    variables: Mapping[str, str] | None = None, *, root: Path | None = None, in_job: bool = False
) -> dict[str, str]:
    """The environment of a program that is started.

    Args:
        variables: of its own.
        root: the directory from which it imports this package; None: this one.
        in_job: whether it is a part of the SLURM job that this process is, whose variables it
            keeps.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in TRACKED and (in_job or not is_ignored(name))
    }
    own = {"PYTHONPATH": python_path(root), "PYTHONIOENCODING": OUTPUT}
    if root is not None:  # before which the working directory would come, perhaps a checkout
        own["PYTHONSAFEPATH"] = "1"
    return {**kept, **own, **(variables or {})}


@contextlib.contextmanager
def cleaned(root: Path | None = None) -> Iterator[None]:
    """``os.environ`` as :func:`child` gives it, for a library that hands on what it finds there."""
    before, own = dict(os.environ), child(root=root)
    os.environ.clear()
    os.environ.update(own)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def ignored() -> str:
    """What of the environment :func:`child` leaves out, in words; empty where it is nothing."""
    names = sorted(name for name in os.environ if name in TRACKED or is_ignored(name))
    job = os.environ.get("SLURM_JOB_ID")
    within = [name for name in names if name.startswith("SLURM_")] if job else []
    said = [name for name in names if name not in within]
    if within:
        said.append(f"{len(within)} variables of the SLURM job {job} around it")
    return ", ".join(said)
