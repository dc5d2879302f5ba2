"""The exact path: selection and penalty from co-activations alone, O(W) forward and backward, whatever N is.

Two features that never fire together have C = 0, so the N x N matrix of Eq. 2 is known from the co-active pairs (the
rest enters mu and sigma as a closed form). `select` goes through all of them once; `evaluate` looks only at the pairs
of S, walking for each pair the entries of its rarer feature, so it costs O(active entries x partners).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from unbraid.decorrelation.entries import Entries
from unbraid.decorrelation.measure import Measure, Scaled, scaled
from unbraid.decorrelation.selection import Selection, TopPairs, live_pairs, moments, nominal_pairs, steps_per_unit
from unbraid.kernels.co_activation import CoActivations, co_activations


@dataclass(frozen=True)
class Evaluation:
    """R of one batch for given pairs, with its gradient."""

    penalty: float
    """R(tau), unweighted."""
    gradient: Tensor
    """[nnz] dR/df at the active entries, float64."""
    correlations: Tensor
    """[P] of the pairs on this batch, float64."""


def supported(entries: Entries, min_support: int) -> Entries:
    """Entries of the features that fire on at least `min_support` rows."""
    if min_support <= 1:
        return entries
    return entries.where((entries.support >= min_support)[entries.indices])


def select(entries: Entries, fraction: float, measure: Measure, max_pairs_per_feature: int | None = None) -> Selection:
    """S, mu and sigma (Eq. 3, 4) from every co-activation of `entries`."""
    entries = entries.detach()
    z = scaled(entries, measure)
    n_live = int((entries.support > 0).sum())
    wanted, limit = nominal_pairs(n_live, fraction, max_pairs_per_feature)
    top, total, squares = TopPairs(wanted), *pairs_without_co_activation(z)
    values = z.values.to(torch.promote_types(entries.values.dtype, torch.float32))
    for chunk in co_activations(entries.offsets, entries.indices, values, entries.n_features):
        correlations, chunk_total, chunk_squares = correlations_of(chunk, z, entries.n_features)
        total, squares = total + chunk_total, squares + chunk_squares
        top.add(correlations, chunk)
    ids, correlations = top.result()
    if ids.numel() < wanted:
        limit = "co-activation"
    mean, std = moments(total, squares, live_pairs(n_live))
    device = entries.indices.device
    return Selection(ids.to(device), correlations.to(device), wanted, mean, std, n_live, limit)


def correlations_of(chunk: CoActivations, z: Scaled, n_features: int) -> tuple[Tensor, float, float]:
    """Correlations of a chunk, and what they add to the sum and to the sum of squares over all pairs."""
    dots = chunk.dots
    if z.shift is None:
        return dots, float(dots.sum(dtype=torch.float64)), float(torch.linalg.vector_norm(dots, dtype=torch.float64)) ** 2
    ids = chunk.pair_ids(torch.arange(dots.numel(), device=dots.device))
    apart = z.shift[ids // n_features] * z.shift[ids % n_features]
    together = dots.double() - apart
    squares = (together * together - apart * apart).sum()
    return together.to(dots.dtype), float(dots.sum(dtype=torch.float64)), float(squares)


def pairs_without_co_activation(z: Scaled) -> tuple[float, float]:
    """Sum and sum of squares of -shift_i shift_j over all pairs, as if no pair were co-active."""
    if z.shift is None:
        return 0.0, 0.0
    squares = z.shift * z.shift
    total = -float(z.shift.sum() ** 2 - squares.sum()) / 2
    return total, float(squares.sum() ** 2 - (squares * squares).sum()) / 2


def evaluate(entries: Entries, pair_ids: Tensor, nominal: int, tau: float, measure: Measure) -> Evaluation:
    """R(tau) = 1/|S| sum of relu(C - tau) over the given pairs on this batch, and its gradient.

    A feature that fires once keeps its correlation whatever it fires with, so its gradient is exactly zero.
    """
    z = scaled(entries, measure)
    first, second = pair_ids // entries.n_features, pair_ids % entries.n_features
    pairs, first_entries, second_entries = meetings(entries, first, second)
    dots = z.values.new_zeros(pair_ids.numel())
    dots.index_add_(0, pairs, z.values[first_entries] * z.values[second_entries])
    correlations = dots if z.shift is None else dots - z.shift[first] * z.shift[second]
    excess = correlations - tau
    weights = (excess > 1 / steps_per_unit(entries.values.dtype)).to(excess.dtype) / max(nominal, 1)
    penalty = float((excess * weights).sum())

    pull = torch.zeros_like(z.values)
    meeting_weights = weights[pairs]
    pull.index_add_(0, first_entries, meeting_weights * z.values[second_entries])
    pull.index_add_(0, second_entries, meeting_weights * z.values[first_entries])
    own = z.inverse_norm.new_zeros(entries.n_features)
    own.index_add_(0, first, weights * correlations).index_add_(0, second, weights * correlations)
    if z.shift is None:
        gradient = pull - own[entries.indices] * z.values
    else:
        others = torch.zeros_like(own).index_add_(0, first, weights * z.shift[second])
        others.index_add_(0, second, weights * z.shift[first])
        root = max(entries.n_rows, 1) ** 0.5
        centred = z.values - (z.shift / root)[entries.indices]
        gradient = pull - (others / root)[entries.indices] - own[entries.indices] * centred
    movable = (entries.support > 1) * z.inverse_norm
    return Evaluation(penalty, gradient * movable[entries.indices], correlations)


def meetings(entries: Entries, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where the pairs meet: for each (pair, row where both fire) the pair's position and the two entries."""
    device = entries.indices.device
    swap = entries.support[second] < entries.support[first]
    rare, other = torch.where(swap, second, first), torch.where(swap, first, second)
    order, starts = entries.by_feature
    lengths = entries.support[rare]
    pairs = torch.repeat_interleave(torch.arange(rare.numel(), device=device), lengths)
    run_starts = lengths.cumsum(0) - lengths
    slots = torch.arange(pairs.numel(), device=device) + (starts[rare] - run_starts)[pairs]
    rare_entries = order[slots]
    keys = entries.rows * entries.n_features + entries.indices
    wanted = entries.rows[rare_entries] * entries.n_features + other[pairs]
    places = torch.searchsorted(keys, wanted).clamp_(max=max(keys.numel() - 1, 0))
    met = (keys[places] == wanted).nonzero().squeeze(1)
    pairs, rare_entries, other_entries = pairs[met], rare_entries[met], places[met]
    swapped = swap[pairs]
    return (
        pairs,
        torch.where(swapped, other_entries, rare_entries),
        torch.where(swapped, rare_entries, other_entries),
    )
