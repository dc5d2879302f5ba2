"""Which pairs are penalised, above which correlation, and what a penalty on them answers with.

S is the top share of live pairs by correlation, chosen the same way on every path. Correlations are ranked on a grid
fine enough to lose nothing (2^-20 in float32, 2^-36 in float64), so pairs that are equal on paper - every pair of
features that fired once, together - are equal here too, whatever order a path summed in; ties then go to the lowest
pair id i * N + j, and a pair within one step of tau is at tau: it is not pushed. Only pairs above zero are chosen: the
others are not entangled.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from unbraid.distributed.ranks import ALONE, Ranks
from unbraid.distributed.shard import Shard, cut_of
from unbraid.kernels.co_activation import BIN_COUNT, bar_for, bin_bits

Measure = Literal["cosine", "pearson"]
CONSTANT = 1e-36
"""Centred sums of squares up to this share of the plain ones are the rounding of a constant."""


class Scaled(NamedTuple):
    """Features or decoder rows, scaled so that a correlation is a dot product (minus a product of shifts)."""

    values: Tensor
    """z: at active entries [nnz] in float64, or the unit rows of a decoder [N, D]; no gradient."""
    inverse_norm: Tensor
    """[N] 1 / (centred) norm, float64; 0 for features that never fire or never vary, and for rows of zeros."""
    shift: Tensor | None = None
    """[N] for Pearson; none for cosine."""


@dataclass(frozen=True)
class Selection:
    """S and the statistics of all live pairs it was chosen from."""

    first: Tensor
    """[P] the smaller feature of each pair; the pairs are in no particular order, but always in the same one."""
    second: Tensor
    """[P] the larger feature of each pair."""
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
    """What bounds |S|: fraction, max_pairs_per_feature, or co-activation (fewer pairs than asked for have C > 0)."""
    low_support: float = 0.0
    """Share of S in which a feature fired at most 4 times."""
    tau: float = math.nan
    """The threshold of Eq. 4, once it is known."""
    refreshed: bool = True
    """Whether it was made on this call."""
    overlap: float | None = None
    """Share of S that was in the S before it; none where no earlier S is remembered."""

    def of(self, shard: Shard) -> "Selection":
        """The pairs whose first feature belongs to the shard."""
        if shard.whole:
            return self
        own = (self.first >= shard.start) & (self.first < shard.end)
        first, second, correlations = self.first[own], self.second[own], self.correlations[own]
        return dataclasses.replace(self, first=first, second=second, correlations=correlations)

    @property
    def cut(self) -> float:
        """The smallest correlation chosen; 0 when nothing was."""
        return float(self.correlations.min()) if self.correlations.numel() else 0.0


@dataclass(frozen=True)
class Evaluation:
    """A penalty on one batch, with its gradient."""

    penalty: float
    """Unweighted by lambda2 and by the interval."""
    gradient: Tensor
    """d penalty / d(what was penalised): at active entries [nnz], of dense codes [B, N], or of decoder rows [N, D]."""
    correlations: Tensor
    """[P] of the pairs, float64."""


def hinge_weights(correlations: Tensor, selection: Selection, dtype: torch.dtype) -> Tensor:
    """[P] 1/|S| for pairs above tau by more than the rounding of `dtype`, else 0: dR/dC."""
    above = correlations - selection.tau > 1 / steps_per_unit(dtype)
    return above.to(correlations.dtype) / max(selection.nominal, 1)


def add_at(base: Tensor, places: Tensor, amounts: Tensor) -> Tensor:
    """`base` with `amounts` added at `places`, in the same order every time (index_add is not, on CUDA)."""
    if base.is_cuda:
        return base.index_put_((places,), amounts, accumulate=True)
    return base.index_add_(0, places, amounts)


def low_support(support: Tensor, first: Tensor, second: Tensor) -> float:
    """Share of the pairs in which a feature fires at most 4 times."""
    if first.numel() == 0:
        return 0.0
    rare = support <= 4
    low = rare.index_select(0, first) | rare.index_select(0, second)
    return int(low.count_nonzero()) / first.numel()


def live_pairs(n_live: int) -> int:
    """Unordered pairs of live features."""
    return n_live * (n_live - 1) // 2


def nominal_pairs(n_live: int, fraction: float, max_pairs_per_feature: int | None) -> tuple[int, str]:
    """|S| = max(1, round(fraction * live pairs)), capped at so many pairs per live feature, and which of them binds."""
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


def grid(correlations: Tensor, steps: int) -> Tensor:
    """Ranks of correlations: integers, equal for correlations that differ by rounding alone."""
    return torch.round(correlations * steps).to(torch.int64 if steps > 2**24 else torch.int32)


def best_pairs(
    first: Tensor,
    second: Tensor,
    correlations: Tensor,
    wanted: int,
    steps: int,
    n_features: int,
    ranks: Ranks = ALONE,
) -> tuple[Tensor, Tensor, Tensor]:
    """The `wanted` best of some pairs, in the order they came; ties go to the lowest pair id.

    Among ranks these are its own of the best anywhere; first features must ascend from rank to rank.
    """
    surplus = correlations.numel() - wanted
    if ranks.size == 1 and surplus <= 0:
        return first, second, correlations
    levels = grid(correlations, steps)
    if ranks.size == 1:
        cut = levels.kthvalue(surplus + 1).values
        seats = wanted - int((levels > cut).sum())
    else:
        cut, seats = cut_of(levels.long(), wanted, steps.bit_length() + 1, ranks) if wanted else (2 * steps, 0)
    ties = (levels == cut).nonzero().squeeze(1)
    if ranks.size > 1:
        seats -= sum(int(count) for count in ranks.gather(torch.tensor([ties.numel()]))[: ranks.rank])
    chosen = levels > cut
    if seats > 0 and ties.numel() > 0:
        ids = first.index_select(0, ties) * n_features + second.index_select(0, ties)
        chosen[ties[ids <= ids.kthvalue(min(seats, ties.numel())).values]] = True
    kept = chosen.nonzero().squeeze(1)
    return first.index_select(0, kept), second.index_select(0, kept), correlations.index_select(0, kept)


class TopPairs:
    """The best `wanted` pairs of a stream of chunks. A coarse histogram of what came raises the bar for what comes."""

    def __init__(self, wanted: int, n_features: int, dtype: torch.dtype, device: torch.device):
        self.wanted, self.n_features = wanted, n_features
        self.steps = steps_per_unit(dtype)
        self.bits = bin_bits(self.steps)
        empty = torch.empty(0, dtype=torch.int64, device=device)
        self._kept = [(empty, empty, torch.empty(0, dtype=dtype, device=device))]
        self._histogram = torch.zeros(BIN_COUNT + 2, dtype=torch.int64, device=device)
        self._bar = 1

    def add(self, correlations: Tensor, features: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
        """Offer a chunk of correlations; `features` gives the features i < j of the pairs at some positions of it."""
        unfiltered = self._bar == 1
        if unfiltered:
            self._raise_bar(grid(correlations, self.steps))
        positions = (correlations > (self._bar - 1) / self.steps).nonzero().squeeze(1)
        found = correlations[positions]
        if not unfiltered:
            self._raise_bar(grid(found, self.steps))
        better = (grid(found, self.steps) >= self._bar).nonzero().squeeze(1)
        self._kept.append((*features(positions[better]), found[better]))

    def _raise_bar(self, ranks: Tensor) -> None:
        """Count newcomers in bins; what is not above zero falls into none, beyond 1 (rounding) into the last."""
        bins = (ranks.clamp(0, self.steps) + ((1 << self.bits) - 1)) >> self.bits
        self._histogram += torch.bincount(bins, minlength=BIN_COUNT + 3)[1:]
        self._bar = bar_for(self._histogram, self.wanted, self.bits)

    def result(self, ranks: Ranks = ALONE) -> tuple[Tensor, Tensor, Tensor]:
        """Features i < j of the chosen pairs, and their correlations; see `best_pairs`."""
        first, second, correlations = (torch.cat(parts) for parts in zip(*self._kept, strict=True))
        return best_pairs(first, second, correlations, self.wanted, self.steps, self.n_features, ranks)
