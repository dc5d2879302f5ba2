"""Cosine and Pearson correlation of features, in a form that needs active entries only.

Both are a dot product of scaled features minus a product of two per-feature numbers, C_ij = z_i . z_j - shift_i shift_j
with z_bi = f_bi / scale. Cosine divides by the norm and has no shift; Pearson divides by the centred norm, and the
shift sqrt(B) mean_i / centred norm stands for the centring of the inactive entries, which are never written down.
A feature active on every row has none: its entries are centred before anything is multiplied and its shift is zero.
Only such a feature can have a mean above sqrt(B) standard deviations, so no shift exceeds sqrt(B) and the difference
keeps its digits.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from unbraid.decorrelation.entries import Entries
from unbraid.decorrelation.hinge import add_at

Measure = Literal["cosine", "pearson"]
CONSTANT = 1e-36
"""Centred sums of squares up to this share of the plain ones are the rounding of a constant."""


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
    means = add_at(values.new_zeros(n_features), entries.indices, values) / max(n_rows, 1)
    centred = values - means[entries.indices]
    rest = add_at(torch.zeros_like(means), entries.indices, centred)
    always = entries.support == n_rows
    # The mean of what is left corrects the rounding of the first mean, which may exceed the spread of the feature.
    centred = centred - torch.where(always, rest / max(n_rows, 1), 0.0)[entries.indices]
    norms = add_at(torch.zeros_like(means), entries.indices, centred * centred)
    norms += (n_rows - entries.support) * means * means
    inverse = torch.where(norms > CONSTANT * squares, norms, torch.inf).rsqrt()
    shift = torch.where(always, 0.0, means * inverse * max(n_rows, 1) ** 0.5)
    return Scaled(torch.where(always[entries.indices], centred, values) * inverse[entries.indices], inverse, shift)


def scaled_columns(f_BN: Float[Tensor, "B N"], measure: Measure) -> tuple[Float[Tensor, "B N"], Float[Tensor, " N"]]:
    """Dense codes as columns whose dot products are correlations, and the 1 / norm (float64) of each."""
    dtype = torch.promote_types(f_BN.dtype, torch.float32)
    squares = torch.linalg.vector_norm(f_BN, dim=0, dtype=torch.float64) ** 2
    if measure == "cosine":
        inverse = torch.where(squares > 0, squares, torch.inf).rsqrt()
        return f_BN.to(dtype) * inverse.to(dtype), inverse
    centred_BN = f_BN.double() - f_BN.mean(0, dtype=torch.float64)
    centred_BN -= centred_BN.mean(0)  # The rounding of the first mean may exceed the spread of a feature.
    norms = torch.linalg.vector_norm(centred_BN, dim=0) ** 2
    inverse = torch.where(norms > CONSTANT * squares, norms, torch.inf).rsqrt()
    return (centred_BN * inverse).to(dtype), inverse
