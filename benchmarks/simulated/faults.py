"""What can go wrong on a shared cluster: each kind of fault, as the seed draws it."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from benchmarks.simulated.kernel import Host, Process
from fisher_lab.runs import atomic

if TYPE_CHECKING:
    from benchmarks.simulated.course import Course

DISK = atomic.DISK_ERRORS
MOST_FAULTS = 3
WITHIN_S = 4.0
"""Faults that have a time come within so many seconds after the beginning."""
CALLS = {"launcher": 900, "worker": 260, "job": 200}
"""About how many calls a process of each kind makes: a fault comes at one of them."""


class Fault:
    """Something that goes wrong.

    Attributes:
        kind: in the words of the table.
        happened: whether it came to that.
    """

    kind = ""
    needs_slurm = False

    def __init__(self, course: Course) -> None:
        self.course, self.random, self.world = course, course.random, course.world
        self.happened = False

    def begin(self, course: Course) -> None:
        """The sweep begins: by default something happens after a while."""
        wait = self.random.uniform(0.0, WITHIN_S)

        def fate() -> int:
            self.world.sleep(wait)
            if not course.over:
                self.strike()
            return 0

        Process(self.world, Host("fate"), fate, "fate")

    def strike(self) -> None:
        """It happens now."""

    def end(self, course: Course) -> None:
        """Nothing goes wrong any more."""

    def some(self, name: str) -> Process | None:
        """A process of some kind that runs."""
        alive = [p for p in self.world.processes.values() if p.name == name and p.code is None]
        return alive[self.random.randrange(len(alive))] if alive else None


class AtCall(Fault):
    """Happens at one call of one process of a kind."""

    def begin(self, course: Course) -> None:
        names = list(CALLS)
        self.name = names[self.random.randrange(len(names))]
        if not course.uses_slurm and self.name == "job":
            self.name = "worker"
        self.nth = self.random.randrange(4)
        self.at = self.random.randrange(CALLS[self.name])
        self.seen: list[Process] = []
        course.hooks.append(self.at_call)

    def at_call(self, process: Process, name: str, path: str) -> None:
        """A call begins."""
        if self.happened or self.course.over or process.name != self.name:
            return
        if process not in self.seen:
            self.seen.append(process)
        if process.calls >= self.at and self.seen.index(process) == self.nth % len(self.seen):
            self.happened = True
            self.hit(process, name, path)

    def hit(self, process: Process, name: str, path: str) -> None:
        """It happens to this call."""


class KilledAtACall(AtCall):
    kind = "SIGKILL at a call"

    def hit(self, process: Process, name: str, path: str) -> None:
        process.end(-signal.SIGKILL)
        self.world._go_on()


class FailedCall(AtCall):
    kind = "a call fails (EIO, ESTALE)"

    def hit(self, process: Process, name: str, path: str) -> None:
        if not path.startswith("/sim"):
            self.happened = False
            self.at += 1
            return
        self.course.harm_all()
        number = errno.EIO if self.random.random() < 0.5 else errno.ESTALE
        raise OSError(number, os.strerror(number), path)


class DelayedCall(AtCall):
    kind = "a call takes seconds"

    def hit(self, process: Process, name: str, path: str) -> None:
        self.world.sleep(self.random.uniform(0.5, 12.0))


class Frozen(AtCall):
    kind = "a process stands still for longer than its lock"

    def hit(self, process: Process, name: str, path: str) -> None:
        until = self.world.now + self.random.uniform(5.0, 20.0)
        self.course.monitor.thawed.add(process)
        self.course.monitor.harmed.update(self.course.cells_of(process))
        self.course.frozen[process] = until
        self.world.sleep(until - self.world.now)


class KilledProcess(Fault):
    kind = "SIGKILL at any time"

    def strike(self) -> None:
        names = ["launcher", "worker", "job"]
        process = self.some(names[self.random.randrange(3)])
        if process is not None:
            self.happened = True
            process.end(-signal.SIGKILL)


class FullDisk(Fault):
    kind = "the disk is full for a while"

    def strike(self) -> None:
        self.happened = self.course.server.full = True
        self.course.harm_all()
        self.world.sleep(self.random.uniform(0.5, 10.0))
        self.course.server.full = False

    def end(self, course: Course) -> None:
        course.server.full = False


class SkewedClocks(Fault):
    kind = "clocks differ by up to an hour"

    def begin(self, course: Course) -> None:
        self.happened = True
        course.server.skew = self.random.uniform(-3600, 3600)
        for host in course.hosts:
            host.skew = self.random.uniform(-3600, 3600)


class Delay(Fault):
    """Something of a host's file system takes up to 3 s."""

    of: ClassVar[str]

    def begin(self, course: Course) -> None:
        self.happened = True
        for host in course.hosts:
            setattr(host, self.of, self.random.uniform(0.5, 3.0))

    def end(self, course: Course) -> None:
        for host in course.hosts:
            setattr(host, self.of, 0.0)


