"""A slice of an SAE's features on each rank, and what slices must agree on: which entries are among the largest.

Features are cut into contiguous slices, so ids ascend from rank to rank and a tie that goes to the lower feature goes
to the lower rank. A top-k over all features is found from each rank's own top-k: only values travel, since a rank needs
to know no more than where the cut is. Over a batch the cut is found digit by digit from histograms, whose size does not
depend on how many entries there are.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unbraid.distributed.ranks import ALONE, Ranks

DIGIT_BITS = 12


@dataclass(frozen=True)
class Shard:
    """Features `start` to `end` of `n_features`, held by one of `ranks`."""

    n_features: int
    ranks: Ranks = ALONE

    @property
    def start(self) -> int:
        """First feature of this rank."""
        return self.n_features * self.ranks.rank // self.ranks.size

    @property
    def end(self) -> int:
        """Feature after the last of this rank."""
        return self.n_features * (self.ranks.rank + 1) // self.ranks.size

    @property
    def width(self) -> int:
        """How many features this rank holds."""
        return self.end - self.start

    @property
    def whole(self) -> bool:
        """Whether this rank holds all features."""
        return self.ranks.size == 1

    def clamp(self, feature: int) -> int:
        """A boundary between features, counted from `start` and moved into the slice."""
        return min(max(feature - self.start, 0), self.width)


def among_top_k(values_BK: Float[Tensor, "B K"], k: int, ranks: Ranks) -> Bool[Tensor, "B K"]:
    """Which of this rank's values are among the k largest of all ranks, row by row; ties go to lower ranks.

    Args:
        values_BK: this rank's candidates, at most k a row, by ascending feature.
        k: how many are kept a row.
        ranks: the others.
    """
    if ranks.size == 1:
        return torch.ones_like(values_BK, dtype=torch.bool)
    padded_Bk = torch.nn.functional.pad(values_BK, (0, k - values_BK.shape[1]), value=-torch.inf)
    gathered = ranks.gather(padded_Bk)
    all_BA = torch.cat(gathered, 1)
    cut_B1 = all_BA.topk(k, dim=1, sorted=False).values.amin(1, keepdim=True)
    seats_B1 = k - (all_BA > cut_B1).sum(1, keepdim=True)
    for lower_BK in gathered[: ranks.rank]:
        seats_B1 -= (lower_BK == cut_B1).sum(1, keepdim=True)
    ties_BK = values_BK == cut_B1
    return (values_BK > cut_B1) | (ties_BK & (ties_BK.cumsum(1) <= seats_B1))


def among_top(values: Float[Tensor, " n"], keys: Int[Tensor, " n"], count: int, ranks: Ranks) -> Bool[Tensor, " n"]:
    """Which of this rank's values, all > 0, are among the `count` largest of all ranks; ties go to lower keys."""
    if ranks.size == 1:
        return torch.ones_like(values, dtype=torch.bool)
    integers = values.view(torch.int64 if values.dtype == torch.float64 else torch.int32).long()
    cut, seats = cut_of(integers, count, 8 * values.element_size() - 1, ranks)
    ties = integers == cut
    tied_keys = torch.cat(ranks.gather_ragged(keys[ties])).sort().values
    if seats < len(tied_keys):
        ties &= keys < tied_keys[seats]
    return (integers > cut) | ties


def cut_of(integers: Int[Tensor, " n"], count: int, bits: int, ranks: Ranks) -> tuple[int, int]:
    """The `count`-th largest of all ranks' integers (>= 0), and how many of those equal to it belong to the largest.

    -1 and 0 when there are fewer than `count`. Digits are settled from the highest, by one histogram each.
    """
    cut, seats = 0, count
    for shift in reversed(range(0, bits, DIGIT_BITS)):
        digits = (integers >> shift) & ((1 << DIGIT_BITS) - 1)
        reached = ranks.sum(torch.bincount(digits, minlength=1 << DIGIT_BITS)).flip(0).cumsum(0).flip(0)
        digit = int((reached >= seats).sum()) - 1
        if digit < 0:
            return -1, 0
        seats -= int(reached[digit + 1]) if digit + 1 < len(reached) else 0
        integers = integers[digits == digit]
        cut |= digit << shift
    return cut, seats
