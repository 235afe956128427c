"""How nodes agree and hear of each other's end; and what a rank makes of one that is gone."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fisher_lab.config.errors import ConfigError
from fisher_lab.config.launchers import LocalSettings, SlurmSettings
from fisher_lab.config.schema import Config
from fisher_lab.curvature.collectives import CommunicationError
from fisher_lab.distributed import nodes
from fisher_lab.distributed.launch import Failure
from fisher_lab.distributed.nodes import Elsewhere, Meeting, NodeError, Place
from fisher_lab.runs import record
from fisher_lab.runs.record import Run
from fisher_lab.runs.signals import Interrupted
from fisher_lab.sweeps import run as session
from fisher_lab.sweeps.cell import Cell, Frozen, freeze, new_submission
from fisher_lab.sweeps.directory import Layout
from fisher_lab.sweeps.slurm import CellFailed, CellJob
from fisher_lab.tasks import endings, ranks
from fisher_lab.tasks.endings import Endings
from fisher_lab.tasks.ranks import Ended
from fisher_lab.tasks.run_spec import Work
from tests.ports import free_ports

WAIT_S = 60


def place(node: int, port: int) -> Place:
    return Place(1, 2, node, "127.0.0.1", port)


def both(*actions: Callable[[Meeting], Any], timeout_s: float = 20.0) -> list[Any]:
    """What each node's action returns, or the error that it raises."""
    port = free_ports()

    def on(node: int) -> Any:
        try:
            with nodes.meeting(place(node, port), timeout_s) as meeting:
                return actions[node](meeting)
        except (NodeError, Elsewhere, Interrupted) as error:
            return error

    with ThreadPoolExecutor(2) as pool:
        futures: list[Future[Any]] = [pool.submit(on, node) for node in range(len(actions))]
        return [future.result(timeout=WAIT_S) for future in futures]


def test_node_0_says_where_the_run_is_and_how_it_ended() -> None:
    def lead(meeting: Meeting) -> Any:
        meeting.announce({"directory": "/runs/x-2"})
        meeting.together()
        found = meeting.reports()
        meeting.decide({"status": "failed", "error": {"type": "X"}, "stop": None})
        return found

    def follow(meeting: Meeting) -> Any:
        told = meeting.announced()
        meeting.together()
        meeting.look()
        meeting.report({"failures": [], "errors": [], "stop": 15})
        return told, meeting.verdict()

    led, followed = both(lead, follow)
    assert led == {1: {"failures": [], "errors": [], "stop": 15}}
    assert followed[0] == {"directory": "/runs/x-2"}
    assert followed[1] == {"status": "failed", "error": {"type": "X"}, "stop": None}


def test_a_node_that_begins_nothing_lets_the_others_go() -> None:
    led, followed = both(lambda _: "held", lambda meeting: meeting.announced())
    assert (led, followed) == ("held", None)


def test_an_alarm_stops_the_other_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "ALARM_EVERY_S", 0.0)

    def lead(meeting: Meeting) -> None:
        meeting.together()
        while not meeting.reports():
            pass
        meeting.look()

    def follow(meeting: Meeting) -> None:
        meeting.together()
        meeting.alarm()
        meeting.look()  # one's own is none
        meeting.report({})

    led, followed = both(lead, follow)
    assert isinstance(led, Elsewhere)
    assert str(led) == "node 1 has given the alarm"
    assert followed is None


def test_nodes_wait_for_each_other_with_a_time_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "GOODBYE_S", 0.1)
    (led,) = both(lambda meeting: meeting.together(), timeout_s=0.3)
    assert str(led) == "distributed.nodes=2, but node 1 did not come within 0.3 s"
    missing = r"node 0 was not at 127\.0\.0\.1:\d+ within 0\.3 s"
    with pytest.raises(NodeError, match=missing), nodes.meeting(place(1, free_ports()), 0.3):
        pass


# ---- the verdict ---------------------------------------------------------------------------------


def work(directory: Path) -> Work:
    return Work(Config(), directory, ())


def error(rank: int, kind: str, second: int = 0) -> dict[str, Any]:
    time = f"2026-01-01T00:00:{second:02}"
    return {"type": kind, "message": "m", "traceback": "t", "rank": rank, "time": time}


