"""Which pairs are penalised: the top share of live pairs by correlation, chosen the same way on every path.

Correlations are ranked on a grid fine enough to lose nothing (2^-20 in float32, 2^-36 in float64), so pairs that are
equal on paper - every pair of features that fired once, together - are equal here too, whatever order a path summed
in; ties then go to the lowest pair id i * N + j, and a pair within one step of tau is at tau: it is not pushed. Only
pairs above zero are chosen: the others are not entangled.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from unbraid.kernels.co_activation import CoActivations


@dataclass(frozen=True)
class Selection:
    """S and the statistics of all live pairs it was chosen from."""

    pair_ids: Tensor
    """[P] ids i * N + j, i < j, ascending."""
    correlations: Tensor
    """[P] what they were chosen by."""
    nominal: int
    """|S| as defined, the divisor of Eq. 3: also when fewer pairs have C > 0."""
    mean: float
    """mu over all live pairs, zeros included."""
    std: float
    """sigma (population) over all live pairs, zeros included."""
    n_live: int
    """Features that fired (at least min_support times)."""
    limit: str
    """What bounds |S|: fraction, max_pairs_per_feature, or co-activation (fewer pairs have C > 0 than were asked for)."""

    @property
    def cut(self) -> float:
        """The smallest correlation chosen; 0 when nothing was."""
        return float(self.correlations.min()) if self.correlations.numel() else 0.0


def live_pairs(n_live: int) -> int:
    """Unordered pairs of live features."""
    return n_live * (n_live - 1) // 2


def nominal_pairs(n_live: int, fraction: float, max_pairs_per_feature: int | None) -> tuple[int, str]:
    """|S| = max(1, round(fraction * live pairs)), capped at so many pairs per live feature, and which of both bound it."""
    pairs = live_pairs(n_live)
    if pairs == 0:
        return 0, "fraction"
    wanted = max(1, round(fraction * pairs))
    if max_pairs_per_feature is not None and max_pairs_per_feature * n_live < wanted:
        return max_pairs_per_feature * n_live, "max_pairs_per_feature"
    return wanted, "fraction"


def moments(total: float, total_of_squares: float, n_pairs: int) -> tuple[float, float]:
    """Mean and population standard deviation of `n_pairs` numbers from their sum and sum of squares.

    A variance that is only the rounding of these sums (below 1e-13 of the mean square) is zero.
    """
    if n_pairs == 0:
        return 0.0, 0.0
    mean, mean_square = total / n_pairs, total_of_squares / n_pairs
    variance = mean_square - mean * mean
    return mean, variance**0.5 if variance > 1e-13 * mean_square else 0.0


def steps_per_unit(dtype: torch.dtype) -> int:
    """Grid steps from C = 0 to C = 1: fine enough to lose nothing, coarse enough to absorb rounding."""
    return 2**36 if dtype == torch.float64 else 2**20


def grid(correlations: Tensor) -> Tensor:
    """Ranks of correlations: integers, equal for correlations that differ by rounding alone."""
    kind = torch.int64 if correlations.dtype == torch.float64 else torch.int32
    return torch.round(correlations * steps_per_unit(correlations.dtype)).to(kind)


class TopPairs:
    """The best `wanted` pairs seen so far, fed chunk by chunk; holds at most a few times that many."""

    def __init__(self, wanted: int):
        self.wanted = wanted
        self._ranks: list[Tensor] = []
        self._ids: list[Tensor] = []
        self._held = 0
        self._bar = 1

    def add(self, correlations: Tensor, pairs: CoActivations) -> None:
        """Offer a chunk; `correlations` [p] belongs to the pairs of `pairs`, position by position."""
        ranks = grid(correlations)
        positions = (ranks >= self._bar).nonzero().squeeze(1)
        self._ranks.append(ranks[positions])
        self._ids.append(pairs.pair_ids(positions))
        self._held += positions.numel()
        if self._held > 4 * self.wanted:
            self._prune()

    def _prune(self) -> tuple[Tensor, Tensor]:
        ranks, ids = torch.cat(self._ranks), torch.cat(self._ids)
        if ranks.numel() > self.wanted > 0:
            self._bar = int(torch.topk(ranks, self.wanted, sorted=False)[0].min())
            above = (ranks > self._bar).nonzero().squeeze(1)
            level = (ranks == self._bar).nonzero().squeeze(1)
            lowest = torch.sort(ids[level])[1][: self.wanted - above.numel()]
            chosen = torch.cat([above, level[lowest]])
            ranks, ids = ranks[chosen], ids[chosen]
        self._ranks, self._ids, self._held = [ranks], [ids], ranks.numel()
        return ranks, ids

    def result(self) -> tuple[Tensor, Tensor]:
        """Pair ids, ascending, and their correlations (on the grid, float64)."""
        if not self._ids or self.wanted == 0:
            return torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.float64)
        ranks, ids = self._prune()
        ids, order = torch.sort(ids)
        step_dtype = torch.float64 if ranks.dtype == torch.int64 else torch.float32
        return ids, ranks[order].double() / steps_per_unit(step_dtype)
