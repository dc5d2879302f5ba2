"""Random directions as first weights, the same ones however the features are divided among ranks."""

from statistics import NormalDist

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from unbraid.distributed.shard import Shard

ROWS_DRAWN = 1 << 16
"""Rows drawn at a time, so that a rank never holds those of the others."""
TRANSCODER_START = 0.1
"""Norm of a transcoder's first encoder rows: what random features predict is noise, so it should be little. On an MLP
of SmolLM2, R^2 after 120,000 tokens is .27 from .1, .26 from .3, .19 from the norm an SAE starts with, and .25 and .16
with rows that start as the decoder's, at .3 and at an SAE's norm."""


def random_unit_rows(shard: Shard, d_in: int, generator: torch.Generator) -> Float[Tensor, "width D"]:
    """Random directions, those of the shard's features among all N; the generator moves on by all N."""
    rows = torch.empty(shard.width, d_in)
    first = 0
    while first < shard.n_features:
        # The last draw takes in what would be left, because torch draws fewer than 16 numbers in another way.
        last = shard.n_features if shard.n_features - first < 2 * ROWS_DRAWN else first + ROWS_DRAWN
        drawn = torch.randn(last - first, d_in, generator=generator)
        start, end = max(first, shard.start), min(last, shard.end)
        if start < end:
            rows[start - shard.start : end - shard.start] = F.normalize(drawn[start - first : end - first], dim=1)
        first = last
    return rows


def closest_norm(share: float, n_features: int, d_in: int) -> float:
    """The multiple c of random unit rows with which c * sum_n f_n w_n comes closest to x.

    With f from unit rows, E<x, x_hat> = s ||x||^2 and E||x_hat||^2 = (s + s^2) ||x||^2 for s = E||f||^2 / ||x||^2,
    so c = 1 / (1 + s). On random rows pre-activations are normal with variance ||x||^2 / D, and a share p of N, the
    largest, is active: E[z^2 | z > t] = 1 + t pdf(t) / p with P(z > t) = p.
    """
    normal = NormalDist()
    cut = normal.inv_cdf(1 - share)
    s = n_features * (share + cut * normal.pdf(cut)) / d_in
    return 1 / (1 + s)
