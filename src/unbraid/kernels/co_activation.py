"""Co-activations of sparse codes: every pair of features that fires together, with its dot product over the batch.

The pairs come in chunks, each pair once (first < second), so nobody ever holds all W of them. On a CPU features are cut
into a few ranges of equally many entries, and a chunk is the CSR product of one range with another: only the upper
triangle is worked out, the working set stays in cache (3x faster than one product of everything at N = 16k), and as
many products run at once as torch has threads. Elsewhere, GPUs included, the pairs are listed, sorted and summed;
cuSPARSE's sparse product is left alone (pytorch issues 95169, 104108).
"""

import itertools
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import scipy.sparse
import torch
from jaxtyping import Float
from torch import Tensor

from unbraid.kernels.pattern import Pattern, starts

PAIRS_PER_CHUNK = 1_000_000


@dataclass(frozen=True)
class CoActivations:
    """A chunk of co-active pairs: `dots[p]` = f_i . f_j; a feature's pairs stand together, as in a CSR matrix."""

    dots: Tensor
    """[p] dot products over the batch."""
    row_offsets: Tensor
    """[r + 1] where the pairs of first feature `first_row + r` start."""
    columns: Tensor
    """[p] second feature, counted from `first_column`; int32 or int64."""
    first_row: int
    first_column: int

    def features(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Features i < j of the pairs at these positions of `dots`."""
        if 16 * positions.numel() < self.dots.numel():
            rows = torch.searchsorted(self.row_offsets, positions, right=True) - 1
        else:
            lengths = self.row_offsets.diff()
            rows = torch.arange(lengths.numel(), device=lengths.device)
            rows = torch.repeat_interleave(rows, lengths, output_size=self.dots.numel())[positions]
        return rows + self.first_row, self.columns[positions].long() + self.first_column


def co_activations(
    pattern: Pattern,
    values: Float[Tensor, " nnz"],
    *,
    by_listing: bool | None = None,
    first_features: tuple[int, int] | None = None,
) -> Iterator[CoActivations]:
    """Every co-active pair of a pattern, chunk by chunk, in a fixed order; the dots are of `values`.

    Args:
        pattern: where the entries are.
        values: [nnz].
        by_listing: list and sort the pairs; none does so where the device has no MKL sparse product.
        first_features: only pairs whose first feature is in start..end; none asks for all.
    """
    start, end = first_features or (0, pattern.n_features)
    if by_listing is None:
        by_listing = values.device.type != "cpu" or not torch.backends.mkl.is_available()
    later = pattern.offsets[1:][pattern.rows] - 1 - torch.arange(values.numel(), device=values.device)
    work = torch.zeros(pattern.n_features, dtype=torch.int64, device=values.device)
    work = work.index_add_(0, pattern.indices, later).cumsum(0)
    if values.numel() == 0 or int(work[-1]) == 0:
        return
    if by_listing:
        yield from _listed(pattern, values, later, work, start, end)
    else:
        yield from _Products(pattern, values, int(work[-1]), start, end).triangle()


class _Products:
    """Rows start..end of the upper triangle of F^T F, from sparse products of one range of features with another."""

    def __init__(self, pattern: Pattern, values: Tensor, work: int, start: int, end: int):
        self.pattern, self.end = pattern, end
        by_feature = pattern.by_feature
        n_ranges = math.ceil(2 * math.sqrt(work / PAIRS_PER_CHUNK))
        cuts = torch.arange(1, n_ranges) * values.numel() // n_ranges
        edges = torch.searchsorted(by_feature.offsets, cuts, right=True) - 1
        self.edges = sorted({start, end, *(edge for edge in edges.tolist() if edge > start), pattern.n_features})
        self.rows, self.values = by_feature.rows.int(), values[by_feature.order]
        self.ranges = [self._features(start, end) for start, end in itertools.pairwise(self.edges)]

    def triangle(self) -> Iterator[CoActivations]:
        """Chunks in a fixed order, as many worked out at once as there are threads; torch rests meanwhile."""
        jobs = itertools.combinations_with_replacement(range(len(self.ranges)), 2)
        jobs = itertools.takewhile(lambda job: self.edges[job[0]] < self.end, jobs)
        n_threads = torch.get_num_threads()
        with ThreadPoolExecutor(n_threads) as threads:
            while some := list(itertools.islice(jobs, n_threads)):
                products = list(threads.map(self._product, some))
                for (row, column), product in zip(some, products, strict=True):
                    yield self._chunk(row, column, product)

    def _features(self, start: int, end: int) -> tuple[Any, Any]:
        """F^T and F of a range of features."""
        offsets = self.pattern.by_feature.offsets[start : end + 1]
        low, high = int(offsets[0]), int(offsets[-1])
        parts = (self.values[low:high].numpy(), self.rows[low:high].numpy(), (offsets - low).int().numpy())
        transposed = scipy.sparse.csr_array(parts, shape=(end - start, self.pattern.n_rows))
        return transposed, transposed.T.tocsr()

    def _product(self, ranges: tuple[int, int]) -> Any:
        """By scipy, not `torch.sparse.mm`: the latter never frees what MKL returns (torch 2.13), tens of MB a call."""
        row, column = ranges
        return self.ranges[row][0] @ self.ranges[column][1]

    def _chunk(self, row: int, column: int, product: Any) -> CoActivations:
        dots, columns = torch.from_numpy(product.data), torch.from_numpy(product.indices)
        offsets = torch.from_numpy(product.indptr).long()
        start, width = self.edges[row], offsets.numel() - 1
        if row == column:
            rows = torch.arange(width, dtype=columns.dtype)
            rows = torch.repeat_interleave(rows, offsets.diff(), output_size=columns.numel())
            upper = (columns > rows).nonzero().squeeze(1)
            dots, columns, offsets = dots[upper], columns[upper], starts(rows[upper], width)
        return CoActivations(dots, offsets, columns, start, self.edges[column])


def _listed(
    pattern: Pattern, values: Tensor, later: Tensor, work: Tensor, lowest: int, highest: int
) -> Iterator[CoActivations]:
    """Pairs by range of first features: list each co-activation, sort by pair, sum the runs."""
    n_features, total, indices = pattern.n_features, int(work[-1]), pattern.indices
    n_chunks = max(1, total // PAIRS_PER_CHUNK)
    targets = torch.arange(1, n_chunks, device=work.device) * total // n_chunks
    cuts = torch.searchsorted(work, targets, right=True).tolist()
    bounds = sorted({lowest, *(cut for cut in cuts if lowest < cut < highest), highest})
    for start, end in itertools.pairwise(bounds):
        leading = ((indices >= start) & (indices < end)).nonzero().squeeze(1)
        followers = later[leading]
        runs = torch.repeat_interleave(torch.arange(leading.numel(), device=indices.device), followers)
        first = leading[runs]
        run_starts = followers.cumsum(0) - followers
        second = first + 1 + torch.arange(first.numel(), device=indices.device) - run_starts[runs]
        keys, order = torch.sort((indices[first] - start) * n_features + indices[second], stable=True)
        if keys.numel() == 0:
            continue
        pairs, counts = torch.unique_consecutive(keys, return_counts=True)
        dots = torch.segment_reduce((values[first] * values[second])[order], "sum", lengths=counts)
        yield CoActivations(dots, starts(pairs // n_features, end - start), pairs % n_features, start, 0)
