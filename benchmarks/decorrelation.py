"""What selective decorrelation costs, beside an SAE's training step at the same shapes.

    python benchmarks/decorrelation.py                       # everything; about ten minutes on two quiet cores
    python benchmarks/decorrelation.py overhead              # one section
    python benchmarks/decorrelation.py --device cuda --threads 8

Sections: `scaling` (time and peak memory against N at fixed W and against W at fixed N, with fitted exponents and a
plot) and `overhead` (training steps with and without the penalty, alternated on the same batches). Contenders take
turns, so that whatever else the machine does falls on all of them; reported are medians with the spread between
quartiles, CPU time beside wall time.
"""

import json
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from support.timing import Times, arguments, progress, record, take_turns
from support.training import B, K, N, activations, endless, step, trainer
from torch import Tensor

from unbraid.config import DecorrelationConfig
from unbraid.decorrelation.penalty import SelectiveDecorrelation
from unbraid.kernels.codes import Codes
from unbraid.recipes import SPARING
from unbraid.training.sae_trainer import SAETrainer

WIDTHS = [2**n for n in range(12, 19)]
ORACLE_WIDTHS = [1024, 2048, 4096]
BLOCK_WIDTHS = [4096, 16_384, 65_536]
STEP_WIDTHS = [4096, 16_384, 65_536]
ACTIVE = [8, 16, 32, 64, 128]


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


def oracle_call(n_features: int, device: str) -> Callable[[], Any]:
    """R through the N x N matrix and autograd, as the tests check every path."""
    sys.path.append(str(Path(__file__).parents[1] / "tests" / "support"))
    import naive

    rows = Codes.from_topk(*codes(n_features, K, device), n_features)

    def call() -> None:
        chosen, leaf = naive.select(rows, 1e-3, "cosine"), rows.to_dense().requires_grad_()
        tau = chosen.mean + chosen.std
        naive.penalty(leaf, chosen.first, chosen.second, chosen.nominal, tau, "cosine")[0].backward()

    return call


def scaling(device: str, turns: int) -> dict[str, Any]:
    """Cost of one call against N at fixed W, and against W at fixed N."""
    against_n: dict[str, dict[int, Any]] = {}
    series: dict[str, tuple[list[int], Callable[[int], Callable[[], Any]]]] = {
        "coactive": (WIDTHS, lambda n: penalty_call(n, K, device)),
        "coactive, 8 pairs a feature": (WIDTHS, lambda n: penalty_call(n, K, device, max_pairs_per_feature=8)),
        "coactive, 2 pairs a feature": (WIDTHS, lambda n: penalty_call(n, K, device, max_pairs_per_feature=2)),
        "blocks of 512": (BLOCK_WIDTHS, lambda n: penalty_call(n, K, device, path="blocks")),
        "oracle (N x N)": (ORACLE_WIDTHS, lambda n: oracle_call(n, device)),
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
    trained = trainer(n_features, device, DecorrelationConfig(lambda2=0.0))
    stream = endless(activations(2, device))
    return lambda: step(trained, *next(stream))


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
            one = trainer(N, device, DecorrelationConfig(lambda2=0.0))
            other = trainer(N, device, config)
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


def kind_of_step(trained: SAETrainer, number: int) -> str:
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
    figure, axes = plt.subplots(2, 2, figsize=(11, 9.5), layout="constrained")
    for column, (key, letter) in enumerate((("against_N", "N"), ("against_W", "W"))):
        for row, (quantity, what, unit) in enumerate((("wall_ms", "time", "ms a call"), ("peak_mib", "memory", "MiB"))):
            axis, slopes = axes[row][column], found["exponents"][f"{what} in {letter}"]
            for (name, points), marker in zip(found[key].items(), "os^DvP", strict=False):
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
            axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2)
            axis.set_title(f"{what} against {letter}" + (f", L0 = {K}" if letter == "N" else f", N = {N:,}"))
    figure.suptitle(f"One call of the penalty with its gradient, B = {B:,}")
    figure.savefig(path, dpi=120)
    plt.close(figure)


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
