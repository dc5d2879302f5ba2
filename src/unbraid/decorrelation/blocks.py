"""Codes too dense for the exact path: exact inside random blocks of features, O(N c B) for blocks of c.

A ReLU SAE starts with half its features on for every token, and nothing exact is sub-quadratic there. A random
partition shows each pair with the same probability, so R inside blocks is an unbiased estimate of R over all pairs,
with mu, sigma and the cut taken from the visible pairs. Two passes over the blocks: one selects, one sends gradients.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from unbraid.decorrelation.entries import Batch, Entries
from unbraid.decorrelation.hinge import Evaluation, add_at, hinge_weights
from unbraid.decorrelation.measure import Measure, scaled_columns
from unbraid.decorrelation.selection import Selection, TopPairs, live_pairs, low_support, moments, nominal_pairs


@dataclass(frozen=True)
class PairsOfABlock:
    """The pairs i < j of a block's features, in the shape `TopPairs` reads chunks in."""

    block: Tensor
    first: Tensor
    second: Tensor

    def features(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Features of the pairs at these positions, the smaller id first."""
        one, other = self.block[self.first[positions]], self.block[self.second[positions]]
        return torch.minimum(one, other), torch.maximum(one, other)


class Blocks:
    """A random partition of the live features of a batch into blocks of at most `size`.

    Args:
        batch: the codes, dense or sparse.
        size: c.
        min_support: features that fire on fewer rows take no part.
        measure: cosine or pearson.
        seed: of the partition.
    """

    def __init__(self, batch: Batch, size: int, min_support: int, measure: Measure, seed: int):
        self.batch = batch
        self.measure: Measure = measure
        support = (batch.f_BN > 0).sum(0) if batch.f_BN is not None else batch.entries.support
        self.support = support
        live = (support >= max(1, min_support)).nonzero().squeeze(1)
        self.n_live = live.numel()
        generator = torch.Generator().manual_seed(seed)
        live = live[torch.randperm(self.n_live, generator=generator).to(live.device)]
        n_blocks = max(1, -(-self.n_live // size))
        self.blocks = [block for block in live.tensor_split(n_blocks) if block.numel()]

    def columns(self, block: Tensor) -> tuple[Tensor, Tensor]:
        """The block's scaled codes [B, c], in float32 or the codes' float64, and 1 / norm [c] (float64)."""
        if self.batch.f_BN is not None:
            f_Bc = self.batch.f_BN.detach()[:, block]
        else:
            f_Bc = columns_of(self.batch.entries, block)
        return scaled_columns(f_Bc, self.measure)

    def select(self, fraction: float, max_pairs_per_feature: int | None) -> Selection:
        """S among the visible pairs: the same fraction of them as is asked of all pairs."""
        visible = sum(live_pairs(block.numel()) for block in self.blocks)
        of_all, limit = nominal_pairs(self.n_live, fraction, max_pairs_per_feature)
        wanted = max(1, round(of_all * visible / live_pairs(self.n_live))) if visible else 0
        source = self.batch.source
        dtype = torch.promote_types(source.dtype, torch.float32)
        top, total, squares = TopPairs(wanted, self.batch.n_features, dtype, source.device), 0.0, 0.0
        for block in self.blocks:
            z_Bc, _ = self.columns(block)
            first, second = torch.triu_indices(block.numel(), block.numel(), 1, device=source.device)
            correlations = (z_Bc.T @ z_Bc)[first, second]
            total += float(correlations.sum(dtype=torch.float64))
            squares += float(torch.linalg.vector_norm(correlations, dtype=torch.float64)) ** 2
            top.add(correlations, PairsOfABlock(block, first, second))
        first, second, correlations = top.result()
        mean, std = moments(total, squares, visible)
        low = low_support(self.support, first, second)
        limit = "co-activation" if first.numel() < wanted else limit
        return Selection(first, second, correlations, wanted, mean, std, self.n_live, limit, low)

    def evaluate(self, selection: Selection, tau: float) -> Evaluation:
        """R and its gradient: [B, N] for dense codes, [nnz] for entries; zero where a feature is off or fires once."""
        batch, source = self.batch, self.batch.source
        first, second, correlations = selection.first, selection.second, selection.correlations.double()
        weights = hinge_weights(correlations, tau, selection.nominal, source.dtype)
        penalty = float(((correlations - tau) * weights).sum())
        place = torch.full((batch.n_features,), -1, device=source.device)
        number = torch.full((batch.n_features,), -1, device=source.device)
        for index, block in enumerate(self.blocks):
            place[block] = torch.arange(block.numel(), device=source.device)
            number[block] = index
        gradient = torch.zeros_like(source)
        for block, pairs in zip(self.blocks, self._pairs_by_block(number[first]), strict=True):
            if pairs.numel() == 0 or not bool((weights[pairs] > 0).any()):
                continue
            z_Bc, inverse = self.columns(block)
            pull_cc = z_Bc.new_zeros(block.numel(), block.numel())
            pull_cc[place[first[pairs]], place[second[pairs]]] = weights[pairs].to(z_Bc.dtype)
            pull_cc = pull_cc + pull_cc.T
            own = z_Bc.new_zeros(block.numel(), dtype=torch.float64)
            own = add_at(own, place[first[pairs]], (weights * correlations)[pairs])
            own = add_at(own, place[second[pairs]], (weights * correlations)[pairs])
            movable = torch.where(self.support[block] > 1, inverse, 0.0).to(z_Bc.dtype)
            gradient_Bc = (z_Bc @ pull_cc - z_Bc * own.to(z_Bc.dtype)) * movable
            if batch.f_BN is not None:
                gradient[:, block] = torch.where(batch.f_BN[:, block] > 0, gradient_Bc, 0.0).to(gradient.dtype)
            else:
                entries, rows, columns = entries_of_block(batch.entries, block)
                gradient[entries] = gradient_Bc[rows, columns].to(gradient.dtype)
        return Evaluation(penalty, gradient, correlations)

    def _pairs_by_block(self, block_numbers: Tensor) -> Iterator[Tensor]:
        order = torch.sort(block_numbers, stable=True)[1]
        counts = torch.bincount(block_numbers, minlength=len(self.blocks)).tolist()
        yield from torch.split(order, counts)


def entries_of_block(entries: Entries, block: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Entries of some features: their ids, rows, and position of their feature in `block`."""
    by_feature, lengths = entries.pattern.by_feature, entries.support[block]
    columns = torch.repeat_interleave(torch.arange(block.numel(), device=block.device), lengths)
    slots = torch.arange(columns.numel(), device=block.device)
    slots = slots + (by_feature.offsets[block] - lengths.cumsum(0) + lengths)[columns]
    return by_feature.order[slots], by_feature.rows[slots], columns


def columns_of(entries: Entries, block: Tensor) -> Tensor:
    """Dense codes [B, c] of some features."""
    ids, rows, columns = entries_of_block(entries, block)
    f_Bc = entries.values.new_zeros(entries.n_rows, block.numel(), requires_grad=False)
    f_Bc[rows, columns] = entries.values.detach()[ids]
    return f_Bc
