"""Numbers over seeds: means with their spread, and paired differences with intervals that say what is noise."""

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """Mean over `n` seeds and their standard deviation (None with one seed)."""

    mean: float
    sd: float | None
    n: int

    def __str__(self) -> str:
        return f"{short(self.mean)}" if self.sd is None else f"{short(self.mean)} ({short(self.sd)})"


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences and the half-width of its 95 % t-interval (None with one pair)."""

    mean: float
    reach: float | None
    n: int

    @property
    def noise(self) -> bool:
        """Whether zero lies inside the interval, or there is none."""
        return self.reach is None or abs(self.mean) <= self.reach

    def __str__(self) -> str:
        reach = "" if self.reach is None else f" ± {short(self.reach)}"
        return f"{'+' if self.mean >= 0 else ''}{short(self.mean)}{reach}"


BySeed = dict[int, float]


def estimate(values: Iterable[float]) -> Estimate:
    """Of one number a seed."""
    numbers = np.array(list(values), dtype=float)
    return Estimate(float(numbers.mean()), float(numbers.std(ddof=1)) if len(numbers) > 1 else None, len(numbers))


def difference(one: BySeed, other: BySeed) -> Difference:
    """one - other, over the seeds both have."""
    gaps = np.array([one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())])
    if len(gaps) < 2:
        return Difference(float(gaps.mean()), None, len(gaps))
    error = float(gaps.std(ddof=1)) / math.sqrt(len(gaps))
    return Difference(float(gaps.mean()), float(stats.t.ppf((1 + LEVEL) / 2, len(gaps) - 1)) * error, len(gaps))


def at_l0(several: list[dict[str, Any]], l0: float) -> dict[str, Any]:
    """What SAEs that differ in their sparsity weight alone would measure at `l0`: on the line between its neighbours.

    Empty when no two of them have `l0` between them: nothing is extrapolated.
    """
    ordered = sorted(several, key=lambda metrics: metrics["l0"])
    for low, high in itertools.pairwise(ordered):
        if low["l0"] <= l0 <= high["l0"]:
            share = (l0 - low["l0"]) / (high["l0"] - low["l0"])
            both = [name for name in low if low[name] is not None and high.get(name) is not None]
            return {name: low[name] + share * (high[name] - low[name]) for name in both}
    return {}


def short(number: float) -> str:
    """Three decimals without the leading zero: .604; fewer for large numbers."""
    if abs(number) >= 10:
        return f"{number:,.0f}" if abs(number) >= 100 else f"{number:.1f}"
    text = f"{number:.3f}"
    return text.replace("0.", ".", 1) if text.lstrip("-").startswith("0.") else text
