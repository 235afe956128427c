"""The nodes of one run: they agree on its directory, and on how it ended, through a store.

Torch elastic starts the ranks of each node and numbers those of all nodes. It lacks the rest: an
agent does not learn that another node's ranks have failed or were asked to end (a rendezvous tells
only of nodes that join), an error is known on its own node alone, and the ``c10d`` rendezvous
numbers nodes by their addresses and not by ``NODE_RANK``. So the rendezvous is elastic's static
one, and the launchers keep two words in a ``TCPStore`` beside it, at node 0: the run's directory,
and how the run ended, said by the first node on which it did. Nothing depends on how fast a shared
file system shows what another node has written.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

POLL_S = 0.1
CHECK_EVERY_S = 0.5
GOODBYE_S = 30.0
"""Node 0 keeps the store this long for nodes that still have to read it."""

_CONNECT_S = 3.0
_DIRECTORY, _END = "directory", "end"


class NodeError(RuntimeError):
    """The nodes of a run did not find each other, or one of them is gone; one line."""


class RunEnded(Exception):
    """The run has ended on another node: this node's ranks have to be stopped."""


class RunEnd(NamedTuple):
    """How a run ended that did not complete: its error, as in ``run.json``, or a signal."""

    error: dict[str, Any] | None = None
    signum: int | None = None


@dataclass(frozen=True)
class Place:
    """Where ranks are started.

    Attributes:
        nproc: ranks on each node.
        nodes: number of nodes.
        node: this node, from 0.
        address: host of node 0.
        port: a free one on node 0, where there are several nodes.
    """

    nproc: int
    nodes: int = 1
    node: int = 0
    address: str = "127.0.0.1"
    port: int = 0


class Nodes:
    """The nodes of one run, as one of their launchers sees them. Made by :func:`connect`.

    Args:
        where: this node among the others.
        store: that all of them use.
        timeout_s: how long nodes wait for each other at the start.
    """

    def __init__(self, where: Place, store: Store, timeout_s: float) -> None:
        self.where = where
        self.timeout_s = timeout_s
        self._store = store
        self._checked = 0.0

    @property
    def is_first(self) -> bool:
        """Whether this is node 0, which alone makes the run directory."""
        return self.where.node == 0

    def publish(self, directory: Path | None) -> None:
        """Gives the others the run directory; None where there will be no run. For node 0."""
        self._set(_DIRECTORY, None if directory is None else str(directory))

    def directory(self) -> Path | None:
        """Waits for the run directory that node 0 publishes.

        Raises:
            NodeError: node 0 publishes nothing in time, or is gone.
        """
        if not self._wait(lambda: self._has(_DIRECTORY), self.timeout_s):
            raise NodeError(f"node 0 did not say within {self.timeout_s:g} s what is to be run")
        found = self._get(_DIRECTORY)
        return None if found is None else Path(found)

    def gather(self) -> None:
        """Waits until every node is about to start its ranks.

        Raises:
            NodeError: one did not come in time.
            RunEnded: one has given up.
        """

        def came() -> int:
            self.check()
            return self._ask("add", "ready", 0)

        self._ask("add", "ready", 1)
        if not self._wait(lambda: came() == self.where.nodes, self.timeout_s):
            raise NodeError(
                f"distributed.nodes={self.where.nodes}, but only {came()} came within "
                f"{self.timeout_s:g} s"
            )

    def check(self) -> None:
        """Looks, at most twice a second, whether the run has ended on another node.

        Raises:
            RunEnded: it has.
            NodeError: node 0 is gone.
        """
        if time.monotonic() - self._checked < CHECK_EVERY_S:
            return
        self._checked = time.monotonic()
        if self._has(_END):
            raise RunEnded

    def agree(self, end: RunEnd | None, patience_s: float = 0.0) -> RunEnd | None:
        """Says how this node's ranks ended; returns how the run ended.

        Args:
            end: None where all ranks of this node did their work, or were stopped for another node.
            patience_s: how long another node may still be the first, where this node's end may
                follow from that one's.

        Returns:
            What the first node said; None where the run is complete.
        """
        if end is None:
            return RunEnd(*self._get(_END)) if self._has(_END) else None
        self._wait(lambda: self._has(_END), patience_s)
        return RunEnd(*json.loads(self._ask("compare_set", _END, "", json.dumps(end))))

    def close(self) -> None:
        """Leaves; node 0 waits for the others, which still have to read how the run ended."""
        if not self.is_first:
            self._set(f"left/{self.where.node}", True)
            return
        if not self._has(_DIRECTORY):
            self.publish(None)
        others = range(1, self.where.nodes)
        self._wait(lambda: all(self._has(f"left/{node}") for node in others), GOODBYE_S)

    def _ask(self, call: str, *arguments: Any) -> Any:
        """Calls the store."""
        try:
            return getattr(self._store, call)(*arguments)
        except RuntimeError as error:
            line = str(error).strip().splitlines()[0]
            raise NodeError(f"the connection to node 0 is gone ({line})") from None

    def _set(self, key: str, value: Any) -> None:
        self._ask("set", key, json.dumps(value))

    def _get(self, key: str) -> Any:
        return json.loads(self._ask("get", key))

    def _has(self, key: str) -> bool:
        return self._ask("check", [key])

    @staticmethod
    def _wait(condition: Callable[[], bool], seconds: float) -> bool:
        """Polls, so that a signal is noticed: the store's own ``wait`` is native code."""
        until = time.monotonic() + seconds
        while not (holds := condition()) and time.monotonic() < until:
            time.sleep(POLL_S)
        return holds


_CURRENT: list[Nodes] = []


def current() -> Nodes | None:
    """Returns the nodes that :func:`connect` has connected in this process, if there are any."""
    return _CURRENT[-1] if _CURRENT else None


@contextmanager
def connect(where: Place, timeout_s: float) -> Iterator[Nodes]:
    """Connects this node with the others.

    Args:
        where: this node among the others.
        timeout_s: how long nodes wait for each other.

    Raises:
        NodeError: node 0 cannot be reached.
    """
    nodes = Nodes(where, _open_store(where, timeout_s), timeout_s)
    _CURRENT.append(nodes)
    try:
        yield nodes
    finally:
        _CURRENT.remove(nodes)
        with suppress(NodeError):
            nodes.close()


def _open_store(where: Place, timeout_s: float) -> Store:
    """Makes short attempts, so that a signal is noticed between them."""
    from torch.distributed import (
        PrefixStore,  # pyright: ignore[reportPrivateImportUsage]
        TCPStore,  # pyright: ignore[reportPrivateImportUsage]
    )

    until = time.monotonic() + timeout_s
    while True:
        attempt = max(0.1, min(_CONNECT_S, until - time.monotonic()))
        try:
            store = TCPStore(
                where.address,
                where.port,
                is_master=where.node == 0,
                timeout=timedelta(seconds=attempt),
                wait_for_workers=False,
                multi_tenant=True,  # elastic opens it a second time
            )
        except RuntimeError as error:  # torch's DistError is one
            if where.node == 0:
                raise NodeError(
                    f"MASTER_PORT={where.port} cannot be opened on {where.address}: "
                    f"{str(error).strip().splitlines()[0]}"
                ) from None
            if time.monotonic() > until:
                raise NodeError(
                    f"node 0 was not at {where.address}:{where.port} within {timeout_s:g} s"
                ) from None
            time.sleep(POLL_S)
            continue
        store.set_timeout(timedelta(seconds=_CONNECT_S))
        return PrefixStore("fisher_lab", store)