@pytest.mark.parametrize(
    ("every", "kind", "rank"),
    [
        # An error on node 1; rank 0 only lost its connection, and node 0 was told.
        (
            [Ended((Failure(0, 9, 1),), (error(0, "CommunicationError", 1),)),
             Ended((Failure(1, 8, 1),), (error(1, "ValueError", 2),))],
            "ValueError", 1,
        ),
        # A rank of node 1 was killed; the scheduler's SIGTERM to node 0 came with it.
        ([Ended(stop=15), Ended((Failure(1, 8, -9),))], "RankKilled", 1),
        # An abort of native code is what another one's end leads to.
        ([Ended((Failure(0, 9, -6),)), Ended((Failure(1, 8, -9),))], "RankKilled", 1),
        # Node 1 cannot start its ranks at all.
        (
            [Ended(elsewhere="node 1 has given the alarm"),
             Ended(errors=({**record.describe(NodeError("no port")), "rank": None},))],
            "fisher_lab.distributed.nodes.NodeError", None,
        ),
        ([Ended(elsewhere="node 1 has given the alarm")], "NodeError", None),
    ],
)  # fmt: skip
def test_the_record_has_the_error_of_whichever_node(
    tmp_path: Path, every: list[Ended], kind: str, rank: int | None
) -> None:
    Run.start(tmp_path, config={}).end("cancelled", "SIGTERM")  # what rank 0 has made of it
    told = ranks._conclude(work(tmp_path), every[0], every)
    found = record.read(tmp_path)
    assert found["status"] == "failed"
    assert found["error"] == told
    assert (found["error"]["type"], found["error"]["rank"]) == (kind, rank)


@pytest.mark.parametrize(
    ("every", "status", "signum"),
    [
        ([Ended((Failure(0, 9, 140),)), Ended(stop=12)], "preempted", 12),
        ([Ended((Failure(0, 9, 1),), (error(0, "CommunicationError"),)), Ended(stop=15)],
         "cancelled", 15),
        ([Ended(stop=15), Ended(elsewhere="node 0 has given the alarm")], "cancelled", 15),
    ],
)  # fmt: skip
def test_a_signal_to_one_node_is_a_signal_to_the_run(
    tmp_path: Path, every: list[Ended], status: str, signum: int
) -> None:
    Run.start(tmp_path, config={})
    with pytest.raises(Interrupted) as caught:
        ranks._conclude(work(tmp_path), every[0], every)
    assert caught.value.signum == signum
    assert record.read(tmp_path)["status"] == status


def test_what_a_node_tells_survives_the_way() -> None:
    told = Ended((Failure(1, 8, -9),), (error(1, "ValueError"),), 15, "why")
    assert Ended.of(json.loads(json.dumps(dataclasses.asdict(told)))) == told


# ---- a rank that is gone -------------------------------------------------------------------------


class Rank:
    """What :class:`Endings` asks of a communicator here."""

    def __init__(self, rank: int) -> None:
        self.rank = rank


@pytest.fixture(scope="module")
def gone() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait(timeout=WAIT_S)
    return process.pid


def known(*pids: int, host: str | None = None) -> list[dict[str, Any]]:
    host = socket.gethostname() if host is None else host
    return [{"rank": rank, "pid": pid, "host": host} for rank, pid in enumerate(pids)]


LOST = CommunicationError("rank 0 of 2: all_reduce failed")


@pytest.mark.parametrize("caught", [LOST, Interrupted(signal.SIGTERM)])
def test_a_rank_without_a_process_and_without_a_word_was_killed(
    tmp_path: Path, gone: int, caught: BaseException
) -> None:
    endings.clear(tmp_path)
    found = endings.cause(tmp_path, 0, caught, known(os.getpid(), gone))
    assert found is not None
    assert (found["type"], found["rank"]) == ("RankKilled", 1)
    assert found["message"].startswith(f"rank 1 (process {gone}) is gone without a word")
    # Nothing is known of a process of another host; an error of its own is better than that.
    away = known(os.getpid(), gone, host="elsewhere")
    assert endings.cause(tmp_path, 0, Interrupted(signal.SIGTERM), away) is None
    endings.write_error(tmp_path, 1, ValueError("no label"))
    found = endings.cause(tmp_path, 0, caught, known(os.getpid(), gone))
    assert found is not None
    assert (found["type"], found["message"], found["rank"]) == ("ValueError", "no label", 1)
    assert endings.cause(tmp_path, 0, ValueError("mine"), known(os.getpid(), gone)) is None


def run_of(directory: Path, *pids: int) -> Run:
    run = Run.start(directory, config={})
    run.note(distributed={"ranks": known(*pids)})
    return run


