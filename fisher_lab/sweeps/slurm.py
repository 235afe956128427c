"""``hydra/launcher=slurm_cpu`` and ``slurm_gpu``: job arrays, by submitit.

submitit writes the job scripts, submits them and puts preempted jobs back into the queue. How a
cell ended is read from its record, and whether its job is still there from the queue (`scheduler`):
the launcher may be gone at any time, and the next one attaches to the jobs that it left.
"""

from __future__ import annotations

import getpass
import os
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from submitit.helpers import DelayedSubmission

from fisher_lab.config.errors import ConfigError
from fisher_lab.config.launchers import SlurmSettings
from fisher_lab.runs import record
from fisher_lab.runs.signals import Watch
from fisher_lab.sweeps import worker, worker_process
from fisher_lab.sweeps.cell import CANCELLED_FILE, Cell, Frozen
from fisher_lab.sweeps.directory import Layout
from fisher_lab.sweeps.tally import Tally, say
from fisher_lab.sweeps.worker_process import Ending, Job, brief, died, end_lost, give_up, tail

TICK_S = 0.05
RESUMABLE = ("train",)
"""Tasks that go on where they were; any other that reached its time limit would reach it again."""

_MARGIN_S = 60.0
"""SLURM may send the signal this much earlier than it was asked to."""


class CellFailed(RuntimeError):
    """The cell did not complete; SLURM is to see the job as failed."""


class CellJob:
    """Runs the frozen cell of a file; pickled by submitit, by reference to this module.

    Args:
        threads: of the numerical libraries.
        grace_s: seconds that a worker has for saving its state.
        limit_s: the job's time limit, seconds.
        signal_delay_s: how long before it SLURM sends SIGUSR2.
        command: what Python is given to run a worker.
    """

    def __init__(
        self,
        *,
        threads: int,
        grace_s: float,
        limit_s: float,
        signal_delay_s: float,
        command: tuple[str, ...],
    ) -> None:
        self.threads = threads
        self.grace_s = grace_s
        self.limit_s = limit_s
        self.signal_delay_s = signal_delay_s
        self.command = command

    def __call__(self, path: str) -> str:
        """Run the cell.

        Returns:
            The status of its record: ``completed``, or ``held`` where somebody else runs it. On
            another node than the first, how its own worker ended: node 0 speaks for all of them.

        Raises:
            CellFailed: it did not complete.
        """
        frozen = Frozen.load(Path(path))
        asked: list[int] = []

        def note(signum: int, _: FrameType | None) -> None:
            asked.append(signum)

        node = frozen.node
        requeue = signal.signal(signal.SIGUSR2, note)
        job = Job(
            frozen,
            threads=self.threads,
            grace_s=self.grace_s,
            environment={worker.SCHEDULED: "slurm"},
            command=self.command,
            node=node,
        )
        while (ending := job.poll()) is None:
            if asked:
                job.ask(signal.SIGUSR2)
            time.sleep(TICK_S)
        if node > 0 or ending.status in ("completed", "held"):
            return ending.status
        if ending.status == "preempted" and self._may_come_back(frozen, job):
            assert callable(requeue)
            requeue(signal.SIGUSR2, None)  # ends this process
        raise CellFailed(self._why(frozen, ending))

    def checkpoint(self, path: str) -> Any:
        """What submitit queues again: the same, which finds the state that the worker saved."""
        return DelayedSubmission(self, path)

    def _may_come_back(self, frozen: Frozen, job: Job) -> bool:
        if record.read(frozen.directory).get("reason") != signal.SIGUSR2.name:
            if self._at_the_limit(job):
                give_up(frozen, "timeout", self._limit_text())
            return False  # SIGTERM: if the scheduler wants the job back, it does so itself
        if frozen.cancelled:
            return False
        if self._at_the_limit(job) and frozen.config.task.name not in RESUMABLE:
            give_up(frozen, "timeout", self._limit_text())
            return False
        allowed = frozen.config.sweep.max_requeues
        if _preemptions(frozen) > allowed:
            message = f"preempted more often than sweep.max_requeues={allowed}"
            give_up(frozen, "max_requeues", message)
            return False
        frozen.layout.journal.append("requeued", run_id=frozen.run_id)
        return True

    def _at_the_limit(self, job: Job) -> bool:
        return job.seconds > self.limit_s - self.signal_delay_s - _MARGIN_S

    def _limit_text(self) -> str:
        return f"reached the job's time limit (hydra.launcher.timeout_min={self.limit_s / 60:g})"

    def _why(self, frozen: Frozen, ending: Ending) -> str:
        status = record.status_of(frozen.directory) or ending.status
        return f"{frozen.run_id}: {status}: {ending.message or ''}; see {frozen.directory}"


