"""Sweeps through a real SLURM: what its notes warn of, tried."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import psutil
import pytest

from fisher_lab.runs import record
from fisher_lab.sweeps import slurm, worker_process
from fisher_lab.sweeps.directory import Layout
from tests.processes import until
from tests.sweeps import trivial_worker
from tests.sweeps.application import (
    ANALYSIS,
    ORDERED_WORKER,
    TEXT,
    TRAINING,
    by_seed,
    count,
    curve,
    launch_trivial,
    statuses,
    the_sweep,
)

pytestmark = [
    pytest.mark.usefixtures("cluster"),
    pytest.mark.xdist_group("slurm"),
    pytest.mark.timeout(600),
]

ROOT = Path(__file__).parents[2]
QUICK = ["hydra.launcher.poll_s=0.3", "hydra.launcher.grace_s=5"]
GPU = ["hydra/launcher=slurm_gpu", "hydra.launcher.timeout_min=60", *QUICK]
CPU = ["hydra/launcher=slurm_cpu", "hydra.launcher.timeout_min=60", *QUICK]


def states_of(numbers: Iterable[str]) -> dict[str, str]:
    found = slurm.states(numbers)
    assert found is not None
    return found


def jobs(of: Layout) -> dict[str, str]:
    found: dict[str, str] = {}
    for entry in of.journal.read():
        if entry["event"] == "submitted":
            found.update(entry["jobs"])
    return found


@pytest.mark.usefixtures("trivial_workers")
def test_eight_cells_with_three_deaths_over_the_array_limit(door, runs):
    seeds = [1, trivial_worker.RAISES, trivial_worker.HANGS, trivial_worker.KILLED, 2, 3, 4, 5]
    answer = door(
        "-m", f"seed={','.join(map(str, seeds))}", *GPU, "sweep.timeout_s=30",
        "hydra.launcher.max_array_size=3",
    )  # fmt: skip
    assert answer.code == 1
    assert "5 of 8 cells completed" in answer.out
    ended = dict.fromkeys(range(1, 6), "completed") | dict.fromkeys((13, 14, 17), "failed")
    assert statuses(runs) == ended
    reasons = {seed: found["reason"] for seed, found in by_seed(runs).items()}
    assert (reasons[14], reasons[17]) == ("SIGKILL", "timeout")
    assert len([line for line in answer.lines if "failed" in line]) == 3

    sweep = the_sweep()
    (hung,) = [path.name for path, one in runs() if one["config"]["seed"] == trivial_worker.HANGS]
    events = sweep.journal.read()
    submitted = [i for i, entry in enumerate(events) if entry["event"] == "submitted"]
    (ended,) = [
        i for i, e in enumerate(events) if (e["event"], e.get("run_id")) == ("failed", hung)
    ]
    assert len(submitted) == 3
    assert submitted[-1] < ended  # at once, and not one after the other
    numbers = jobs(sweep)
    until(lambda: not any(map(slurm.is_active, states_of(numbers.values()).values())))
    seen_by_slurm = states_of(numbers.values())
    for directory, found in runs():
        expected = {"completed": "COMPLETED", "failed": "FAILED"}[found["status"]]
        assert seen_by_slurm[numbers[directory.name]] == expected
        if found["status"] == "completed":
            gpus = (directory / "job.log").read_text().rpartition("GPUs: ")[2].split()[0]
            assert gpus in ("0", "1", "2", "3")


@pytest.mark.usefixtures("trivial_workers")
def test_a_job_that_is_killed_outright_is_seen_without_accounting(door, runs):
    """SIGKILL to everything in the job: nobody is left to write it down but the launcher."""
    process = launch_trivial("-m", f"seed={trivial_worker.WAITS},1", *CPU)
    until(lambda: statuses(runs).get(trivial_worker.WAITS) == "running")
    sweep = the_sweep()
    ((directory, _),) = [one for one in runs() if one[1]["config"]["seed"] == trivial_worker.WAITS]
    job = jobs(sweep)[directory.name]
    (pid,) = [
        entry["pid"]
        for entry in sweep.journal.read()
        if entry["event"] == "started" and entry["run_id"] == directory.name
    ]
    worker = psutil.Process(pid)
    job_itself = worker.parent()
    assert job_itself is not None
    worker.suspend()  # or it would get a SIGTERM as its parent dies, and have a last word
    job_itself.kill()
    worker.kill()
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 1, out
    assert statuses(runs) == {1: "completed", trivial_worker.WAITS: "failed"}
    assert record.read(directory)["error"]["job"] == job


@pytest.mark.usefixtures("trivial_workers")
def test_a_plain_scancel_is_no_failure(door, runs):
    """And the same command goes on."""
    waits = trivial_worker.WAITS
    process = launch_trivial("-m", f"seed={waits},1", *CPU, "sweep.max_failures=1")
    until(lambda: statuses(runs) == {waits: "running", 1: "completed"})
    ((directory, _),) = [one for one in runs() if one[1]["config"]["seed"] == waits]
    subprocess.run(["scancel", jobs(the_sweep())[directory.name]], check=True, timeout=60)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 1, out
    assert "1 cells did not come to an end" in out
    assert statuses(runs) == {1: "completed", waits: "cancelled"}
    assert count(the_sweep(), "failed") == 0


@pytest.mark.usefixtures("trivial_workers")
def test_fail_fast_stops_what_runs_and_what_waits(door, runs):
    waits, raises = trivial_worker.WAITS, trivial_worker.RAISES
    answer = door(
        "-m", f"seed={waits},{raises},1", *CPU, "hydra.launcher.array_parallelism=2",
        "sweep.fail_fast=true",
    )  # fmt: skip
    assert answer.code == 1
    found = statuses(runs)
    assert found[raises] == "failed"
    assert found.get(waits, "cancelled") == "cancelled"  # it may not have come to begin
    assert count(the_sweep(), "failed") == 1
    numbers = jobs(the_sweep()).values()
    until(lambda: not any(map(slurm.is_active, states_of(numbers).values())))


@pytest.mark.usefixtures("trivial_workers")
def test_a_preempted_job_comes_back_at_most_so_often(door, runs):
    answer = door("-m", f"seed={trivial_worker.PREEMPTED}", *CPU, "sweep.max_requeues=1")
    assert answer.code == 1
    ((_, found),) = runs()
    assert (found["status"], found["reason"]) == ("failed", "max_requeues")
    assert (count(the_sweep(), "preempted"), count(the_sweep(), "requeued")) == (2, 1)


@pytest.mark.usefixtures("trivial_workers")
def test_the_launcher_is_killed_half_way_and_the_next_one_attaches(door, runs):
    seeds = ",".join(str(trivial_worker.SLOW + number) for number in range(4))
    arguments = ["-m", f"seed={seeds}", *CPU, "hydra.launcher.array_parallelism=1"]
    process = launch_trivial(*arguments)
    until(lambda: "running" in statuses(runs).values())
    process.kill()
    process.communicate(timeout=60)
    answer = door(*arguments)
    assert answer.code == 0
    assert "in the queue already" in answer.out
    sweep = the_sweep()
    assert set(statuses(runs).values()) == {"completed"}
    assert (count(sweep, "started"), count(sweep, "completed")) == (4, 4)
    assert count(sweep, "submitted") == 1


@pytest.mark.usefixtures("trivial_workers")
def test_detach_status_cancel_and_nothing_comes_back(door, runs):
    waits = trivial_worker.WAITS
    answer = door(
        "-m", f"seed={waits},1,2", *CPU, "hydra.launcher.array_parallelism=1",
        "sweep.detach=true", "sweep.name=away",
    )  # fmt: skip
    assert answer.code == 0
    assert "fisher-lab status" in answer.out
    until(lambda: statuses(runs).get(waits) == "running")
    shown = {cell["label"]: cell for cell in json.loads(door("status", "away", "--json").out)}
    found = [shown[f"seed={seed}"]["state"] for seed in (waits, 1, 2)]
    assert found == ["running", "queued", "queued"]
    numbers = jobs(the_sweep())
    assert shown["seed=1"]["job"] in numbers.values()
    answer = door("cancel", "away")
    assert (answer.code, "3 jobs of SLURM" in answer.out) == (0, True)
    until(lambda: not any(map(slurm.is_active, states_of(numbers.values()).values())))
    assert statuses(runs) == {waits: "cancelled"}
    assert count(the_sweep(), "requeued") == 0


RULING = {
    "SBATCH_TIMELIMIT": "1", "SBATCH_PARTITION": "none", "SLURM_MEM_PER_CPU": "10",
    "SLURM_MEM_PER_NODE": "20", "SLURM_CLUSTERS": "far", "SQUEUE_PARTITION": "none",
    "SQUEUE_USERS": "nobody", "SRUN_CONTAINER": "none",
}  # fmt: skip
"""What a shell may hold that was begun in another allocation, or by another tool."""
NOBODY = 65534


def colleague() -> int:
    """Another user, where one may run this interpreter; else this one."""
    command = [
        sys.executable,
        "-c",
        "import sys; sys.path.insert(0, sys.argv[1]); import fisher_lab",
    ]
    try:
        done = subprocess.run(
            [*command, str(ROOT)],
            user=NOBODY,
            group=NOBODY,
            extra_groups=[],
            timeout=60,
            check=False,
        )
    except PermissionError:
        return 0
    return NOBODY if done.returncode == 0 else 0


def look_of(user: int, sweep: Layout, **variables: str) -> dict[str, str]:
    """Cell -> state, as another user sees it."""
    for folder in (sweep.directory, *sweep.directory.parents[:-2]):
        folder.chmod(folder.stat().st_mode | 0o055)
    environment = {k: v for k, v in os.environ.items() if k not in ("USER", "HOME", "LOGNAME")}
    done = subprocess.run(
        [sys.executable, "-m", "fisher_lab", "status", str(sweep.directory), "--json"],
        env={**environment, "PYTHONPATH": str(ROOT), **variables}, user=user, group=user,
        extra_groups=[], capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return {cell["label"]: cell["state"] for cell in json.loads(done.stdout)}


def records_of(sweep: Layout) -> dict[Path, bytes]:
    """What a sweep consists of; a cell that has just begun may still be renaming its record."""
    files = (path for path in sweep.directory.rglob("*.json*") if path.suffix != ".tmp")
    return {path: path.read_bytes() for path in files}


@pytest.mark.usefixtures("trivial_workers")
def test_what_a_shell_has_inherited_rules_nothing_and_a_colleagues_look_damages_nothing(
    door, runs, monkeypatch
):
    for name, value in RULING.items():
        monkeypatch.setenv(name, value)
    waits = trivial_worker.WAITS
    answer = door(
        "-m", f"seed={waits},1", *CPU, "hydra.launcher.array_parallelism=1",
        "sweep.detach=true", "sweep.name=away",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    assert "SBATCH_TIMELIMIT" in answer.out
    until(lambda: statuses(runs).get(waits) == "running")
    sweep = the_sweep()
    (job,) = [n for run_id, n in jobs(sweep).items() if sweep.state(run_id) == "running"]
    for name in RULING:
        monkeypatch.delenv(name)
    limit = subprocess.check_output(["squeue", "-h", "-j", job, "-o", "%l"], text=True, timeout=60)
    assert limit.strip() == "1:00:00"
    before = records_of(sweep)
    expected = {f"seed={waits}": "running", "seed=1": "queued"}
    other = colleague()
    assert look_of(other, sweep, **RULING) == expected
    assert look_of(0, sweep, USER="nobody", SQUEUE_PARTITION="none") == expected
    # Where SLURM cannot be asked nothing is known of the jobs.
    unknown = {f"seed={waits}": "running", "seed=1": "unknown"}
    assert look_of(other, sweep, PATH="/nowhere") == unknown
    assert records_of(sweep) == before
    assert door("cancel", "away").code == 0
    until(lambda: not any(map(slurm.is_active, states_of(jobs(sweep).values()).values())))
    assert look_of(other, sweep) == {f"seed={waits}": "cancelled", "seed=1": "cancelled"}


@pytest.mark.usefixtures("trivial_workers")
def test_a_job_at_its_time_limit_fails_where_it_could_only_begin_anew(door, runs):
    """SLURM itself sends the signal, ``signal_delay_s`` before the limit of a minute.

    It looks twice a minute and sends what is due until it looks again: here after 15 to 45 seconds,
    when the one cell is long done and the other one has long begun.
    """
    limit = ["hydra.launcher.timeout_min=1", "hydra.launcher.signal_delay_s=15"]
    answer = door("-m", f"seed={trivial_worker.WAITS},1", *CPU, *limit)
    assert answer.code == 1
    assert statuses(runs)[1] == "completed"
    found = by_seed(runs)[trivial_worker.WAITS]
    assert (found["status"], found["reason"]) == ("failed", "timeout")
    assert "hydra.launcher.timeout_min=1" in found["error"]["message"]
    assert count(the_sweep(), "requeued") == 0


@pytest.mark.longest
def test_a_preempted_training_ends_as_the_undisturbed_one(door, runs, monkeypatch):
    Path("text.txt").write_text(TEXT)
    sweep = ["-m", *TRAINING, "seed=0,1"]
    monkeypatch.setattr(worker_process, "WORKER", (str(ORDERED_WORKER),))
    Path("hold").touch()
    assert door(*sweep, "sweep.name=away", "sweep.detach=true", *CPU).code == 0
    away = Layout(Path("results/away").resolve())
    until(Path("held").exists)  # one of the two is in the middle of its training
    directory = Path(Path("held").read_text())
    job = jobs(away)[directory.name]
    subprocess.run(["scancel", "--signal=USR2", job], check=True, timeout=60)
    until(lambda: all(away.state(run_id) == "completed" for run_id in jobs(away)), 150)
    assert count(away, "preempted") == count(away, "requeued") == 1
    assert record.read(directory)["provenance"]["resumed_at"] > 0

    assert door(*sweep, "sweep.name=here").code == 0
    here = Layout(Path("results/here").resolve())
    for run_id in jobs(away):
        mine, theirs = (one.run_directory(run_id) / "model" for one in (here, away))
        name = "model.safetensors"
        assert (mine / name).read_bytes() == (theirs / name).read_bytes()
        assert curve(here.run_directory(run_id)) == curve(away.run_directory(run_id))


RANKS = [*ANALYSIS, "data.batch_size=4", "distributed.nproc=2", "distributed.timeout_s=120"]


@pytest.mark.longest
@pytest.mark.timeout(900)
def test_a_cell_of_two_ranks_is_one_job_and_gives_what_it_gives_here(door, runs):
    """One task of SLURM, whose worker starts the ranks; the GPUs are declared, not there."""
    Path("text.txt").write_text(TEXT)
    launchers = {"gpu": [*GPU, "hydra.launcher.gpus_per_node=2"], "cpu": CPU, "here": []}
    found = {}
    for name, chosen in launchers.items():
        arguments = ["-m", *RANKS, "seed=0", f"sweep.name={name}", *chosen]
        assert door(*arguments).code == 0
        (directory,) = (path for path, _ in runs() if path.parent.name == name)
        metrics = json.loads((directory / "metrics.json").read_text())
        assert record.read(directory)["status"] == "completed"
        assert metrics["dist/world_size"] == 2
        assert len((directory / "ranks.csv").read_text().splitlines()) == 3
        ranks = record.read(directory)["provenance"]["distributed"]["ranks"]
        assert len({rank["pid"] for rank in ranks}) == 2
        found[name] = {key: metrics[key] for key in ("loss", "ng/norm", "ng/cosine", "tokens")}
    assert found["gpu"] == found["cpu"] == found["here"]
    numbers = {
        name: list(jobs(Layout(Path("results", name).resolve())).values())
        for name in ("gpu", "cpu")
    }
    assert [len(one) for one in numbers.values()] == [1, 1]
    both = [job for one in numbers.values() for job in one]
    until(lambda: set(states_of(both).values()) == {"COMPLETED"})
