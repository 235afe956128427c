"""What the launcher makes of how its ranks ended, and a rank of another one that is gone."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from fisher_lab.config.schema import Config
from fisher_lab.curvature.collectives import CommunicationError
from fisher_lab.distributed import launch, nodes
from fisher_lab.distributed.launch import RanksFailed
from fisher_lab.distributed.nodes import NodeError, RunEnd, RunEnded
from fisher_lab.runs import record
from fisher_lab.runs.record import Run
from fisher_lab.runs.signals import Interrupted, Watch
from fisher_lab.tasks import rank_status, ranks
from fisher_lab.tasks.rank_status import RankStatus
from fisher_lab.tasks.run_spec import RunSpec

WAIT_S = 60
"""Seconds for a process that ends at once."""


def error(rank: int, kind: str, second: int = 0) -> dict[str, Any]:
    time = f"2026-01-01T00:00:{second:02}"
    return {"type": kind, "message": "m", "traceback": "t", "rank": rank, "time": time}


def failed(codes: dict[int, int]) -> RanksFailed:
    """Rank -> its exit code."""
    return RanksFailed({rank: ProcessFailure(0, 10 + rank, c, "") for rank, c in codes.items()})


LOST_RANK = error(0, "fisher_lab.curvature.errors.RankError", 1)


@pytest.mark.parametrize(
    ("errors", "failures", "kind", "rank"),
    [
        # The first error that follows from no other.
        ([LOST_RANK, error(1, "TypeError", 2), error(2, "ValueError", 3)],
         {0: 1, 1: 1}, "TypeError", 1),
        ([LOST_RANK, error(1, "TypeError", 2)],
         {0: -15, 2: -9}, "TypeError", 1),
        # A rank that was killed; an abort of native code is what that leads to.
        ([LOST_RANK], {0: 1, 2: -9}, "RankKilled", 2),
        ([], {0: -6, 1: -9}, "RankKilled", 1),
        ([LOST_RANK], {0: 1}, LOST_RANK["type"], 0),
        ([], {0: 1, 1: 1}, "RankFailed", 0),
    ],
)  # fmt: skip
def test_the_error_of_a_run_is_the_one_that_the_others_follow_from(errors, failures, kind, rank):
    found = ranks.first_error(errors, failed(failures).failures)
    assert (found["type"], found["rank"]) == (kind, rank)
    if kind == "RankKilled":
        assert found["message"].endswith("was ended by SIGKILL")
    elif kind == "RankFailed":
        assert found["message"] == "rank 0 (process 10) ended with exit code 1"
    else:
        assert (found["message"], found["traceback"]) == ("m", "t")


@pytest.mark.parametrize(
    ("codes", "signum"),
    [
        ([140, 140], signal.SIGUSR2),
        ([-signal.SIGTERM, 140], signal.SIGUSR2),
        ([1, 140], None),
        ([-signal.SIGUSR2, 140], signal.SIGUSR2),
        ([-signal.SIGUSR2, -signal.SIGTERM], signal.SIGUSR2),
        ([-signal.SIGUSR2, 1], None),
        ([-signal.SIGKILL], None),
        ([-signal.SIGTERM], None),
    ],
)
def test_the_launcher_tells_a_signal_from_a_failure(codes, signum):
    assert ranks.stopped_by(failed(dict(enumerate(codes))).failures) == signum


def test_a_rank_that_saw_another_one_go_ended_for_the_same_signal():
    """The signal had not reached it yet when the collective of both failed."""
    failures = failed({0: 1, 1: 140}).failures
    assert ranks.stopped_by(failures, [error(0, "CommunicationError")]) == signal.SIGUSR2
    assert ranks.stopped_by(failures, [error(0, "ValueError")]) is None
    assert ranks.stopped_by(failed({0: 1}).failures, [error(0, "CommunicationError")]) is None


class Group:
    """The nodes of a run of which another one has said how it ended."""

    is_first = True

    def __init__(self, end: RunEnd | None) -> None:
        self.end = end

    def publish(self, directory: Path | None) -> None:
        self.published = directory

    def agree(self, end: RunEnd | None, patience_s: float) -> RunEnd | None:
        self.own, self.patience_s = end, patience_s
        return self.end if self.end is not None else end


def launched(
    directory: Path, monkeypatch: pytest.MonkeyPatch, group: Group, raised: BaseException
) -> dict[str, Any] | None:
    """What the launcher of node 0 returns for ranks that ended in some way."""

    def start(*_: Any) -> None:
        raise raised

    monkeypatch.setattr(launch, "start", start)
    monkeypatch.setattr(nodes, "current", lambda: group)
    for name, value in (("NODE_RANK", "0"), ("MASTER_ADDR", "127.0.0.1")):
        monkeypatch.setenv(name, value)
    config = Config()
    config.distributed.nodes = 2
    return ranks.start(RunSpec(config, directory, ()), {})


@pytest.mark.parametrize(
    ("raised", "other", "kind", "rank"),
    [
        (RunEnded(), error(1, "ValueError"), "ValueError", 1),
        (failed({0: -6}), error(1, "RankKilled"), "RankKilled", 1),
        (failed({0: -9}), None, "RankKilled", 0),
        (NodeError("no port"), None, "fisher_lab.distributed.nodes.NodeError", None),
    ],
)
def test_the_record_has_the_error_of_whichever_node(
    tmp_path, monkeypatch, raised, other, kind, rank
):
    Run.start(tmp_path, config={}).end("cancelled", "SIGTERM")  # what rank 0 has made of it
    group = Group(None if other is None else RunEnd(other))
    answer = launched(tmp_path, monkeypatch, group, raised)
    found = record.read(tmp_path)
    assert group.published == tmp_path
    # Native code aborts when another rank is gone: then another node may still be the first.
    aborted = isinstance(raised, RanksFailed) and raised.failures[0].exitcode == -6
    assert (group.patience_s > 0) == aborted
    assert (found["status"], found["error"]) == ("failed", answer)
    assert (found["error"]["type"], found["error"]["rank"]) == (kind, rank)


@pytest.mark.parametrize(
    ("raised", "other", "status"),
    [
        (failed({0: 140}), None, "preempted"),
        (RunEnded(), 15, "cancelled"),
        (Interrupted(15), None, "cancelled"),
        (Interrupted(15), None, "completed"),  # the signal came too late
    ],
)
def test_a_signal_to_one_node_is_a_signal_to_the_run(tmp_path, monkeypatch, raised, other, status):
    run = Run.start(tmp_path, config={})
    if status == "completed":
        run.complete()
    else:  # rank 0 has noticed that another rank is gone
        run.fail_with({"type": "CommunicationError", "message": "m", "traceback": "", "rank": 0})
    group = Group(None if other is None else RunEnd(signum=other))
    with pytest.raises(Interrupted) as caught:
        launched(tmp_path, monkeypatch, group, raised)
    assert caught.value.signum == (12 if status == "preempted" else 15)
    assert (record.read(tmp_path)["status"], record.read(tmp_path)["error"]) == (status, None)


def test_ranks_that_could_not_begin_a_record_get_one(tmp_path, monkeypatch):
    launched(tmp_path, monkeypatch, Group(None), failed({0: -9}))
    found = record.read(tmp_path)
    assert (found["status"], found["config"]["distributed"]["nodes"]) == ("failed", 2)
    assert found["run_id"]


def status_of(rank: int, directory: Path) -> RankStatus:
    communicator: Any = SimpleNamespace(rank=rank)
    return RankStatus(communicator, directory)


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
def test_a_rank_without_a_process_and_without_a_word_was_killed(tmp_path, gone, caught):
    rank_status.clear(tmp_path)
    found = rank_status.cause(tmp_path, 0, caught, known(os.getpid(), gone))
    assert found is not None
    assert (found["type"], found["rank"]) == ("RankKilled", 1)
    assert found["message"].startswith(f"rank 1 (process {gone}) is gone without a word")
    # Nothing is known of a process of another host; an error of its own is better than that.
    away = known(os.getpid(), gone, host="another")
    assert rank_status.cause(tmp_path, 0, Interrupted(signal.SIGTERM), away) is None
    rank_status.write_error(tmp_path, 1, ValueError("no label"))
    found = rank_status.cause(tmp_path, 0, caught, known(os.getpid(), gone))
    assert found is not None
    assert (found["type"], found["message"], found["rank"]) == ("ValueError", "no label", 1)
    assert rank_status.cause(tmp_path, 0, ValueError("mine"), known(os.getpid(), gone)) is None


def run_of(directory: Path, *pids: int) -> Run:
    run = Run.start(directory, config={})
    run.note(distributed={"ranks": known(*pids)})
    return run


def test_a_preemption_is_none_of_a_failure_whatever_became_of_the_other_rank(tmp_path, gone):
    """On a busy machine the other rank was killed before it could say that it has ended."""
    rank_status.clear(tmp_path / "ranks")
    zero = status_of(0, tmp_path)
    zero.stopped(run_of(tmp_path, os.getpid(), gone), Interrupted(signal.SIGUSR2))
    assert record.read(tmp_path)["status"] == "preempted"


@pytest.mark.parametrize(
    ("found", "status"),
    [
        ({"type": "RankKilled", "message": "rank 1 is gone", "traceback": ""}, "preempted"),
        ({"type": "x.CommunicationError", "message": "m", "traceback": "t"}, "preempted"),
        ({"type": "ValueError", "message": "its own", "traceback": "t"}, "failed"),
    ],
)
def test_what_rank_zero_makes_of_a_signal_to_the_launcher(tmp_path, monkeypatch, found, status):
    """It has seen only that the other rank was gone: the launcher knows why."""

    def start(*_: Any) -> None:
        Run.start(tmp_path, config={}).fail_with(found)
        raise Interrupted(signal.SIGUSR2)

    monkeypatch.setattr(launch, "start", start)
    with pytest.raises(Interrupted, match="preempted by SIGUSR2"):
        ranks.start(RunSpec(Config(), tmp_path, ()), {})
    assert record.read(tmp_path)["status"] == status


def test_a_signal_between_the_end_of_the_ranks_and_its_record_is_the_end_of_the_run(
    tmp_path, monkeypatch
):
    def start(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGUSR2)

    monkeypatch.setattr(ranks, "_run_own_ranks", start)
    with pytest.raises(Interrupted):
        ranks.start(RunSpec(Config(), tmp_path, ()), {})
    assert record.read(tmp_path)["status"] == "preempted"


@pytest.mark.parametrize(
    ("kind", "status"), [("CommunicationError", "preempted"), ("ValueError", "failed")]
)
def test_a_signal_that_is_noted_after_the_ranks_ended_is_why_they_were_gone(
    tmp_path, monkeypatch, kind, status
):
    """The ranks got it first, and the launcher had seen them end before its own one came."""

    def ending(signals: Watch) -> None:
        real(signals)
        os.kill(os.getpid(), signal.SIGUSR2)

    real = Watch.ending
    monkeypatch.setattr(Watch, "ending", ending)
    monkeypatch.setattr(ranks, "_run_own_ranks", lambda *_: RunEnd(error(0, kind)))
    Run.start(tmp_path, config={}).fail_with(error(0, kind))
    if status == "preempted":
        with pytest.raises(Interrupted, match="preempted by SIGUSR2"):
            ranks.start(RunSpec(Config(), tmp_path, ()), {})
    else:
        assert ranks.start(RunSpec(Config(), tmp_path, ()), {}) == error(0, kind)
    assert record.read(tmp_path)["status"] == status


def test_ranks_that_a_signal_has_ended_were_not_killed(tmp_path, gone):
    """A user's SIGTERM reaches all of them; rank 1 is gone first."""
    rank_status.clear(tmp_path / "ranks")
    stop = Interrupted(signal.SIGTERM)
    one = status_of(1, tmp_path)
    one.stopped(run_of(tmp_path / "one", os.getpid(), os.getpid()), stop)
    zero = status_of(0, tmp_path)
    run = run_of(tmp_path, os.getpid(), gone)
    zero.stopped(run, stop)
    assert record.read(tmp_path)["status"] == "cancelled"
    # So is one that was done before the signal came.
    rank_status.clear(tmp_path / "ranks")
    one.completed()
    zero.stopped(run_of(tmp_path, os.getpid(), gone), stop)
    assert record.read(tmp_path)["status"] == "cancelled"