class StaleListings(Delay):
    kind, of = "listings are stale for up to 3 s", "lag"


class LateNames(Delay):
    kind, of = "renames and new files arrive up to 3 s late", "late"


class SecondLauncher(Fault):
    kind = "two launchers"

    def begin(self, course: Course) -> None:
        self.happened = True


class SignalledLauncher(Fault):
    kind = "SIGTERM or SIGINT to a launcher"

    def strike(self) -> None:
        process = self.some("launcher")
        if process is not None:
            self.happened = self.course.monitor.cancelled = True
            process.send(signal.SIGTERM if self.random.random() < 0.5 else signal.SIGINT)


class Looks(Fault):
    kind = "somebody looks (`status`)"

    def strike(self) -> None:
        self.happened = True
        for _ in range(6):
            host = self.course.hosts[self.random.randrange(len(self.course.hosts))]
            Process(self.world, host, self.course.look, "observer")
            self.world.sleep(self.random.uniform(0.2, 2.0))


class OfSlurm(Fault):
    needs_slurm = True

    @property
    def slurm(self) -> Any:
        """The simulated SLURM."""
        return self.course.slurm

    def job(self, *states: str) -> Any:
        """A job in one of these states."""
        found = [job for job in self.slurm.jobs.values() if job.state in states and job.known]
        return found[self.random.randrange(len(found))] if found else None


class NodeFails(OfSlurm):
    kind = "a node fails; what it had not flushed is lost"

    def strike(self) -> None:
        job = self.job("RUNNING")
        if job is not None:
            self.happened = True
            node = job.processes[-1].host
            self.slurm.crash(node, comes_back=self.random.random() < 0.5)
            self.course.server.crash(node)


class LostJob(OfSlurm):
    kind = "a job is lost: the controller forgets it"

    def strike(self) -> None:
        job = self.job("PENDING", "RUNNING")
        if job is not None:
            self.happened = True
            job.known = False
            self.course.monitor.harmed.add(job.key)
            if job.state == "PENDING":
                job.state = "REVOKED"
            elif self.random.random() < 0.5:
                job.processes[-1].end(-signal.SIGKILL)


class DuplicateJob(OfSlurm):
    kind = "a job runs twice at once"

    def strike(self) -> None:
        job = self.job("RUNNING")
        if job is not None:
            self.happened = True
            self.slurm.begin(job)


class LateJobs(OfSlurm):
    kind = "jobs wait for up to 20 s"

    def strike(self) -> None:
        self.happened = True
        self.slurm.delay_s = 20.0


class RequeueStorm(OfSlurm):
    kind = "a storm of preemptions"

    def strike(self) -> None:
        for _ in range(12):
            job = self.job("RUNNING")
            if job is not None:
                self.happened = True
                self.slurm.signal(job, signal.SIGUSR2)
            self.world.sleep(self.random.uniform(0.1, 1.0))


class NoAnswer(OfSlurm):
    kind = "the controller does not answer"

    def strike(self) -> None:
        self.happened = True
        self.slurm.hangs = self.random.random() < 0.3
        self.slurm.down_until = self.world.now + self.random.uniform(1.0, 15.0)

    def end(self, course: Course) -> None:
        self.slurm.down_until = 0.0


KINDS: tuple[type[Fault], ...] = (
    KilledAtACall, KilledProcess, FailedCall, DelayedCall, Frozen, FullDisk, SkewedClocks,
    StaleListings, LateNames, SecondLauncher, SignalledLauncher, Looks, NodeFails, LostJob,
    DuplicateJob, LateJobs, RequeueStorm, NoAnswer,
)  # fmt: skip


QUICK = (
    KilledAtACall, KilledProcess, SkewedClocks, SecondLauncher, Looks, NodeFails, DuplicateJob,
)  # fmt: skip
"""Faults that hold up nobody but those whom they hit."""


def chosen(course: Course, only: Sequence[str] | None) -> list[Fault]:
    """The faults of a course; those of the call that is killed come most often."""
    able = [
        kind
        for kind in KINDS
        if (course.uses_slurm or not kind.needs_slurm) and (only is None or kind.__name__ in only)
    ]
    number = min(len(able), 1 + course.random.randrange(MOST_FAULTS))
    return [kind(course) for kind in course.random.sample(able, number)]
