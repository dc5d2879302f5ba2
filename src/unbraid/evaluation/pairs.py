"""Exact correlation statistics over all feature pairs of held-out codes, one tile of features at a time.

Training selects pairs from small batches and must be fast; judging what it achieved must be exact, on many more tokens,
and must not share code with what it judges. Codes are kept sparse (8 to 12 bytes per firing) and the N x N matrix is
walked in tiles of its upper triangle, so memory grows with the firings and with N, never with N^2. Only co-active pairs
are enumerated: all others have cosine zero, and a Pearson correlation that follows from their means alone.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import scipy.sparse as sparse
import torch
from torch import Tensor

from unbraid.errors import CodesError, EvaluationError

Csr = Any  # scipy.sparse.csr_array, whose annotations say less than nothing to a type checker
Measure = Literal["cosine", "pearson"]
TILE_ENTRIES = 1 << 24
ENTANGLED = 0.5
DENSE_TILE_SPEEDUP = (
    40  # a dense multiply-add costs about this many times less than a co-activation of a sparse product
)


@dataclass(frozen=True)
class PairStatistics:
    """What all live pairs of a set of codes look like.

    Pairs that are not co-active count in `mean` and `std`. `above` counts the pairs correlated by more than 0.5.
    `values` holds the largest correlations, descending and above zero, and `pairs` [., 2] their feature ids, i < j.
    """

    mean: float
    std: float
    n_live: int
    n_pairs: int
    above: int
    values: np.ndarray
    pairs: np.ndarray

    def top_mean(self, count: int) -> float:
        """Mean of the `count` largest correlations, pairs at or below zero counting as zero."""
        return float(self.values[:count].sum() / max(1, count))

    def quantile(self, q: float) -> float:
        """The q-quantile over all live pairs (inverse of the empirical distribution), zero where it is not positive."""
        rank = self.n_pairs - max(1, int(np.ceil(q * self.n_pairs)))
        return float(self.values[rank]) if 0 <= rank < len(self.values) else 0.0


def stack_codes(chunks: Iterable[Any], n_features: int) -> Csr:
    """Codes of many chunks as one sparse [T, N] matrix in float64.

    Args:
        chunks: dense tensors [B, N], or objects with `.offsets [B+1]`, `.indices` and `.values` (CSR).
        n_features: N.

    Raises:
        CodesError: a chunk has another width, or holds a negative or non-finite number.
        EvaluationError: there is no token at all.
    """
    indptr, indices, values = [np.zeros(1, dtype=np.int64)], [], []
    for chunk in chunks:
        lengths, columns, numbers = _rows_of(chunk, n_features)
        indptr.append(indptr[-1][-1] + np.cumsum(lengths))
        indices.append(columns)
        values.append(numbers)
    offsets = np.concatenate(indptr)
    if len(offsets) == 1:
        raise EvaluationError("no codes were given; expected at least one token; raise the number of held-out tokens")
    matrix = (np.concatenate(values), np.concatenate(indices), offsets)
    return sparse.csr_array(matrix, shape=(len(offsets) - 1, n_features))


def _rows_of(chunk: Any, n_features: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    if isinstance(chunk, Tensor):
        if chunk.ndim != 2 or chunk.shape[1] != n_features:
            raise CodesError(f"codes have shape {tuple(chunk.shape)}; expected [tokens, {n_features}]")
        rows, columns = chunk.detach().nonzero(as_tuple=True)
        numbers = chunk.detach()[rows, columns]
        lengths = torch.bincount(rows, minlength=chunk.shape[0])
    else:
        if chunk.n_features != n_features:
            raise CodesError(f"codes have {chunk.n_features} features; expected {n_features}")
        lengths, columns, numbers = chunk.offsets.diff(), chunk.indices, chunk.values.detach()
    if not bool(torch.isfinite(numbers).all()) or bool((numbers < 0).any()):
        raise CodesError("codes hold a negative or non-finite number; expected the non-negative output of an encoder")
    return lengths.cpu().numpy(), columns.to(torch.int32).cpu().numpy(), numbers.double().cpu().numpy()


def pair_statistics(
    codes: Csr,
    measure: Measure = "cosine",
    keep: float = 0.01,
    min_support: int = 1,
) -> PairStatistics:
    """Exact mean, spread and upper tail of the correlation over all live pairs.

    Args:
        codes: [T, N] non-negative.
        measure: cosine (Eq. 2), or pearson, which centres each feature first.
        keep: share of the live pairs whose correlations are kept, largest first (at least one pair).
        min_support: features that fire on fewer tokens are not live.
    """
    live = np.flatnonzero(np.bincount(codes.indices, minlength=codes.shape[1]) >= min_support)
    n_pairs = len(live) * (len(live) - 1) // 2
    if n_pairs == 0:
        return PairStatistics(0.0, 0.0, len(live), 0, 0, np.zeros(0), np.zeros((0, 2), dtype=np.int64))
    scaled, shift = _scaled(codes[:, live], measure)
    tail = _Tail(max(1, round(keep * n_pairs)))
    total = np.zeros(2)
    above = 0
    for rows, columns, products in _tiles(scaled):
        common = shift[rows] * shift[columns]
        correlations = products - common
        above += int((correlations > ENTANGLED).sum())
        total += products.sum(), (products**2 - 2 * products * common).sum()
        tail.add(correlations, rows * len(live) + columns)
    # Pairs that are never co-active have the product 0 and the correlation -shift_i shift_j.
    total += -(shift.sum() ** 2 - (shift**2).sum()) / 2, ((shift**2).sum() ** 2 - (shift**4).sum()) / 2
    mean = total[0] / n_pairs
    values, ids = tail.sorted()
    pairs = live[np.stack(np.divmod(ids, len(live)), axis=1)]
    std = float(np.sqrt(max(0.0, total[1] / n_pairs - mean**2)))
    return PairStatistics(float(mean), std, len(live), n_pairs, above, values, pairs)


def _scaled(codes: Csr, measure: Measure) -> tuple[Csr, np.ndarray]:
    """Columns scaled so that C_ij = (column_i . column_j) - shift_i shift_j."""
    n_tokens = codes.shape[0]
    squares = np.asarray((codes**2).sum(axis=0)).ravel()
    shift = np.zeros(codes.shape[1])
    if measure == "pearson":
        means = np.asarray(codes.sum(axis=0)).ravel() / n_tokens
        centred = squares - n_tokens * means**2
        varies = centred > 1e-12 * squares  # a feature that never varies correlates with nothing
        shift = np.where(varies, means * np.sqrt(n_tokens / np.where(varies, centred, 1.0)), 0.0)
        scale = np.where(varies, 1 / np.sqrt(np.where(varies, centred, 1.0)), 0.0)
    else:
        scale = 1 / np.sqrt(squares)
    return sparse.csr_array((codes.data * scale[codes.indices], codes.indices, codes.indptr), shape=codes.shape), shift


def _tiles(scaled: Csr):
    """Yields (rows, columns, products): every co-active pair rows < columns once, tile by tile."""
    n_tokens, n_features = scaled.shape
    lengths = np.diff(scaled.indptr).astype(np.float64)
    dense = DENSE_TILE_SPEEDUP * (lengths**2).sum() > n_tokens * n_features**2
    step = max(1, TILE_ENTRIES // n_features)
    transposed = scaled.T.tocsr()
    by_column = scaled.tocsc()
    for start in range(0, n_features, step):
        stop = min(n_features, start + step)
        if dense:
            tile = _dense_tile(scaled, start, stop)
            rows, columns = np.nonzero(np.triu(tile, k=1))
            products = tile[rows, columns]
        else:
            product = (transposed[start:stop] @ by_column[:, start:].tocsr()).tocoo()
            above = product.col > product.row
            rows, columns, products = product.row[above], product.col[above], product.data[above]
        yield rows.astype(np.int64) + start, columns.astype(np.int64) + start, products


def _dense_tile(scaled: Csr, start: int, stop: int) -> np.ndarray:
    tile = np.zeros((stop - start, scaled.shape[1] - start))
    step = max(1, TILE_ENTRIES // scaled.shape[1])
    for first in range(0, scaled.shape[0], step):
        block = scaled[first : first + step].toarray()[:, start:]
        tile += block[:, : stop - start].T @ block
    return tile


class _Tail:
    """The `count` largest positive values seen, ties going to the lowest pair id."""

    SLACK = 1 << 20  # entries gathered between two prunings

    def __init__(self, count: int):
        self.count, self.bound, self.held = count, 0.0, 0
        self.values, self.ids = [np.zeros(0)], [np.zeros(0, dtype=np.int64)]

    def add(self, values: np.ndarray, ids: np.ndarray) -> None:
        above = np.flatnonzero(values > self.bound)
        self.values.append(values[above])
        self.ids.append(ids[above])
        self.held += len(above)
        if self.held > 2 * self.count + self.SLACK:
            values, ids = self.sorted()
            self.values, self.ids, self.held = [values], [ids], len(values)
            self.bound = max(self.bound, np.nextafter(float(values[-1]), 0.0))

    def sorted(self) -> tuple[np.ndarray, np.ndarray]:
        values, ids = np.concatenate(self.values), np.concatenate(self.ids)
        # Rounded for the order only: a pair that fires once together has cosine 1 up to rounding, and must tie.
        rounded = values.astype(np.float32)
        if len(values) > self.count:
            near = np.flatnonzero(rounded >= np.partition(rounded, -self.count)[-self.count])
            values, ids, rounded = values[near], ids[near], rounded[near]
        order = np.lexsort((ids, -rounded))[: self.count]
        return values[order], ids[order]
