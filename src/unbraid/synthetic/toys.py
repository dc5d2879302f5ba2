"""Worlds of two features in two orthogonal directions, small enough to know every answer on paper.

In `parent_and_child` a sparse SAE gains by absorption: a latent for "parent without child" and one for both together.
In `correlated_pair` an SAE with one latent gains by hedging: it mixes the second direction into the first by exactly
P(second | first) - P(second | not first), the least-squares slope.
"""

import math

import torch
from torch import Tensor

from unbraid.synthetic.world import World


def parent_and_child(p_parent: float = 0.5, p_child_given_parent: float = 0.3, d_model: int = 2) -> World:
    """Feature 0 fires with `p_parent`, feature 1 only with it; both at strength 1, without bias."""
    probability = torch.tensor([p_parent, p_parent * p_child_given_parent])
    return _toy(
        probability,
        torch.tensor([p_parent, p_child_given_parent]),
        torch.tensor([[1], [-1]]),
        torch.zeros(2, 1),
        d_model,
    )


def correlated_pair(correlation: float = 0.8, d_model: int = 2) -> World:
    """Two features that fire half of the time each, through a Gaussian copula of this correlation.

    P(both fire) = 1/4 + asin(correlation) / 2 pi, so P(second | first) - P(second | not first) is
    2 asin(correlation) / pi.
    """
    half = torch.full((2,), 0.5)
    loadings = torch.tensor([[math.sqrt(abs(correlation))], [math.copysign(math.sqrt(abs(correlation)), correlation)]])
    return _toy(half, half, torch.full((2, 1), -1), loadings, d_model)


def _toy(probability: Tensor, conditional: Tensor, children: Tensor, loadings: Tensor, d_model: int) -> World:
    return World(
        dictionary=torch.eye(2, d_model),
        bias=torch.zeros(d_model),
        probability=probability,
        conditional=conditional,
        children=children,
        loadings=loadings,
        magnitude=torch.ones(2),
        magnitude_sd=torch.zeros(2),
        exclusive=False,
    )
