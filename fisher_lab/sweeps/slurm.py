"""``hydra/launcher=slurm_cpu`` and ``slurm_gpu``: jobs, by submitit.

submitit writes the job scripts, submits them and puts preempted jobs back into the queue. How a
cell ended is read from its record, and whether its job is still there from the queue: the launcher
may be gone at any time, and the next one attaches to the jobs that it left. ``slurm_debug`` runs
the same cells in processes of this machine.
"""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from submitit.helpers import DelayedSubmission

from fisher_lab.config.errors import ConfigError
from fisher_lab.config.launchers import LocalSettings, SlurmSettings
from fisher_lab.runs import environment, record
from fisher_lab.runs.status import Status
from fisher_lab.sweeps import worker, worker_process
from fisher_lab.sweeps.cell import CANCELLED_FILE, Cell, Outcome, death
from fisher_lab.sweeps.directory import Layout, tail
from fisher_lab.sweeps.local import LocalProcesses
from fisher_lab.sweeps.queue import Executor, say
from fisher_lab.sweeps.retry import Again
from fisher_lab.sweeps.worker_process import WorkerProcess

if TYPE_CHECKING:
    import submitit

TICK_S = 0.05
PATIENCE = 2
"""Looks at the queue at which a job must be gone before it counts as dead: records travel slowly
over network file systems."""
CANCEL_TIMEOUT_S = 120.0
"""How long the jobs of a cancelled launch may take to leave the queue."""
RESUMABLE = ("train",)
"""Tasks that go on where they were; any other that reached its time limit would reach it again."""

_MARGIN_S = 60.0
"""SLURM may send the signal this much earlier than it was asked to."""


@dataclass(frozen=True, kw_only=True)
class CellJob:
    """Runs the frozen cell of a file; pickled by submitit, by reference to this module.

    Attributes:
        threads: of the numerical libraries.
        grace_s: seconds that a worker has for saving its state.
        limit_s: the job's time limit, seconds.
        signal_delay_s: how long before it SLURM sends SIGUSR2.
        command: what Python is given to run a worker.
    """

    threads: int
    grace_s: float
    limit_s: float
    signal_delay_s: float
    command: tuple[str, ...]

    def __call__(self, path: str) -> str:
        """Run the cell.

        Returns:
            The status of its record: ``completed``, or ``held`` where somebody else runs it. On
            another node than the first, how its own worker ended: node 0 speaks for all of them.

        Raises:
            RuntimeError: it did not complete; SLURM is to see the job as failed.
        """
        cell = Cell.load(Path(path))
        node = worker.node_of(cell)
        asked: list[int] = []
        requeue = signal.signal(signal.SIGUSR2, lambda signum, _: asked.append(signum))
        process = WorkerProcess(
            cell, threads=self.threads, grace_s=self.grace_s, scheduled=True,
            command=self.command, node=node,
        )  # fmt: skip
        while (outcome := process.poll()) is None:
            if asked:
                process.ask(signal.SIGUSR2)
            time.sleep(TICK_S)
        if node == 0:
            cell.layout.finish_if_last()
        if node > 0 or outcome.status in (Status.COMPLETED, Status.HELD):
            return outcome.status.value
        if outcome.status is Status.PREEMPTED and self._may_come_back(cell, process.seconds):
            assert callable(requeue)
            requeue(signal.SIGUSR2, None)  # ends this process
        status = record.status_of(cell.directory) or outcome.status
        raise RuntimeError(
            f"{cell.run_id}: {status}: {outcome.message or ''}; see {cell.directory}"
        )

    def checkpoint(self, path: str) -> DelayedSubmission:
        """What submitit queues again: the same, which finds the state that the worker saved."""
        return DelayedSubmission(self, path)

    def _may_come_back(self, cell: Cell, seconds: float) -> bool:
        warned = record.read(cell.directory).get("reason") == signal.SIGUSR2.name
        if warned and cell.cancelled:
            return False
        limit_s = limit_of_this_job()
        is_as_asked = limit_s in (None, self.limit_s)
        limit_s = self.limit_s if limit_s is None else limit_s
        at_limit = seconds > limit_s - self.signal_delay_s - _MARGIN_S
        if at_limit and not (warned and cell.config.task.name in RESUMABLE):
            limit = f"hydra.launcher.timeout_min={limit_s / 60:g}" if is_as_asked else (
                f"{limit_s / 60:g} min, and not hydra.launcher.timeout_min={self.limit_s / 60:g}"
            )  # fmt: skip
            cell.give_up("timeout", f"reached the job's time limit ({limit})")
            return False
        if not warned:  # SIGTERM: if the scheduler wants the job back, it does so itself
            return False
        allowed = cell.config.sweep.max_requeues
        if _preemptions(cell) > allowed:
            cell.give_up("max_requeues", f"preempted more often than sweep.max_requeues={allowed}")
            return False
        cell.layout.journal.append("requeued", run_id=cell.run_id)
        return True


