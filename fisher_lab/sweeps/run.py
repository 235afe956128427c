"""The course of one multirun: plan, look at what is there, freeze, launch, report.

``python -m fisher_lab.sweeps.run SUBMISSION...`` is the launcher of a detached sweep.
"""

from __future__ import annotations

import contextlib
import json
import os
import pkgutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from hydra.core.config_loader import ConfigLoader
from omegaconf import DictConfig, OmegaConf

from fisher_lab.config import launchers
from fisher_lab.config.errors import ConfigError
from fisher_lab.config.launchers import Settings, SlurmSettings
from fisher_lab.config.schema import SweepConfig
from fisher_lab.config.validate import build
from fisher_lab.runs import atomic, provenance, record, screen
from fisher_lab.runs.lock import Lock
from fisher_lab.runs.signals import Interrupted
from fisher_lab.runs.status import Status
from fisher_lab.sweeps import plan
from fisher_lab.sweeps.cell import RUN_DIRECTORY, Cell, Outcome, Submission
from fisher_lab.sweeps.deciding import Deciding
from fisher_lab.sweeps.directory import LAUNCH_FILE, LAUNCHER, REGISTRATION_FILE, Layout
from fisher_lab.sweeps.plan import Identify
from fisher_lab.sweeps.queue import Executor, Queue, Tally, say
from fisher_lab.sweeps.worker_process import start_python

if TYPE_CHECKING:
    from fisher_lab.results.registration import Registration

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
    options = build(SweepConfig, _plain(master.sweep), "sweep.")
    plans = plan.make(loader, master, arguments, identify, strict=not options.dry_run)
    _refuse_to_decide(plans, options)
    if options.dry_run:
        return _dry_run(plans, options, kind, settings)
    cells = [cell for one in plans for cell in one.launched]
    for key, value, allowed in _refused(cells, options, kind, settings):
        raise ConfigError.value(key, value, allowed)
    registered = [one.register() for one in plans]
    deciding = [
        Deciding(one, found)
        for one, found in zip(plans, registered, strict=True)
        if one.further is not None and found is not None
    ]
    for one in plans:
        one.write()
    if options.register:
        return _say_registered(plans, registered)
    cells = [cell for one in plans for cell in one.launched]
    todo, states = plan.to_run(cells)
    _look_at_what_is_done([cell for cell in cells if states[cell] is Status.COMPLETED])
    counted = Counter(sorted(states.values()))
    say(f"{len(cells)} cells: {', '.join(f'{n} {state}' for state, n in counted.items())}")
    for one in plans:
        say(one.layout.title)
    failed = [c.directory for c in cells if states[c] is Status.FAILED and c not in todo]
    before = {directory: Outcome(Status.FAILED) for directory in failed}
    tally = Tally(len(todo) + len(before), options.max_failures, before)
    if todo or deciding:
        submissions = _submissions(todo, deciding, master, kind, settings)
        if options.detach:
            return _detach(_frozen(todo, submissions), settings)
        _launch(todo, tally, settings, submissions, deciding)
    cells = [cell for one in plans for cell in one.launched]
    finish(cells)  # also where an earlier launcher was killed before, or claims have changed
    return tally.report(cells)


def _dry_run(
    plans: Sequence[plan.SweepPlan], options: SweepConfig, kind: str, settings: Settings
) -> int:
    for one in plans:
        for cell in list(one.cells):
            refused = next(_refused([cell], options, kind, settings), None)
            if refused is not None:
                one.refuse(cell, str(ConfigError.value(*refused)))
    return plan.show(plans)


def _refuse_to_decide(plans: Sequence[plan.SweepPlan], options: SweepConfig) -> None:
    """Refuse ``sweep.until=decided`` where it cannot be done."""
    if not options.until:
        return
    if all(one.further is None for one in plans):
        allowed = "null for sweeps whose files state no claims"
        raise ConfigError.value("sweep.until", options.until, allowed)
    if any(one.further is not None and one.file and one.file.alone for one in plans):
        allowed = "null for sweeps with alone: true, whose times are compared seed by seed"
        raise ConfigError.value("sweep.until", options.until, allowed)
    if options.detach:
        why = "false with sweep.until=decided: a launcher stays to look at the claims"
        raise ConfigError.value("sweep.detach", True, f"{why}; run it under tmux or nohup")


def _launch(
    todo: Sequence[Cell],
    tally: Tally,
    settings: Settings,
    submissions: Mapping[Layout, Submission],
    deciding: Sequence[Deciding],
) -> None:
    """Run cells, and those that claims come to need."""

    def wanted() -> list[Cell]:
        found = [*todo, *(cell for one in deciding for cell in one.wanted())]
        return list(dict.fromkeys(_frozen(found, submissions)))

    try:
        first = _frozen(todo, submissions)
        launch(first, tally, settings, submissions.values(), wanted if deciding else None)
    except Interrupted:
        say("interrupted; run the same command again to go on", error=True)
        raise


