"""SLURM without SLURM: what sbatch is told, and what is made of what the queue says."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from fisher_lab.config.errors import ConfigError
from fisher_lab.config.launchers import SlurmSettings
from fisher_lab.runs import record
from fisher_lab.sweeps import slurm
from fisher_lab.sweeps.cell import CANCELLED_FILE, Cell
from fisher_lab.sweeps.queue import Queue, Tally
from fisher_lab.sweeps.slurm import CellJob, SubmititJobs
from tests.processes import until
from tests.sweeps.application import launch_trivial, statuses
from tests.sweeps.submitted_cells import begin, submitted
from tests.sweeps.trivial_worker import WAITS

SETTINGS = SlurmSettings(poll_s=0.01)


class FakeSlurm:
    """Job -> its states at one look after the other; the last one stays. Takes submissions."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.states: dict[str, list[str]] = {}
        self.cancelled: list[str] = []
        self.batches: list[list[str]] = []
        monkeypatch.setattr(slurm, "states", self.look)
        monkeypatch.setattr(slurm, "cancel", lambda jobs: self.cancel(jobs))
        monkeypatch.setattr(slurm, "_submit", lambda batch, settings: self.submit(batch, settings))

    def look(self, jobs) -> dict[str, str]:
        return {job: self._next(job) for job in jobs}

    def _next(self, job: str) -> str:
        left = self.states.get(job, [slurm.GONE])
        return left.pop(0) if len(left) > 1 else left[0]

    def cancel(self, jobs) -> bool:
        self.cancelled += jobs
        return True

    def submit(self, batch, settings) -> list[SimpleNamespace]:
        self.batches.append([cell.run_id for cell in batch])
        numbers = [f"{len(self.batches)}_{i}" for i in range(len(batch))]
        return [SimpleNamespace(job_id=number) for number in numbers]


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    return FakeSlurm(monkeypatch)


def run(cells: list[Cell], limit: int | None = None) -> Tally:
    tally = Tally(len(cells), limit)
    Queue(cells, SubmititJobs(SETTINGS), tally).run()
    return tally


def ended(tally: Tally) -> dict[str, str]:
    return {directory.name: outcome.status.value for directory, outcome in tally.ended.items()}


@pytest.mark.parametrize("before", [None, "running", "preempted"])
def test_a_job_that_was_cancelled_by_a_plain_scancel_is_no_failure(before, queue):
    """It counts towards no limit, and the record says what it was."""
    one, two = submitted(1, 2)
    if before is not None:
        begin(one, before)
    begin(two, "completed")
    queue.states = {"1_0": ["RUNNING", "CANCELLED"], "1_1": ["COMPLETED"]}
    tally = run([one, two], limit=1)
    assert ended(tally) == {"seed1": "cancelled", "seed2": "completed"}
    assert (tally.failures, queue.cancelled) == (0, [])
    found = record.read(one.directory)
    assert (found["status"], found["reason"]) == ("cancelled", "CANCELLED")
    assert [e["event"] for e in one.layout.journal.read()] == ["submitted", "cancelled"]


def test_a_job_that_ended_without_a_word_is_a_failure(queue):
    (one,) = submitted(1)
    begin(one)
    queue.states = {"1_0": ["RUNNING", "NODE_FAIL"]}
    assert ended(run([one])) == {"seed1": "failed"}
    error = record.read(one.directory)["error"]
    assert error["message"] == "the job 1_0 ended as NODE_FAIL and left no result"


def test_jobs_of_a_cancelled_launch_are_waited_for_and_not_attached_to(queue, capsys):
    (before,) = submitted(1)
    layout = before.layout
    layout.journal.append("submitted", jobs={"seed1": "7"})
    layout.journal.append("cancel", cells=["seed1"])
    (before.submission / CANCELLED_FILE).touch()
    (now,) = submitted(1)
    begin(now, "cancelled")
    queue.states = {"7": ["RUNNING", "COMPLETING", "CANCELLED"], "1_0": ["COMPLETED"]}

    def complete(batch, settings) -> list[SimpleNamespace]:
        assert queue.states["7"] == ["CANCELLED"]
        begin(now, "completed")
        return [SimpleNamespace(job_id="1_0")]

    queue.submit = complete
    assert ended(run([now])) == {"seed1": "completed"}
    assert "waiting for 1 cancelled jobs" in capsys.readouterr().out