def _preemptions(cell: Cell) -> int:
    """How often this cell was preempted since it was last submitted."""
    count = 0
    for entry in cell.layout.journal.read():
        if entry["event"] == "submitted" and cell.run_id in entry.get("jobs", {}):
            count = 0
        elif entry["event"] == Status.PREEMPTED and entry.get("run_id") == cell.run_id:
            count += 1
    return count


ENDED = frozenset({
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY",
    "PREEMPTED", "REVOKED", "TIMEOUT",
})  # fmt: skip
"""States of a job that does not come back."""

GONE = "GONE"
"""State of a job that the controller of this cluster does not know, or knows no more."""

_TIMEOUT_S = 60


def states(jobs: Iterable[str]) -> dict[str, str] | None:
    """The state of jobs, whoever has submitted them.

    Args:
        jobs: numbers as sbatch gives them, ``12`` or ``12_3``.

    Returns:
        Job -> state, :data:`GONE` where neither the queue of this cluster nor its accounting knows
        how the job stands; None where the controller does not answer, which says nothing of them.
    """
    wanted = set(jobs)
    if not wanted:
        return {}
    numbers = ",".join(sorted({job.partition("_")[0] for job in wanted}))
    text = _ask(["squeue", "-a", "-h", "-r", "-t", "all", "-j", numbers, "-o", "%i|%T"])
    if text is None:
        return None
    known = _states_in(text)
    if not wanted <= set(known):
        text = _ask(["sacct", "-X", "-n", "-P", "-j", numbers, "-o", "JobID,State"]) or ""
        ended = {job: state for job, state in _states_in(text).items() if state in ENDED}
        known = {**ended, **known}
    return {job: known.get(job, GONE) for job in wanted}


def _states_in(text: str) -> dict[str, str]:
    """Job -> state, from lines such as ``12_3|CANCELLED by 1000``."""
    lines = (line.strip().split("|", 1) for line in text.splitlines() if "|" in line)
    return {job: (state.split() or [""])[0] for job, state in lines}


def is_active(state: str | None) -> bool:
    """Whether a job of this state may still run; not one of which nothing is known."""
    return state is not None and state not in ENDED and state != GONE


def cluster() -> str | None:
    """The name of the cluster that SLURM's programs reach from here; None where there is none."""
    return _configured("ClusterName")


def max_array_size() -> int:
    """How many jobs an array may have here; SLURM's own default where it does not say."""
    given = _configured("MaxArraySize") or ""
    # Its largest index is one less than this number, and indices begin at 0.
    return max(1, int(given)) if given.isdecimal() else 1001


def _configured(name: str) -> str | None:
    for line in (_ask(["scontrol", "show", "config"]) or "").splitlines():
        key, _, value = line.partition("=")
        if key.strip() == name:
            return value.strip()
    return None


def limit_of_this_job(field: str = "%l") -> float | None:
    """Seconds that the job which this process is a part of may take; None where unknown.

    Args:
        field: of squeue; ``%L`` for those that are left of them.
    """
    job = os.environ.get("SLURM_JOB_ID")
    text = _ask(["squeue", "-h", "-j", job, "-o", field]) if job else None
    found = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", (text or "").strip())
    if found is None:  # such as UNLIMITED
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


def cancel(jobs: Iterable[str]) -> bool:
    """Cancel jobs; false where the controller did not take it."""
    wanted = sorted(set(jobs))
    return not wanted or _ask(["scancel", "--quiet", *wanted]) is not None


