"""Decoder space: the overlap of decoder rows instead of the correlation of codes, and the tiled exact search.

Rows of any matrix [N, D] are compared by cosine; a decoder is one, and so are dense codes laid out feature by feature.
mu and sigma over all N(N-1)/2 pairs come from the D x D Gram matrix, the penalty from the pairs of S alone, and the
exact top pairs from tiles of the N x N matrix that are looked at once and thrown away.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unbraid.decorrelation.hinge import Evaluation, add_at, hinge_weights
from unbraid.decorrelation.selection import Selection, TopPairs, live_pairs, moments, nominal_pairs
from unbraid.errors import CodesError
from unbraid.kernels.pattern import starts
from unbraid.kernels.products import segment_sums

TILE = 1024


@dataclass(frozen=True)
class PairsOfATile:
    """All pairs (row, column) of a tile, in the shape `TopPairs` reads chunks in."""

    first_row: int
    first_column: int
    n_columns: int

    def features(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Rows i < j of the pairs at these positions."""
        return positions // self.n_columns + self.first_row, positions % self.n_columns + self.first_column


@dataclass(frozen=True)
class UnitRows:
    """Rows scaled to unit norm, and what they were multiplied by (0 for a row of zeros)."""

    unit_ND: Tensor
    inverse_norm: Tensor


def require_decoder(decoder: Tensor | None, n_features: int | None) -> Tensor:
    """The decoder, if it is one.

    Raises:
        CodesError: it is missing, not a floating-point matrix, or has another number of rows than the codes have.
    """
    if decoder is None:
        raise CodesError("this penalty compares decoder rows, but no decoder was passed; pass decoder=W_dec [N, D]")
    if decoder.ndim != 2 or not decoder.is_floating_point():
        raise CodesError(
            f"decoder is {decoder.dtype} of shape {tuple(decoder.shape)}; expected floating point [N, D], "
            "a row a feature; pass W_dec"
        )
    if n_features is not None and decoder.shape[0] != n_features:
        raise CodesError(
            f"decoder has {decoder.shape[0]} rows, but the codes have {n_features} features; expected [N, D]; pass "
            "W_dec, transposed if your SAE stores it as [D, N]"
        )
    return decoder


def unit_rows(matrix_ND: Float[Tensor, "N D"]) -> UnitRows:
    """Rows over their norms, in float32 (float64 for float64)."""
    dtype = torch.promote_types(matrix_ND.dtype, torch.float32)
    matrix_ND = matrix_ND.detach()
    norms = torch.linalg.vector_norm(matrix_ND, dim=1, dtype=dtype)
    inverse = torch.where(norms > 0, norms, torch.inf).reciprocal()
    return UnitRows(matrix_ND.to(dtype) * inverse.unsqueeze(1), inverse.double())


def row_moments(unit_ND: Float[Tensor, "N D"]) -> tuple[float, float]:
    """mu and sigma of the cosines of all pairs of rows, O(N D^2): sum C = |sum d|^2 - N, sum C^2 = |D^T D|^2 - N."""
    own = float(torch.linalg.vector_norm(unit_ND, dtype=torch.float64)) ** 2
    own_squares = float((torch.linalg.vector_norm(unit_ND, dim=1, dtype=torch.float64) ** 4).sum())
    total = float((unit_ND.sum(0, dtype=torch.float64) ** 2).sum())
    gram = unit_ND.T @ unit_ND if unit_ND.shape[0] > unit_ND.shape[1] else unit_ND @ unit_ND.T
    squares = float(torch.linalg.vector_norm(gram, dtype=torch.float64)) ** 2
    return moments((total - own) / 2, (squares - own_squares) / 2, live_pairs(unit_ND.shape[0]))


