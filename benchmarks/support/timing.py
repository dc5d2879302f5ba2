"""The file a script of sections keeps its figures in, and how it is asked for them."""

import argparse
import json
import platform
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch

from unbraid.bench.timing import Times, peak_mib, progress, synchronise, take_turns

__all__ = ["RESULTS", "Times", "arguments", "peak_mib", "progress", "record", "synchronise", "take_turns"]

RESULTS = Path(__file__).parents[1] / "results"


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
