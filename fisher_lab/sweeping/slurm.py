"""``hydra/launcher=slurm_cpu`` and ``slurm_gpu``: job arrays, by submitit.

submitit writes the job scripts, submits them and puts preempted jobs back into the queue. How a
cell ended is read from its record, and whether its job is still there from the queue (`scheduler`):
the launcher may be gone at any time, and the next one attaches to the jobs that it left.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fisher_lab.config.errors import ConfigError
from fisher_lab.config.launcher_schema import SlurmSettings
from fisher_lab.runs.signals import Watch

from . import scheduler, supervisor
from .cell import CANCELLED_FILE, Cell, Frozen
from .layout import Layout
from .progress import Tally, say
from .supervisor import brief, died, end_lost, tail

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
    for batch in batches(wanted, settings.max_array_size or scheduler.max_array_size()):
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
    found = scheduler.states(last.values()) or {}
    return {run_id: (job, found.get(job)) for run_id, job in last.items()}


def queued(layout: Layout) -> dict[str, str]:
    """Identity -> job, for the cells of a sweep that SLURM has queued or runs."""
    return {
        run_id: job
        for run_id, (job, state) in last_jobs(layout).items()
        if scheduler.is_active(state)
    }


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
    states = scheduler.states(found) or {}
    return [job for job, state in states.items() if scheduler.is_active(state)]


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
    from .array_job import CellJob

    return CellJob(
        threads=settings.threads or settings.cpus_per_task,
        grace_s=settings.grace_s,
        limit_s=60.0 * settings.timeout_min,
        signal_delay_s=settings.signal_delay_s,
        command=supervisor.WORKER,
    )


def _submit(batch: Sequence[Work], settings: SlurmSettings) -> list[str]:
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    folder = batch[0][1].submission / "slurm" / "%j"
    requeues = max(cell.config.sweep.max_requeues for cell, _ in batch)
    try:
        with supervisor.importable():
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
    return file.cancelled and (state != "interrupted" or job_state == scheduler.GONE)


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
        found = scheduler.states(self._jobs[file.directory] for _, file in self.waiting)
        if found is None:
            return
        for cell, file in list(self.waiting):
            state = found[self._jobs[file.directory]]
            if scheduler.is_active(state):
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
        states = scheduler.states(self._jobs[file.directory] for _, file in self.waiting) or {}
        pending = [job for job, state in states.items() if fail_fast or state == "PENDING"]
        for directory in {file.submission for _, file in self.waiting}:
            (directory / CANCELLED_FILE).touch()
        scheduler.cancel(pending)