def select_exactly(
    unit_ND: Float[Tensor, "N D"], fraction: float, max_pairs_per_feature: int | None = None
) -> Selection:
    """The true top pairs of rows by cosine: O(N^2 D) time, one tile of memory."""
    n_rows = unit_ND.shape[0]
    wanted, limit = nominal_pairs(n_rows, fraction, max_pairs_per_feature)
    top = TopPairs(wanted, n_rows, unit_ND.dtype, unit_ND.device)
    total = squares = 0.0
    for start in range(0, n_rows, TILE):
        for other in range(start, n_rows, TILE):
            tile = unit_ND[start : start + TILE] @ unit_ND[other : other + TILE].T
            if other == start:
                tile.masked_fill_(torch.ones_like(tile, dtype=torch.bool).tril_(), 0.0)
            total += float(tile.sum(dtype=torch.float64))
            squares += float(torch.linalg.vector_norm(tile, dtype=torch.float64)) ** 2
            top.add(tile.reshape(-1), PairsOfATile(start, other, tile.shape[1]))
    first, second, cosines = top.result()
    mean, std = moments(total, squares, live_pairs(n_rows))
    limit = "co-activation" if first.numel() < wanted else limit
    return Selection(first, second, cosines, wanted, mean, std, n_rows, limit)


def pair_cosines(
    unit_ND: Float[Tensor, "N D"], first: Int[Tensor, " P"], second: Int[Tensor, " P"]
) -> Float[Tensor, " P"]:
    """Cosines of given pairs of rows."""
    if unit_ND.is_cuda:
        parts = zip(first.split(65536), second.split(65536), strict=True)
        return torch.cat([unit_ND.new_empty(0), *((unit_ND[i] * unit_ND[j]).sum(1) for i, j in parts)])
    n_rows = unit_ND.shape[0]
    first, order = torch.sort(first, stable=True)
    places = torch.sparse_csr_tensor(
        starts(first, n_rows), second[order], unit_ND.new_zeros(order.numel()), (n_rows, n_rows), check_invariants=False
    )
    cosines = torch.sparse.sampled_addmm(places, unit_ND, unit_ND.T, beta=0.0).values()
    return torch.empty_like(cosines).index_copy_(0, order, cosines)


def evaluate_rows(
    rows: UnitRows,
    first: Int[Tensor, " P"],
    second: Int[Tensor, " P"],
    nominal: int,
    tau: float,
    share: Float[Tensor, " P"] | None = None,
) -> Evaluation:
    """R(tau) over given pairs of rows, and its gradient [N, D] with respect to the rows before scaling.

    Args:
        rows: all rows.
        first: one row of each pair.
        second: the other.
        nominal: |S|, the divisor.
        tau: the threshold.
        share: how much of a pair's push goes to its first row, the rest to the second; halves where not given, which
            is the gradient of R. Any other share pushes a pair as hard, by other rows.
    """
    unit_ND = rows.unit_ND
    n_rows = unit_ND.shape[0]
    cosines = pair_cosines(unit_ND, first, second).double()
    weights = hinge_weights(cosines, tau, nominal, unit_ND.dtype)
    penalty = float(((cosines - tau) * weights).sum())
    above = (weights > 0).nonzero().squeeze(1)
    first, second = first[above], second[above]
    on_first = on_second = weights[above]
    if share is not None:
        on_first, on_second = 2 * share[above] * on_first, 2 * (1 - share[above]) * on_second
    own = add_at(torch.zeros_like(rows.inverse_norm), first, on_first * cosines[above])
    own = add_at(own, second, on_second * cosines[above])
    ends, order = torch.sort(torch.cat([first, second]), stable=True)
    partners = torch.cat([second, first])[order]
    pulls = torch.cat([on_first, on_second])[order].to(unit_ND.dtype)
    if partners.numel() == 0:
        return Evaluation(penalty, torch.zeros_like(unit_ND), cosines)
    gradient = segment_sums(starts(ends, n_rows), partners, pulls, unit_ND)
    gradient = gradient.addcmul_(unit_ND, own.to(unit_ND.dtype).unsqueeze(1), value=-1)
    return Evaluation(penalty, gradient.mul_(rows.inverse_norm.to(unit_ND.dtype).unsqueeze(1)), cosines)
