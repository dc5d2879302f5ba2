"""Codes of an SAE that is split by features over ranks, brought together on every one of them.

What travels is what fires: of each active entry its feature and its value, and how many there are a row. Every rank
then knows all codes; it looks for pairs whose lower feature is its own, so the slices share out the co-activations and
no pair is looked at twice.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from unbraid.decorrelation.entries import Entries
from unbraid.decorrelation.hinge import Evaluation
from unbraid.distributed.ranks import Ranks
from unbraid.distributed.shard import Shard
from unbraid.kernels.pattern import Pattern


class Gathered(NamedTuple):
    """The codes of all features, without a graph, and which of their entries are this rank's."""

    entries: Entries
    own: Tensor
    """[own entries] positions among all."""


def gathered(entries: Entries, shard: Shard) -> Gathered:
    """All codes [B, N] from each rank's slice [B, n]; slices are contiguous, so rows stay sorted by feature."""
    values = entries.values.detach()
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    counts_B = entries.pattern.offsets.diff()
    message = torch.cat([counts_B.int(), (entries.indices + shard.start).int(), values.view(torch.int32)])
    messages = shard.ranks.gather_ragged(message)
    n_rows, words = entries.n_rows, values.element_size() // 4
    counts_RB = torch.stack([message[:n_rows] for message in messages]).long()
    ends_BR = counts_RB.T.reshape(-1).cumsum(0).view(n_rows, -1)
    all_rows = torch.repeat_interleave(torch.arange(n_rows, device=values.device), counts_RB.sum(0))
    all_indices, all_values = torch.empty_like(all_rows), values.new_empty(all_rows.numel())
    own = all_rows
    for rank, (message, counts_B) in enumerate(zip(messages, counts_RB, strict=True)):
        places = torch.arange(int(counts_B.sum()), device=values.device)
        places += torch.repeat_interleave(ends_BR[:, rank] - counts_B.cumsum(0), counts_B)
        all_indices[places] = message[n_rows : n_rows + places.numel()].long()
        # Copied, because a view as wider numbers must start at a multiple of their size.
        all_values[places] = message[n_rows + places.numel() :][: words * places.numel()].clone().view(values.dtype)
        own = places if rank == shard.ranks.rank else own
    return Gathered(Entries(Pattern.from_rows(all_rows, all_indices, n_rows, shard.n_features), all_values), own)


def completed(found: Evaluation, ranks: Ranks, dtype: torch.dtype) -> Evaluation:
    """R and its gradient at all active entries, from what each rank found for its own pairs."""
    (penalty,) = ranks.total(found.penalty)
    return Evaluation(penalty, ranks.sum(found.gradient.to(dtype)), found.correlations)
