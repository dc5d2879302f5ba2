"""Exact correlation statistics over all feature pairs of held-out codes, one tile of features at a time.

Training selects pairs from small batches and must be fast; judging what it achieved must be exact, on many more tokens,
and must not share code with what it judges. Codes are kept sparse (8 to 12 bytes per firing) and the N x N matrix is
walked in tiles of its upper triangle, so memory grows with the firings and with N, never with N^2. Only co-active pairs
are enumerated: all others have cosine zero, and a Pearson correlation that follows from their means alone.
"""

from collections.abc import Iterable, Iterator, Sequence
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
DENSE_TILE_SPEEDUP = 400  # a dense multiply-add costs so many times less than one of a sparse product (two threads)


@dataclass(frozen=True)
class View:
    """One way to look at pairs: the measure, and on how many tokens a feature must fire to count (to be live)."""

    measure: Measure = "cosine"
    min_support: int = 1


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


def pair_statistics(codes: Csr, views: Sequence[View], keep: float = 0.01) -> list[PairStatistics]:
    """Exact mean, spread and upper tail of the correlation over all live pairs, for every view, in one walk.

    Args:
        codes: [T, N] non-negative.
        views: the measures, and the supports below which a feature is not live.
        keep: share of the live pairs whose correlations are kept, largest first (at least one pair).
    """
    support = np.bincount(codes.indices, minlength=codes.shape[1])
    fires = np.flatnonzero(support)
    codes, support = codes[:, fires], support[fires]
    gathered = [_Gathered(codes, support, view, keep) for view in views]
    for rows, columns, products in _tiles(codes):
        for view in gathered:
            view.add(rows, columns, products)
    return [view.statistics(fires) for view in gathered]


class _Gathered:
    """Running sums and the upper tail of one view, in which C_ij = product_ij scale_i scale_j - shift_i shift_j."""

    def __init__(self, codes: Csr, support: np.ndarray, view: View, keep: float):
        n_tokens, self.n_features = codes.shape
        live = support >= view.min_support
        self.n_live = int(live.sum())
        self.n_pairs = self.n_live * (self.n_live - 1) // 2
        spread = squares = np.asarray((codes**2).sum(axis=0)).ravel()
        means = np.zeros(self.n_features)
        if view.measure == "pearson":
            means = np.asarray(codes.sum(axis=0)).ravel() / n_tokens
            spread = squares - n_tokens * means**2
        varies = live & (spread > 1e-12 * squares)  # a feature that never varies correlates with nothing
        self.scale = np.where(varies, 1 / np.sqrt(np.where(varies, spread, 1.0)), 0.0)
        self.shift = shift = means * np.sqrt(n_tokens) * self.scale
        # Pairs that are never co-active have the product 0 and the correlation -shift_i shift_j.
        self.total = -(shift.sum() ** 2 - (shift**2).sum()) / 2
        self.total_squares = ((shift**2).sum() ** 2 - (shift**4).sum()) / 2
        self.above = 0
        self.tail = _Tail(max(1, round(keep * self.n_pairs)))

    def add(self, rows: np.ndarray, columns: np.ndarray, products: np.ndarray) -> None:
        products = products * self.scale[rows] * self.scale[columns]
        common = self.shift[rows] * self.shift[columns]
        correlations = products - common
        self.above += int((correlations > ENTANGLED).sum())
        self.total += products.sum()
        self.total_squares += (products * (products - 2 * common)).sum()
        self.tail.add(correlations, rows * self.n_features + columns)

    def statistics(self, features: np.ndarray) -> PairStatistics:
        """What was gathered; `features` are the ids of the columns."""
        pairs = max(1, self.n_pairs)
        mean = float(self.total) / pairs
        std = float(np.sqrt(max(0.0, self.total_squares / pairs - mean**2)))
        values, ids = self.tail.sorted()
        pairs = features[np.stack(np.divmod(ids, max(1, self.n_features)), axis=1)]
        return PairStatistics(mean, std, self.n_live, self.n_pairs, self.above, values, pairs)


def _tiles(codes: Csr) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yields (rows, columns, products): every co-active pair rows < columns once, tile by tile."""
    n_tokens, n_features = codes.shape
    lengths = np.diff(codes.indptr).astype(np.float64)
    dense = DENSE_TILE_SPEEDUP * (lengths**2).sum() > n_tokens * n_features**2
    step = max(1, TILE_ENTRIES // max(1, n_features))
    transposed = codes.T.tocsr()
    by_column = codes.tocsc()
    for start in range(0, n_features, step):
        stop = min(n_features, start + step)
        if dense:
            tile = _dense_tile(codes, start, stop)
            rows, columns = np.nonzero(np.triu(tile, k=1))
            products = tile[rows, columns]
        else:
            product = (transposed[start:stop] @ by_column[:, start:].tocsr()).tocoo()
            above = product.col > product.row
            rows, columns, products = product.row[above], product.col[above], product.data[above]
        yield rows.astype(np.int64) + start, columns.astype(np.int64) + start, products


def _dense_tile(codes: Csr, start: int, stop: int) -> np.ndarray:
    tile = np.zeros((stop - start, codes.shape[1] - start))
    step = max(1, TILE_ENTRIES // codes.shape[1])
    for first in range(0, codes.shape[0], step):
        block = codes[first : first + step].toarray()[:, start:]
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
