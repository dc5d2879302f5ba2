"""Random directions as first weights, the same ones however the features are divided among ranks."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from unbraid.distributed.shard import Shard

ROWS_DRAWN = 1 << 16
"""Rows drawn at a time, so that a rank never holds those of the others."""


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
