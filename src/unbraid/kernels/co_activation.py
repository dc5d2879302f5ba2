"""Co-activations of sparse codes: every pair of features that fires together, with its dot product over the batch.

The pairs come in chunks, each pair once (first < second), so nobody ever holds all W of them. On a CPU with MKL a
chunk is a CSR product of a few features with the later ones, which does only the upper triangle and keeps the working
set in cache (2.5x faster than one product at N = 16k). Elsewhere, GPUs included, the pairs are listed, sorted and
summed; cuSPARSE's sparse product is left alone (pytorch issues 95169, 104108).
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

PAIRS_PER_CHUNK = 500_000
MAX_CHUNKS = 64


@dataclass(frozen=True)
class CoActivations:
    """A chunk of co-active pairs: `dots[p]` = f_i . f_j, and which features i < j they are."""

    dots: Tensor
    keys: Tensor | None = None
    row_offsets: Tensor | None = None
    columns: Tensor | None = None
    first_row: int = 0
    first_column: int = 0
    n_features: int = 0

    def pair_ids(self, positions: Tensor) -> Tensor:
        """Pair ids i * N + j of the pairs at these positions of `dots`."""
        if self.keys is not None:
            return self.keys[positions]
        assert self.row_offsets is not None and self.columns is not None
        rows = torch.searchsorted(self.row_offsets, positions, right=True) - 1
        return (rows + self.first_row) * self.n_features + self.columns[positions] + self.first_column


def co_activations(
    offsets: Tensor, indices: Tensor, values: Tensor, n_features: int, *, sort: bool | None = None
) -> Iterator[CoActivations]:
    """Every co-active pair of the rows `indices[offsets[b]:offsets[b + 1]]` (ascending), chunk by chunk.

    Args:
        offsets: [B + 1] row starts.
        indices: [nnz] feature ids.
        values: [nnz], the dots are of these.
        n_features: N.
        sort: list and sort the pairs; none does so where there is no MKL sparse product for the device.
    """
    lengths = offsets[1:] - offsets[:-1]
    rows = torch.repeat_interleave(torch.arange(lengths.numel(), device=offsets.device), lengths)
    if sort is None:
        sort = indices.device.type != "cpu" or not torch.backends.mkl.is_available()
    later = offsets[1:][rows] - 1 - torch.arange(rows.numel(), device=offsets.device)
    work = torch.zeros(n_features, dtype=torch.int64, device=offsets.device).index_add_(0, indices, later)
    for start, end in feature_ranges(work):
        if sort:
            yield listed_pairs(indices, values, rows, later, start, end, n_features)
        else:
            yield from multiplied_pairs(indices, values, rows, lengths.numel(), start, end, n_features)


def feature_ranges(work: Tensor) -> list[tuple[int, int]]:
    """Consecutive ranges of features with about equal numbers of pairs to do in each."""
    total = int(work.sum())
    if total == 0:
        return []
    n_chunks = min(max(1, total // PAIRS_PER_CHUNK), MAX_CHUNKS)
    targets = torch.arange(1, n_chunks, device=work.device) * total // n_chunks
    cuts = torch.searchsorted(work.cumsum(0), targets, right=True).tolist()
    bounds = sorted({0, *cuts, work.numel()})
    return list(zip(bounds[:-1], bounds[1:], strict=True))


def multiplied_pairs(
    indices: Tensor, values: Tensor, rows: Tensor, n_rows: int, start: int, end: int, n_features: int
) -> Iterator[CoActivations]:
    """Pairs whose lower feature lies in start..end, as two sparse products: the triangle inside, the rectangle beyond."""
    inside = ((indices >= start) & (indices < end)).nonzero().squeeze(1)
    order = inside[torch.sort(indices[inside], stable=True)[1]]
    transposed = csr(indices[order] - start, rows[order], values[order], (end - start, n_rows))
    block = csr(rows[inside], indices[inside] - start, values[inside], (n_rows, end - start))
    square = torch.sparse.mm(transposed, block)
    columns, row_offsets = square.col_indices(), square.crow_indices()
    row_ids = torch.repeat_interleave(torch.arange(end - start), row_offsets[1:] - row_offsets[:-1])
    upper = (columns > row_ids).nonzero().squeeze(1)
    row_ids, columns = row_ids[upper] + start, columns[upper] + start
    yield CoActivations(square.values()[upper], keys=row_ids * n_features + columns)
    beyond = (indices >= end).nonzero().squeeze(1)
    if beyond.numel() == 0:
        return
    rest = csr(rows[beyond], indices[beyond] - end, values[beyond], (n_rows, n_features - end))
    product = torch.sparse.mm(transposed, rest)
    yield CoActivations(
        product.values(),
        row_offsets=product.crow_indices(),
        columns=product.col_indices(),
        first_row=start,
        first_column=end,
        n_features=n_features,
    )


def csr(sorted_rows: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    """A sparse CSR matrix of entries already sorted by row."""
    offsets = torch.zeros(shape[0] + 1, dtype=torch.int64)
    torch.cumsum(torch.bincount(sorted_rows, minlength=shape[0]), 0, out=offsets[1:])
    with warnings.catch_warnings():
        # torch announces once a process that its CSR support is in beta; what we use of it is tested against dense.
        warnings.simplefilter("ignore")
        return torch.sparse_csr_tensor(offsets, columns, values, shape, check_invariants=False)


def listed_pairs(
    indices: Tensor, values: Tensor, rows: Tensor, later: Tensor, start: int, end: int, n_features: int
) -> CoActivations:
    """Pairs whose lower feature lies in start..end, by listing each co-activation, sorting by pair and summing runs."""
    leading = ((indices >= start) & (indices < end)).nonzero().squeeze(1)
    first = torch.repeat_interleave(leading, later[leading])
    run_starts = later[leading].cumsum(0) - later[leading]
    run_ids = torch.repeat_interleave(torch.arange(leading.numel(), device=indices.device), later[leading])
    second = first + 1 + torch.arange(first.numel(), device=indices.device) - run_starts[run_ids]
    keys, order = torch.sort(indices[first] * n_features + indices[second], stable=True)
    products = (values[first] * values[second])[order]
    unique_keys, counts = torch.unique_consecutive(keys, return_counts=True)
    if unique_keys.numel() == 0:
        return CoActivations(products, keys=unique_keys)
    return CoActivations(torch.segment_reduce(products, "sum", lengths=counts), keys=unique_keys)
