"""R(tau) over given pairs (Eq. 3): what every path answers with, and the arithmetic that paths share."""

from dataclasses import dataclass

import torch
from torch import Tensor

from unbraid.decorrelation.selection import steps_per_unit


@dataclass(frozen=True)
class Evaluation:
    """A penalty on one batch, with its gradient."""

    penalty: float
    """Unweighted by lambda2 and by the interval."""
    gradient: Tensor
    """d penalty / d(what was penalised): at active entries [nnz], of dense codes [B, N], or of decoder rows [N, D]."""
    correlations: Tensor
    """[P] of the pairs, float64."""


def hinge_weights(correlations: Tensor, tau: float, nominal: int, dtype: torch.dtype) -> Tensor:
    """[P] 1/|S| for pairs above tau by more than the rounding of `dtype`, else 0: dR/dC."""
    above = correlations - tau > 1 / steps_per_unit(dtype)
    return above.to(correlations.dtype) / max(nominal, 1)


def add_at(base: Tensor, places: Tensor, amounts: Tensor) -> Tensor:
    """`base` with `amounts` added at `places`, in the same order every time (index_add is not, on CUDA)."""
    if base.is_cuda:
        return base.index_put_((places,), amounts, accumulate=True)
    return base.index_add_(0, places, amounts)
