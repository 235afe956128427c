"""The nodes of one run: one leads, and all of them learn how the ranks of each have ended.

On every node a process starts that node's ranks and watches them. These processes talk through a
small store (torch's ``TCPStore``) that node 0 keeps at ``MASTER_ADDR:MASTER_PORT``, where the ranks
meet too: which directory the run has, that a node has failed and the others are to stop, how each
node's ranks ended, and what node 0 made of it all. No file is needed for that, so nothing depends
on how fast a shared file system shows what another node has written.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

LOOK_EVERY_S = 0.1
ALARM_EVERY_S = 0.5
REPORT_S = 25.0
"""How long node 0 waits for the others to tell how their ranks ended, once one has failed."""

VERDICT_S = 60.0
"""How long the others wait for node 0 to tell what became of the run."""

GOODBYE_S = 30.0
"""How long node 0 keeps the store for those that have yet to come, or to read its last word."""

_CONNECT_S = 3.0
_RUN, _VERDICT, _ALARM = "run", "verdict", "alarm"


class NodeError(RuntimeError):
    """The nodes of a run did not come together, or one of them is gone; one line."""


class Elsewhere(Exception):
    """Another node's ranks have failed, or it was told to stop: this node's ranks are stopped."""


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


class Meeting:
    """What the nodes tell each other. Made by :func:`meeting`.

    Args:
        where: this node among the others.
        store: what all of them see.
        timeout_s: how long nodes wait for each other at the start.
    """

    def __init__(self, where: Place, store: TCPStore, timeout_s: float) -> None:
        self.where = where
        self.timeout_s = timeout_s
        self._store = store
        self._looked = 0.0

    @property
    def leads(self) -> bool:
        """Whether this is node 0, which alone writes the run."""
        return self.where.node == 0

    # ---- the start ---------------------------------------------------------------------------

    def announce(self, told: dict[str, Any]) -> None:
        """Tells the others what is being run, and where; for node 0."""
        self._say(_RUN, told)

    def announced(self) -> dict[str, Any] | None:
        """Waits for what node 0 announces; None where it ended without.

        Raises:
            NodeError: it says nothing in time, or is gone.
        """
        found = self._first((_RUN, _VERDICT), self.timeout_s)
        if found is None:
            raise NodeError(f"node 0 did not say within {self.timeout_s:g} s what is to be run")
        return found[1] if found[0] == _RUN else None

    def together(self) -> None:
        """Waits until every node is about to start its ranks.

        Raises:
            NodeError: one did not come in time.
            Elsewhere: one has given up.
        """
        self._say(_ready(self.where.node), True)
        until = time.monotonic() + self.timeout_s
        missing = list(range(self.where.nodes))
        while missing:
            self.look()
            missing = [node for node in missing if self._heard(_ready(node)) is None]
            if missing and time.monotonic() > until:
                raise NodeError(
                    f"distributed.nodes={self.where.nodes}, but node "
                    f"{' and '.join(map(str, missing))} did not come within {self.timeout_s:g} s"
                )
            time.sleep(LOOK_EVERY_S if missing else 0)

    # ---- while the ranks are at work ---------------------------------------------------------

    def alarm(self) -> None:
        """Tells the others that the run is over."""
        self._say(_ALARM, self.where.node)

    def look(self) -> None:
        """Looks, not more than twice a second, whether another node has given the alarm.

        Raises:
            Elsewhere: it has, or node 0 is gone.
        """
        if time.monotonic() - self._looked < ALARM_EVERY_S:
            return
        self._looked = time.monotonic()
        try:
            node = self._heard(_ALARM)
        except NodeError as error:
            raise Elsewhere(str(error)) from None
        if node is not None and node != self.where.node:
            raise Elsewhere(f"node {node} has given the alarm")

    # ---- the end -----------------------------------------------------------------------------

    def report(self, told: dict[str, Any]) -> None:
        """Tells node 0 how this node's ranks have ended."""
        self._say(_ended(self.where.node), told)

    def reports(self) -> dict[int, dict[str, Any]]:
        """Returns what the other nodes tell of their ranks, by node; for node 0.

        Those that say nothing in time are left out.
        """
        found: dict[int, dict[str, Any]] = {}
        until = time.monotonic() + REPORT_S
        others = range(1, self.where.nodes)
        while len(found) < len(others) and time.monotonic() < until:
            for node in others:
                told = self._heard(_ended(node))
                if told is not None:
                    found[node] = told
            time.sleep(LOOK_EVERY_S)
        return found

    def decide(self, told: dict[str, Any]) -> None:
        """Tells the others what became of the run; for node 0, once it is written."""
        self._say(_VERDICT, told)

    def verdict(self) -> dict[str, Any]:
        """Waits for what became of the run.

        Raises:
            NodeError: node 0 says nothing in time, or is gone.
        """
        found = self._first((_VERDICT,), VERDICT_S)
        if found is None:
            raise NodeError(f"node 0 did not say within {VERDICT_S:g} s how the run ended")
        return found[1]

    def close(self) -> None:
        """Leaves; node 0 waits for the others, which still have to hear how the run ended."""
        if not self.leads:
            with suppress(NodeError):
                self._say(_bye(self.where.node), True)
            return
        if self._heard(_VERDICT) is None:
            self.decide({"status": "not begun"})
        others = range(1, self.where.nodes)
        until = time.monotonic() + GOODBYE_S
        while time.monotonic() < until and not all(self._heard(_bye(n)) for n in others):
            time.sleep(LOOK_EVERY_S)

    # ---- the store ---------------------------------------------------------------------------

    def _say(self, key: str, value: Any) -> None:
        with _lost():
            self._store.set(f"fisher_lab/{key}", json.dumps(value))

    def _heard(self, key: str) -> Any | None:
        name = f"fisher_lab/{key}"
        with _lost():
            return json.loads(self._store.get(name)) if self._store.check([name]) else None

    def _first(self, keys: tuple[str, ...], seconds: float) -> tuple[str, Any] | None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            for key in keys:
                value = self._heard(key)
                if value is not None:
                    return key, value
            time.sleep(LOOK_EVERY_S)
        return None


