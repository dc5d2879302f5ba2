"""The oracle: Eq. 2-4 through the N x N matrix, by autograd, as the paper wrote them.

Nothing here is fast or small; it is what every other path is compared with.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from unbraid.decorrelation.measure import CONSTANT, Measure
from unbraid.decorrelation.selection import Selection, grid, nominal_pairs, steps_per_unit


def correlation_matrix(f_BN: Float[Tensor, "B N"], measure: Measure) -> Float[Tensor, "N N"]:
    """Eq. 2 for every pair; 0 for features that never fire (or, for Pearson, never vary)."""
    squares = (f_BN * f_BN).sum(0)
    if measure == "pearson":
        centred_BN = f_BN - f_BN.mean(0, keepdim=True)
        norms = (centred_BN * centred_BN).sum(0)
        varies = norms > CONSTANT * squares
    else:
        centred_BN, norms = f_BN, squares
        varies = norms > 0
    z_BN = torch.where(varies, centred_BN / torch.where(varies, norms, 1.0).sqrt(), 0.0)
    return z_BN.T @ z_BN


def naive_penalty(
    f_BN: Float[Tensor, "B N"],
    fraction: float,
    measure: Measure = "cosine",
    min_support: int = 1,
    max_pairs_per_feature: int | None = None,
    floor: float | None = None,
) -> tuple[Tensor, float, Selection]:
    """R, tau and S of one batch (Eq. 2-4); differentiable through `f_BN`.

    The gradient autograd gives at inactive entries is not the method's: multiply it by `f_BN > 0`.
    """
    n_features = f_BN.shape[1]
    live = (f_BN > 0).sum(0) >= min_support
    correlations_NN = correlation_matrix(f_BN * live, measure)
    i, j = torch.triu_indices(n_features, n_features, offset=1)
    both = live[i] & live[j]
    i, j = i[both], j[both]
    correlations = correlations_NN[i, j]
    n_live = int(live.sum())
    known = correlations.detach().double()
    mean, std = (float(known.mean()), float(known.std(correction=0))) if n_live > 1 else (0.0, 0.0)
    wanted, limit = nominal_pairs(n_live, fraction, max_pairs_per_feature)
    ranks = grid(correlations.detach())
    order = torch.sort(ranks, descending=True, stable=True)[1][:wanted]
    chosen = torch.sort(order[ranks[order] > 0])[0]
    if chosen.numel() < wanted:
        limit = "co-activation"
    tau = mean + std if floor is None else max(mean + std, floor)
    excess = correlations[chosen] - tau
    penalty = torch.where(excess > 1 / steps_per_unit(f_BN.dtype), excess, 0.0).sum() / max(wanted, 1)
    ids = i[chosen] * n_features + j[chosen]
    return penalty, tau, Selection(ids, known[chosen], wanted, mean, std, n_live, limit)
