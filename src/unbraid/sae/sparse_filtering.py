"""Sparse filtering (Ngiam et al. 2011) as the sparsity loss of a ReLU SAE.

A comparator: it asks for codes that are sparse per token *after* every feature has been scaled to equal activity, which
spreads activity over features without naming pairs. Each feature is divided by its L2 norm over the batch, each token
then by its L2 norm over features, and the loss is the mean L1 norm of the result. The original has no decoder; here
reconstruction is learned beside it, as in every SAE.
"""

import torch
from torch import Tensor

from unbraid.sae.codes import Codes
from unbraid.sae.relu import ReLUSAE


class SparseFilteringSAE(ReLUSAE):
    """ReLU SAE with the sparse filtering objective in place of L1."""

    architecture = "sparse_filtering"

    def sparsity(self, codes: Codes | Tensor) -> Tensor:
        """Mean over tokens of || f~_b / ||f~_b||_2 ||_1, with f~_n = f_n / ||f_n||_2 over the batch."""
        if isinstance(codes, Codes):
            values, rows, features = codes.values, codes.rows(), codes.indices
            norms_N = values.new_zeros(codes.n_features).index_add(0, features, values.square()).sqrt()
            scaled = values / norms_N.index_select(0, features)
            norms_B = values.new_zeros(codes.n_rows).index_add(0, rows, scaled.square()).sqrt()
            return (scaled / norms_B.index_select(0, rows)).sum() / codes.n_rows
        scaled_BN = codes / _norm(codes, 0)
        return (scaled_BN.sum(1, keepdim=True) / _norm(scaled_BN, 1)).sum() / len(codes)


def _norm(matrix: Tensor, dim: int) -> Tensor:
    """L2 norm along `dim`, 1 where all entries are zero, so that both value and gradient are zero there."""
    squares = matrix.square().sum(dim, keepdim=True)
    return torch.where(squares > 0, squares, torch.ones_like(squares)).sqrt()
