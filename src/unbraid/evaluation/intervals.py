"""Bootstrap intervals: how far a number moves when the texts (or tasks, or tokens) it rests on are drawn again."""

from collections.abc import Callable

import numpy as np

REPLICATES = 1000
LEVEL = 0.95


def bootstrap_interval(
    statistic: Callable[[np.ndarray], np.ndarray], n_units: int, seed: int = 0, replicates: int = REPLICATES
) -> tuple[float, float] | None:
    """95 % percentile interval of a statistic over independent units; None with fewer than two units.

    Args:
        statistic: maps counts `[replicates, units]`, how often each unit was drawn, to `[replicates]` values.
        n_units: number of units.
        seed: of the draws.
        replicates: bootstrap samples.
    """
    if n_units < 2:
        return None
    counts = np.random.default_rng(seed).multinomial(n_units, np.full(n_units, 1 / n_units), size=replicates)
    values = statistic(counts.astype(np.float64))
    tail = (1 - LEVEL) / 2
    low, high = np.nanquantile(values, [tail, 1 - tail])
    return float(low), float(high)


def mean_interval(values: np.ndarray, seed: int = 0) -> tuple[float, float] | None:
    """Interval of a mean over units."""
    return bootstrap_interval(lambda counts: counts @ values / counts.sum(1), len(values), seed)
