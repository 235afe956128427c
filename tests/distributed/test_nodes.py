"""Nodes agree on the run directory, and on how the run ended."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fisher_lab.distributed import nodes
from fisher_lab.distributed.nodes import NodeError, Nodes, Place, RunEnd, RunEnded
from tests.ports import free_ports

WAIT_S = 60


def place(node: int, port: int) -> Place:
    return Place(1, 2, node, "127.0.0.1", port)


def both(*actions: Callable[[Nodes], Any], timeout_s: float = 20.0) -> list[Any]:
    """What each node's action returns, or the error that it raises."""
    port = free_ports()

    def on(node: int) -> Any:
        try:
            with nodes.connect(place(node, port), timeout_s) as group:
                return actions[node](group)
        except (NodeError, RunEnded) as error:
            return error

    with ThreadPoolExecutor(2) as pool:
        futures: list[Future[Any]] = [pool.submit(on, node) for node in range(len(actions))]
        return [future.result(timeout=WAIT_S) for future in futures]


def test_node_0_publishes_the_directory_and_a_complete_run_has_no_end():
    def first(group: Nodes) -> RunEnd | None:
        group.publish(Path("/runs/x-2"))
        group.gather()
        return group.agree(None)

    def second(group: Nodes) -> tuple[Path | None, RunEnd | None]:
        directory = group.directory()
        group.gather()
        return directory, group.agree(None)

    assert both(first, second) == [None, (Path("/runs/x-2"), None)]


def test_a_node_that_begins_nothing_lets_the_others_go():
    assert both(lambda _: "held", lambda group: group.directory()) == ["held", None]


def test_the_first_end_is_the_run_s_and_stops_the_other_nodes(monkeypatch):
    monkeypatch.setattr(nodes, "CHECK_EVERY_S", 0.0)
    failed, lost = RunEnd({"type": "X", "rank": 1}), RunEnd({"type": "CommunicationError"})
    stopped: list[bool] = []
    at_work = threading.Event()  # an end that comes sooner is one for `gather` to see

    def first(group: Nodes) -> RunEnd | None:
        group.gather()
        at_work.set()
        end = group.agree(lost, patience_s=20)  # its error follows from that of the other node
        with pytest.raises(RunEnded):
            group.check()
        stopped.append(True)
        return end

    def second(group: Nodes) -> RunEnd | None:
        group.gather()
        assert at_work.wait(WAIT_S)
        return group.agree(failed)

    assert both(first, second) == [failed, failed]
    assert stopped == [True]


def test_nodes_wait_for_each_other_with_a_time_out(monkeypatch):
    monkeypatch.setattr(nodes, "GOODBYE_S", 0.1)
    (error,) = both(lambda group: group.gather(), timeout_s=0.3)
    assert str(error) == "distributed.nodes=2, but only 1 came within 0.3 s"
    missing = r"node 0 was not at 127\.0\.0\.1:\d+ within 0\.3 s"
    with pytest.raises(NodeError, match=missing), nodes.connect(place(1, free_ports()), 0.3):
        pass
