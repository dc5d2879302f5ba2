"""How far correlation statistics move when the tokens are drawn again, at the cost of about one pass over the pairs.

A bootstrap sample is a weighted sum of the Gram matrices of a few dozen groups of contexts, so these are computed once,
tile by tile, and every sample, measure and support threshold is read off the same tile. The tail of a sample is taken
from a fine histogram above a floor: what is wanted from it is a spread, not a value.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unbraid.evaluation.pairs import DENSE_TILE_SPEEDUP, Csr, View

STACK_ENTRIES = 1 << 24
BINS = 4000


def resampled(
    codes: Csr,
    group_of_row: np.ndarray,
    draws: np.ndarray,
    views: Sequence[View],
    floors: Sequence[float],
    fraction: float,
    quantiles: Mapping[str, float],
) -> list[dict[str, np.ndarray]]:
    """Statistics of every bootstrap sample, for every view: name -> `[samples]`.

    Args:
        codes: `[T, N]` sparse codes.
        group_of_row: `[T]` ascending group number of each token.
        draws: `[samples, groups]`, how often a sample takes each group.
        views: which measures and supports.
        floors: for each view a value safely below the tail that is asked for.
        fraction: share of live pairs that counts as the top.
        quantiles: name -> q.
    """
    groups = [codes[group_of_row == group] for group in range(draws.shape[1])]
    tokens = np.array([group.shape[0] for group in groups])
    sums = np.stack([np.asarray(group.sum(axis=0)).ravel() for group in groups])
    squares = np.stack([np.asarray((group**2).sum(axis=0)).ravel() for group in groups])
    support = np.bincount(codes.indices, minlength=codes.shape[1])
    gathered = [
        _Gathered(view, floor, support, draws @ tokens, draws @ sums, draws @ squares)
        for view, floor in zip(views, floors, strict=True)
    ]
    weights = torch.from_numpy(draws).float()
    for start, stack in _tiles(groups):
        samples = (weights @ stack.flatten(1)).view(-1, *stack.shape[1:])
        for view in gathered:
            view.add(start, samples)
    return [view.statistics(fraction, quantiles) for view in gathered]


class _Gathered:
    """Running sums and histograms of all samples under one view."""

    def __init__(
        self, view: View, floor: float, support: np.ndarray, tokens: np.ndarray, sums: np.ndarray, squares: np.ndarray
    ):
        live = support >= view.min_support
        self.floor = floor
        self.n_pairs = int(live.sum()) * (int(live.sum()) - 1) // 2
        centre = sums**2 / tokens[:, None] if view.measure == "pearson" else 0.0
        spread = squares - centre
        usable = live & (spread > 1e-12 * squares) & (squares > 0)
        scale = np.where(usable, 1 / np.sqrt(np.where(usable, spread, 1.0)), 0.0)
        shift = sums / np.sqrt(tokens[:, None]) * scale if view.measure == "pearson" else np.zeros_like(squares)
        # Pairs that are never co-active have the product 0 and the correlation -shift_i shift_j.
        self.total = -(shift.sum(1) ** 2 - (shift**2).sum(1)) / 2
        self.total_squares = ((shift**2).sum(1) ** 2 - (shift**4).sum(1)) / 2
        self.counts = np.zeros((len(tokens), BINS))
        self.scale, self.shift = torch.from_numpy(scale).float(), torch.from_numpy(shift).float()
        self.centred = view.measure == "pearson"

    def add(self, start: int, samples: Tensor) -> None:
        """Take in a tile `[samples, rows, columns]`, rows and columns both beginning at feature `start`."""
        stop = start + samples.shape[1]
        for sample, products in enumerate(samples):
            scale, shift = self.scale[sample], self.shift[sample]
            correlation = products * scale[start:stop, None] * scale[None, start:]
            self.total[sample] += _sum(correlation)
            if self.centred:
                common = shift[start:stop, None] * shift[None, start:]
                self.total_squares[sample] += _sum(correlation * (correlation - 2 * common))
                correlation -= common
            else:
                self.total_squares[sample] += _sum(correlation.square())
            high = correlation[correlation > self.floor]
            bins = (high * BINS).long().clamp_(max=BINS - 1)
            self.counts[sample] += torch.bincount(bins, minlength=BINS).numpy()

    def statistics(self, fraction: float, quantiles: Mapping[str, float]) -> dict[str, np.ndarray]:
        pairs = max(1, self.n_pairs)
        mean = self.total / pairs
        std = np.sqrt(np.maximum(0.0, self.total_squares / pairs - mean**2))
        above = self.counts[:, ::-1].cumsum(1)  # pairs in this bin or a higher one, from the top
        centres = (np.arange(BINS)[::-1] + 0.5) / BINS
        wanted = max(1, round(fraction * self.n_pairs))
        taken = np.diff(np.minimum(above, wanted), axis=1, prepend=0.0)
        result = {"mean": mean, "std": std, "top": taken @ centres / wanted}
        for name, q in quantiles.items():
            rank = self.n_pairs - max(1, int(np.ceil(q * self.n_pairs)))
            first = (above > rank).argmax(1)
            result[name] = np.where(above[:, -1] > rank, centres[first], 0.0)
        return result


def _sum(entries: Tensor) -> float:
    """Short rows in float32, their sums in float64."""
    return float(entries.sum(1).sum(dtype=torch.float64))


def _tiles(groups: list[Csr]) -> Iterator[tuple[int, Tensor]]:
    """Yields (first feature, `[groups, rows, columns]`): every group's Gram matrix above the diagonal, in strips."""
    n_features = groups[0].shape[1]
    step = max(1, STACK_ENTRIES // (n_features * len(groups)))
    columns_of = [group.astype(np.float32).tocsc() for group in groups]
    for start in range(0, n_features, step):
        stop = min(n_features, start + step)
        yield start, torch.stack([_gram(group, start, stop) for group in columns_of]).triu_(1)


def _gram(codes: Any, start: int, stop: int) -> Tensor:
    own, others = codes[:, start:stop], codes[:, start:]
    density = codes.nnz / max(1, codes.shape[0] * codes.shape[1])
    if DENSE_TILE_SPEEDUP * density**2 > 1:
        return torch.from_numpy(own.toarray()).T @ torch.from_numpy(others.toarray())
    return torch.from_numpy((own.T @ others).toarray())
