"""The course of one multirun: plan, look at what is there, freeze, launch, report.

``python -m fisher_lab.sweeps.run SUBMISSION...`` is the launcher of a detached sweep.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hydra.core.config_loader import ConfigLoader
from omegaconf import DictConfig, OmegaConf

from fisher_lab.config import launchers
from fisher_lab.config.errors import ConfigError
from fisher_lab.config.launchers import LocalSettings, Settings, SlurmSettings
from fisher_lab.config.schema import SweepConfig
from fisher_lab.runs import atomic, provenance, record
from fisher_lab.runs.lock import Lock
from fisher_lab.runs.processes import importable
from fisher_lab.runs.signals import Interrupted
from fisher_lab.runs.status import Status
from fisher_lab.sweeps import plan
from fisher_lab.sweeps.cell import RUN_DIRECTORY, Cell, FrozenCell, freeze, new_submission
from fisher_lab.sweeps.directory import LAUNCH_FILE, LAUNCHER
from fisher_lab.sweeps.plan import Identify, SweepPlan
from fisher_lab.sweeps.queue import Executor, Queue
from fisher_lab.sweeps.tally import Outcome, Tally, report, say

LAUNCHER_LOG = "launcher.log"
BACKGROUND = ("-m", "fisher_lab.sweeps.run")
"""What Python is given to run the launcher of a detached sweep."""


def run(
    loader: ConfigLoader,
    master: DictConfig,
    arguments: Sequence[str],
    kind: str,
    given: Mapping[str, Any],
    identify: Identify,
) -> int:
    """Run a multirun from its command line to its exit code.

    Args:
        loader: Hydra's configuration loader.
        master: the composed configuration that was started with.
        arguments: the overrides of the command line.
        kind: of the launcher, a key of ``launchers.KINDS``.
        given: the launcher's settings.
        identify: hashes text and model, and refuses what this machine cannot do.

    Raises:
        ConfigError: a cell that cannot run, or settings that are not allowed; nothing is written.
        Interrupted: a signal ended it.
    """
    settings = launchers.check(kind, given)
    options = SweepConfig(**_section(master, "sweep"))
    plans = plan.make(loader, master, arguments, identify, strict=not options.dry_run)
    if options.dry_run:
        return plan.show(plans)
    _check(plans, kind, settings)
    if options.detach and isinstance(settings, SlurmSettings) and settings.cluster == "slurm":
        _check_detached(options)
    cells = [cell for one in plans for cell in one.cells]
    for one in plans:
        one.layout.directory.mkdir(parents=True, exist_ok=True)
        one.write()
    todo, states = plan.to_run(cells)
    _look_at_what_is_done(plans, states)
    say(f"{len(cells)} cells: {_summary(states)}")
    for one in plans:
        say(f"{one.name}: {one.layout.directory}")
    failed = [
        cell for cell in cells if states[cell.directory] is Status.FAILED and cell not in todo
    ]
    before = {cell.directory: Outcome(Status.FAILED) for cell in failed}
    if not todo:
        finish(cells)  # its launcher may have been killed before, and claims may have changed
        return report(cells, Tally(0, ended=before))
    frozen = _submit(todo, master, kind, settings)
    tally = Tally(len(todo) + len(before), options.max_failures, before)
    if options.detach:
        return _detach(frozen, settings)
    try:
        launch(frozen, tally, settings)
    except Interrupted:
        say("interrupted; run the same command again to go on", error=True)
        raise
    finish(cells)  # sweeps too whose last cell ended under an earlier launcher that was killed
    return report(cells, tally)


def finish(cells: Sequence[Cell] | Sequence[FrozenCell]) -> None:
    """Tables, verdicts and figures of the sweeps of which cells have ended now."""
    from fisher_lab.results import finishing
    from fisher_lab.tracking import send

    for directory, tracker in {c.layout.directory: c.config.tracker for c in cells}.items():
        finishing.at_end(directory)
        send.send_sweep(directory, tracker)


def launch(cells: Sequence[FrozenCell], tally: Tally, settings: Settings) -> None:
    """Run cells with a launcher, until they have ended.

    Raises:
        ConfigError: there is no SLURM here, or it does not take the jobs.
        Interrupted: a signal.
    """
    with contextlib.ExitStack() as stack:
        for submission in dict.fromkeys(cell.submission for cell in cells):
            alive = Lock(submission / LAUNCHER)  # for `fisher-lab status --watch`
            if alive.acquire():
                stack.enter_context(alive)
        Queue(cells, _executor(settings), tally).run()


def _executor(settings: Settings) -> Executor:
    if isinstance(settings, SlurmSettings):
        from fisher_lab.sweeps.slurm import SubmititJobs

        return SubmititJobs(settings)
    if isinstance(settings, LocalSettings):
        from fisher_lab.sweeps.local import LocalProcesses

        return LocalProcesses(settings)
    from fisher_lab.sweeps.serial import InProcess

    return InProcess()


def _check(plans: Sequence[SweepPlan], kind: str, settings: Settings) -> None:
    for cell in (cell for one in plans for cell in one.cells):
        _check_nodes(cell.config.distributed.nodes, kind, settings)
    if kind != "serial":
        return
    for one in plans:
        for cell in one.cells:
            if cell.config.sweep.timeout_s is not None:
                raise ConfigError.value(
                    "sweep.timeout_s",
                    cell.config.sweep.timeout_s,
                    "null with hydra/launcher=serial, which cannot end a cell; take "
                    "hydra/launcher=local",
                )


def _check_nodes(nodes: int, kind: str, settings: Settings) -> None:
    """A job has the nodes that its cell is to run on; on this machine there is one."""
    if isinstance(settings, SlurmSettings) and settings.cluster == "slurm":
        if nodes != settings.nodes:
            raise ConfigError.value(
                "distributed.nodes", nodes, f"hydra.launcher.nodes={settings.nodes}, the job's"
            )
    elif nodes > 1:
        raise ConfigError.value(
            "distributed.nodes", nodes, f"1 with hydra/launcher={kind}; SLURM gives several"
        )


def _check_detached(options: SweepConfig) -> None:
    """What takes somebody who watches the jobs is refused where nobody does."""
    for key, value, allowed in (
        ("sweep.max_failures", options.max_failures, "null"),
        ("sweep.fail_fast", options.fail_fast, "false"),
    ):
        if value:
            raise ConfigError.value(
                key,
                value,
                f"{allowed} with sweep.detach=true on SLURM, where no launcher stays to count "
                "failures; leave out sweep.detach, for instance under tmux or nohup",
            )


def _section(master: DictConfig, name: str) -> dict[str, Any]:
    found = OmegaConf.to_container(master[name], resolve=True)
    assert isinstance(found, dict)
    return {str(key): value for key, value in found.items()}


def _summary(states: Mapping[Path, Status]) -> str:
    counted = Counter(sorted(states.values()))
    return ", ".join(f"{number} {state}" for state, number in counted.items())


def _look_at_what_is_done(plans: Sequence[SweepPlan], states: Mapping[Path, Status]) -> None:
    """Complete the journal where a worker was killed before it could; compare the versions."""
    now, others = None, set()
    for one in plans:
        done = [cell for cell in one.cells if states[cell.directory] is Status.COMPLETED]
        if not done:
            continue
        noted = {
            entry.get("run_id")
            for entry in one.layout.journal.read()
            if entry.get("event") == Status.COMPLETED
        }
        now = now or provenance.git()
        for cell in done:
            if cell.run_id not in noted:
                _note(cell)
            found = record.read(one.layout.run_directory(cell.run_id))
            commit = (found.get("provenance", {}).get("git") or {}).get("commit")
            if commit != now["commit"]:
                others.add(str(commit)[:12])
    if others and now is not None:
        say(
            f"fisher_lab: completed cells are of another version of the code "
            f"({', '.join(sorted(others))}; now {str(now['commit'])[:12]}); they are kept",
            error=True,
        )


def _note(cell: Cell) -> None:
    lock = cell.layout.lock(cell.run_id)
    if lock.acquire():
        with lock:
            cell.layout.note(cell.run_id, Status.COMPLETED)


def _submit(
    cells: Sequence[Cell], master: DictConfig, kind: str, settings: Settings
) -> list[FrozenCell]:
    """Freeze cells, each in its own sweep, and write down who launched what."""
    logging = _logging(master)
    frozen: dict[Path, FrozenCell] = {}
    for layout in dict.fromkeys(cell.layout for cell in cells):
        submission = new_submission(layout)
        own = [cell for cell in cells if cell.layout == layout]
        for cell, file in zip(own, freeze(submission, own, logging), strict=True):
            frozen[cell.directory] = file
        atomic.write_json(
            submission / LAUNCH_FILE,
            {
                "kind": kind,
                "settings": asdict(settings),
                "host": os.uname().nodename,
                "pid": os.getpid(),
                "cells": [cell.run_id for cell in own],
            },
        )
        layout.journal.append("launched", launcher=kind, cells=len(own), submission=submission.name)
    return [frozen[cell.directory] for cell in cells]


def _logging(master: DictConfig) -> dict[str, Any]:
    """The logging of a job, with a name in the place of the run directory."""
    copied = master.copy()
    OmegaConf.update(copied, "hydra.runtime.output_dir", RUN_DIRECTORY, force_add=True)
    found = OmegaConf.to_container(copied.hydra.job_logging, resolve=True)
    assert isinstance(found, dict)
    return {str(key): value for key, value in found.items()}


def _detach(cells: Sequence[FrozenCell], settings: Settings) -> int:
    """Hand the cells to the scheduler, or to a process of their own, and return."""
    names = ", ".join(sorted({str(cell.layout.directory) for cell in cells}))
    if isinstance(settings, SlurmSettings) and settings.cluster == "slurm":
        _executor(settings).start(cells)
    else:
        submissions = list(dict.fromkeys(str(cell.submission) for cell in cells))
        log = cells[0].submission / LAUNCHER_LOG
        with open(log, "ab") as stream, importable():
            subprocess.Popen(
                [sys.executable, *BACKGROUND, *submissions],
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        say(f"the launcher goes on in the background; its log is {log}")
    say(f"detached: fisher-lab status {names}")
    return 0


def main(submissions: list[str]) -> int:
    """Launch the frozen cells of submissions; returns the exit code."""
    cells: list[FrozenCell] = []
    launched: dict[str, Any] = {}
    for submission in map(Path, submissions):
        launched = json.loads((submission / LAUNCH_FILE).read_text(encoding="utf-8"))
        files = [submission / "cells" / f"{run_id}.json" for run_id in launched["cells"]]
        cells += map(FrozenCell.load, files)
    tally = Tally(len(cells), cells[0].sweep["max_failures"])
    try:
        launch(cells, tally, launchers.check(launched["kind"], launched["settings"]))
    except Interrupted as stop:
        return 128 + stop.signum
    finish(cells)
    return report(cells, tally)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
