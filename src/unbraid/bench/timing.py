"""Times of calls that take turns in one process, and what they add to its memory.

Contenders take turns, so that whatever else the machine does falls on all of them; a median over turns with its
quartiles says how much it did. CPU seconds stand beside wall seconds: on a shared machine compare by them.
"""

import ctypes
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch


@dataclass
class Times:
    """Seconds of one contender, a number a turn, and what a turn adds to the process's peak memory."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    peak_mib: float | None = None

    def take(self, call: Callable[[], Any], device: str) -> None:
        """One turn."""
        synchronise(device)
        wall, cpu = time.perf_counter(), time.process_time()
        call()
        synchronise(device)
        self.wall.append(time.perf_counter() - wall)
        self.cpu.append(time.process_time() - cpu)

    def report(self) -> dict[str, Any]:
        """Milliseconds: medians, and the quartiles of wall time."""
        low, high = np.quantile(self.wall, [0.25, 0.75])
        return {
            "wall_ms": round(1e3 * statistics.median(self.wall), 2),
            "wall_ms_quartiles": [round(1e3 * low, 2), round(1e3 * high, 2)],
            "cpu_ms": round(1e3 * statistics.median(self.cpu), 2),
            "peak_mib": self.peak_mib,
            "turns": len(self.wall),
        }


def synchronise(device: str) -> None:
    """Wait until the device has done what it was asked."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def peak_mib(call: Callable[[], Any], device: str) -> float | None:
    """What a call adds to the peak of memory: of the device, or (on Linux) of this process; none where not known."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        call()
        return None
    before = resident_mib("VmRSS")
    call()
    return round(resident_mib("VmHWM") - before, 1)


def resident_mib(name: str) -> float:
    """VmRSS (now) or VmHWM (most so far) of this process, in MiB; on Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))


def take_turns(contenders: Mapping[str, Callable[[], Any]], turns: int, device: str) -> dict[str, Times]:
    """Times of every contender; the first turn of each warms up and tells its memory."""
    times = {name: Times() for name in contenders}
    for name, call in contenders.items():
        call()
        times[name].peak_mib = peak_mib(call, device)
    for _ in range(turns):
        for name, call in contenders.items():
            times[name].take(call, device)
    return times


def progress(point: str, found: Mapping[str, Times]) -> None:
    """A line a point, so that a long run is seen to go on."""
    figures = (f"{name} {1e3 * statistics.median(times.wall):.0f} ms" for name, times in found.items())
    print(f"{point}: {', '.join(figures)}", flush=True, file=sys.stdout)
