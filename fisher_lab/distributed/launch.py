"""Starting the ranks of one run on this node by torch elastic, and saying how they ended.

The launcher computes nothing: it watches. When a rank dies, the others are stopped within seconds.
``CUDA_VISIBLE_DEVICES`` is handed on as it is; a rank takes the device of its local rank. What
elastic lacks: it leaves signal handlers and environment variables behind, its ranks outlive an
agent that is killed, and it waits 30 s for a rank that has been asked to end.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

from fisher_lab.distributed.nodes import NodeError, Nodes, Place
from fisher_lab.runs import environment
from fisher_lab.runs.signals import STATUS, Interrupted

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
    from torch.distributed.elastic.rendezvous import (
        RendezvousHandler,
        RendezvousInfo,
        RendezvousParameters,
    )

SHUTDOWN_S = 10
"""A rank that has not ended this long after it was asked to is killed."""

SIGNALS = tuple(STATUS)
"""Handed on to the ranks."""

_BACKEND = "fisher_lab"


class LaunchError(ValueError):
    """The environment does not say where the ranks are to be started; one line."""


class RanksFailed(RuntimeError):
    """Ranks ended with an error; the others were stopped.

    Attributes:
        failures: rank -> how it ended, of those that ended first.
    """

    def __init__(self, failures: Mapping[int, ProcessFailure]) -> None:
        self.failures = failures
        super().__init__(f"ranks {sorted(failures)} have failed")


def place(nproc: int, nodes: int, environment: Mapping[str, str]) -> Place:
    """Finds this node among several, from the launcher's environment.

    SLURM's ``SLURM_NODEID`` and ``SLURM_JOB_NODELIST`` are used; ``NODE_RANK``, ``MASTER_ADDR``
    and ``MASTER_PORT`` go before them.

    Args:
        nproc: ranks on each node.
        nodes: number of nodes.
        environment: usually ``os.environ``.

    Raises:
        LaunchError: the environment does not say which node this is.
    """
    if nodes == 1:
        return Place(nproc)
    node = environment.get("NODE_RANK", environment.get("SLURM_NODEID"))
    hosts = environment.get("SLURM_JOB_NODELIST", "")
    address = environment.get("MASTER_ADDR") or (first_host(hosts) if hosts else None)
    if node is None or address is None:
        raise LaunchError(
            f"distributed.nodes={nodes}, but neither SLURM_NODEID and SLURM_JOB_NODELIST nor "
            "NODE_RANK and MASTER_ADDR are in the environment; start it through SLURM or set them"
        )
    given = int(environment.get("SLURM_NNODES", nodes))
    if given != nodes:
        raise LaunchError(f"distributed.nodes={nodes}, but SLURM has given {given}")
    # Jobs that share a host take different ports.
    job = int(environment.get("SLURM_JOB_ID", "0") or 0)
    port = int(environment.get("MASTER_PORT") or 20000 + job % 20000)
    return Place(nproc, nodes, int(node), address, port)


def first_host(hosts: str) -> str:
    """Returns the first host of a SLURM list, such as ``gpu[07-09,12],login``."""
    match = re.match(r"([^\[,]+)(?:\[([^\]]+)\])?([^,]*)", hosts.strip())
    if match is None:
        raise LaunchError(f"SLURM_JOB_NODELIST={hosts!r} is no list of hosts")
    prefix, numbers, suffix = match.groups()
    if numbers is None:
        return prefix
    return prefix + re.split(r"[-,]", numbers)[0] + suffix


def inside() -> bool:
    """Says whether this process is a rank, started by ``torchrun`` or by :func:`start`."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def start(module: str, arguments: Sequence[str], where: Place, nodes: Nodes | None = None) -> None:
    """Runs ``python -m module arguments`` on every rank of this node and waits for all of them.

    Args:
        module: what every rank runs.
        arguments: its arguments.
        where: how many ranks, on which nodes.
        nodes: the nodes, where there are several.

    Raises:
        RanksFailed: a rank ended with an error; the others have been stopped.
        Interrupted: this process got a signal; the ranks got it too and have ended.
        nodes.RunEnded: the run has ended on another node; this node's ranks have ended.
        nodes.NodeError: the nodes did not find each other.
    """
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import rendezvous_handler_registry
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if nodes is not None:
        rendezvous_handler_registry.register(_BACKEND, _rendezvous)
    with tempfile.TemporaryDirectory(prefix="fisher_lab-ranks-") as logs, _as_before():
        config = LaunchConfig(
            min_nodes=where.nodes,
            max_nodes=where.nodes,
            nproc_per_node=where.nproc,
            run_id=uuid.uuid4().hex if nodes is None else f"fisher_lab-{where.port}",
            rdzv_backend="c10d" if nodes is None else _BACKEND,
            rdzv_endpoint=f"{where.address}:{where.port}",
            rdzv_configs={} if nodes is None else {"nodes": nodes},
            local_addr="127.0.0.1" if nodes is None else None,
            max_restarts=0,
            monitor_interval=0.1,
            logs_specs=DefaultLogsSpecs(log_dir=logs),
            metrics_cfg={},
            signals_to_handle=",".join(signum.name for signum in SIGNALS),
            shutdown_timeout=SHUTDOWN_S,
        )
        os.environ["PYTHONPATH"] = environment.python_path()  # the ranks import this package
        try:
            elastic_launch(config, sys.executable)("-m", module, *arguments)
        except ChildFailedError as error:
            raise RanksFailed(error.failures) from None
        except SignalException as error:
            raise Interrupted(int(error.sigval)) from None
        except DistError as error:
            raise NodeError(str(error).strip().splitlines()[0]) from None


def _rendezvous(parameters: RendezvousParameters) -> RendezvousHandler:
    """Elastic's static rendezvous, which also ends once the run has ended on another node."""
    from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous

    nodes: Nodes = parameters.config["nodes"]

    class Rendezvous(StaticTCPRendezvous):
        def get_backend(self) -> str:
            return _BACKEND

        def next_rendezvous(self) -> RendezvousInfo:
            nodes.gather()
            return super().next_rendezvous()

        def num_nodes_waiting(self) -> Literal[0]:
            nodes.check()  # elastic asks all the time while the ranks are at work
            return 0

    where, seconds = nodes.where, max(1, round(nodes.timeout_s))
    return Rendezvous(
        where.address, where.port, where.node, where.nodes, parameters.run_id, seconds
    )


@contextmanager
def _as_before() -> Iterator[None]:
    """Elastic leaves signal handlers and environment variables behind."""
    handlers = {}
    if threading.current_thread() is threading.main_thread():
        handlers = {signum: signal.getsignal(signum) for signum in SIGNALS}
    environment = dict(os.environ)
    try:
        yield
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)
        for key in set(os.environ) - set(environment):
            del os.environ[key]
        os.environ.update(environment)


def end_with_parent() -> None:
    """Asks the kernel to end this rank when the process that started it is gone (Linux)."""
    if sys.platform != "linux":
        return
    import ctypes

    parent = os.getppid()
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1 is PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it was gone before we asked
        os.kill(os.getpid(), signal.SIGTERM)


def end_in_time(seconds: float = SHUTDOWN_S) -> None:
    """Sees to it that this rank ends within ``seconds`` after it was asked to (SIGTERM).

    A signal handler of Python's waits for the native code that the main thread is in. A thread
    learns of the signal at once. Elastic itself waits longer where a rank has failed.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)

    def watch() -> None:
        while signal.SIGTERM not in os.read(reading, 64):
            pass
        time.sleep(seconds)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="end-in-time", daemon=True).start()
