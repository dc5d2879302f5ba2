"""What selective decorrelation costs, beside an SAE's training step at the same shapes.

    python benchmarks/decorrelation.py                       # everything; about ten minutes on two quiet cores
    python benchmarks/decorrelation.py overhead              # one section
    python benchmarks/decorrelation.py --device cuda --threads 8

Sections: `scaling` (time and peak memory against N at fixed W and against W at fixed N, with fitted exponents and a
plot) and `overhead` (training steps with and without the penalty, alternated on the same batches). Contenders take
turns, so that whatever else the machine does falls on all of them; reported are medians with the spread between
quartiles, CPU time beside wall time.
"""

import argparse
import ctypes
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor

from unbraid.config import DecorrelationConfig, OptimiserConfig, SAEConfig, VariantConfig
from unbraid.decorrelation.build import build as build_decorrelation
from unbraid.decorrelation.penalty import SelectiveDecorrelation
from unbraid.recipes import SPARING
from unbraid.sae.build import build as build_sae
from unbraid.training.optimiser import SAEOptimiser
from unbraid.training.trainee import Trainee, train_step

HERE = Path(__file__).parent

B, D, K = 2048, 576, 64
WIDTHS = [2**n for n in range(12, 19)]
ORACLE_WIDTHS = [1024, 2048, 4096]
BLOCK_WIDTHS = [4096, 16_384, 65_536]
STEP_WIDTHS = [4096, 16_384, 65_536]
ACTIVE = [8, 16, 32, 64, 128]
N = 16_384


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


def resident_mib(name: str) -> float:
    """A memory figure of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) / 1024


def codes(n_features: int, k: int, device: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Indices and values [B, k]: exactly k distinct features a row (W is exact), a few frequent and many rare ones."""
    draws = torch.Generator().manual_seed(seed)
    width = n_features // k
    within = (torch.rand(B, k, generator=draws) ** 3 * width).long()
    return (torch.arange(k) * width + within).to(device), (torch.rand(B, k, generator=draws) + 0.1).to(device)


def penalty_call(n_features: int, k: int, device: str, **settings: Any) -> Callable[[], None]:
    """One call of the penalty with its backward pass."""
    decorrelate = SelectiveDecorrelation(**settings)
    indices, values = codes(n_features, k, device)

    def call() -> None:
        leaf = values.clone().requires_grad_()
        penalty, _ = decorrelate(indices=indices, values=leaf, n_features=n_features)
        penalty.backward()

    return call


def trainee(n_features: int, device: str, decorrelation: DecorrelationConfig) -> Trainee:
    """A TopK SAE with its optimiser and penalty, as a run builds them."""
    settings = VariantConfig(
        seed=0,
        sae=SAEConfig(architecture="topk", n_features=n_features, k=K),
        optimiser=OptimiserConfig(warmup_steps=0),
        decorrelation=decorrelation,
    )
    sae = build_sae(settings.sae, D, torch.Generator().manual_seed(0)).to(device)
    return Trainee(
        name="topk",
        site=0,
        config=settings,
        scale=1.0,
        sae=sae,
        optimiser=SAEOptimiser(sae, settings.optimiser),
        decorrelate=build_decorrelation(settings.decorrelation, n_features, D, seed=0).to(device),
        generator=torch.Generator(device).manual_seed(0),
        tokens_since_fired=torch.zeros(n_features, dtype=torch.long, device=device),
    )


def activations(count: int, device: str, seed: int = 0) -> list[Tensor]:
    """Batches of stand-in activations, E||x||^2 = 1: 32 of 8192 directions each, a few frequent and many rare ones."""
    draws = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(8192, D, generator=draws), dim=1)
    batches = []
    for _ in range(count):
        chosen = (torch.rand(B, 32, generator=draws) ** 3 * len(directions)).long()
        weights = torch.rand(B, 32, generator=draws) + 0.5
        x_BD = torch.nn.functional.embedding_bag(chosen, directions, per_sample_weights=weights, mode="sum")
        batches.append((x_BD / x_BD.square().sum(1).mean().sqrt()).to(device))
    return batches


def endless(batches: list[Tensor]) -> Iterator[tuple[int, Tensor]]:
    """The batches again and again, numbered."""
    step = 0
    while True:
        yield step, batches[step % len(batches)]
        step += 1


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