def _preemptions(frozen: Frozen) -> int:
    """How often this cell was preempted since it was last submitted."""
    count = 0
    for entry in frozen.layout.journal.read():
        if entry["event"] == "submitted" and frozen.run_id in entry.get("jobs", {}):
            count = 0
        elif entry["event"] == "preempted" and entry.get("run_id") == frozen.run_id:
            count += 1
    return count


ENDED = frozenset(
    {
        "BOOT_FAIL",
        "CANCELLED",
        "COMPLETED",
        "DEADLINE",
        "FAILED",
        "NODE_FAIL",
        "OUT_OF_MEMORY",
        "PREEMPTED",
        "REVOKED",
        "TIMEOUT",
    }
)
"""States of a job that does not come back."""

GONE = "GONE"
"""State of a job that the controller has forgotten."""

_TIMEOUT_S = 60


def states(jobs: Iterable[str]) -> dict[str, str] | None:
    """The state of jobs of this user.

    Args:
        jobs: numbers as sbatch gives them, ``12`` or ``12_3``.

    Returns:
        Job -> state, :data:`GONE` for what the controller no longer knows; None where it does not
        answer, which says nothing of the jobs.
    """
    wanted = set(jobs)
    if not wanted:
        return {}
    command = ["squeue", "-h", "-r", "-t", "all", "-u", getpass.getuser(), "-o", "%i|%T"]
    text = _ask(command)
    if text is None:
        return None
    known = dict(line.strip().split("|", 1) for line in text.splitlines() if "|" in line)
    return {job: known.get(job, GONE) for job in wanted}


def is_active(state: str | None) -> bool:
    """Whether a job of this state may still run; not one of which nothing is known."""
    return state is not None and state not in ENDED and state != GONE


def max_array_size() -> int:
    """How many jobs an array may have here; SLURM's own default where it does not say."""
    for line in (_ask(["scontrol", "show", "config"]) or "").splitlines():
        name, _, value = line.partition("=")
        if name.strip() == "MaxArraySize" and value.strip().isdecimal():
            # Its largest index is one less than this number, and indices begin at 0.
            return max(1, int(value))
    return 1001


def cancel(jobs: Iterable[str]) -> bool:
    """Cancel jobs; false where the controller did not take it."""
    wanted = sorted(set(jobs))
    return not wanted or _ask(["scancel", "--quiet", *wanted]) is not None


def _ask(command: list[str]) -> str | None:
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=True,
            env={**os.environ, "SLURM_TIME_FORMAT": "standard"},
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


Work = tuple[Cell, Frozen]
PATIENCE = 2
"""Looks at the queue at which a job must be gone before it counts as dead: records travel slowly
over network file systems."""
DYING_TIMEOUT_S = 120.0
"""How long the jobs of a cancelled launch may take to leave the queue."""


def run(
    cells: Sequence[Cell], frozen: Sequence[Frozen], tally: Tally, settings: SlurmSettings
) -> None:
    """Submit cells and wait until their jobs have ended.

    Raises:
        ConfigError: there is no SLURM here, or it does not take the jobs.
        Interrupted: a signal; the jobs stay in the queue.
    """
    jobs = submit(cells, frozen, settings)
    watch = _Watched(list(zip(cells, frozen, strict=True)), jobs, tally)
    with Watch() as signals, signals.deferred() as pending:
        while watch.waiting:
            watch.look()
            until = time.monotonic() + settings.poll_s
            while watch.waiting and not pending() and time.monotonic() < until:
                time.sleep(0.05)
            if pending():
                say("the jobs stay in the queue; run the same command again to attach to them")
                pending.stop()


