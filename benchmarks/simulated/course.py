"""One course of events: a sweep on a simulated cluster, and the faults that its seed says."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import logging
import random
import signal
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from benchmarks.simulated import faults
from benchmarks.simulated.calls import Calls
from benchmarks.simulated.cluster import Slurm
from benchmarks.simulated.files import Server
from benchmarks.simulated.kernel import Host, Process, Stuck, World
from benchmarks.simulated.monitor import Monitor
from fisher_lab.config.errors import ConfigError
from fisher_lab.config.launchers import LocalSettings, SlurmSettings
from fisher_lab.config.schema import Config, ResumeConfig, SweepConfig
from fisher_lab.results import finishing
from fisher_lab.runs import atomic, identity, provenance
from fisher_lab.runs.signals import Interrupted
from fisher_lab.sweeps import cell as cells_module
from fisher_lab.sweeps import plan, run, slurm, status, worker
from fisher_lab.sweeps.cell import Cell, Submission
from fisher_lab.sweeps.directory import Layout
from fisher_lab.sweeps.queue import Tally
from fisher_lab.tasks import runner

CELLS = 3
STALE_AFTER_S, POLL_S, GRACE_S, STEP_S = 4.0, 0.5, 3.0, 0.3
STEPS = 4
TRIES = 15
CONTENT = {"data": "abc"}
REST_S = 30.0
"""After the faults, until the user looks again."""


@dataclasses.dataclass
class Result:
    """What came of a seed.

    Attributes:
        seed: of the course of events.
        kinds: the faults that happened.
        problems: promises that were broken, and the words.
        seconds: simulated.
        calls: that were made.
        recovery: seconds between the moment from which a death can be seen and a cell's being
            taken up.
    """

    seed: int
    kinds: list[str]
    problems: list[tuple[str, str]]
    seconds: float
    calls: int
    recovery: list[float]


class Course:
    """A sweep of a few cells, one or two launchers, and some faults.

    Args:
        seed: of everything.
        only: names of faults; by default all.
    """

    def __init__(self, seed: int, only: Sequence[str] | None = None) -> None:
        self.seed = seed
        self.world = World(seed, mixing=random.Random(seed).choice([0.02, 0.1, 0.3]))
        self.random = self.world.random
        self.hosts = [Host(f"login{i}") for i in range(2)] + [Host(f"node{i}") for i in range(3)]
        self.server = Server(self.world, 0.0)
        self.monitor = Monitor(self.world, self.server, POLL_S)
        self.uses_slurm = self.random.random() < 0.6
        self.slurm: Slurm | None = None
        self.layout = Layout(Path("/sim/results/made"))
        self.launchers: list[Process] = []
        self.torn = 0
        self.over = False
        self.server.on_short = self._short
        self.calls = Calls(self.world, self.server, self._program, self._ask)
        self.hooks: list[Callable[[Process, str, str], None]] = []
        self.frozen: dict[Process, float] = {}
        self.world.on_call = self._call
        self.faults = faults.chosen(self, only)

    def _call(self, process: Process, name: str, path: str) -> None:
        for hook in self.hooks:
            hook(process, name, path)
        until = self.frozen.get(process, 0.0)
        if self.world.now < until:
            self.world.sleep(until - self.world.now)

    def _short(self) -> None:
        self.torn += 1

    def harm_all(self) -> None:
        """A fault has reached all cells."""
        self.monitor.all_harmed = self.monitor.cancelled = True

    # ---- what is replaced of fisher_lab: the task, the code's identity, the submission

    def cells(self) -> list[Cell]:
        """The cells, as a launcher composes them."""
        return [
            Cell(self.layout, run_id, (f"seed={c.seed}",), {"seed": str(c.seed)}, c, CONTENT)
            for run_id, c in _configured()
        ]

    def task(self, config: Config, of: Any) -> None:
        """What a cell does."""
        run_id = of.directory.name
        self.monitor.enter(run_id)
        try:
            for _ in range(STEPS):
                self.calls_sleep(STEP_S)
            of.table("layers.csv", [{"layer": "a", "seed": config.seed}])
            of.metrics({"loss": config.seed})
        finally:
            self.monitor.leave(run_id)

    def calls_sleep(self, seconds: float) -> None:
        """Sleep in simulated time."""
        self.calls.sleep(seconds)

    def _program(self, command: Sequence[str]) -> int:
        assert command[-2] == "fisher_lab.sweeps.worker", command
        return worker.main([command[-1]])

    def _ask(self, command: list[str]) -> Any:
        assert self.slurm is not None, command
        return self.slurm.ask(command)

    def _executor(self, settings: Any, folder: Path, requeues: int, *, alone: bool) -> Any:
        """In the place of submitit's: jobs of the simulated SLURM."""

        def map_array(job: slurm.CellJob, paths: Sequence[str]) -> list[Any]:
            assert self.slurm is not None
            self.world.call("run", "sbatch")
            if self.world.now < self.slurm.down_until:
                raise RuntimeError("sbatch: error: Unable to contact slurm controller")
            made = [(Path(p).stem, functools.partial(job, p)) for p in paths]
            found = self.slurm.submit(made)
            self.world.call("run", "sbatch: its answer")
            return found

        return SimpleNamespace(map_array=map_array)

    @contextlib.contextmanager
    def _installed(self) -> Iterator[None]:
        module: Any = types.ModuleType("simulated_task")
        module.run = self.task
        sys.modules[module.__name__] = module
        nothing = SimpleNamespace(about=lambda: {"others": 0.0})
        replaced: list[tuple[Any, str, Any]] = [
            (runner, "TASKS", dict.fromkeys(runner.TASKS, module.__name__)),
            (runner, "_content", lambda config: (CONTENT, None)),
            (runner, "prepare", lambda config: {}),
            (runner, "Load", lambda: nothing),
            (runner, "_show", lambda of: None),
            (provenance, "collect", lambda: {"code": "simulated"}),
            (provenance, "code", lambda: {"code": "simulated"}),
            (finishing, "at_end", lambda directory: None),
            (slurm, "submitit_executor", self._executor),
            (cells_module, "build", _built),
            (atomic, "json", SimpleNamespace(**{**vars(json), "dumps": _dumps})),
        ]
        with contextlib.ExitStack() as stack:
            for owner, name, other in replaced:
                stack.enter_context(mock.patch.object(owner, name, other))
            quiet = io.StringIO()
            stack.enter_context(contextlib.redirect_stdout(quiet))
            stack.enter_context(contextlib.redirect_stderr(quiet))
            stack.enter_context(_no_logging())
            stack.enter_context(self.calls.installed())
            yield

    # ---- who does what

    def launch(self) -> int:
        """A launcher: what ``python -m fisher_lab -m`` does once its cells are composed."""
        cells = self.cells()
        try:
            todo, states = plan.to_run(cells)
            run._look_at_what_is_done([c for c in cells if states[c] == "completed"])
            tally = Tally(len(todo))
            if todo:
                self._submit(todo, tally)
            return tally.report(cells)
        except Interrupted as stop:
            return 128 + stop.signum
        except ConfigError:
            return 2
        except OSError as error:
            if error.errno not in faults.DISK:
                raise
            return 2

    def _submit(self, todo: Sequence[Cell], tally: Tally) -> None:
        kind = "slurm" if self.uses_slurm else "local"
        submission = Submission(self.layout, {"version": 1, "incremental": True}, {"kind": kind})
        own = submission.freeze(list(todo))
        self.layout.journal.append(
            "launched", launcher=kind, cells=len(own), submission=submission.launch
        )
        run.launch(own, tally, self._settings(), [submission])

    def _settings(self) -> Any:
        if self.uses_slurm:
            return SlurmSettings(poll_s=POLL_S, grace_s=GRACE_S, signal_delay_s=5, threads=1)
        return LocalSettings(n_jobs=2, threads=1, grace_s=GRACE_S)

    def user(self, host: Host) -> int:
        """Runs the command until it says that all is well, as people do."""
        for _ in range(TRIES):
            process = Process(self.world, host, self.launch, "launcher", {"HOME": "/root"})
            self.launchers.append(process)
            self.world.wait(float("inf"), lambda p=process: p.code is not None, every=1.0)
            if process.code == 0 or self.over:
                return 0
            self.world.sleep(self.random.uniform(0.1, 3.0))
        return 1

    def look(self) -> int:
        """Somebody looks at the sweep."""
        with contextlib.suppress(ConfigError):
            status.look(self.layout)
        return 0

    def main(self) -> None:
        """Everything, in the order in which it happens."""
        self._write_sweep()
        if self.uses_slurm:
            self.slurm = Slurm(
                self.world,
                self.hosts[2:],
                accounting=self.random.random() < 0.5,
                keeps_s=self.random.choice([1.0, 5.0, 60.0]),
                delay_s=self.random.choice([0.2, 3.0]),
            )
        self.world.on_end.append(self._ended)
        self.monitor.bounded = all(isinstance(one, faults.QUICK) for one in self.faults)
        for fault in self.faults:
            fault.begin(self)
        users = [
            Process(self.world, self.hosts[i % 2], lambda i=i: self.user(self.hosts[i % 2]), "user")
            for i in range(1 + any(isinstance(one, faults.SecondLauncher) for one in self.faults))
        ]
        self.world.wait(
            self.world.now + 900.0, lambda: all(p.code is not None for p in users), every=1.0
        )
        for fault in self.faults:
            fault.end(self)
        self.over = True
        self.world.sleep(REST_S)
        last = Process(self.world, self.hosts[1], self.launch, "launcher", {"HOME": "/root"})
        if not self.world.wait(
            self.world.now + 300.0, lambda: last.code is not None, every=1.0
        ):  # fmt: skip
            self.monitor.say("none lost", "the last launch does not come to its end")
        elif last.code != 0:
            self.monitor.say("none lost", f"the last launch ends with {last.code}")
        self.monitor.judge(self.cells(), self.torn)
        for process in list(self.world.processes.values()):
            if process is not self.world.process:
                process.end(-signal.SIGKILL)

    def _write_sweep(self) -> None:
        cells = [{"run_id": c.run_id, "axes": dict(c.axes), "overrides": []} for c in self.cells()]
        atomic.write_json(self.layout.sweep_file, {"cells": cells})

    def _ended(self, process: Process) -> None:
        """A process has ended: what dies with it is harmed."""
        if process.code is None or process.code >= 0:
            return
        self.torn += 1
        for run_id, inside in self.monitor.inside.items():
            if process in inside:
                inside.remove(process)
                self.monitor.harmed.add(run_id)
                self._lost(run_id, process)
        self.monitor.harmed.update(self.cells_of(process))

    def _lost(self, run_id: str, process: Process) -> None:
        """The process of a cell has died: who sees that, and when, at the latest."""
        alive = [p for p in self.launchers if p.code is None]
        watcher = process.parent
        if watcher is not None and watcher.code is None:
            self.monitor.died(run_id, 0.0, [watcher])
        else:
            self.monitor.died(run_id, STALE_AFTER_S, alive)

    def cells_of(self, process: Process) -> list[str]:
        """The cells that a process works for."""
        if self.slurm is not None:
            jobs = self.slurm.jobs.values()
            return [j.key for j in jobs if {process, process.parent} & set(j.processes)]
        return [run_id for run_id, _ in _configured()] if process.name == "worker" else []

    def run(self) -> Result:
        """Everything; what came of it."""
        random.seed(self.seed)
        problems = self.monitor.problems
        with self._installed():
            try:
                self.world.run(self.hosts[0], self.main)
            except Stuck as stuck:
                problems.append(("none lost", str(stuck)))
        for name, error in self.world.uncaught:
            if name != "launcher" and isinstance(error, OSError) and error.errno in faults.DISK:
                continue  # its log holds it, and its launcher says it in one line
            problems.append(("no traceback", f"{name}: {type(error).__name__}: {error}"))
        kinds = [fault.kind for fault in self.faults if fault.happened]
        return Result(
            self.seed, kinds, problems, self.world.now, self.world.calls, self.monitor.recovery
        )


@functools.cache
def _configured() -> list[tuple[str, Config]]:
    found = []
    for seed in range(CELLS):
        config = dataclasses.replace(
            Config(),
            seed=seed,
            sweep=SweepConfig(max_requeues=30),
            resume=ResumeConfig(stale_after_s=STALE_AFTER_S),
        )
        found.append((identity.run_id(dataclasses.asdict(config), CONTENT), config))
    return found


_build = cells_module.build
_known: dict[str, Any] = {}


def _built(kind: Any, data: Any) -> Any:
    """The configuration of a frozen cell, built once for all courses."""
    text = json.dumps(data, sort_keys=True)
    if text not in _known:
        _known[text] = _build(kind, data)
    return _known[text]


def _dumps(found: Any, *, indent: int = 0, **more: Any) -> str:
    """Without indentation, which takes half of the time of a course."""
    return json.dumps(found, **more)


@contextlib.contextmanager
def _no_logging() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def trial(seed: int, only: Sequence[str] | None = None) -> Result:
    """Run the course of events of one seed."""
    return Course(seed, only).run()