def test_a_consequence_is_recorded_before_its_cause_is_looked_for(tmp_path, gone, monkeypatch):
    rank_status.clear(tmp_path / "ranks")
    run, seen = run_of(tmp_path, os.getpid(), gone), []
    look = rank_status.cause

    def watched(*arguments: Any) -> Any:
        seen.append(record.read(tmp_path))
        return look(*arguments)

    monkeypatch.setattr(rank_status, "cause", watched)
    status_of(0, tmp_path).failed(run, LOST)
    assert [one["status"] for one in seen] == ["failed"]
    assert seen[0]["error"]["type"].endswith("CommunicationError")
    assert record.read(tmp_path)["error"]["type"] == "RankKilled"


def test_the_first_rank_that_is_left_writes_for_rank_0(tmp_path, gone):
    directory = tmp_path / "run"
    rank_status.clear(directory / "ranks")
    run_of(directory, gone, os.getpid(), os.getpid())
    two = status_of(2, directory)
    two.failed(run_of(tmp_path / "two", gone, os.getpid(), os.getpid()), LOST)
    assert record.read(directory)["status"] == "running"  # rank 1 is there to do so
    one = status_of(1, directory)
    one.failed(run_of(tmp_path / "one", gone, os.getpid(), os.getpid()), LOST)
    found = record.read(directory)
    assert (found["status"], found["error"]["type"]) == ("failed", "RankKilled")
    assert found["error"]["rank"] == 0
