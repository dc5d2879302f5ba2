"""What a penalty says about itself: enough to draw Figure 1 and to see whether S is signal or noise."""

import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unbraid.decorrelation.hinge import Evaluation
from unbraid.decorrelation.selection import Selection
from unbraid.distributed.ranks import Ranks
from unbraid.distributed.shard import Shard


class PairsFound(NamedTuple):
    """S, in the order the path came across it, and its correlations."""

    first: Tensor
    second: Tensor
    correlations: Tensor

    @property
    def ids(self) -> Tensor:
        """A number for each pair, the same for the same pair in any selection."""
        return (self.first << 32) + self.second


NO_PAIRS = torch.empty(0, dtype=torch.int64)
NOTHING = PairsFound(NO_PAIRS, NO_PAIRS, torch.empty(0, dtype=torch.float64))


@dataclass(frozen=True)
class DecorrelationStats:
    """One call of a penalty.

    What was not measured, because the method does not look at it or because this call neither selects nor penalises
    and nothing is remembered, is NaN here and None in `scalars`.
    """

    path: str
    """How it was computed: coactive, blocks, tiled, naive, decoder, ...; filling while a window has too few batches
    or decoder rows have not all been looked at."""
    penalty: float = math.nan
    """R(tau), unweighted by lambda2 and by the interval."""
    tau: float = math.nan
    """The threshold of Eq. 4 in force."""
    mean: float = math.nan
    """mu: mean correlation over all live pairs at the latest selection."""
    std: float = math.nan
    """sigma: population standard deviation of the same."""
    cut: float = math.nan
    """The lowest correlation that got into S."""
    found: PairsFound = field(default=NOTHING, repr=False)
    """S as the path left it; `pairs` and `correlations` are the same in order, sorted when somebody asks."""
    n_live: int = 0
    """Features that fired in the window, at least min_support times."""
    nominal: int = 0
    """|S| as defined: the divisor of Eq. 3."""
    limit: str = "fraction"
    """What bounds |S|: fraction, max_pairs_per_feature or co-activation."""
    co_activations: int | None = None
    """W of this batch: what the exact path costs."""
    low_support: float = math.nan
    """Share of S in which a feature fired at most 4 times in the window: the share that is mostly noise."""
    overlap: float | None = None
    """Share of S that was in the S before it; none where no earlier S is remembered."""
    refreshed: bool = True
    """Whether S was selected on this call."""
    penalised: bool = True
    """Whether this call's penalty is switched on (interval)."""

    @cached_property
    def _order(self) -> Tensor:
        return torch.sort(self.found.ids)[1]

    @cached_property
    def pairs(self) -> Int[Tensor, "P 2"]:
        """S as [P, 2], i < j, by ascending i, then j."""
        return torch.stack(self.found[:2], dim=1)[self._order]

    @cached_property
    def correlations(self) -> Float[Tensor, " P"]:
        """Correlations of `pairs`: on this batch, or of the decoder rows; as selected where nothing is penalised."""
        return self.found.correlations[self._order]

    def of(self, shard: Shard) -> "DecorrelationStats":
        """The same with only the pairs whose first feature belongs to the shard."""
        own = (self.found.first >= shard.start) & (self.found.first < shard.end)
        return replace(self, found=PairsFound(*(part[own] for part in self.found)))

    def from_all(self, ranks: Ranks) -> "DecorrelationStats":
        """The stats of all ranks as one, from each rank's pairs."""
        if ranks.size == 1:
            return self
        found = PairsFound(*(torch.cat(ranks.gather_ragged(part)) for part in self.found))
        pairs, overlap = self.found.first.numel(), self.overlap or 0.0
        remembered = ranks.any(self.overlap is not None)
        low_support = 0.0 if pairs == 0 else pairs * self.low_support
        total, low, overlapping = ranks.total(pairs, low_support, pairs * overlap)
        cut = float(ranks.min(torch.tensor(self.cut if pairs else torch.inf, dtype=torch.float64)))
        return replace(
            self,
            found=found,
            cut=cut if total else 0.0,
            low_support=low / max(total, 1),
            overlap=overlapping / max(total, 1) if remembered else None,
        )

    def overlap_with(self, previous: "DecorrelationStats") -> float:
        """Share of this S that was also in `previous`'s."""
        if self.found.first.numel() == 0:
            return 0.0
        return float(torch.isin(self.found.ids, previous.found.ids).double().mean())

    @property
    def top(self) -> float:
        """Mean correlation over the nominal |S|: a pair that is missing from S counts as 0."""
        if math.isnan(self.tau):
            return math.nan
        return float(self.found.correlations.sum(dtype=torch.float64)) / max(1, self.nominal)

    def scalars(self) -> dict[str, float | int | str | None]:
        """The numbers worth a line in a log, ready for JSON; None where nothing was measured."""
        correlations = self.found.correlations
        some, known, selected = correlations.numel() > 0, not math.isnan(self.mean), not math.isnan(self.tau)
        numbers: dict[str, float | int | str | None] = {
            "path": self.path,
            "penalty": self.penalty,
            "tau": self.tau,
            "mean": self.mean,
            "std": self.std,
            "cut": self.cut,
            "pairs": correlations.numel() if selected else None,
            "nominal_pairs": self.nominal if known else None,
            "mean_selected": float(correlations.mean(dtype=torch.float64)) if some else None,
            "above_tau": float((correlations > self.tau).double().mean()) if some else None,
            "n_live": self.n_live if known else None,
            "limit": self.limit if selected else None,
            "co_activations": self.co_activations,
            "low_support": self.low_support,
            "refreshed": int(self.refreshed),
            "penalised": int(self.penalised),
        }
        numbers = {name: None if isinstance(n, float) and math.isnan(n) else n for name, n in numbers.items()}
        return numbers if self.overlap is None else numbers | {"overlap": self.overlap}


def stats_of(path: str, selection: Selection, tau: float, found: Evaluation | None, **more: Any) -> DecorrelationStats:
    """Stats of a selection and, where it was penalised, of what was found."""
    return DecorrelationStats(
        path=path,
        penalty=math.nan if found is None else found.penalty,
        tau=tau,
        mean=selection.mean,
        std=selection.std,
        cut=selection.cut,
        found=PairsFound(selection.first, selection.second, (found or selection).correlations),
        n_live=selection.n_live,
        nominal=selection.nominal,
        limit=selection.limit,
        low_support=selection.low_support,
        penalised=found is not None,
        **more,
    )
