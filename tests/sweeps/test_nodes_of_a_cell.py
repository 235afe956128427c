"""Cells of a sweep on several nodes: who settles how a job ended, and what is checked when."""

from __future__ import annotations

import dataclasses
import signal
from pathlib import Path

import pytest

from fisher_lab.config.errors import ConfigError
from fisher_lab.config.launchers import LocalSettings, SerialSettings, SlurmSettings
from fisher_lab.config.schema import Config, SweepConfig
from fisher_lab.runs import record
from fisher_lab.sweeps import run as session
from fisher_lab.sweeps.cell import Cell, submit
from fisher_lab.sweeps.directory import Layout
from fisher_lab.sweeps.slurm import CellJob


def of_nodes(nodes: int) -> Config:
    config = Config()
    config.distributed.nodes = nodes
    return config


@pytest.mark.parametrize("node", [0, 1])
def test_node_0_alone_settles_how_a_job_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, node: int
) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setenv("NODE_RANK", str(node))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    cell = Cell(Layout(tmp_path / "sweep"), "abc", (), {}, of_nodes(2), {})
    (frozen,) = submit([cell], {"version": 1})
    job = CellJob(
        threads=1, grace_s=5, limit_s=60, signal_delay_s=1,
        command=("-c", "print('a word'); raise SystemExit(1)"),
    )  # fmt: skip
    if node == 0:
        with pytest.raises(RuntimeError, match=r"^abc: "):
            job(str(frozen.path))
        assert record.read(frozen.directory)["status"] == "failed"
        assert (frozen.directory / "job.log").read_text() == "a word\n"
        return
    assert job(str(frozen.path)) == "failed"
    written = [p.relative_to(frozen.directory) for p in frozen.directory.rglob("*") if p.is_file()]
    assert written == [Path("ranks", "node1.job.log")]
    assert frozen.layout.journal.read() == []


def test_a_job_has_as_many_nodes_as_its_cell() -> None:
    one, two = (Cell(Layout(Path()), "abc", (), {}, of_nodes(n), {}) for n in (1, 2))
    for cell, kind, settings, allowed in (
        (two, "slurm", SlurmSettings(nodes=2), None),
        (one, "serial", SerialSettings(), None),
        (one, "slurm", SlurmSettings(nodes=2), "hydra.launcher.nodes=2, the job's"),
        (two, "local", LocalSettings(), "1 with hydra/launcher=local; SLURM gives several"),
    ):
        nodes = cell.config.distributed.nodes
        expected = [] if allowed is None else [("distributed.nodes", nodes, allowed)]
        assert list(session._refused([cell], SweepConfig(), kind, settings)) == expected


def test_a_sweep_is_submitted_where_no_node_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment names the nodes once the job runs, and not before."""
    from fisher_lab.tasks import preflight

    for name in ("NODE_RANK", "SLURM_NODEID", "MASTER_ADDR", "SLURM_JOB_NODELIST"):
        monkeypatch.delenv(name, raising=False)
    config = dataclasses.replace(of_nodes(2), device="cpu")
    preflight.check_ranks(config)
    with pytest.raises(ConfigError, match=r"neither SLURM_NODEID"):
        preflight.check_nodes(config)