def scaling(device: str, turns: int) -> dict[str, Any]:
    """Cost of one call against N at fixed W, and against W at fixed N."""
    against_n: dict[str, dict[int, Any]] = {}
    capped = {"max_pairs_per_feature": 8}
    series: dict[str, tuple[list[int], Callable[[int], Callable[[], Any]]]] = {
        "coactive": (WIDTHS, lambda n: penalty_call(n, K, device)),
        "coactive, 8 pairs a feature": (WIDTHS, lambda n: penalty_call(n, K, device, **capped)),
        "blocks of 512": (BLOCK_WIDTHS, lambda n: penalty_call(n, K, device, path="blocks")),
        "oracle (N x N)": (ORACLE_WIDTHS, lambda n: penalty_call(n, K, device, path="naive")),
        "SAE step": (STEP_WIDTHS, lambda n: step_call(n, device)),
    }
    for n in sorted({n for widths, _ in series.values() for n in widths}):
        found = take_turns({name: make(n) for name, (widths, make) in series.items() if n in widths}, turns, device)
        for name, times in found.items():
            against_n.setdefault(name, {})[n] = times.report()
        progress(f"N = {n}", found)
    against_w: dict[str, dict[int, Any]] = {}
    for k in ACTIVE:
        calls = {"coactive": penalty_call(N, k, device, pair_budget=10**12)}
        if k in (ACTIVE[0], K, ACTIVE[-1]):
            calls["blocks of 512"] = penalty_call(N, k, device, path="blocks")
        found = take_turns(calls, turns, device)
        for name, times in found.items():
            against_w.setdefault(name, {})[B * k * (k - 1) // 2] = times.report()
        progress(f"W = {B * k * (k - 1) // 2}", found)
    return {
        "against_N": against_n,
        "against_W": against_w,
        "exponents": {
            "time in N": exponents(against_n, "wall_ms"),
            "memory in N": exponents(against_n, "peak_mib"),
            "time in W": exponents(against_w, "wall_ms"),
            "memory in W": exponents(against_w, "peak_mib"),
        },
    }


def step_call(n_features: int, device: str) -> Callable[[], None]:
    """One training step without a penalty."""
    trained = trainee(n_features, device, DecorrelationConfig(lambda2=0.0))
    stream = endless(activations(2, device))
    return lambda: step(trained, *next(stream))


def step(trained: Trainee, number: int, x_BD: Tensor) -> None:
    """One training step."""
    train_step(trained, x_BD, number, trained.config.optimiser.lr, log=False)


def exponents(series: dict[str, dict[int, Any]], quantity: str) -> dict[str, float]:
    """Slope of the log-log fit of each series; memory below a MiB is noise and counts as one."""
    slopes = {}
    for name, points in series.items():
        known = [(size, max(point[quantity], 1.0)) for size, point in points.items() if point[quantity] is not None]
        if len(known) > 1:
            slopes[name] = round(float(np.polyfit(*np.log(np.array(known)).T, 1)[0]), 3)
    return slopes


def overhead(device: str, turns: int) -> dict[str, Any]:
    """Steps with a penalty over steps without, of two SAEs that take turns on the same batches.

    Steps come in kinds (they select pairs, only penalise, or rest); of each kind the median ratio to the plain step
    beside it is taken, and these are weighted by how often the kind comes in a cycle of selections.
    """
    batches = activations(8, device)
    rows = {}
    for name, settings in {"the paper's, per batch": {}, "sparing": dict(SPARING)}.items():
        config = DecorrelationConfig(**settings)
        refresh, interval = config.refresh or config.window, config.interval
        share = {"selects": 1 / refresh, "penalises": 1 / interval - 1 / refresh, "rests": 1 - 1 / interval}
        plain, pushed = Times(), Times()
        kinds = []
        for _ in range(2):
            one = trainee(N, device, DecorrelationConfig(lambda2=0.0))
            other = trainee(N, device, config)
            for number in range(max(turns, 4 * interval) + 1):
                x_BD = batches[number % len(batches)]
                plain.take(partial(step, one, number, x_BD), device)
                pushed.take(partial(step, other, number, x_BD), device)
                kinds.append("warms up" if number == 0 else kind_of_step(other, number))
        found = {
            "settings": settings,
            "ratio": weighted_ratio(plain.wall, pushed.wall, kinds, share),
            "cpu_ratio": weighted_ratio(plain.cpu, pushed.cpu, kinds, share),
            "plain_step": plain.report(),
        }
        for kind in share:
            of_kind = [index for index, found_kind in enumerate(kinds) if found_kind == kind]
            if of_kind:
                chosen = Times([pushed.wall[i] for i in of_kind], [pushed.cpu[i] for i in of_kind])
                found[f"step_that_{kind}"] = chosen.report()
        rows[name] = found
        print(f"{name}: {json.dumps(found, indent=1)}", flush=True)
    return rows


def kind_of_step(trained: Trainee, number: int) -> str:
    """What the penalty did on the step just taken."""
    penalty = trained.decorrelate
    assert isinstance(penalty, SelectiveDecorrelation)
    if penalty.selection is None or (penalty.selection.known and penalty.selection.calls_since == 0):
        return "selects"
    return "penalises" if penalty.selection.known and number % penalty.interval == 0 else "rests"


def weighted_ratio(plain: list[float], pushed: list[float], kinds: list[str], share: dict[str, float]) -> float:
    """Sum over the kinds of step of how often they come times the median ratio of the steps side by side."""
    ratios = {
        kind: [q / p for p, q, k in zip(plain, pushed, kinds, strict=True) if k == kind]
        for kind, part in share.items()
        if part > 0
    }
    return round(sum(share[kind] * statistics.median(found) for kind, found in ratios.items()), 4)


def progress(point: str, found: dict[str, Times]) -> None:
    """A line a point, so that a long run is seen to go on."""
    figures = (f"{name} {1e3 * statistics.median(times.wall):.0f} ms" for name, times in found.items())
    print(f"{point}: {', '.join(figures)}", flush=True)


def scaling_tables(found: dict[str, Any]) -> str:
    """Markdown: a line a size, a column a path; wall (CPU) milliseconds and MiB."""
    parts = []
    for key, letter in (("against_N", "N"), ("against_W", "W")):
        series = found[key]
        sizes = sorted({int(size) for points in series.values() for size in points})
        parts.append(f"| {letter} | " + " | ".join(f"{name}: ms (CPU), MiB" for name in series) + " |")
        parts.append("|---" * (len(series) + 1) + "|")
        for size in sizes:
            cells = []
            for points in series.values():
                point = points.get(size) or points.get(str(size))
                cells.append(
                    "-" if point is None else f"{point['wall_ms']:.0f} ({point['cpu_ms']:.0f}), {point['peak_mib']}"
                )
            parts.append(f"| {size:,} | " + " | ".join(cells) + " |")
        parts.append("")
    parts += [f"exponent of {what}: {slopes}" for what, slopes in found["exponents"].items()]
    return "\n".join(parts)


def draw(found: dict[str, Any], path: Path) -> None:
    """Time and memory against N and against W, log-log, with the fitted exponents in the legend."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    for column, (key, letter) in enumerate((("against_N", "N"), ("against_W", "W"))):
        for row, (quantity, what, unit) in enumerate((("wall_ms", "time", "ms a call"), ("peak_mib", "memory", "MiB"))):
            axis, slopes = axes[row][column], found["exponents"][f"{what} in {letter}"]
            for (name, points), marker in zip(found[key].items(), "os^Dv", strict=False):
                known = {
                    int(size): max(point[quantity], 1.0)
                    for size, point in points.items()
                    if point[quantity] is not None
                }
                label = f"{name}: {letter}^{slopes[name]:.2f}" if name in slopes else name
                style = "--" if name == "SAE step" else "-"
                axis.plot(list(known), list(known.values()), style, marker=marker, label=label)
            axis.set(xscale="log", yscale="log", xlabel=letter, ylabel=unit)
            axis.set_xscale("log", base=2 if letter == "N" else 10)
            axis.grid(alpha=0.3)
            axis.legend(fontsize=8)
            axis.set_title(f"{what} against {letter}" + (f", L0 = {K}" if letter == "N" else f", N = {N:,}"))
    figure.suptitle(f"One call of the penalty with its gradient, B = {B:,}")
    figure.savefig(path, dpi=120)
    plt.close(figure)


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
    """What every script here can be asked."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    return parser


def main() -> None:
    """Run, print and draw."""
    parser = arguments(__doc__)
    parser.add_argument("--turns", type=int, default=7)
    asked = parser.parse_args()
    results = record(
        {
            "scaling": lambda: scaling(asked.device, asked.turns),
            "overhead": lambda: overhead(asked.device, asked.turns),
        },
        asked,
        "decorrelation",
    )
    if "scaling" in results:
        print(scaling_tables(results["scaling"]))
        draw(results["scaling"], asked.out / f"decorrelation-{asked.device.split(':')[0]}.png")


if __name__ == "__main__":
    main()
