"""Times of calls that take turns in one process, what they add to its memory, and the file the figures are kept in."""

import argparse
import ctypes
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers.turns import resident_mib

RESULTS = Path(__file__).parents[1] / "results"


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
    """What a call adds to the peak of memory: of the device, or (on Linux) of this process."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
    if sys.platform != "linux":
        return None
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_mib("VmRSS")
    call()
    return round(resident_mib("VmHWM") - before, 1)


def take_turns(contenders: dict[str, Callable[[], Any]], turns: int, device: str) -> dict[str, Times]:
    """Times of every contender; the first turn of each warms up and tells its memory."""
    times = {name: Times() for name in contenders}
    for name, call in contenders.items():
        call()
        times[name].peak_mib = peak_mib(call, device)
    for _ in range(turns):
        for name, call in contenders.items():
            times[name].take(call, device)
    return times


def progress(point: str, found: dict[str, Times]) -> None:
    """A line a point, so that a long run is seen to go on."""
    figures = (f"{name} {1e3 * statistics.median(times.wall):.0f} ms" for name, times in found.items())
    print(f"{point}: {', '.join(figures)}", flush=True)


def record(sections: dict[str, Callable[[], dict[str, Any]]], asked: argparse.Namespace, name: str) -> dict[str, Any]:
    """Run sections and put their figures beside those of earlier runs in results/NAME-DEVICE.json."""
    torch.set_num_threads(asked.threads)
    asked.out.mkdir(parents=True, exist_ok=True)
    path = asked.out / f"{name}-{asked.device.split(':')[0]}.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    on_gpu = asked.device.startswith("cuda")
    setting = {
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "machine": torch.cuda.get_device_name() if on_gpu else f"{platform.machine()}, {asked.threads} threads",
    }
    for section in asked.sections or sections:
        print(f"## {section}", flush=True)
        results[section] = setting | sections[section]()
        path.write_text(json.dumps(results, indent=1) + "\n")
    return results


def arguments(description: str | None) -> argparse.ArgumentParser:
    """What a script of sections can be asked."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser
