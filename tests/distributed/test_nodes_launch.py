"""Two nodes on one host: two launchers (or workers of a sweep), each of which takes itself for one.

What only a second machine can show is not shown here: that the store is reached over a network, and
that SLURM starts a task on each node.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from fisher_lab.runs.identity import run_id
from fisher_lab.sweeps.cell import Cell, submit
from fisher_lab.sweeps.directory import Layout
from fisher_lab.workload.content_identity import content_identity
from tests.config.test_groups import composed
from tests.distributed.runs_on_ranks import (
    FAILING,
    LONG,
    SMALL,
    check_failed,
    check_killed,
    kill_rank,
    metrics_of,
    program,
    record_of,
)
from tests.ports import free_ports

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

NODES = (
    "distributed.nproc=1", "distributed.nodes=2", "progress=false", "distributed.timeout_s=120"
)  # fmt: skip
END_S = 300
WORKER = ("fisher_lab.sweeps.worker",)


@contextmanager
def two_nodes(*arguments: str, module: tuple[str, ...] = ("fisher_lab",)) -> Iterator[list[Any]]:
    """The same program as node 0 and as node 1, on loopback."""
    common = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports()), "GLOO_SOCKET_IFNAME": "lo"
    }  # fmt: skip
    with ExitStack() as stack:
        yield [
            stack.enter_context(program(*arguments, module=module, NODE_RANK=str(node), **common))
            for node in (0, 1)
        ]


def ended(programs: list[Any]) -> tuple[list[int], list[str]]:
    outputs = [one.communicate(timeout=END_S)[0] for one in programs]
    return [one.returncode for one in programs], outputs


def check_completed(directory: Path, outputs: list[str]) -> None:
    found = record_of(directory)
    assert found["status"] == "completed", outputs
    ranks = found["provenance"]["distributed"]["ranks"]
    assert [rank["rank"] for rank in ranks] == [0, 1]
    assert len({rank["pid"] for rank in ranks}) == 2
    assert metrics_of(directory)["tokens"] == 64
    assert metrics_of(directory)["dist/world_size"] == 2
    assert "completed" in (directory / "ranks" / "rank1.log").read_text()
    assert "node" in (directory / "ranks" / "node1.log").read_text()


def test_two_nodes_share_the_default_directory(tmp_path, monkeypatch):
    """It is named after the second; node 1 takes the one that node 0 has made."""
    monkeypatch.chdir(tmp_path)
    with two_nodes(*SMALL, *NODES) as programs:
        codes, outputs = ended(programs)
    assert codes == [0, 0], outputs
    (file,) = tmp_path.rglob("run.json")
    check_completed(file.parent, outputs)
    assert not [d for d in file.parent.parent.iterdir() if d != file.parent]
    assert list(file.parent.rglob("fisher_lab.log")) == [file.parent / "fisher_lab.log"]
    assert len(list(tmp_path.rglob(".hydra"))) == 1
    assert [out.count("run directory") for out in outputs] == [1, 0]


@contextmanager
def two_launchers(tmp_path: Path, *arguments: str) -> Iterator[tuple[Path, list[Any]]]:
    directory = tmp_path / "run"
    with two_nodes(*SMALL, *NODES, *arguments, f"hydra.run.dir={directory}") as programs:
        yield directory, programs


@contextmanager
def two_workers(tmp_path: Path, *arguments: str) -> Iterator[tuple[Path, list[Any]]]:
    """Of one cell of a sweep; its journal and its record say so."""
    frozen = frozen_cell(tmp_path, *arguments)
    with two_nodes(str(frozen.path), module=WORKER) as programs:
        yield frozen.directory, programs
    assert events(frozen) == ["started", "failed"]
    assert record_of(frozen.directory)["run_id"] == frozen.run_id


@pytest.mark.parametrize("nodes", [two_launchers, two_workers])
def test_an_error_on_node_1_is_in_the_record(tmp_path, nodes):
    with nodes(tmp_path, *FAILING) as (directory, programs):
        codes, outputs = ended(programs)
    assert codes == [1, 1], outputs
    check_failed(directory, outputs)
    if nodes is two_launchers:
        assert all("BatchError: batches: none given" in out for out in outputs)


@pytest.mark.parametrize("nodes", [two_launchers, two_workers])
def test_a_killed_rank_on_node_1_is_named(tmp_path, nodes):
    with nodes(tmp_path, *LONG) as (directory, programs):
        pid, codes, outputs = kill_rank(1, directory, programs)
    assert codes == [1, 1], outputs
    check_killed(directory, 1, f"rank 1 (process {pid}) was ended by SIGKILL", outputs)


def frozen_cell(tmp_path: Path, *arguments: str) -> Any:
    """A cell as SLURM's job gets it."""
    config = composed(*SMALL, *NODES, *arguments)
    content = content_identity(config)
    layout = Layout(tmp_path / "sweep")
    identity = run_id(dataclasses.asdict(config), content)
    cell = Cell(layout, identity, arguments, {}, config, content)
    logging_config = {
        "version": 1,
        "handlers": {"file": {"class": "logging.FileHandler",
                              "filename": "@RUN_DIRECTORY@/fisher_lab.log"}},
        "root": {"level": "INFO", "handlers": ["file"]},
        "disable_existing_loggers": False,
    }  # fmt: skip
    (frozen,) = submit([cell], logging_config)
    return frozen


def events(frozen: Any) -> list[str]:
    return [entry["event"] for entry in frozen.layout.journal.read()]


def test_workers_of_two_nodes_run_one_cell(tmp_path):
    frozen = frozen_cell(tmp_path)
    with two_nodes(str(frozen.path), module=WORKER) as programs:
        codes, outputs = ended(programs)
    assert codes == [0, 0], outputs
    check_completed(frozen.directory, outputs)
    assert events(frozen) == ["started", "completed"]
    assert not list(frozen.layout.locks.glob("*.lock.*"))
    # Started again, node 0 finds it done, and node 1 does not wait for anything.
    with two_nodes(str(frozen.path), module=WORKER) as programs:
        codes, outputs = ended(programs)
    assert codes == [0, 3], outputs
    assert events(frozen) == ["started", "completed"]