def _say_registered(
    plans: Sequence[plan.SweepPlan], registered: Sequence[Registration | None]
) -> int:
    for one, found in zip(plans, registered, strict=True):
        claims = "no claims to register" if found is None else f"{len(found.claims)} claims"
        sha256 = "" if found is None else f", SHA-256 {found.content['sha256']}"
        say(f"{one.layout.title}: {len(one.cells)} cells, {claims}{sha256}")
    return 0


def finish(cells: Sequence[Cell]) -> None:
    """Tables, verdicts and figures of the sweeps of which cells have ended now."""
    from fisher_lab.results import finishing

    for directory in dict.fromkeys(cell.layout.sweep for cell in cells):
        finishing.at_end(directory)


def launch(
    cells: Sequence[Cell],
    tally: Tally,
    settings: Settings,
    submissions: Iterable[Submission],
    wanted: Callable[[], list[Cell]] | None = None,
) -> None:
    """Run cells with a launcher, until they have ended.

    Args:
        cells: frozen.
        tally: learns how each has ended.
        settings: of the launcher.
        submissions: in which they are frozen.
        wanted: asked whenever a cell has ended for all that are to be run, in their order.

    Raises:
        ConfigError: there is no SLURM here, or it does not take the jobs.
        Interrupted: a signal.
    """
    with contextlib.ExitStack() as stack:
        for submission in submissions:
            alive = Lock(submission.directory / LAUNCHER)  # for `fisher-lab status --watch`
            if alive.acquire():
                stack.enter_context(alive)
        Queue(cells, _executor(settings), tally, wanted).run()


def _executor(settings: Settings) -> Executor:
    return pkgutil.resolve_name(settings.executor)(settings)


def _is_cluster(settings: Settings) -> bool:
    return isinstance(settings, SlurmSettings) and settings.cluster == "slurm"


def _refused(
    cells: Sequence[Cell], options: SweepConfig, kind: str, settings: Settings
) -> Iterator[tuple[str, object, str]]:
    """Key, value and what is allowed of every setting that the launcher cannot do."""
    yield from _refused_to_workers(cells, kind, settings)
    yield from _refused_to_retry(cells, options, kind, settings)
    for cell in cells:
        nodes, timeout_s = cell.config.distributed.nodes, cell.config.sweep.timeout_s
        if isinstance(settings, SlurmSettings) and _is_cluster(settings):
            if nodes != settings.nodes:
                allowed = f"hydra.launcher.nodes={settings.nodes}, the job's"
                yield "distributed.nodes", nodes, allowed
        elif nodes > 1:
            allowed = f"1 with hydra/launcher={kind}; SLURM gives several"
            yield "distributed.nodes", nodes, allowed
        if kind == "serial" and timeout_s is not None:
            allowed = (
                "null with hydra/launcher=serial, which cannot end a cell; take "
                "hydra/launcher=local"
            )
            yield "sweep.timeout_s", timeout_s, allowed
    if options.detach and _is_cluster(settings):
        why = (
            "with sweep.detach=true on SLURM, where no launcher stays to count failures; leave out "
            "sweep.detach, for instance under tmux or nohup"
        )
        if options.max_failures:
            yield "sweep.max_failures", options.max_failures, f"null {why}"
        if options.fail_fast:
            yield "sweep.fail_fast", options.fail_fast, f"false {why}"


def _refused_to_workers(
    cells: Sequence[Cell], kind: str, settings: Settings
) -> Iterator[tuple[str, object, str]]:
    """The same of workers, each of which takes one cell after the other on one node."""
    workers = getattr(settings, "workers", None)
    if workers is None and kind != "workers":
        return
    key, value = (
        ("hydra/launcher", kind) if workers is None else ("hydra.launcher.workers", workers)
    )
    if any(cell.alone for cell in cells):
        yield key, value, "left out for a sweep with alone: true, whose cells run one at a time"
    if any(cell.config.distributed.nodes > 1 for cell in cells):
        yield key, value, "left out for cells with distributed.nodes > 1: a worker has one node"


