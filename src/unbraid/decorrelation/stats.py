"""What a penalty says about itself: enough to draw Figure 1 and to see whether S is signal or noise."""

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unbraid.decorrelation.coactive import Evaluation
from unbraid.decorrelation.selection import Selection


@dataclass(frozen=True)
class DecorrelationStats:
    """One call of a penalty. Fields that a method has no use for keep their defaults."""

    path: str
    """How it was computed: coactive, blocks, tiled, naive, decoder, ...; filling while a window has too few batches."""
    penalty: float = 0.0
    """R(tau), unweighted by lambda2 and by the interval."""
    tau: float = 0.0
    """The threshold of Eq. 4 in force."""
    mean: float = 0.0
    """mu: mean correlation over all live pairs at the latest selection."""
    std: float = 0.0
    """sigma: population standard deviation of the same."""
    cut: float = 0.0
    """The lowest correlation that got into S."""
    pairs: Int[Tensor, "P 2"] = field(default_factory=lambda: torch.empty(0, 2, dtype=torch.int64))
    """S, i < j, by ascending pair id."""
    correlations: Float[Tensor, " P"] = field(default_factory=lambda: torch.empty(0, dtype=torch.float64))
    """Correlations of S as penalised: on this batch, or of the decoder rows; as selected where nothing is penalised."""
    n_live: int = 0
    """Features that fired in the window, at least min_support times."""
    nominal: int = 0
    """|S| as defined: the divisor of Eq. 3."""
    limit: str = "fraction"
    """What bounds |S|: fraction, max_pairs_per_feature or co-activation."""
    co_activations: int = 0
    """W of this batch: what the exact path costs."""
    low_support: float = 0.0
    """Share of S in which a feature fired at most 4 times in the window: the share that is mostly noise."""
    overlap: float | None = None
    """Share of S that was in the S before it; none where no earlier S is remembered."""
    refreshed: bool = True
    """Whether S was selected on this call."""
    penalised: bool = True
    """Whether this call's penalty is switched on (interval)."""

    def overlap_with(self, previous: "DecorrelationStats") -> float:
        """Share of this S that was also in `previous`'s."""
        if self.pairs.numel() == 0:
            return 0.0
        base = int(max(self.pairs.max(), previous.pairs.max() if previous.pairs.numel() else 0)) + 1
        ids, earlier = (pairs[:, 0] * base + pairs[:, 1] for pairs in (self.pairs, previous.pairs))
        return float(torch.isin(ids, earlier).double().mean())

    def scalars(self) -> dict[str, float | int | str]:
        """The numbers worth a line in a log, ready for JSON."""
        numbers: dict[str, float | int | str] = {
            "path": self.path,
            "penalty": self.penalty,
            "tau": self.tau,
            "mean": self.mean,
            "std": self.std,
            "cut": self.cut,
            "pairs": self.pairs.shape[0],
            "nominal_pairs": self.nominal,
            "mean_selected": float(self.correlations.mean()) if self.correlations.numel() else 0.0,
            "above_tau": float((self.correlations > self.tau).double().mean()) if self.correlations.numel() else 0.0,
            "n_live": self.n_live,
            "limit": self.limit,
            "co_activations": self.co_activations,
            "low_support": self.low_support,
            "refreshed": int(self.refreshed),
            "penalised": int(self.penalised),
        }
        return numbers if self.overlap is None else numbers | {"overlap": self.overlap}


def stats_of(
    path: str, selection: Selection, tau: float, found: Evaluation | None, n_features: int, **more: Any
) -> DecorrelationStats:
    """Stats of a selection and, where it was penalised, of what was found."""
    ids, width = selection.pair_ids, max(n_features, 1)
    return DecorrelationStats(
        path=path,
        penalty=0.0 if found is None else found.penalty,
        tau=tau,
        mean=selection.mean,
        std=selection.std,
        cut=selection.cut,
        pairs=torch.stack([ids // width, ids % width], dim=1),
        correlations=selection.correlations if found is None else found.correlations,
        n_live=selection.n_live,
        nominal=selection.nominal,
        limit=selection.limit,
        low_support=selection.low_support,
        penalised=found is not None,
        **more,
    )
