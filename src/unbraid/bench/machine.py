"""What a time was measured on, so that somebody else's table can be read: processor, threads, torch, load."""

import os
import platform
from datetime import date
from pathlib import Path
from typing import Any

import torch

from unbraid import __version__


def describe(device: torch.device) -> dict[str, Any]:
    """The machine as it is now, without anything that names its owner.

    Returns:
        `processor`, `cores` (those this process may use), `memory_gib`, `system`, `python`, `torch`, `unbraid`,
        `threads`, `load` (of the last minute, before anything is measured; none where nobody counts), `device`,
        `device_name` and `device_gib` (none on a CPU), `date`.
    """
    on_gpu = device.type == "cuda"
    properties = torch.cuda.get_device_properties(device) if on_gpu else None
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": _memory_gib(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "unbraid": __version__,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "device": device.type,
        "device_name": properties.name if properties else None,
        "device_gib": round(properties.total_memory / 2**30, 1) if properties else None,
        "date": date.today().isoformat(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None