def test_ranks_that_a_signal_has_ended_were_not_killed(tmp_path: Path, gone: int) -> None:
    """A user's SIGTERM reaches all of them; rank 1 is gone first."""
    endings.clear(tmp_path / "ranks")
    stop = Interrupted(signal.SIGTERM)
    one = Endings(Rank(1), tmp_path)  # type: ignore[arg-type]
    one.stopped(run_of(tmp_path / "one", os.getpid(), os.getpid()), stop)
    zero = Endings(Rank(0), tmp_path)  # type: ignore[arg-type]
    run = run_of(tmp_path, os.getpid(), gone)
    zero.stopped(run, stop)
    assert record.read(tmp_path)["status"] == "cancelled"
    # So is one that was done before the signal came.
    endings.clear(tmp_path / "ranks")
    one.completed()
    zero.stopped(run_of(tmp_path, os.getpid(), gone), stop)
    assert record.read(tmp_path)["status"] == "cancelled"


def test_a_consequence_is_recorded_before_its_cause_is_looked_for(
    tmp_path: Path, gone: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    endings.clear(tmp_path / "ranks")
    run, seen = run_of(tmp_path, os.getpid(), gone), []
    look = endings.cause

    def watched(*arguments: Any) -> Any:
        seen.append(record.read(tmp_path))
        return look(*arguments)

    monkeypatch.setattr(endings, "cause", watched)
    Endings(Rank(0), tmp_path).failed(run, LOST)  # type: ignore[arg-type]
    assert [one["status"] for one in seen] == ["failed"]
    assert seen[0]["error"]["type"].endswith("CommunicationError")
    assert record.read(tmp_path)["error"]["type"] == "RankKilled"


def test_the_first_rank_that_is_left_writes_for_rank_0(tmp_path: Path, gone: int) -> None:
    directory = tmp_path / "run"
    endings.clear(directory / "ranks")
    run_of(directory, gone, os.getpid(), os.getpid())
    two = Endings(Rank(2), directory)  # type: ignore[arg-type]
    two.failed(run_of(tmp_path / "two", gone, os.getpid(), os.getpid()), LOST)
    assert record.read(directory)["status"] == "running"  # rank 1 is there to do so
    one = Endings(Rank(1), directory)  # type: ignore[arg-type]
    one.failed(run_of(tmp_path / "one", gone, os.getpid(), os.getpid()), LOST)
    found = record.read(directory)
    assert (found["status"], found["error"]["type"]) == ("failed", "RankKilled")
    assert found["error"]["rank"] == 0


# ---- sweeps --------------------------------------------------------------------------------------


def frozen_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, node: int) -> Frozen:
    for name, value in (("NODE_RANK", str(node)), ("MASTER_ADDR", "127.0.0.1")):
        monkeypatch.setenv(name, value)
    config = Config()
    config.distributed.nodes = 2
    layout = Layout(tmp_path / "sweep")
    cell = Cell(layout, "abc", (), {}, config, {})
    (frozen,) = freeze(new_submission(layout), [cell], {"version": 1})
    return frozen


@pytest.mark.parametrize("node", [0, 1])
def test_node_0_alone_settles_how_a_job_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, node: int
) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    frozen = frozen_for(tmp_path, monkeypatch, node)
    job = CellJob(
        threads=1, grace_s=5, limit_s=60, signal_delay_s=1,
        command=("-c", "print('a word'); raise SystemExit(1)"),
    )  # fmt: skip
    if node == 0:
        with pytest.raises(CellFailed):
            job(str(frozen.path))
        assert record.read(frozen.directory)["status"] == "failed"
        assert (frozen.directory / "job.log").read_text() == "a word\n"
        return
    assert job(str(frozen.path)) == "failed"
    written = [p.relative_to(frozen.directory) for p in frozen.directory.rglob("*") if p.is_file()]
    assert written == [Path("ranks", "node1.job.log")]
    assert frozen.layout.journal.read() == []


def test_a_job_has_as_many_nodes_as_its_cell() -> None:
    slurm = SlurmSettings(nodes=2)
    session._check_nodes(2, "slurm", slurm)
    session._check_nodes(1, "serial", LocalSettings())
    with pytest.raises(ConfigError, match=r"distributed\.nodes=1.*hydra\.launcher\.nodes=2"):
        session._check_nodes(1, "slurm", slurm)
    with pytest.raises(ConfigError, match=r"distributed\.nodes=2.*hydra/launcher=local"):
        session._check_nodes(2, "local", LocalSettings())


def test_a_sweep_is_submitted_where_no_node_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment names the nodes once the job runs, and not before."""
    from fisher_lab import cli

    for name in ("NODE_RANK", "SLURM_NODEID", "MASTER_ADDR", "SLURM_JOB_NODELIST"):
        monkeypatch.delenv(name, raising=False)
    config = Config()
    config.distributed.nodes = 2
    config.device = "cpu"
    cli._preflight_ranks(config)
    with pytest.raises(ConfigError, match=r"neither SLURM_NODEID"):
        cli._check_nodes(config)