def test_jobs_of_a_cancelled_launch_that_do_not_go_are_said(queue, monkeypatch):
    monkeypatch.setattr(slurm, "CANCEL_TIMEOUT_S", 0.0)
    (one,) = submitted(1)
    one.layout.journal.append("submitted", jobs={"seed1": "7"})
    one.layout.journal.append("cancel", cells=["seed1"])
    queue.states = {"7": ["COMPLETING"]}
    with pytest.raises(ConfigError, match="still in the queue: 7; try again"):
        run([one])
    assert queue.batches == []


def test_jobs_in_the_queue_are_attached_to(queue):
    one, two = submitted(1, 2)
    begin(one, "completed")
    begin(two, "completed")
    one.layout.journal.append("submitted", jobs={"seed1": "7"})
    queue.states = {"7": ["RUNNING", "COMPLETED"], "1_0": ["COMPLETED"]}
    assert ended(run([one, two])) == {"seed1": "completed", "seed2": "completed"}
    assert queue.batches == [["seed2"]]


@pytest.mark.parametrize(
    ("limits", "limit", "cancelled"),
    [({"fail_fast": True}, None, ["1_1", "1_2"]), ({"max_failures": 1}, 1, ["1_2"]), ({}, 2, [])],
)
def test_failures_stop_the_rest_of_an_array(limits, limit, cancelled, queue):
    """`fail_fast` those that run too; `max_failures` those that wait, and one that runs may die."""
    work = submitted(1, 2, 3, **limits)
    begin(work[1])
    begin(work[0], "failed", error={"type": "E", "message": "m", "traceback": ""})
    queue.states = {"1_0": ["FAILED"], "1_1": ["RUNNING"], "1_2": ["PENDING"]}

    def cancel(jobs) -> bool:
        jobs = list(jobs)
        queue.cancelled += jobs
        for job in queue.states:
            queue.states[job] = ["CANCELLED" if job in jobs else "COMPLETED"]
        return True

    if not cancelled:
        queue.states.update({"1_1": ["CANCELLED"], "1_2": ["CANCELLED"]})
    queue.cancel = cancel
    tally = run(work, limit)
    assert queue.cancelled == cancelled
    assert (work[0].submission / CANCELLED_FILE).exists() == bool(cancelled)
    assert tally.failures == (2 if cancelled == ["1_2"] else 1)


def test_cells_that_run_alone_have_arrays_of_their_own(queue):
    beside, alone = submitted(1, 2, 3), submitted(4, 5, alone=True)
    work = [alone[0], *beside, alone[1]]
    found = [[cell.run_id for cell in batch] for batch in slurm.batches(work, 2)]
    assert found == [["seed1", "seed2"], ["seed3"], ["seed4", "seed5"]]


def test_one_cell_at_a_time_where_times_are_compared():
    (alone, another), (beside, other) = submitted(1, 4, alone=True), submitted(2, 3)
    for at_work, wanted, room in (
        ([], alone, True),
        ([beside], alone, False),
        ([alone], beside, False),
        ([alone], another, False),
        ([beside], other, True),
        ([beside, other], another, False),
    ):
        executor = SimpleNamespace(limit=2, outlives=True, running=list(at_work), ended=list)
        executor.start = executor.running.extend
        assert Queue([wanted], executor, Tally(1)).step() is room
        assert executor.running == [*at_work, *([wanted] if room else [])]


def test_the_options_of_sbatch(tmp_path, monkeypatch):
    """Through submitit, as they stand in the script that sbatch is given."""
    from submitit.slurm import slurm as submitit_slurm

    monkeypatch.setattr(submitit_slurm.SlurmExecutor, "affinity", classmethod(lambda cls: 2))
    settings = SlurmSettings(
        partition="gpu", account="lab", qos="long", constraint="a100", gres="gpu:a100:2",
        nodes=2, cpus_per_task=3, mem_gb=8, timeout_min=30, array_parallelism=5,
        mail_user="me@example.org", mail_type="END,FAIL", setup=["module load cuda"],
        python="singularity exec x.sif python", signal_delay_s=45,
        additional_parameters={"reservation": "mine", "nice": 100},
    )  # fmt: skip
    made = slurm.submitit_executor(settings, tmp_path / "%j", 3, alone=False)
    text = made._executor._make_submission_file_text("PROGRAM", "uid")
    options = {line.removeprefix("#SBATCH --") for line in text.splitlines() if "SBATCH" in line}
    assert options >= {
        "partition=gpu", "account=lab", "qos=long", "constraint=a100", "gres=gpu:a100:2",
        "nodes=2", "cpus-per-task=3", "mem=8GB", "time=30", "mail-user=me@example.org",
        "mail-type=END,FAIL", "reservation=mine", "nice=100", "signal=USR2@45",
        "ntasks-per-node=1", "job-name=fisher_lab",
    }  # fmt: skip
    assert "exclusive" not in options
    assert "\nmodule load cuda\n" in text
    assert made._executor.python == "singularity exec x.sif python"
    assert made._executor.max_num_timeout == 4
    assert made._executor.parameters["array_parallelism"] == 5
    alone = slurm.submitit_executor(settings, tmp_path / "%j", 3, alone=True)
    text = alone._executor._make_submission_file_text("PROGRAM", "uid")
    assert "#SBATCH --exclusive\n" in text
    assert alone._executor.parameters["array_parallelism"] == 1


