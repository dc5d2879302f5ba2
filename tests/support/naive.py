"""The oracle: Eq. 2-4 through the N x N matrix, by autograd, as the paper wrote them.

Nothing here is fast or small; it is what every other path is compared with.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unbraid.decorrelation.selection import (
    CONSTANT,
    Measure,
    Selection,
    grid,
    low_support,
    nominal_pairs,
    steps_per_unit,
)
from unbraid.kernels.codes import Codes


def correlation_matrix(f_BN: Float[Tensor, "B N"], measure: Measure) -> Float[Tensor, "N N"]:
    """Eq. 2 for every pair, in float64; 0 for features that never fire (or, for Pearson, never vary)."""
    f_BN = f_BN.double()
    squares = (f_BN * f_BN).sum(0)
    if measure == "pearson":
        centred_BN = f_BN - f_BN.mean(0, keepdim=True)
        centred_BN = centred_BN - centred_BN.mean(0, keepdim=True)
        norms = (centred_BN * centred_BN).sum(0)
        varies = norms > CONSTANT * squares
    else:
        centred_BN, norms = f_BN, squares
        varies = norms > 0
    z_BN = torch.where(varies, centred_BN / torch.where(varies, norms, 1.0).sqrt(), 0.0)
    return z_BN.T @ z_BN


def penalty(
    f_BN: Float[Tensor, "B N"],
    first: Int[Tensor, " P"],
    second: Int[Tensor, " P"],
    nominal: int,
    tau: float,
    measure: Measure,
) -> tuple[Tensor, Tensor]:
    """R(tau) of Eq. 3 over given pairs, differentiable through `f_BN`, and their correlations.

    The gradient autograd gives at inactive entries is not the method's: multiply it by `f_BN > 0`.
    """
    correlations = correlation_matrix(f_BN, measure)[first, second]
    excess = correlations - tau
    above = excess > 1 / steps_per_unit(f_BN.dtype)
    return torch.where(above, excess, 0.0).sum() / max(nominal, 1), correlations


def select(codes: Codes, fraction: float, measure: Measure, max_pairs_per_feature: int | None = None) -> Selection:
    """S, mu and sigma from the whole matrix."""
    f_BN = codes.detach().to_dense()
    n_features = f_BN.shape[1]
    live = (f_BN > 0).any(0)
    first, second = torch.triu_indices(n_features, n_features, offset=1, device=f_BN.device)
    both = live[first] & live[second]
    first, second = first[both], second[both]
    known = correlation_matrix(f_BN, measure)[first, second]
    n_live = int(live.sum())
    mean, std = (float(known.double().mean()), float(known.double().std(correction=0))) if n_live > 1 else (0.0, 0.0)
    wanted, limit = nominal_pairs(n_live, fraction, max_pairs_per_feature)
    ranks = grid(known, steps_per_unit(torch.promote_types(f_BN.dtype, torch.float32)))
    order = torch.sort(ranks, descending=True, stable=True)[1][:wanted]
    chosen = torch.sort(order[ranks[order] > 0])[0]
    limit = "co-activation" if chosen.numel() < wanted else limit
    first, second = first[chosen], second[chosen]
    low = low_support(codes.support, first, second)
    return Selection(first, second, known[chosen], wanted, mean, std, n_live, limit, low)
