"""A simulated SLURM: jobs that wait, run, come back, are forgotten, or run twice."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from benchmarks.simulated.kernel import Host, Process, World

TERM_TO_KILL_S = 5.0


@dataclass(eq=False)
class Job:
    """One job of an array.

    Attributes:
        number: as sbatch gives it.
        work: what it runs; returns nothing, or raises.
        key: what the work is about.
        state: as squeue says it.
        known: whether the controller knows it.
        coming_back: whether it returns to the queue when its process ends.
        cancelled: whether scancel has ended it.
        processes: that have run for it, the last one last.
    """

    number: str
    work: Callable[[], Any]
    key: str
    state: str = "PENDING"
    known: bool = True
    coming_back: bool = False
    cancelled: bool = False
    processes: list[Process] = field(default_factory=list)
    timer: int = 0


class Slurm:
    """Controller and nodes.

    Args:
        world: of the processes.
        nodes: hosts that run jobs.
        accounting: whether sacct knows jobs that have left the queue.
        keeps_s: seconds for which an ended job stays in the queue.
        delay_s: seconds for which a job waits at most.
        program: children of a job's process, which end with it.
    """

    def __init__(
        self,
        world: World,
        nodes: Sequence[Host],
        *,
        accounting: bool,
        keeps_s: float,
        delay_s: float,
    ) -> None:
        self.world, self.nodes = world, nodes
        self.accounting, self.keeps_s, self.delay_s = accounting, keeps_s, delay_s
        self.jobs: dict[str, Job] = {}
        self.down_until, self.hangs = 0.0, False
        self.arrays = 0
        world.on_end.append(self._process_ended)
        self._daemon = Process(world, Host("controller"), self._control, "slurmctld")
        self._plans: list[tuple[float, Callable[[], None]]] = []

    def _control(self) -> int:
        while True:
            following = min((when for when, _ in self._plans), default=float("inf"))
            self.world.wait(following, lambda: self._is_due())
            due = [one for one in self._plans if one[0] <= self.world.now]
            self._plans = [one for one in self._plans if one not in due]
            for _, action in due:
                action()

    def _is_due(self) -> bool:
        return any(when <= self.world.now for when, _ in self._plans)

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        """Have the controller do something later."""
        self._plans.append((self.world.now + seconds, action))
        self._daemon.main.wake = self.world.now if seconds <= 0 else min(
            self._daemon.main.wake, self.world.now + seconds
        )  # fmt: skip

    def submit(self, works: Sequence[tuple[str, Callable[[], Any]]]) -> list[Any]:
        """An array of jobs, each a key and what it runs; what submitit returns."""
        self.arrays += 1
        made = [Job(f"{self.arrays}_{i}", work, key) for i, (key, work) in enumerate(works)]
        for job in made:
            self.jobs[job.number] = job
            self._queue(job)
        return [SimpleNamespace(job_id=job.number) for job in made]

    def _queue(self, job: Job) -> None:
        job.state, job.coming_back = "PENDING", False
        job.timer += 1
        timer = job.timer
        self.after(
            self.delay_s * self.world.random.random(),
            lambda: self.begin(job) if timer == job.timer and job.state == "PENDING" else None,
        )

    def begin(self, job: Job, *, forced: bool = False) -> None:
        """Run a job on a node."""
        if not job.known and not forced:
            return
        node = self.nodes[self.world.random.randrange(len(self.nodes))]
        job.state = "RUNNING"
        about = {"SLURM_JOB_ID": job.number, "HOME": "/root"}
        job.processes.append(Process(self.world, node, lambda: self._body(job), "job", about))

    def _body(self, job: Job) -> int:
        def come_back(*_: object) -> None:
            self.world.call("scontrol")
            job.coming_back = True
            raise SystemExit(-1)

        handlers = self.world.process.handlers
        handlers[signal.SIGUSR2], handlers[signal.SIGTERM] = come_back, lambda *_: None
        try:
            job.work()
        except RuntimeError:
            return 1
        return 0

    def signal(self, job: Job, signum: int) -> None:
        """Send a signal to the process of a job; SIGTERM and SIGKILL to its worker too."""
        if job.state != "RUNNING":
            return
        for process in self._family(job.processes[-1]):
            if process.name == "job" or signum != signal.SIGUSR2:
                process.send(signum)

    def _family(self, process: Process) -> list[Process]:
        return [p for p in self.world.processes.values() if p is process or p.parent is process]

    def _process_ended(self, process: Process) -> None:
        job = next((j for j in self.jobs.values() if process in j.processes), None)
        if job is None:
            return
        for other in self._family(process):
            other.end(-signal.SIGKILL)
        if process is not job.processes[-1] or job.state != "RUNNING":
            return
        if job.coming_back:
            self._queue(job)
        elif job.cancelled:
            self.finish(job, "CANCELLED")
        else:
            self.finish(job, "COMPLETED" if process.code == 0 else "FAILED")

    def finish(self, job: Job, state: str) -> None:
        """A job has come to its end, and is forgotten after a while."""
        job.state = state
        job.timer += 1
        self.after(self.keeps_s, lambda: setattr(job, "known", False))

    def crash(self, node: Host, *, comes_back: bool) -> None:
        """A node goes down with everything on it."""
        jobs = [j for j in self.jobs.values() if j.state == "RUNNING"]
        for job in (one for one in jobs if one.processes[-1].host is node):
            job.state = "COMPLETING"
            if comes_back:
                self.after(2.0, lambda job=job: self._queue(job))
            else:
                self.after(1.0, lambda job=job: self.finish(job, "NODE_FAIL"))
        for process in list(self.world.processes.values()):
            if process.host is node:
                process.end(-signal.SIGKILL)

    def ask(self, command: Sequence[str]) -> Any:
        """What a program of SLURM answers."""
        if self.world.now < self.down_until:
            if self.hangs:
                self.world.sleep(60.0)
                raise subprocess.TimeoutExpired(command, 60)
            return _answer(1, error="Unable to contact slurm controller")
        return getattr(self, f"_{command[0]}")(list(command))

    def _scontrol(self, command: list[str]) -> Any:
        return _answer(0, "ClusterName = simulated\nMaxArraySize = 1001\n")

    def _squeue(self, command: list[str]) -> Any:
        numbers = command[command.index("-j") + 1].split(",")
        if command[-1] == "%l":
            return _answer(0, "1:00:00\n")
        of_arrays = [j for j in self.jobs.values() if j.number.partition("_")[0] in numbers]
        known = [job for job in of_arrays if job.known]
        if not known and len(numbers) == 1:
            return _answer(1, error="slurm_load_jobs error: Invalid job id specified")
        return _answer(0, "".join(f"{job.number}|{job.state}\n" for job in known))

    def _sacct(self, command: list[str]) -> Any:
        if not self.accounting:
            return _answer(1, error="Slurm accounting storage is disabled")
        numbers = command[command.index("-j") + 1].split(",")
        found = [j for j in self.jobs.values() if j.number.partition("_")[0] in numbers]
        return _answer(0, "".join(f"{job.number}|{job.state}\n" for job in found))

    def _scancel(self, command: list[str]) -> Any:
        for number in command[2:]:
            job = self.jobs.get(number)
            if job is None or not job.known:
                continue
            if job.state == "PENDING":
                self.finish(job, "CANCELLED")
            elif job.state == "RUNNING":
                self.signal(job, signal.SIGTERM)
                job.cancelled = True
                process = job.processes[-1]
                self.after(TERM_TO_KILL_S, lambda p=process: p.end(-signal.SIGKILL))
        return _answer(0)


def _answer(code: int, out: str = "", error: str = "") -> Any:
    return SimpleNamespace(returncode=code, stdout=out, stderr=error)
