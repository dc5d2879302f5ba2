"""Co-activations of sparse codes: every pair of features that fires together, with its dot product over the batch.

On a CPU a compiled loop adds up one feature's dot products with all later ones at a time, twice: `RankedPairs` first
counts how the correlations are spread, and when its owner knows how far down the wanted pairs reach, writes only those
out. So W pairs are never stored, and neither sorted nor listed. Elsewhere, GPUs included, `co_activations` lists,
sorts and sums the pairs, chunk by chunk; cuSPARSE's sparse product is left alone (pytorch issues 95169, 104108).
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from unbraid.kernels.on_cpu import in_parallel
from unbraid.kernels.pattern import Pattern

PAIRS_PER_CHUNK = 1_000_000
PARTS = 32


def followers(pattern: Pattern) -> Tensor:
    """[nnz] how many entries come after each in its row: the pairs it leads."""
    return pattern.offsets[1:][pattern.rows] - 1 - torch.arange(pattern.indices.numel(), device=pattern.indices.device)


def work_edges(pattern: Pattern, later: Tensor, n_parts: int, start: int, end: int) -> list[int]:
    """Features start..end in ranges; all features in `n_parts` would lead about as many co-activations each."""
    work = torch.zeros(pattern.n_features, dtype=torch.int64, device=later.device)
    work = work.index_add_(0, pattern.indices, later).cumsum(0)
    total = int(work[-1]) if work.numel() else 0
    cuts = torch.searchsorted(work, torch.arange(1, n_parts, device=later.device) * total // n_parts, right=True)
    return sorted({start, *(cut for cut in cuts.tolist() if start < cut < end), end})


class RankedPairs:
    """The co-active pairs led by features start..end, by rank: round(C * steps), C = z_i . z_j - shift_i shift_j.

    Attributes:
        histogram: [bins] how many pairs have a rank in 1 + bin * width .. width + bin * width, width = 2**bits.
        total: sum of z_i . z_j over the co-active pairs.
        squares: sum of C^2 - (shift_i shift_j)^2 over them.
    """

    def __init__(
        self,
        pattern: Pattern,
        z: Float[Tensor, " nnz"],
        shift_N: Tensor | None,
        steps: int,
        bits: int,
        start: int,
        end: int,
    ):
        by_feature, later = pattern.by_feature, followers(pattern)
        shift_N = z.new_empty(0) if shift_N is None else shift_N
        row_ends = pattern.offsets[1:][by_feature.rows]
        self.bits = bits
        self.edges = work_edges(pattern, later, PARTS, start, end)
        self.pairs = [by_feature.offsets, by_feature.order, row_ends, pattern.indices, z, shift_N, steps]
        self.by_part = torch.zeros(len(self.edges) - 1, (steps >> bits) + 2, dtype=torch.int64)
        sums = z.new_zeros(len(self.edges) - 1, 2)
        in_parallel("count_pairs", self.edges, *self.pairs, bits, self.by_part, sums)
        self.histogram = self.by_part.sum(0)
        self.total, self.squares = sums.sum(0).tolist()

    def from_rank(self, bar: int) -> tuple[Tensor, Tensor, Tensor]:
        """Features i < j and correlations of the pairs whose rank is at least `bar`, the lowest rank of a bin."""
        counts = self.by_part[:, (bar - 1) >> self.bits :].sum(1)
        pairs = torch.empty(2, int(counts.sum()), dtype=torch.int64)
        found = torch.empty(pairs.shape[1], dtype=torch.float64)
        in_parallel("place_pairs", self.edges, *self.pairs, bar, counts.cumsum(0) - counts, pairs, found)
        return pairs[0], pairs[1], found


@dataclass(frozen=True)
class CoActivations:
    """A chunk of co-active pairs: `dots[p]` = f_i . f_j."""

    dots: Tensor
    first: Tensor
    second: Tensor

    def features(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Features i < j of the pairs at these positions of `dots`."""
        return self.first[positions], self.second[positions]


def co_activations(
    pattern: Pattern, values: Float[Tensor, " nnz"], start: int = 0, end: int | None = None
) -> Iterator[CoActivations]:
    """Every co-active pair led by features start..end, in a fixed order, by ranges of first features.

    Args:
        pattern: where the entries are.
        values: [nnz] what the dots are of.
        start, end: the range of first features; all, unless said otherwise.
    """
    n_features, indices, later = pattern.n_features, pattern.indices, followers(pattern)
    n_chunks = max(1, int(later.sum()) // PAIRS_PER_CHUNK)
    edges = work_edges(pattern, later, n_chunks, start, n_features if end is None else end)
    for low, high in itertools.pairwise(edges):
        leading = ((indices >= low) & (indices < high)).nonzero().squeeze(1)
        run_lengths = later[leading]
        runs = torch.repeat_interleave(torch.arange(leading.numel(), device=indices.device), run_lengths)
        first = leading[runs]
        run_starts = run_lengths.cumsum(0) - run_lengths
        second = first + 1 + torch.arange(first.numel(), device=indices.device) - run_starts[runs]
        keys, order = torch.sort((indices[first] - low) * n_features + indices[second], stable=True)
        if keys.numel() == 0:
            continue
        pairs, counts = torch.unique_consecutive(keys, return_counts=True)
        dots = torch.segment_reduce((values[first] * values[second])[order], "sum", lengths=counts)
        yield CoActivations(dots, pairs // n_features + low, pairs % n_features)
