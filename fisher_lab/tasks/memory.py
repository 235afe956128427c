"""Growth of the peak memory during a phase: resident set on the CPU, allocator's peak on CUDA."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from pathlib import Path
from threading import Event, Thread

import psutil
import torch

MIB = 2**20
_SAMPLE_S = 0.005


class PeakMemory:
    """Context manager that measures how far a phase raises the peak (``docs/math.md``, section 1).

    On Linux the kernel's own high-water mark is reset and read (``/proc/self``); where that is
    not allowed, a thread samples the resident set. What the process has given back to its allocator
    goes back to the system first (with glibc), so that a run counts what it takes even where
    another one went before it in the same process; elsewhere such memory is not growth.

    Args:
        device: where the phase computes.

    Attributes:
        growth_mib: after the phase, growth of the peak over the level at its start, MiB.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.growth_mib = 0.0
        self._start = 0
        self._sampler: _Sampler | None = None

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._start = torch.cuda.memory_allocated(self.device)
            return self
        with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
            ctypes.CDLL(None).malloc_trim(0)
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            self._sampler = _Sampler()
        self._start = _resident_bytes()
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            peak = torch.cuda.max_memory_allocated(self.device)
        elif self._sampler is not None:
            peak = self._sampler.stop()
        else:  # psutil does not read the high-water mark on Linux
            lines = Path("/proc/self/status").read_text().splitlines()
            peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
        self.growth_mib = max(0, peak - self._start) / MIB


class _Sampler(Thread):
    """Samples the resident set until it is stopped."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._peak = _resident_bytes()
        self._stopping = Event()
        self.start()

    def run(self) -> None:
        while not self._stopping.wait(_SAMPLE_S):
            self._peak = max(self._peak, _resident_bytes())

    def stop(self) -> int:
        self._stopping.set()
        self.join()
        return max(self._peak, _resident_bytes())


def _resident_bytes() -> int:
    return psutil.Process().memory_info().rss
