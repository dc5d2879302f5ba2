"""Cosine and Pearson correlation of features, in a form that needs active entries only.

Both are a dot product of scaled features minus a product of two per-feature numbers, C_ij = z_i . z_j - shift_i shift_j
with z_bi = f_bi / scale. Cosine divides by the norm and has no shift; Pearson divides by the centred norm, and the
shift sqrt(B) mean_i / centred norm stands for the centring of the inactive entries, which are never written down.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from unbraid.decorrelation.entries import Entries
from unbraid.decorrelation.hinge import add_at

Measure = Literal["cosine", "pearson"]
CONSTANT = 1e-12


@dataclass(frozen=True)
class Scaled:
    """Entries scaled so that a correlation is a dot product minus a product of shifts; float64, no gradient."""

    values: Tensor
    """[nnz] z at active entries."""
    inverse_norm: Tensor
    """[N] 1 / (centred) norm, 0 for features that never fire or never vary."""
    shift: Tensor | None
    """[N] for Pearson; none for cosine."""


def scaled(entries: Entries, measure: Measure) -> Scaled:
    """Scale the features of a batch for `measure`."""
    values = entries.values.detach().double()
    n_features, n_rows = entries.n_features, entries.n_rows
    squares = add_at(values.new_zeros(n_features), entries.indices, values * values)
    if measure == "cosine":
        inverse = torch.where(squares > 0, squares, torch.inf).rsqrt()
        return Scaled(values * inverse[entries.indices], inverse, None)
    totals = add_at(values.new_zeros(n_features), entries.indices, values)
    centred = squares - totals * totals / max(n_rows, 1)
    inverse = torch.where(centred > CONSTANT * squares, centred, torch.inf).rsqrt()
    shift = totals * inverse / max(n_rows, 1) ** 0.5
    return Scaled(values * inverse[entries.indices], inverse, shift)


def scaled_columns(f_BN: Float[Tensor, "B N"], measure: Measure) -> tuple[Float[Tensor, "B N"], Float[Tensor, " N"]]:
    """Dense codes as columns whose dot products are correlations, and the 1 / norm (float64) of each."""
    f_BN = f_BN.to(torch.promote_types(f_BN.dtype, torch.float32))
    squares = torch.linalg.vector_norm(f_BN, dim=0, dtype=torch.float64) ** 2
    norms = squares
    if measure == "pearson":
        f_BN = f_BN - f_BN.mean(0, dtype=torch.float64).to(f_BN.dtype)
        norms = torch.linalg.vector_norm(f_BN, dim=0, dtype=torch.float64) ** 2
    inverse = torch.where(norms > CONSTANT * squares, norms, torch.inf).rsqrt()
    return f_BN * inverse.to(f_BN.dtype), inverse