def _ask(command: list[str]) -> str | None:
    """What a program of SLURM prints; None where there is none, or it has no answer."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT_S,
            check=False, env=environment.child({"LC_ALL": "C"}),
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    # Of one job that it does not know squeue says so; of one among several it says nothing.
    is_answer = done.returncode == 0 or "Invalid job id" in done.stderr
    return done.stdout if is_answer else None


def executor(settings: SlurmSettings) -> Executor:
    """Jobs of SLURM; with ``cluster=local`` processes of this machine, for trying things out."""
    if settings.cluster == "slurm":
        return SubmititJobs(settings)
    threads = settings.threads or settings.cpus_per_task
    return LocalProcesses(LocalSettings(settings.array_parallelism, threads, settings.grace_s))


class SubmititJobs(Executor):
    """A job of SLURM for each cell, all in arrays at once.

    Args:
        settings: of the launcher.
    """

    limit = None
    pause_s = TICK_S

    def __init__(self, settings: SlurmSettings) -> None:
        self._settings = settings
        self._jobs: dict[Cell, str] = {}
        self._cluster: str | None = None
        self._gone: Counter[Cell] = Counter()
        self._looked = 0.0
        self._withdrawn = False

    @property
    def running(self) -> list[Cell]:
        """The cells whose jobs wait or run."""
        return list(self._jobs)

    def start(self, cells: Sequence[Cell]) -> None:
        """Submit cells, but for those that SLURM has in its queue: their jobs are attached to.

        Jobs of a launch that was cancelled are on their way out, and no others are put beside them.

        Raises:
            ConfigError: there is no SLURM here, or it does not take the jobs.
        """
        self._cluster = cluster()
        left = {layout: Jobs.of(layout) for layout in {cell.layout for cell in cells}}
        _wait_for_cancelled_jobs(left.values(), self._cluster, self._settings.poll_s)
        last = {c: job for c in cells if (job := left[c.layout].last.get(c.run_id)) is not None}
        here = {job for jobs in left.values() for job in jobs.here(last.values(), self._cluster)}
        active = states(here) or {}
        for cell in cells:
            if is_active(active.get(last.get(cell, ""))):
                self._jobs[cell] = last[cell]
        wanted = [cell for cell in cells if cell not in self._jobs]
        if len(wanted) < len(cells):
            say(f"{len(cells) - len(wanted)} cells are in the queue already")
        if wanted and (ignored := environment.ignored()):
            say(f"not handed on to SLURM, which takes hydra.launcher alone: {ignored}")
        where = {"cluster": self._cluster} if self._cluster else {}
        for batch, settings in self._batches(wanted):
            jobs = _submit(batch, settings)
            self._jobs |= {cell: job.job_id for cell, job in zip(batch, jobs, strict=True)}
            for layout in dict.fromkeys(cell.layout for cell in batch):
                own = {cell.run_id: self._jobs[cell] for cell in batch if cell.layout == layout}
                layout.journal.append("submitted", jobs=own, **where)
            say(f"submitted {len(batch)} cells as {jobs[0].job_id.partition('_')[0]}")

    def _batches(self, cells: Sequence[Cell]) -> Iterator[tuple[list[Cell], SlurmSettings]]:
        """Arrays of cells with what their jobs get: more where they have failed for the want."""
        size = self._settings.max_array_size or max_array_size()
        by_need: dict[Again, list[Cell]] = {}
        for cell in cells:
            by_need.setdefault(replace(cell.again, said="", is_due=False), []).append(cell)
        for need, own in by_need.items():
            for batch in batches(own, size):
                yield batch, raised(self._settings, need)

    def ended(self) -> list[tuple[Cell, Outcome]]:
        """Ask the queue, at most every ``poll_s``; the cells whose jobs have ended."""
        if not self._jobs or time.monotonic() - self._looked < self._settings.poll_s:
            return []
        known, found = states(self._jobs.values()), []
        self._looked = time.monotonic()
        if known is None:
            return []
        for cell, job in list(self._jobs.items()):
            if is_active(known[job]):
                self._gone.pop(cell, None)
                continue
            self._gone[cell] += 1
            state = cell.state
            if state is Status.RUNNING or (not state.is_final and self._gone[cell] < PATIENCE):
                continue  # somebody else runs it, or the lock of a dead node is not stale yet
            state = end_cell(cell, job, known[job])
            why = record.brief(cell.directory) if state is Status.FAILED else None
            del self._jobs[cell]
            found.append((cell, Outcome(state, why)))
        return found

    def stop(self, cells: Sequence[Cell]) -> None:
        """Cancel jobs, and mark their launch for those that have not come to their cell."""
        wanted = [cell for cell in cells if cell in self._jobs]
        _mark_cancelled(wanted)
        cancel(self._jobs[cell] for cell in wanted)

    def withdraw(self) -> None:
        """Cancel the jobs of SLURM that have not begun."""
        if self._withdrawn:
            return
        self._withdrawn = True
        known = states(self._jobs.values()) or {}
        _mark_cancelled(self._jobs)
        cancel(job for job, state in known.items() if state == "PENDING")


def _mark_cancelled(cells: Iterable[Cell]) -> None:
    """Tell the cells of these launches that have not begun not to begin."""
    for submission in {cell.submission for cell in cells}:
        (submission / CANCELLED_FILE).touch()


class Jobs(NamedTuple):
    """What the journal of a sweep says of its jobs.

    Attributes:
        last: identity of a cell -> the job that it was last submitted as.
        cancelled: jobs that the user has cancelled.
        past: jobs whose end says nothing of their cells, because something came after them: they
            were cancelled, or the sweep went on with another launcher.
        clusters: job -> the cluster that it was submitted to, where that is known.
    """

    last: dict[str, str]
    cancelled: set[str]
    past: set[str]
    clusters: dict[str, str]

    @classmethod
    def of(cls, layout: Layout) -> Jobs:
        """Read the journal of a sweep."""
        jobs, submitted = cls({}, set(), set(), {}), set[str]()
        for entry in layout.journal.read():
            if entry["event"] == "submitted":
                jobs.last.update(entry["jobs"])
                submitted.update(entry["jobs"].values())
                if entry.get("cluster"):
                    jobs.clusters.update(dict.fromkeys(entry["jobs"].values(), entry["cluster"]))
            elif entry["event"] == "cancel":
                jobs.cancelled.update(submitted)
                jobs.past.update(submitted)
            elif entry["event"] == "launched" and entry["launcher"] != "slurm":
                jobs.past.update(submitted)
        return jobs

    def here(self, jobs: Iterable[str], cluster: str | None) -> set[str]:
        """Jobs but for those of another cluster, where their numbers are those of other jobs."""
        return {job for job in jobs if self.clusters.get(job, cluster) == cluster}


def _wait_for_cancelled_jobs(found: Iterable[Jobs], here: str | None, poll_s: float) -> None:
    """Until the jobs that the user has cancelled have left the queue.

    Raises:
        ConfigError: they do not.
    """
    cancelled = {job for jobs in found for job in jobs.here(jobs.cancelled, here)}
    until, said = time.monotonic() + CANCEL_TIMEOUT_S, False
    while left := sorted(j for j, state in (states(cancelled) or {}).items() if is_active(state)):
        if time.monotonic() > until:
            raise ConfigError(
                f"jobs of a cancelled launch are still in the queue: {', '.join(left)}; try again "
                "when they have left it"
            )
        if not said:
            say(f"waiting for {len(left)} cancelled jobs to leave the queue")
        said = True
        time.sleep(poll_s)


def batches(cells: Sequence[Cell], size: int) -> Iterator[list[Cell]]:
    """Arrays of at most ``size`` cells; those that run alone in arrays of their own."""
    for alone in (False, True):
        own = [cell for cell in cells if cell.alone == alone]
        for start in range(0, len(own), size):
            yield own[start : start + size]


_OPTIONS = (
    "partition", "account", "qos", "constraint", "gres", "mail_user", "mail_type", "setup",
    "signal_delay_s",
)  # fmt: skip
"""Settings that submitit takes under the same name, after ``slurm_``."""


def submitit_executor(
    settings: SlurmSettings, folder: Path, requeues: int, *, alone: bool
) -> submitit.AutoExecutor:
    """The executor of submitit with everything set."""
    import submitit

    made = submitit.AutoExecutor(
        folder=folder,
        cluster="slurm",
        slurm_max_num_timeout=requeues + 1,
        slurm_python=settings.python,
    )
    given = {
        "name": "fisher_lab",
        "timeout_min": settings.timeout_min,
        "nodes": settings.nodes,
        "tasks_per_node": 1,
        "cpus_per_task": settings.cpus_per_task,
        "gpus_per_node": settings.gpus_per_node,
        "mem_gb": settings.mem_gb,
        "slurm_array_parallelism": 1 if alone else settings.array_parallelism,
        "slurm_exclusive": True if alone else None,
        **{f"slurm_{name}": getattr(settings, name) for name in _OPTIONS},
        # submitit would take the name of the signal from the environment.
        "slurm_additional_parameters": {
            "signal": f"USR2@{settings.signal_delay_s}",
            **(settings.additional_parameters or {}),
        },
    }
    made.update_parameters(
        **{name: value for name, value in given.items() if value not in (None, [])}
    )
    return made


def raised(settings: SlurmSettings, need: Again) -> SlurmSettings:
    """The settings of a job that gets more memory or time than others."""
    memory = settings.mem_gb
    return replace(
        settings,
        mem_gb=None if memory is None else memory * need.memory,
        timeout_min=math.ceil(settings.timeout_min * need.time),
    )


def _submit(cells: Sequence[Cell], settings: SlurmSettings) -> list[submitit.Job[Any]]:
    job = CellJob(
        threads=settings.threads or settings.cpus_per_task,
        grace_s=settings.grace_s,
        limit_s=60.0 * settings.timeout_min,
        signal_delay_s=settings.signal_delay_s,
        command=worker_process.WORKER,
    )
    requeues = max(cell.config.sweep.max_requeues for cell in cells)
    return submit_array(job, [str(cell.path) for cell in cells], settings, cells[0], requeues)


def submit_array(
    job: Callable[..., Any],
    arguments: Sequence[Any],
    settings: SlurmSettings,
    cell: Cell,
    requeues: int,
) -> list[submitit.Job[Any]]:
    """Submit a job for each argument.

    Args:
        job: what submitit pickles and calls.
        arguments: of the jobs.
        settings: of the launcher.
        cell: one of those that the jobs are about, all of one launch.
        requeues: how often a job that has reached its time limit may be queued again.

    Raises:
        ConfigError: there is no SLURM here, or it does not take the jobs.
    """
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    folder = cell.submission / "slurm" / "%j"
    try:
        # Where sbatch looks for options, and what it hands on to the job.
        with environment.cleaned(cell.code_root):
            made = submitit_executor(settings, folder, requeues, alone=cell.alone)
            return made.map_array(job, arguments)
    except (FailedSubmissionError, FailedJobError, RuntimeError, OSError) as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise ConfigError(
            f"SLURM does not take the jobs: {lines[-1] if lines else error}"
        ) from None


def end_cell(cell: Cell, job: str, job_state: str) -> Status:
    """End the record of a cell whose job has ended and is not coming back.

    Args:
        cell: the cell; nobody runs it.
        job: its number.
        job_state: the last that the queue says of it.

    Returns:
        The cell's state from now on.
    """
    state = cell.state
    if state.is_final or state is Status.RUNNING:
        return state
    # Under the mark of sweep.max_failures a job that runs goes on, and may die.
    may_have_died = state is Status.INTERRUPTED and job_state != GONE
    if job_state == "CANCELLED" or (cell.cancelled and not may_have_died):
        if state is Status.CANCELLED or (state is Status.MISSING and cell.cancelled):
            return Status.CANCELLED
        status, error = Status.CANCELLED, None
    elif (
        job_state == "COMPLETED" and not cell.cancelled
    ):  # it found the cell held, by somebody who has not completed it
        return Status.INTERRUPTED
    else:
        message = lost_message(cell.layout, job, job_state)
        error = death(message, job=job, log_tail=_printed(cell.layout, job))
        status = Status.FAILED
    return status if cell.settle_lost(status, job_state, error) else cell.state


def lost_message(layout: Layout, job: str, job_state: str) -> str:
    """Why a cell has failed whose job is gone, with the last line that the job has printed."""
    last = (_printed(layout, job).splitlines() or [""])[-1]
    return f"the job {job} ended as {job_state} and left no result" + (f": {last}" if last else "")


def _printed(layout: Layout, job: str) -> str:
    """The end of a job's own log, whichever launch has submitted it."""
    logs = layout.submissions.glob(f"*/slurm/{job}/{job}_0_log.err")
    return next(filter(None, map(tail, logs)), "")