def submit(
    cells: Sequence[Cell], frozen: Sequence[Frozen], settings: SlurmSettings
) -> dict[Path, str]:
    """Submit the cells that are not in the queue, all arrays at once.

    Jobs of a launch that was cancelled are on their way out, and no others are put beside them.

    Returns:
        Run directory -> job, those that were in the queue before among them.

    Raises:
        ConfigError: there is no SLURM here, or it does not take the jobs.
    """
    layouts = list(dict.fromkeys(cell.layout for cell in cells))
    _wait_for_the_dying(layouts, settings.poll_s)
    jobs = {
        layout.run_directory(run_id): job
        for layout in layouts
        for run_id, job in queued(layout).items()
    }
    work = list(zip(cells, frozen, strict=True))
    wanted = [one for one in work if one[1].directory not in jobs]
    if len(wanted) < len(work):
        say(f"{len(work) - len(wanted)} cells are in the queue already")
    for batch in batches(wanted, settings.max_array_size or max_array_size()):
        numbers = _submit(batch, settings)
        by_layout: dict[Layout, dict[str, str]] = {}
        for (cell, file), number in zip(batch, numbers, strict=True):
            jobs[file.directory] = number
            by_layout.setdefault(cell.layout, {})[cell.run_id] = number
        for layout, own in by_layout.items():
            layout.journal.append("submitted", jobs=own)
        say(f"submitted {len(batch)} cells as {numbers[0].partition('_')[0]}")
    return jobs


def last_jobs(layout: Layout) -> dict[str, tuple[str, str | None]]:
    """Identity -> job and its state, for the cells of a sweep that were ever submitted.

    The state is None where SLURM does not answer.
    """
    last: dict[str, str] = {}
    for entry in layout.journal.read():
        if entry["event"] == "submitted":
            last.update(entry["jobs"])
    found = states(last.values()) or {}
    return {run_id: (job, found.get(job)) for run_id, job in last.items()}


def queued(layout: Layout) -> dict[str, str]:
    """Identity -> job, for the cells of a sweep that SLURM has queued or runs."""
    return {run_id: job for run_id, (job, state) in last_jobs(layout).items() if is_active(state)}


def _wait_for_the_dying(layouts: Sequence[Layout], poll_s: float) -> None:
    """Until the jobs of cancelled launches have left the queue.

    Raises:
        ConfigError: they do not.
    """
    until, told = time.monotonic() + DYING_TIMEOUT_S, False
    while dying := sorted(job for layout in layouts for job in _dying(layout)):
        if time.monotonic() > until:
            raise ConfigError(
                f"jobs of a cancelled launch are still in the queue: {', '.join(dying)}; try again "
                "when they have left it"
            )
        if not told:
            say(f"waiting for {len(dying)} cancelled jobs to leave the queue")
        told = True
        time.sleep(poll_s)


def _dying(layout: Layout) -> list[str]:
    """Jobs that the user has cancelled and that SLURM still has."""
    submitted: set[str] = set()
    found: set[str] = set()
    for entry in layout.journal.read():
        if entry["event"] == "submitted":
            submitted.update(entry["jobs"].values())
        elif entry["event"] == "cancel":
            found.update(submitted)
    known = states(found) or {}
    return [job for job, state in known.items() if is_active(state)]


def batches(work: Sequence[Work], size: int) -> Iterator[list[Work]]:
    """Arrays of at most ``size`` cells; those that run alone in arrays of their own."""
    for alone in (False, True):
        own = [one for one in work if one[0].alone == alone]
        for start in range(0, len(own), size):
            yield own[start : start + size]


def parameters(settings: SlurmSettings, *, alone: bool) -> dict[str, Any]:
    """The settings by submitit's names."""
    given = {
        "timeout_min": settings.timeout_min,
        "nodes": settings.nodes,
        "tasks_per_node": 1,
        "cpus_per_task": settings.cpus_per_task,
        "gpus_per_node": settings.gpus_per_node,
        "mem_gb": settings.mem_gb,
        "name": "fisher_lab",
        "slurm_partition": settings.partition,
        "slurm_account": settings.account,
        "slurm_qos": settings.qos,
        "slurm_constraint": settings.constraint,
        "slurm_gres": settings.gres,
        "slurm_mail_user": settings.mail_user,
        "slurm_mail_type": settings.mail_type,
        "slurm_setup": settings.setup or None,
        "slurm_signal_delay_s": settings.signal_delay_s,
        "slurm_array_parallelism": 1 if alone else settings.array_parallelism,
        "slurm_exclusive": True if alone else None,
        "slurm_additional_parameters": settings.additional_parameters,
    }
    return {name: value for name, value in given.items() if value is not None}


def executor(settings: SlurmSettings, folder: Path, requeues: int, *, alone: bool) -> Any:
    """The executor of submitit with everything set."""
    import submitit

    cluster = settings.cluster
    made = submitit.AutoExecutor(
        folder=folder,
        cluster=cluster,
        **{f"{cluster}_max_num_timeout": requeues + 1, f"{cluster}_python": settings.python},
    )
    made.update_parameters(**parameters(settings, alone=alone))
    return made


