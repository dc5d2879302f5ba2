"""How entangled are the features: the paper's correlation statistics on held-out tokens.

`correlation_summary` is the short form written at the end of a run. The numbers are exact over all pairs of live
features (see `pairs.py`), in the terms of Eq. 2-4: mean mu, spread sigma, tau = mu + sigma, and the mean of the
selected top pairs.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unbraid.evaluation.pairs import Measure, PairStatistics, pair_statistics, stack_codes


@dataclass(frozen=True)
class CorrelationSummary:
    """Correlation over all pairs of live features of one SAE on one set of tokens.

    `top` is the mean over the `n_selected` = max(1, round(fraction * live pairs)) most correlated pairs; `pairs` [P, 2]
    (i < j) and `correlations` [P], descending, list those of them that are above zero.
    """

    mean: float
    std: float
    tau: float
    top: float
    n_live: int
    n_pairs: int
    n_selected: int
    pairs: Tensor
    correlations: Tensor


def correlation_summary(
    codes: Iterable[Any], n_features: int, fraction: float = 1e-3, measure: Measure = "cosine", min_support: int = 1
) -> CorrelationSummary:
    """Exact mean, spread, threshold and top mean of the correlation of all live pairs.

    Args:
        codes: chunks of codes, dense `[B, N]` or sparse (`Codes`), on any device.
        n_features: N.
        fraction: share of the live pairs that counts as the top.
        measure: cosine, the paper's Eq. 2, or pearson.
        min_support: features that fire on fewer tokens are left out.
    """
    statistics = pair_statistics(stack_codes(codes, n_features), measure, keep=fraction, min_support=min_support)
    return summarise(statistics, fraction)


def summarise(statistics: PairStatistics, fraction: float) -> CorrelationSummary:
    """The summary of exact statistics that kept at least `fraction` of the pairs."""
    selected = max(1, round(fraction * statistics.n_pairs)) if statistics.n_pairs else 0
    return CorrelationSummary(
        mean=statistics.mean,
        std=statistics.std,
        tau=statistics.mean + statistics.std,
        top=statistics.top_mean(selected),
        n_live=statistics.n_live,
        n_pairs=statistics.n_pairs,
        n_selected=selected,
        pairs=torch.from_numpy(statistics.pairs[:selected].copy()),
        correlations=torch.from_numpy(statistics.values[:selected].copy()),
    )
