"""Co-activations of sparse codes: every pair of features that fires together, with its dot product over the batch.

On a CPU a compiled loop adds up one feature's dot products with all later ones at a time, twice: `count_pairs` counts
how the correlations are spread, and once it is known how far down the wanted pairs reach, `place_pairs` writes only
those out. So W pairs are never stored, and neither sorted nor listed. Elsewhere, GPUs included, `co_activations` lists,
sorts and sums the pairs, chunk by chunk; cuSPARSE's sparse product is left alone (pytorch issues 95169, 104108).
"""

import itertools
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from unbraid.kernels.codes import Codes

PAIRS_PER_CHUNK = 1_000_000
PARTS = 32
BIN_COUNT = 4096
"""Bins from C = 0 to C = 1 in which correlations are counted to find how far down the wanted pairs reach."""


def bin_bits(steps: int) -> int:
    """Ranks in a bin, as a power of two; bin b holds the ranks from 1 + b * width on."""
    return (steps // BIN_COUNT).bit_length() - 1


def bar_for(histogram: Tensor, wanted: int, bits: int) -> int:
    """The lowest rank of the highest bin from which on there are `wanted` pairs, or 1."""
    reached = histogram.flip(0).cumsum(0).flip(0) >= wanted
    return 1 + (max(0, int(reached.sum()) - 1) << bits)


def followers(codes: Codes) -> Tensor:
    """[nnz] how many entries come after each in its row: the pairs it leads."""
    return codes.offsets[1:][codes.rows()] - 1 - torch.arange(codes.indices.numel(), device=codes.indices.device)


def work_edges(codes: Codes, later: Tensor, n_parts: int, start: int, end: int) -> list[int]:
    """Features start..end in ranges; all features in `n_parts` would lead about as many co-activations each."""
    work = torch.zeros(codes.n_features, dtype=torch.int64, device=later.device)
    work = work.index_add_(0, codes.indices, later).cumsum(0)
    total = int(work[-1]) if work.numel() else 0
    cuts = torch.searchsorted(work, torch.arange(1, n_parts, device=later.device) * total // n_parts, right=True)
    return sorted({start, *(cut for cut in cuts.tolist() if start < cut < end), end})


def co_activations(codes: Codes, start: int = 0, end: int | None = None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Every co-active pair led by features start..end, in a fixed order, by ranges of first features.

    Args:
        codes: what the dot products are of.
        start, end: the range of first features; all, unless said otherwise.

    Yields:
        Dot products [pairs] f_i . f_j, and the features i < j, [pairs] each.
    """
    n_features, indices, later = codes.n_features, codes.indices, followers(codes)
    n_chunks = max(1, int(later.sum()) // PAIRS_PER_CHUNK)
    edges = work_edges(codes, later, n_chunks, start, n_features if end is None else end)
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
        products: Float[Tensor, " products"] = (codes.values[first] * codes.values[second])[order]
        dots = torch.segment_reduce(products, "sum", lengths=counts)
        yield dots, pairs // n_features + low, pairs % n_features