def _refused_to_retry(
    cells: Sequence[Cell], options: SweepConfig, kind: str, settings: Settings
) -> Iterator[tuple[str, object, str]]:
    """The same of what is done about failures."""
    policies = {name: getattr(options.retry, name) for name in vars(options.retry)}
    memory = getattr(settings, "mem_gb", None) if _is_cluster(settings) else None
    has_limit = _is_cluster(settings) or any(c.config.sweep.timeout_s is not None for c in cells)
    for name, policy in policies.items():
        key = f"sweep.retry.{name}"
        if policy.mem_gb is not None and memory is None:
            allowed = "null where no job of SLURM has a memory that can be raised"
            yield f"{key}.mem_gb", policy.mem_gb, f"{allowed} (hydra.launcher.mem_gb)"
        if policy.timeout_min is not None and not has_limit:
            allowed = "null where cells have no time limit (sweep.timeout_s)"
            yield f"{key}.timeout_min", policy.timeout_min, allowed
        if policy.times and options.detach and _is_cluster(settings):
            allowed = "0 with sweep.detach=true on SLURM, where no launcher stays to submit again"
            yield f"{key}.times", policy.times, allowed


def _plain(config: DictConfig) -> dict[str, Any]:
    return cast("dict[str, Any]", OmegaConf.to_container(config, resolve=True))


def _look_at_what_is_done(done: Sequence[Cell]) -> None:
    """Complete the journal where a worker was killed before it could; compare the versions."""
    noted = {
        (layout, entry.get("run_id"))
        for layout in {cell.layout for cell in done}
        for entry in layout.journal.read()
        if entry.get("event") == Status.COMPLETED
    }
    now = provenance.code()["code"] if done else None
    others = set[str | None]()
    for cell in done:
        lock = cell.lock
        if (cell.layout, cell.run_id) not in noted and lock.acquire():
            with lock:
                cell.layout.note(cell.run_id, Status.COMPLETED)
        others.add(provenance.code_of(record.read(cell.directory).get("provenance") or {}))
    if others := others - {now}:
        names = ", ".join(sorted(map(str, others)))
        text = f"completed cells are of another version of the code ({names}; now {now})"
        say(f"fisher_lab: {text}; they are kept", error=True)


def _submissions(
    cells: Sequence[Cell],
    deciding: Sequence[Deciding],
    master: DictConfig,
    kind: str,
    settings: Settings,
) -> dict[Layout, Submission]:
    """A launch of every sweep that has cells to run, or may come to have some, with its cells."""
    copied = master.copy()
    OmegaConf.update(copied, "hydra.runtime.output_dir", RUN_DIRECTORY, force_add=True)
    logging = _plain(copied.hydra.job_logging)
    about = {"kind": kind, "settings": asdict(settings)}
    about |= {"host": os.uname().nodename, "pid": os.getpid()}
    made: dict[Layout, Submission] = {}
    for layout in dict.fromkeys([one.layout for one in (*cells, *(d.plan for d in deciding))]):
        registered = atomic.read_json(layout.sweep / REGISTRATION_FILE).get("sha256")
        code = "" if kind == "serial" else provenance.snapshot(layout.code).name
        made[layout] = Submission(layout, logging, {**about, "registration": registered}, code)
        own = made[layout].freeze([cell for cell in cells if cell.layout == layout])
        name = made[layout].launch
        layout.journal.append("launched", launcher=kind, cells=len(own), submission=name)
    return made


def _frozen(cells: Iterable[Cell], submissions: Mapping[Layout, Submission]) -> list[Cell]:
    return [frozen for cell in cells for frozen in submissions[cell.layout].freeze([cell])]


def _detach(cells: Sequence[Cell], settings: Settings) -> int:
    """Hand the cells to the scheduler, or to a process of their own, and return."""
    names = ", ".join(sorted({str(cell.layout.directory) for cell in cells}))
    if _is_cluster(settings):
        _executor(settings).start(cells)
    else:
        submissions = list(dict.fromkeys(str(cell.submission) for cell in cells))
        log = cells[0].submission / LAUNCHER_LOG
        start_python([*BACKGROUND, *submissions], log, {}, root=cells[0].code_root)
        say(f"the launcher goes on in the background; its log is {log}")
    say(f"detached: fisher-lab status {names}")
    return 0


def main(submissions: list[str]) -> int:
    """Launch the frozen cells of submissions; returns the exit code."""
    cells: list[Cell] = []
    launched: dict[str, Any] = {}
    for submission in map(Path, submissions):
        launched = json.loads((submission / LAUNCH_FILE).read_text(encoding="utf-8"))
        files = [submission / "cells" / f"{run_id}.json" for run_id in launched["cells"]]
        cells += map(Cell.load, files)
    tally = Tally(len(cells), cells[0].config.sweep.max_failures)
    started = [Submission(Layout(Path(s).parents[2]), {}, launch=Path(s).name) for s in submissions]
    try:
        launch(cells, tally, launchers.check(launched["kind"], launched["settings"]), started)
    except Interrupted as stop:
        return 128 + stop.signum
    finish(cells)
    return tally.report(cells)


if __name__ == "__main__":
    screen.install()
    sys.exit(main(sys.argv[1:]))
