"""Three processes that stay, for many checks: starting one costs seconds.

A check is a function of a module under `tests/` that takes a communicator and plain arguments and
returns plain data or tensors; :meth:`Pool.run` calls it on the first `size` processes at once and
hands back what each returned. Loopback only, time-outs on every wait.
"""

import pickle
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any

PROCESSES = 3
START_S = 120
CALL_S = 200
COLLECTIVE_S = 60


def said(action: Callable[[], Any]) -> str:
    """The error that an action raises, as text; "nothing" without one."""
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


class RanksFailed(AssertionError):
    """A check failed on a rank; the text has every rank's traceback."""


class Pool:
    """The processes; a failed or stuck call ends them, and the next call starts new ones.

    Args:
        directory: for the files through which they find each other.
    """

    def __init__(self, directory: Path) -> None:
        self.directory, self.started = directory, 0
        self.processes: list[subprocess.Popen] = []
        self.connections: list[Connection] = []

    def run(
        self, function: Callable[..., Any], size: int, own: list | None = None, **same: Any
    ) -> list[Any]:
        """Calls `function(communicator, **same)` on `size` ranks; with `batches=own[rank]`."""
        if not self.processes:
            self._start()
        for rank in range(size):
            arguments = same if own is None else {**same, "batches": own[rank]}
            self.connections[rank].send_bytes(pickle.dumps((function, size, arguments)))
        answers = [self._answer(rank) for rank in range(size)]
        failed = [f"rank {r}:\n{text}" for r, (good, text) in enumerate(answers) if not good]
        if failed:
            self.close(kill=True)
            raise RanksFailed("\n".join(failed))
        return [value for _, value in answers]

    def _answer(self, rank: int) -> tuple[bool, Any]:
        try:
            if self.connections[rank].poll(CALL_S):
                return pickle.loads(self.connections[rank].recv_bytes())
        except (EOFError, ConnectionError):
            return False, f"ended with exit code {self.processes[rank].wait(10)}"
        return False, f"no answer within {CALL_S} s"

    def _start(self) -> None:
        self.started += 1
        store = str(self.directory / f"store{self.started}")
        worker = str(Path(__file__).with_name("rank_pool_worker.py"))
        found: dict[int, Connection] = {}
        with Listener(str(self.directory / f"socket{self.started}"), "AF_UNIX") as listener:
            sock = listener._listener._socket  # type: ignore[attr-defined]
            sock.settimeout(START_S)
            for rank in range(PROCESSES):
                arguments = (listener.address, rank, PROCESSES, store, COLLECTIVE_S)
                command = [sys.executable, worker, *map(str, arguments)]
                self.processes.append(subprocess.Popen(command))
            waiting = [listener.accept() for _ in range(PROCESSES)]
        for connection in waiting:
            if not connection.poll(START_S):
                self.close(kill=True)
                raise RanksFailed(f"the processes were not ready within {START_S} s")
            found[connection.recv()] = connection
        self.connections = [found[rank] for rank in range(PROCESSES)]

    def close(self, *, kill: bool = False) -> None:
        """Ends the processes, at once or at their own pace."""
        for connection in self.connections:
            if not kill:
                connection.send_bytes(b"")
        for process in self.processes:
            if kill:
                process.kill()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(5)
        for connection in self.connections:
            connection.close()
        self.processes, self.connections = [], []
