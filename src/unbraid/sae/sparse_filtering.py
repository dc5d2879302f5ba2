"""Sparse filtering (Ngiam et al. 2011) as the sparsity loss of a ReLU SAE.

A comparator: it asks for codes that are sparse per token *after* every feature has been scaled to equal activity, which
spreads activity over features without naming pairs. Each feature is divided by its L2 norm over the batch, each token
then by its L2 norm over features, and the loss is the mean L1 norm of the result. The original has no decoder; here
reconstruction is learned beside it, as in every SAE.
"""

from typing import Literal

import torch
from torch import Tensor

from unbraid.config import WeightedSAEConfig
from unbraid.kernels.codes import Codes
from unbraid.kernels.dense import SlabGradient, slabs
from unbraid.sae.registry import register
from unbraid.sae.relu import ReLUSAE


class SparseFilteringConfig(WeightedSAEConfig):
    """ReLU with the sparse filtering objective."""

    architecture: Literal["sparse_filtering"] = "sparse_filtering"


@register
class SparseFilteringSAE(ReLUSAE):
    """ReLU SAE with the sparse filtering objective in place of L1."""

    settings = SparseFilteringConfig
    can_be_split = False  # its loss looks at all features of a token at once

    def sparsity(self, codes: Codes) -> Tensor:
        """Mean over tokens of || f~_b / ||f~_b||_2 ||_1, with f~_n = f_n / ||f_n||_2 over the batch."""
        values, rows, features = codes.values, codes.rows(), codes.indices
        norms_N = values.new_zeros(codes.n_features).index_add(0, features, values.square()).sqrt()
        scaled = values / norms_N.index_select(0, features)
        norms_B = values.new_zeros(codes.n_rows).index_add(0, rows, scaled.square()).sqrt()
        return (scaled / norms_B.index_select(0, rows)).sum() / codes.n_rows

    @torch.no_grad()
    def dense_sparsity(self, f_BN: Tensor) -> tuple[Tensor, SlabGradient]:
        """The same for dense codes: with G the gradient in f~, that in f is (G - f~ (f~ . G)) / ||f_n||_2."""
        norms_N = f_BN.new_empty(self.n_features)
        sums_B, squares_B = f_BN.new_zeros(len(f_BN)), f_BN.new_zeros(len(f_BN))
        for _, part in slabs([self.n_features]):
            norms_N[part] = _positive(torch.linalg.vector_norm(f_BN[:, part], dim=0))
            scaled = f_BN[:, part] / norms_N[part]
            sums_B += scaled.sum(1)
            squares_B += scaled.square_().sum(1)
        norms_B1 = _positive(squares_B.sqrt()).unsqueeze(1)
        slopes_B1 = sums_B.unsqueeze(1) / norms_B1**3

        def gradient(f: Tensor, part: slice) -> Tensor:
            scaled = f / norms_N[part]
            g = (1 / norms_B1 - slopes_B1 * scaled) / len(f)
            return g.sub_(scaled * (g * scaled).sum(0)).div_(norms_N[part])

        return (sums_B.unsqueeze(1) / norms_B1).sum() / len(f_BN), gradient


def _positive(norms: Tensor) -> Tensor:
    """Norms with 1 in place of 0, so that what is divided by them stays 0."""
    return norms.where(norms > 0, torch.ones_like(norms))
