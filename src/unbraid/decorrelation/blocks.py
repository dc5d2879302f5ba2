"""Codes too dense for the exact path: exact inside random blocks of features, O(N c B) for blocks of c.

A ReLU SAE starts with half its features on for every token, and nothing exact is sub-quadratic there. A random
partition shows each pair with the same probability, so R inside blocks is an unbiased estimate of R over all pairs,
with mu, sigma and the cut taken from the visible pairs. Two passes over the blocks: one selects, one sends gradients.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from unbraid.decorrelation.selection import (
    CONSTANT,
    Evaluation,
    Measure,
    Selection,
    TopPairs,
    add_at,
    hinge_weights,
    live_pairs,
    low_support,
    moments,
    nominal_pairs,
)
from unbraid.kernels.codes import Codes

LARGE = 1e30
"""Numbers up to this and their products with codes are in float32's range."""


class Blocks:
    """A random partition of the live features of a batch into blocks of at most `size`.

    Args:
        codes: of the batch, sparse or a dense [B, N] tensor.
        size: c.
        min_support: features that fire on fewer rows take no part.
        measure: cosine or pearson.
        seed: of the partition.
    """

    def __init__(self, codes: Codes | Tensor, size: int, min_support: int, measure: Measure, seed: int):
        self.codes = codes
        self.source = codes.values if isinstance(codes, Codes) else codes
        self.measure: Measure = measure
        self.support = codes.support if isinstance(codes, Codes) else (codes > 0).sum(0)
        live = (self.support >= max(1, min_support)).nonzero().squeeze(1)
        self.n_live = live.numel()
        generator = torch.Generator().manual_seed(seed)
        live = live[torch.randperm(self.n_live, generator=generator).to(live.device)]
        n_blocks = max(1, -(-self.n_live // size))
        self.blocks = [block for block in live.tensor_split(n_blocks) if block.numel()]

    def columns(self, block: Tensor) -> tuple[Tensor, Tensor]:
        """The block's scaled codes [B, c], in float32 or the codes' float64, and 1 / norm [c] (float64)."""
        codes = self.codes.detach()
        return scaled_columns(columns_of(codes, block) if isinstance(codes, Codes) else codes[:, block], self.measure)

    def select(self, fraction: float, max_pairs_per_feature: int | None) -> Selection:
        """S among the visible pairs: the same fraction of them as is asked of all pairs."""
        visible = sum(live_pairs(block.numel()) for block in self.blocks)
        of_all, limit = nominal_pairs(self.n_live, fraction, max_pairs_per_feature)
        wanted = max(1, round(of_all * visible / live_pairs(self.n_live))) if visible else 0
        device = self.source.device
        dtype = torch.promote_types(self.source.dtype, torch.float32)
        top, total, squares = TopPairs(wanted, len(self.support), dtype, device), 0.0, 0.0
        for block in self.blocks:
            z_Bc, _ = self.columns(block)
            first, second = torch.triu_indices(block.numel(), block.numel(), 1, device=device)
            correlations = (z_Bc.T @ z_Bc)[first, second]
            total += float(correlations.sum(dtype=torch.float64))
            squares += float(torch.linalg.vector_norm(correlations, dtype=torch.float64)) ** 2
            top.add(correlations, lambda at, of=block, i=first, j=second: in_order(of[i[at]], of[j[at]]))
        first, second, correlations = top.result()
        mean, std = moments(total, squares, visible)
        low = low_support(self.support, first, second)
        limit = "co-activation" if first.numel() < wanted else limit
        return Selection(first, second, correlations, wanted, mean, std, self.n_live, limit, low)

    def evaluate(self, selection: Selection) -> Evaluation:
        """R and its gradient: [B, N] for dense codes, [nnz] for entries; zero where a feature is off or fires once."""
        codes, source = self.codes, self.source
        first, second, correlations = selection.first, selection.second, selection.correlations.double()
        weights = hinge_weights(correlations, selection, source.dtype)
        penalty = float(((correlations - selection.tau) * weights).sum())
        place = torch.full_like(self.support, -1)
        number = torch.full_like(self.support, -1)
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
            movable = torch.where(self.support[block] > 1, inverse, 0.0)
            movable = movable if bool((movable > LARGE).any()) else movable.to(z_Bc.dtype)
            gradient_Bc = (z_Bc @ pull_cc - z_Bc * own.to(z_Bc.dtype)) * movable
            if isinstance(codes, Tensor):
                gradient[:, block] = torch.where(codes[:, block] > 0, gradient_Bc, 0.0).to(gradient.dtype)
            else:
                entries, rows, columns = entries_of_block(codes, block)
                gradient[entries] = gradient_Bc[rows, columns].to(gradient.dtype)
        return Evaluation(penalty, gradient, correlations)

    def _pairs_by_block(self, block_numbers: Tensor) -> Iterator[Tensor]:
        order = torch.sort(block_numbers, stable=True)[1]
        counts = torch.bincount(block_numbers, minlength=len(self.blocks)).tolist()
        yield from torch.split(order, counts)


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


def in_order(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Features of pairs, the smaller id first."""
    return torch.minimum(one, other), torch.maximum(one, other)


def entries_of_block(codes: Codes, block: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Entries of some features: their ids, rows, and position of their feature in `block`."""
    lengths = codes.support[block]
    columns = torch.repeat_interleave(torch.arange(block.numel(), device=block.device), lengths)
    slots = torch.arange(columns.numel(), device=block.device)
    slots = slots + (codes.feature_offsets[block] - lengths.cumsum(0) + lengths)[columns]
    return codes.order[slots], codes.rows_by_feature[slots], columns


def columns_of(codes: Codes, block: Tensor) -> Tensor:
    """Dense codes [B, c] of some features."""
    ids, rows, columns = entries_of_block(codes, block)
    f_Bc = codes.values.new_zeros(codes.n_rows, block.numel(), requires_grad=False)
    f_Bc[rows, columns] = codes.values.detach()[ids]
    return f_Bc
