"""What SLURM's programs are asked, and with which environment; the programs are scripts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fisher_lab.config.errors import ConfigError
from fisher_lab.config.launchers import SlurmSettings, check
from fisher_lab.runs import record
from fisher_lab.runs.lock import Lock
from fisher_lab.sweeps import slurm
from fisher_lab.sweeps.directory import LAUNCHER
from fisher_lab.sweeps.slurm import CellJob, Jobs, SubmititJobs
from tests.sweeps.submitted_cells import begin, submitted

RULING = {"SQUEUE_PARTITION": "other", "SLURM_CLUSTERS": "far", "SBATCH_TIMELIMIT": "2",
          "SLURM_MEM_PER_CPU": "100", "SQUEUE_USERS": "nobody"}  # fmt: skip


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Puts a script in the place of a program of SLURM; it notes its arguments and environment."""
    folder = tmp_path / "programs"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    for name, value in RULING.items():
        monkeypatch.setenv(name, value)

    def put(name: str, text: str) -> Path:
        file = folder / name
        noted = tmp_path / f"{name}.asked"
        file.write_text(f'#!/bin/sh\n{{ echo "$@"; env; }} >> {noted}\n{text}\n')
        file.chmod(0o755)
        return noted

    return put


def test_jobs_are_asked_for_by_their_numbers_whoever_asks(programs):
    asked = programs("squeue", 'echo "12_0|RUNNING"; echo "12_1|PENDING"; echo "13|FAILED"')
    found = slurm.states(["12_0", "12_1", "13"])
    assert found == {"12_0": "RUNNING", "12_1": "PENDING", "13": "FAILED"}
    text = asked.read_text()
    assert "-j 12,13 " in text.splitlines()[0]
    assert "-u" not in text.splitlines()[0].split()
    assert not [name for name in RULING if f"\n{name}=" in text]


def test_a_job_that_the_queue_has_forgotten_is_asked_of_the_accounting(programs):
    programs("squeue", "true")
    programs("sacct", 'echo "12|CANCELLED by 1000"; echo "14|RUNNING"')
    assert slurm.states(["12", "13", "14"]) == {"12": "CANCELLED", "13": "GONE", "14": "GONE"}


def test_one_job_that_is_not_known_is_no_silence_of_the_controller(programs):
    programs("squeue", 'echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1')
    programs("sacct", "exit 1")
    assert slurm.states(["12"]) == {"12": "GONE"}
    programs("squeue", 'echo "Unable to contact slurm controller" >&2; exit 1')
    assert slurm.states(["12"]) is None


def test_what_is_submitted_is_ruled_by_the_settings_alone(programs, capsys):
    asked = programs("sbatch", 'cp "$1" sbatch.sh; echo "Submitted batch job 12"')
    programs("srun", "true")
    programs("squeue", "true")
    programs("scontrol", 'echo "ClusterName = here"')
    cells = submitted(1, 2)
    SubmititJobs(SlurmSettings(poll_s=0.01)).start(cells)
    text = asked.read_text()
    assert not [name for name in RULING if f"\n{name}=" in text]
    assert "PYTHONPATH=" in text
    assert "#SBATCH --time=60\n" in Path("sbatch.sh").read_text()
    (line,) = [one for one in capsys.readouterr().out.splitlines() if "not handed on" in one]
    assert "SBATCH_TIMELIMIT" in line
    assert os.environ["SBATCH_TIMELIMIT"] == "2"
    found = Jobs.of(cells[0].layout)
    assert found.last == {"seed1": "12_0", "seed2": "12_1"}
    assert found.here(["12_0"], "here") == {"12_0"}
    assert found.here(["12_0"], "there") == set()


@pytest.mark.parametrize(
    ("told", "seconds"),
    [("2:00", 120), ("1:00:00", 3600), ("1-02:03:04", 93784), ("UNLIMITED", None), ("", None)],
)
def test_the_job_reads_its_real_limit(told, seconds, programs, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    asked = programs("squeue", f"echo {told}")
    assert slurm.limit_of_this_job() == seconds
    assert "-j 12" in asked.read_text()


def test_a_time_limit_that_is_not_the_one_that_was_asked_for_is_a_time_limit(monkeypatch):
    """And no preemption, after which the job would come back and reach it again."""
    monkeypatch.setattr(slurm, "limit_of_this_job", lambda: 240.0)
    (cell,) = submitted(1)
    begin(cell, "preempted", reason="SIGUSR2")
    job = CellJob(threads=1, grace_s=1.0, limit_s=3600.0, signal_delay_s=90.0, command=())
    assert not job._may_come_back(cell, 120.0)
    assert cell.state == "failed"
    message = record.read(cell.directory)["error"]["message"]
    assert message == (
        "reached the job's time limit (4 min, and not hydra.launcher.timeout_min=60)"
    )


def test_jobs_of_another_cluster_are_not_submitted():
    for name in ("clusters", "M"):
        with pytest.raises(ConfigError, match="SLURM_CONF"):
            check("slurm", {"additional_parameters": {name: "far"}})


def test_the_job_of_the_last_cell_writes_the_table_that_no_launcher_will(monkeypatch):
    from fisher_lab.results import finishing

    done: list[Path] = []
    monkeypatch.setattr(finishing, "at_end", done.append)
    one, two = submitted(1, 2)
    launcher = Lock(one.submission / LAUNCHER)
    begin(one, "completed")
    one.layout.finish_if_last()
    begin(two, "failed", error={"type": "E", "message": "m", "traceback": ""})
    assert launcher.acquire()
    with launcher:
        one.layout.finish_if_last()
    assert done == []
    one.layout.finish_if_last()
    assert done == [one.layout.directory]


def test_a_failure_tells_the_last_line_of_the_jobs_own_log():
    (cell,) = submitted(1)
    log = cell.submission / "slurm" / "7_0" / "7_0_0_log.err"
    log.parent.mkdir(parents=True)
    log.write_text("first\nsrun: fatal: SLURM_MEM_PER_CPU and SLURM_MEM_PER_NODE\n")
    assert slurm.end_cell(cell, "7_0", "FAILED") == "failed"
    error = record.read(cell.directory)["error"]
    assert error["message"] == (
        "the job 7_0 ended as FAILED and left no result: "
        "srun: fatal: SLURM_MEM_PER_CPU and SLURM_MEM_PER_NODE"
    )
    assert error["log_tail"].startswith("first\n")