def job_of(settings: SlurmSettings) -> Any:
    """What every job calls with the path of its frozen cell."""
    return CellJob(
        threads=settings.threads or settings.cpus_per_task,
        grace_s=settings.grace_s,
        limit_s=60.0 * settings.timeout_min,
        signal_delay_s=settings.signal_delay_s,
        command=worker_process.WORKER,
    )


def _submit(batch: Sequence[Work], settings: SlurmSettings) -> list[str]:
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    folder = batch[0][1].submission / "slurm" / "%j"
    requeues = max(cell.config.sweep.max_requeues for cell, _ in batch)
    try:
        with worker_process.importable():
            made = executor(settings, folder, requeues, alone=batch[0][0].alone)
            submitted = made.map_array(job_of(settings), [str(file.path) for _, file in batch])
    except (FailedSubmissionError, FailedJobError, RuntimeError, OSError) as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise ConfigError(
            f"SLURM does not take the jobs: {lines[-1] if lines else error}"
        ) from None
    return [job.job_id for job in submitted]


def end_cell(file: Frozen, job: str, job_state: str) -> str:
    """End the record of a cell whose job has ended and is not coming back.

    Args:
        file: the cell; nobody runs it.
        job: its number.
        job_state: the last that the queue says of it.

    Returns:
        The cell's state from now on.
    """
    state = file.layout.state(file.run_id, file.stale_after_s)
    if state in ("completed", "failed", "running"):
        return state
    if _was_cancelled(file, state, job_state):
        if state == "cancelled" or (state == "missing" and file.cancelled):
            return "cancelled"
        status, error = "cancelled", None
    else:
        message = f"the job {job} ended as {job_state} and left no result"
        status, error = "failed", died(message, job=job, log_tail=_job_log(file.layout, job))
    if end_lost(file, status, job_state, error):
        return status
    return file.layout.state(file.run_id, file.stale_after_s)


def _was_cancelled(file: Frozen, state: str, job_state: str) -> bool:
    """Whether a job was cancelled, by fisher-lab or by a plain scancel, and did not die."""
    if job_state == "CANCELLED":
        return True
    # Under the mark of sweep.max_failures a job that runs goes on, and may die.
    return file.cancelled and (state != "interrupted" or job_state == GONE)


def _job_log(layout: Layout, job: str) -> str:
    """The end of what a job has printed itself, whichever launch has submitted it."""
    for log in layout.submissions.glob(f"*/slurm/{job}/{job}_0_log.err"):
        return tail(log)
    return ""


class _Watched:
    """Jobs that have not ended."""

    def __init__(self, work: list[Work], jobs: dict[Path, str], tally: Tally) -> None:
        self.waiting = work
        self._jobs = jobs
        self._tally = tally
        self._gone: dict[Path, int] = {}
        self._stopped = False

    def look(self) -> None:
        """Ask the queue once, and settle the cells whose jobs have ended."""
        found = states(self._jobs[file.directory] for _, file in self.waiting)
        if found is None:
            return
        for cell, file in list(self.waiting):
            state = found[self._jobs[file.directory]]
            if is_active(state):
                self._gone.pop(file.directory, None)
                continue
            self._gone[file.directory] = self._gone.get(file.directory, 0) + 1
            self._settle(cell, file, state)
        self._stop_at_failures()

    def _settle(self, cell: Cell, file: Frozen, job_state: str) -> None:
        state = cell.layout.state(cell.run_id, file.stale_after_s)
        if state not in ("completed", "failed") and self._gone[file.directory] < PATIENCE:
            return
        if state == "running":
            return  # somebody else runs it, or the claim of a dead node has not gone stale yet
        if state in ("missing", "interrupted", "preempted", "cancelled"):
            state = end_cell(file, self._jobs[file.directory], job_state)
        self.waiting.remove((cell, file))
        message = brief(file.directory) if state == "failed" else None
        self._tally.end(cell, state, message, None)

    def _stop_at_failures(self) -> None:
        fail_fast = any(cell.config.sweep.fail_fast for cell, _ in self.waiting)
        if self._stopped or not (self._tally.exhausted or (fail_fast and self._tally.failures > 0)):
            return
        self._stopped = True
        known = states(self._jobs[file.directory] for _, file in self.waiting) or {}
        pending = [job for job, state in known.items() if fail_fast or state == "PENDING"]
        for directory in {file.submission for _, file in self.waiting}:
            (directory / CANCELLED_FILE).touch()
        cancel(pending)