_CURRENT: list[Meeting] = []


def current() -> Meeting | None:
    """Returns the meeting that this process takes part in, if there are several nodes."""
    return _CURRENT[-1] if _CURRENT else None


@contextmanager
def meeting(where: Place, timeout_s: float) -> Iterator[Meeting]:
    """Brings this node together with the others.

    Args:
        where: this node among the others.
        timeout_s: how long nodes wait for each other.

    Raises:
        NodeError: node 0 cannot be reached.
    """
    found = Meeting(where, _store(where, timeout_s), timeout_s)
    _CURRENT.append(found)
    try:
        yield found
    finally:
        _CURRENT.remove(found)
        with suppress(NodeError):
            found.close()


def _store(where: Place, timeout_s: float) -> TCPStore:
    """Short attempts, so that a signal is noticed between them."""
    from torch.distributed import (
        DistError,
        TCPStore,  # pyright: ignore[reportPrivateImportUsage]
    )

    until = time.monotonic() + timeout_s
    while True:
        left = until - time.monotonic()
        try:
            store = TCPStore(
                where.address,
                where.port,
                is_master=where.node == 0,
                timeout=timedelta(seconds=max(0.1, min(_CONNECT_S, left))),
                wait_for_workers=False,
                multi_tenant=True,  # elastic opens it a second time
            )
        except (DistError, RuntimeError) as error:
            if where.node == 0:
                raise NodeError(
                    f"MASTER_PORT={where.port} cannot be opened on {where.address}: "
                    f"{str(error).strip().splitlines()[0]}"
                ) from None
            if time.monotonic() > until:
                raise NodeError(
                    f"node 0 was not at {where.address}:{where.port} within {timeout_s:g} s"
                ) from None
            time.sleep(LOOK_EVERY_S)
            continue
        store.set_timeout(timedelta(seconds=_CONNECT_S))
        return store


@contextmanager
def _lost() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # torch's DistError is one
        raise NodeError(
            f"the connection to node 0 is gone ({str(error).strip().splitlines()[0]})"
        ) from None


def _ready(node: int) -> str:
    return f"ready/{node}"


def _ended(node: int) -> str:
    return f"ended/{node}"


def _bye(node: int) -> str:
    return f"bye/{node}"