@pytest.mark.parametrize(
    ("told", "size"),
    [
        ("AccountingStorageType = none\nMaxArraySize            = 51\nMaxJobCount = 9\n", 51),
        ("MaxArraySize = 0\n", 1),
        ("MaxArraySize = many\n", 1001),
        ("", 1001),
        (None, 1001),
    ],
)
def test_how_many_cells_an_array_may_have(told, size, monkeypatch):
    asked = []
    monkeypatch.setattr(slurm, "_ask", lambda command: asked.append(command) or told)
    assert slurm.max_array_size() == size
    assert asked == [["scontrol", "show", "config"]]


JOB = CellJob(threads=1, grace_s=1.0, limit_s=3600.0, signal_delay_s=90.0, command=())


@pytest.mark.parametrize(
    ("task", "seconds", "reason", "back", "status"),
    [
        ("analyze", 3000.0, "SIGUSR2", True, "preempted"),  # long before the limit
        ("analyze", 3449.0, "SIGUSR2", True, "preempted"),
        ("analyze", 3451.0, "SIGUSR2", False, "failed"),  # it would reach it again
        ("train", 3451.0, "SIGUSR2", True, "preempted"),  # it goes on where it was
        ("analyze", 3000.0, "SIGTERM", False, "preempted"),
        ("train", 3451.0, "SIGTERM", False, "failed"),
    ],
)
def test_at_the_time_limit_and_away_from_it(task, seconds, reason, back, status):
    (file,) = submitted(1)
    file.config.task.name = task
    begin(file, "preempted", reason=reason)
    assert JOB._may_come_back(file, seconds) is back
    found = record.read(file.directory)
    assert found["status"] == status
    if status == "failed":
        assert found["reason"] == "timeout"
        assert "hydra.launcher.timeout_min=60" in found["error"]["message"]
    assert ("requeued" in [e["event"] for e in file.layout.journal.read()]) is back


def test_a_preempted_job_comes_back_at_most_so_often_and_not_once_cancelled():
    """So often since it was submitted."""
    (file,) = submitted(1, max_requeues=1)
    begin(file, "preempted", reason="SIGUSR2")
    journal = file.layout.journal
    for event in ("preempted", "preempted", "submitted", "preempted"):
        about = {"jobs": {"seed1": "7"}} if event == "submitted" else {"run_id": "seed1"}
        journal.append(event, **about)
    assert slurm._preemptions(file) == 1
    assert JOB._may_come_back(file, 1.0)
    cancelled = file.submission / CANCELLED_FILE
    cancelled.touch()
    assert not JOB._may_come_back(file, 1.0)
    cancelled.unlink()
    journal.append("preempted", run_id="seed1")
    assert not JOB._may_come_back(file, 1.0)
    assert record.read(file.directory)["reason"] == "max_requeues"


@pytest.mark.usefixtures("trivial_workers")
def test_slurm_debug_runs_and_cancels_cells_in_processes_of_this_machine(door, runs):
    process = launch_trivial(
        "-m", f"seed=1,{WAITS},2", "hydra/launcher=slurm_debug", "hydra.launcher.grace_s=5",
        "hydra.launcher.array_parallelism=1", "sweep.name=debug",
    )  # fmt: skip
    until(lambda: statuses(runs).get(WAITS) == "running")
    answer = door("cancel", "debug")
    assert "cancelled 1 cells of debug: 0 jobs of SLURM, 1 processes" in answer.out
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 1, out
    assert "1 of 3 cells completed" in out
    assert "failed" not in out
    assert statuses(runs) == {1: "completed", WAITS: "cancelled"}
