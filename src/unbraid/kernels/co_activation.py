"""Co-activations of sparse codes: every pair of features that fires together, with its dot product over the batch.

The pairs come in chunks, each pair once (first < second), so nobody ever holds all W of them. On a CPU a
chunk is a CSR product of a range of features with a later one: halving the features again and again does only the
upper triangle, keeps the working set in cache, and is 3x faster than one product of everything at N = 16k. Elsewhere,
GPUs included, the pairs are listed, sorted and summed; cuSPARSE's sparse product is left alone (pytorch issues 95169,
104108).
"""

import itertools
from collections.abc import Iterator
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
    """[p] second feature, counted from `first_column`."""
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
        return rows + self.first_row, self.columns[positions] + self.first_column


def co_activations(
    pattern: Pattern, values: Float[Tensor, " nnz"], *, by_listing: bool | None = None
) -> Iterator[CoActivations]:
    """Every co-active pair of a pattern, chunk by chunk, in a fixed order; the dots are of `values`.

    Args:
        pattern: where the entries are.
        values: [nnz].
        by_listing: list and sort the pairs; none does so where the device has no MKL sparse product.
    """
    if by_listing is None:
        by_listing = values.device.type != "cpu" or not torch.backends.mkl.is_available()
    later = pattern.offsets[1:][pattern.rows] - 1 - torch.arange(values.numel(), device=values.device)
    work = torch.zeros(pattern.n_features, dtype=torch.int64, device=values.device)
    work = work.index_add_(0, pattern.indices, later).cumsum(0)
    if values.numel() == 0 or int(work[-1]) == 0:
        return
    if by_listing:
        yield from _listed(pattern, values, later, work)
    else:
        yield from _Halving(pattern, values, int(work[-1])).triangle()


class _Halving:
    """The upper triangle of F^T F as products of ranges of features, by halving."""

    def __init__(self, pattern: Pattern, values: Tensor, work: int):
        self.pattern, self.values = pattern, values
        self.values_by_feature = values[pattern.by_feature.order]
        self.leaf = max(2, -(-pattern.n_features // max(1, work // PAIRS_PER_CHUNK)))

    def triangle(self) -> Iterator[CoActivations]:
        yield from self._within(0, self.pattern.n_features, torch.arange(self.values.numel()))

    def _within(self, start: int, end: int, entries: Tensor) -> Iterator[CoActivations]:
        """Pairs inside start..end; `entries` are those of these features, row by row."""
        if end - start < 2 or entries.numel() < 2:
            return
        if end - start <= self.leaf:
            yield self._square(start, end, entries)
            return
        middle = (start + end) // 2
        upper = self.pattern.indices[entries] >= middle
        lower_entries, upper_entries = entries[~upper], entries[upper]
        if lower_entries.numel() and upper_entries.numel():
            dots, offsets, columns = _product(
                self._transposed(start, middle), self._columns(middle, end, upper_entries)
            )
            yield CoActivations(dots, offsets, columns, start, middle)
        yield from self._within(start, middle, lower_entries)
        yield from self._within(middle, end, upper_entries)

    def _square(self, start: int, end: int, entries: Tensor) -> CoActivations:
        dots, offsets, columns = _product(self._transposed(start, end), self._columns(start, end, entries))
        rows = torch.repeat_interleave(torch.arange(end - start), offsets.diff(), output_size=columns.numel())
        upper = (columns > rows).nonzero().squeeze(1)
        return CoActivations(dots[upper], starts(rows[upper], end - start), columns[upper], start, start)

    def _transposed(self, start: int, end: int) -> scipy.sparse.csr_array:
        by_feature = self.pattern.by_feature
        offsets = by_feature.offsets[start : end + 1]
        low, high = int(offsets[0]), int(offsets[-1])
        shape = (end - start, self.pattern.n_rows)
        return _csr(offsets - low, by_feature.rows[low:high], self.values_by_feature[low:high], shape)

    def _columns(self, start: int, end: int, entries: Tensor) -> scipy.sparse.csr_array:
        offsets = starts(self.pattern.rows[entries], self.pattern.n_rows)
        shape = (self.pattern.n_rows, end - start)
        return _csr(offsets, self.pattern.indices[entries] - start, self.values[entries], shape)


def _csr(offsets: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> scipy.sparse.csr_array:
    return scipy.sparse.csr_array((values.numpy(), columns.numpy(), offsets.numpy()), shape=shape)


def _product(left: scipy.sparse.csr_array, right: scipy.sparse.csr_array) -> tuple[Tensor, Tensor, Tensor]:
    """(values, row offsets, column indices) of a sparse product.

    By scipy, not `torch.sparse.mm`: on a CPU the latter never frees what MKL returns (torch 2.13), tens of MB a call.
    """
    product: Any = left @ right
    return (
        torch.from_numpy(product.data),
        torch.from_numpy(product.indptr).long(),
        torch.from_numpy(product.indices).long(),
    )


def _listed(pattern: Pattern, values: Tensor, later: Tensor, work: Tensor) -> Iterator[CoActivations]:
    """Pairs by range of first features: list each co-activation, sort by pair, sum the runs."""
    n_features, total, indices = pattern.n_features, int(work[-1]), pattern.indices
    n_chunks = max(1, total // PAIRS_PER_CHUNK)
    targets = torch.arange(1, n_chunks, device=work.device) * total // n_chunks
    bounds = sorted({0, *torch.searchsorted(work, targets, right=True).tolist(), n_features})
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
