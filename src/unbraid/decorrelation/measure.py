"""Cosine and Pearson correlation of features, in a form that needs active entries only.

Both are a dot product of scaled features minus a product of two per-feature numbers, C_ij = z_i . z_j - shift_i shift_j
with z_bi = f_bi / scale. Cosine divides by the norm and has no shift; Pearson divides by the centred norm, and the
shift sqrt(B) mean_i / centred norm stands for the centring of the inactive entries, which are never written down.
A feature active on every row has none: its entries are centred before anything is multiplied and its shift is zero.
Only such a feature can have a mean above sqrt(B) standard deviations, so no shift exceeds sqrt(B) and the difference
keeps its digits.
"""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from unbraid.decorrelation.selection import add_at
from unbraid.errors import CodesError
from unbraid.kernels.codes import Codes

Measure = Literal["cosine", "pearson"]
CONSTANT = 1e-36
"""Centred sums of squares up to this share of the plain ones are the rounding of a constant."""
LARGE = 1e30
SAFE = 1e15
"""Norms between 1 / this and this are squares in float32's range."""


class Scaled(NamedTuple):
    """Features or decoder rows, scaled so that a correlation is a dot product (minus a product of shifts)."""

    values: Tensor
    """z: at active entries [nnz] in float64, or the unit rows of a decoder [N, D]; no gradient."""
    inverse_norm: Tensor
    """[N] 1 / (centred) norm, float64; 0 for features that never fire or never vary, and for rows of zeros."""
    shift: Tensor | None = None
    """[N] for Pearson; none for cosine."""


def scaled(codes: Codes, measure: Measure) -> Scaled:
    """The features of a batch, at their active entries."""
    values = codes.values.detach().double()
    n_features, n_rows = codes.n_features, codes.n_rows
    squares = add_at(values.new_zeros(n_features), codes.indices, values * values)
    if measure == "cosine":
        inverse = torch.where(squares > 0, squares, torch.inf).rsqrt()
        return Scaled(values * inverse[codes.indices], inverse)
    means = add_at(values.new_zeros(n_features), codes.indices, values) / max(n_rows, 1)
    centred = values - means[codes.indices]
    rest = add_at(torch.zeros_like(means), codes.indices, centred)
    always = codes.support == n_rows
    # The mean of what is left corrects the rounding of the first mean, which may exceed the spread of the feature.
    centred = centred - torch.where(always, rest / max(n_rows, 1), 0.0)[codes.indices]
    norms = add_at(torch.zeros_like(means), codes.indices, centred * centred)
    norms += (n_rows - codes.support) * means * means
    inverse = torch.where(norms > CONSTANT * squares, norms, torch.inf).rsqrt()
    shift = torch.where(always, 0.0, means * inverse * max(n_rows, 1) ** 0.5)
    return Scaled(torch.where(always[codes.indices], centred, values) * inverse[codes.indices], inverse, shift)


def scaled_columns(f_BN: Float[Tensor, "B N"], measure: Measure) -> tuple[Float[Tensor, "B N"], Float[Tensor, " N"]]:
    """Dense codes as columns whose dot products are correlations, and the 1 / norm (float64) of each."""
    dtype = torch.promote_types(f_BN.dtype, torch.float32)
    squares = torch.linalg.vector_norm(f_BN, dim=0, dtype=torch.float64) ** 2
    if measure == "cosine":
        inverse = torch.where(squares > 0, squares, torch.inf).rsqrt()
        if bool((inverse > LARGE).any()):  # It would be infinite in float32.
            return (f_BN.double() * inverse).to(dtype), inverse
        return f_BN.to(dtype) * inverse.to(dtype), inverse
    centred_BN = f_BN.double() - f_BN.mean(0, dtype=torch.float64)
    centred_BN -= centred_BN.mean(0)  # The rounding of the first mean may exceed the spread of a feature.
    norms = torch.linalg.vector_norm(centred_BN, dim=0) ** 2
    inverse = torch.where(norms > CONSTANT * squares, norms, torch.inf).rsqrt()
    return (centred_BN * inverse).to(dtype), inverse


def unit_rows(matrix_ND: Float[Tensor, "N D"]) -> Scaled:
    """Rows over their norms, in float32 (float64 for float64).

    Raises:
        CodesError: a row is not finite.
    """
    dtype = torch.promote_types(matrix_ND.dtype, torch.float32)
    matrix_ND = matrix_ND.detach()
    norms = torch.linalg.vector_norm(matrix_ND, dim=1, dtype=dtype)
    if norms.numel():
        low, high = (float(bound) for bound in torch.aminmax(norms))
        if not 1 / SAFE < low <= high < SAFE:
            return _unit_rows_of_any_size(matrix_ND, dtype)
    inverse = torch.where(norms > 0, norms, torch.inf).reciprocal()
    return Scaled(matrix_ND.to(dtype) * inverse.unsqueeze(1), inverse.double())


def _unit_rows_of_any_size(matrix_ND: Tensor, dtype: torch.dtype) -> Scaled:
    """The same where squares leave the range of the dtype, or a row is zero or not finite."""
    largest = matrix_ND.abs().amax(1).double()
    if not bool(largest.isfinite().all()):
        rows = (~largest.isfinite()).nonzero().squeeze(1)
        raise CodesError(
            f"decoder rows {', '.join(map(str, rows[:5].tolist()))}{', ...' if len(rows) > 5 else ''} hold NaN or "
            "infinity; expected finite numbers; look for the step at which training diverged"
        )
    scale = torch.where(largest > 0, largest, 1.0)
    norms = torch.linalg.vector_norm(matrix_ND.double() / scale.unsqueeze(1), dim=1)
    inverse = torch.where(norms > 0, norms, torch.inf).reciprocal()
    unit_ND = (matrix_ND.double() / scale.unsqueeze(1) * inverse.unsqueeze(1)).to(dtype)
    return Scaled(unit_ND, inverse / scale)
