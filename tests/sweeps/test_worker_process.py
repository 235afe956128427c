"""What becomes of a cell whose worker has said little or nothing of its end."""

from __future__ import annotations

import signal

import pytest

from fisher_lab.runs import record
from fisher_lab.sweeps import worker
from fisher_lab.sweeps.cell import CANCELLED_FILE, Cell, Outcome
from fisher_lab.sweeps.worker_process import WorkerProcess
from tests.processes import until
from tests.sweeps.submitted_cells import begin, submitted


def process_of(
    cell: Cell, script: str, *, scheduled: bool = False, grace_s: float = 20.0
) -> WorkerProcess:
    """A process that runs a line of Python in the place of a worker."""
    return WorkerProcess(
        cell, threads=None, grace_s=grace_s, scheduled=scheduled, command=("-c", script)
    )


def ended(process: WorkerProcess) -> Outcome:
    return until(process.poll)


def exits(code: int) -> str:
    return f"import os; os._exit({code})"


def dies(signum: int) -> str:
    return f"import os; os.kill(os.getpid(), {int(signum)})"


@pytest.mark.parametrize(
    ("script", "scheduled", "cancelled", "status", "reason"),
    [
        (exits(worker.CANCELLED), False, False, "cancelled", "SIGTERM"),
        (exits(worker.PREEMPTED), False, False, "preempted", "SIGUSR2"),
        (exits(worker.CANCELLED), True, False, "preempted", "SIGTERM"),
        (exits(worker.PREEMPTED), True, False, "preempted", "SIGUSR2"),
        (exits(worker.CANCELLED), True, True, "cancelled", "cancel"),
        (exits(worker.PREEMPTED), True, True, "cancelled", "SIGUSR2"),
        (dies(signal.SIGTERM), False, False, "cancelled", "SIGTERM"),
        (dies(signal.SIGTERM), True, False, "preempted", "SIGTERM"),
        (dies(signal.SIGTERM), True, True, "cancelled", "SIGTERM"),
        (dies(signal.SIGUSR2), False, False, "preempted", "SIGUSR2"),
        (exits(7), False, False, "failed", "exit"),
        (dies(signal.SIGKILL), True, False, "failed", "SIGKILL"),
    ],
)
def test_a_worker_that_ends_before_it_has_a_record(script, scheduled, cancelled, status, reason):
    (cell,) = submitted(1)
    begin(cell, "failed", error={"type": "OfBefore", "message": "", "traceback": ""})
    if cancelled:
        (cell.submission / CANCELLED_FILE).touch()
    ending = ended(process_of(cell, script, scheduled=scheduled))
    found = record.read(cell.directory)
    assert (ending.status, found["status"], found["reason"]) == (status, status, reason)
    assert (found["error"] or {}).get("type") == ("JobDied" if status == "failed" else None)
    assert [entry["event"] for entry in cell.layout.journal.read()] == [status]


def test_a_cell_that_is_deaf_to_the_wish_to_cancel_is_killed_and_cancelled():
    (cell,) = submitted(1)
    one = process_of(
        cell,
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "print('deaf', flush=True); time.sleep(60)",
        grace_s=0.1,
    )
    log = cell.layout.job_log(cell.run_id)
    until(lambda: "deaf" in log.read_text())
    one.ask(signal.SIGTERM)
    assert ended(one).status == "cancelled"
    assert record.read(cell.directory)["reason"] == "SIGKILL"


def test_a_cancelled_cell_that_comes_to_its_turn_is_cancelled(monkeypatch):
    """The real worker, whose launch was cancelled while it was in a queue."""
    (cell,) = submitted(1)
    (cell.submission / CANCELLED_FILE).touch()
    one = WorkerProcess(cell, threads=None, grace_s=20.0, scheduled=True)
    assert ended(one).status == "cancelled"
    found = record.read(cell.directory)
    assert (found["status"], found["reason"], found["error"]) == ("cancelled", "cancel", None)


def test_an_error_that_the_worker_recorded_itself_is_kept():
    (cell,) = submitted(1)
    directory = str(cell.directory)
    script = (
        "from fisher_lab.runs.record import Run; from pathlib import Path; "
        f"run = Run.start(Path({directory!r}), config={{}}); "
        "run.fail(ValueError('no room\\nat all')); raise SystemExit(1)"
    )
    outcome = ended(process_of(cell, script))
    assert (outcome.status, outcome.message) == ("failed", "ValueError: no room")
    found = record.read(cell.directory)
    assert found["reason"] == "ValueError: no room"
    assert found["error"]["message"] == "no room\nat all"
    assert record.brief(cell.directory) == "ValueError: no room"
