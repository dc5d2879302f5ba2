"""What a penalty says about itself: enough to draw Figure 1 and to see whether S is signal or noise."""

import math
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unbraid.decorrelation.selection import Evaluation, Selection
from unbraid.distributed.ranks import Ranks
from unbraid.distributed.shard import Shard

NO_PAIRS = torch.empty(0, dtype=torch.int64)
NO_CORRELATIONS = torch.empty(0, dtype=torch.float64)


@dataclass(frozen=True)
class DecorrelationStats:
    """One call of a penalty.

    What was not measured, because the method does not look at it or because this call neither selects nor penalises
    and nothing is remembered, is NaN here and None in `scalars`.
    """

    path: str
    """How it was computed: coactive, blocks, neighbours, ...; filling while a window has too few batches or decoder
    rows have not all been looked at; skipped where nothing was due (interval)."""
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
    first: Tensor = field(default=NO_PAIRS, repr=False)
    """[P] the smaller feature of each pair of S, as the path left it; `pairs` and `correlations` are sorted."""
    second: Tensor = field(default=NO_PAIRS, repr=False)
    """[P] the larger feature."""
    found: Tensor = field(default=NO_CORRELATIONS, repr=False)
    """[P] correlations of these pairs."""
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
    above_tau: float | None = None
    """Share of S above its threshold where that is not one number; none where it is `tau`."""
    refreshed: bool = True
    """Whether S was selected on this call."""
    penalised: bool = True
    """Whether this call's penalty is switched on (interval)."""

    @property
    def ids(self) -> Int[Tensor, " P"]:
        """A number for each pair of S, the same for the same pair in any selection."""
        return (self.first << 32) + self.second

    @cached_property
    def _order(self) -> Tensor:
        return torch.sort(self.ids)[1]

    @cached_property
    def pairs(self) -> Int[Tensor, "P 2"]:
        """S as [P, 2], i < j, by ascending i, then j."""
        return torch.stack([self.first, self.second], dim=1)[self._order]

    @cached_property
    def correlations(self) -> Float[Tensor, " P"]:
        """Correlations of `pairs`: on this batch, or of the decoder rows; as selected where nothing is penalised."""
        return self.found[self._order]

    def of(self, shard: Shard) -> "DecorrelationStats":
        """The same with only the pairs whose first feature belongs to the shard."""
        own = (self.first >= shard.start) & (self.first < shard.end)
        return replace(self, first=self.first[own], second=self.second[own], found=self.found[own])

    def from_all(self, ranks: Ranks) -> "DecorrelationStats":
        """The stats of all ranks as one, from each rank's pairs."""
        if ranks.size == 1:
            return self
        first, second, found = (torch.cat(ranks.gather_ragged(part)) for part in (self.first, self.second, self.found))
        pairs, overlap = self.first.numel(), self.overlap or 0.0
        remembered = ranks.any(self.overlap is not None)
        total, low, overlapping = ranks.total(pairs, pairs and pairs * self.low_support, pairs * overlap)
        cut = float(ranks.min(torch.tensor(self.cut if pairs else torch.inf, dtype=torch.float64)))
        whole = replace(self, first=first, second=second, found=found)
        if math.isnan(self.tau):
            return whole
        return replace(
            whole,
            cut=cut if total else 0.0,
            low_support=low / max(total, 1),
            overlap=overlapping / max(total, 1) if remembered else None,
        )

    def overlap_with(self, previous: "DecorrelationStats") -> float:
        """Share of this S that was also in `previous`'s."""
        if self.first.numel() == 0:
            return 0.0
        return float(torch.isin(self.ids, previous.ids).double().mean())

    @property
    def top(self) -> float:
        """Mean correlation over the nominal |S|: a pair that is missing from S counts as 0."""
        if math.isnan(self.tau):
            return math.nan
        return float(self.found.sum(dtype=torch.float64)) / max(1, self.nominal)

    def scalars(self) -> dict[str, float | int | str | None]:
        """The numbers worth a line in a log, ready for JSON; None where nothing was measured."""
        correlations, above = self.found, self.above_tau
        some, known, selected = correlations.numel() > 0, not math.isnan(self.mean), not math.isnan(self.tau)
        if above is None and some:
            above = float((correlations > self.tau).double().mean())
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
            "above_tau": above,
            "n_live": self.n_live if known else None,
            "limit": self.limit if selected else None,
            "co_activations": self.co_activations,
            "low_support": self.low_support,
            "refreshed": int(self.refreshed),
            "penalised": int(self.penalised),
        }
        numbers = {name: None if isinstance(n, float) and math.isnan(n) else n for name, n in numbers.items()}
        return numbers if self.overlap is None else numbers | {"overlap": self.overlap}


def stats_of(
    path: str, selection: Selection, found: Evaluation | None, co_activations: int | None = None
) -> DecorrelationStats:
    """Stats of a selection and, where it was penalised, of what was found."""
    return DecorrelationStats(
        path=path,
        penalty=math.nan if found is None else found.penalty,
        tau=selection.tau,
        mean=selection.mean,
        std=selection.std,
        cut=selection.cut,
        first=selection.first,
        second=selection.second,
        found=(found or selection).correlations,
        n_live=selection.n_live,
        nominal=selection.nominal,
        limit=selection.limit,
        co_activations=co_activations,
        low_support=selection.low_support,
        overlap=selection.overlap,
        refreshed=selection.refreshed,
        penalised=found is not None,
    )
