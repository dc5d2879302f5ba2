"""The exact path: selection and penalty from co-activations alone, O(W) forward and backward, whatever N is.

Two features that never fire together have C = 0, so the N x N matrix of Eq. 2 is known from the co-active pairs (the
rest enters mu and sigma in closed form). `select` goes through all of them once; `evaluate` looks only at the pairs
of S, walking for each pair the rows of its rarer feature, so it costs O(active entries x partners).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from unbraid.decorrelation.entries import Entries
from unbraid.decorrelation.measure import Measure, Scaled, scaled
from unbraid.decorrelation.selection import Selection, TopPairs, live_pairs, moments, nominal_pairs, steps_per_unit
from unbraid.kernels.co_activation import CoActivations, co_activations
from unbraid.kernels.pattern import Pattern


@dataclass(frozen=True)
class Evaluation:
    """R of one batch for given pairs, with its gradient."""

    penalty: float
    """R(tau), unweighted."""
    gradient: Tensor
    """dR/d(what was penalised): at the active entries, or of the decoder rows."""
    correlations: Tensor
    """[P] of the pairs, float64."""


def select(entries: Entries, fraction: float, measure: Measure, max_pairs_per_feature: int | None = None) -> Selection:
    """S, mu and sigma (Eq. 3, 4) from every co-activation of `entries`."""
    n_live = int((entries.support > 0).sum())
    wanted, limit = nominal_pairs(n_live, fraction, max_pairs_per_feature)
    z = scaled(entries, measure)
    total, squares = sums_without_meeting(z)
    found = top_pairs(entries.pattern, z, z.values, wanted, entries.values.dtype)
    mean, std = moments(total + found.total, squares + found.squares, live_pairs(n_live))
    limit = "co-activation" if found.pair_ids.numel() < wanted else limit
    low = low_support(entries, found.pair_ids)
    return Selection(found.pair_ids, found.correlations, wanted, mean, std, n_live, limit, low)


def select_inside_groups(entries: Entries, groups: Tensor, n_groups: int, measure: Measure) -> Selection:
    """Every live pair inside a group (those with C > 0 are listed), mu and sigma over the same.

    Each row is cut into one row per group, so only pairs that share a group meet: W / groups.
    """
    alive = torch.bincount(groups[entries.support > 0], minlength=n_groups)
    n_pairs = int((alive * (alive - 1) // 2).sum())
    z = scaled(entries, measure)
    total, squares = sums_without_meeting(z, groups, n_groups)
    rows = entries.rows * n_groups + groups[entries.indices]
    order = torch.sort(rows, stable=True)[1]
    n_rows = entries.n_rows * n_groups
    pattern = Pattern.from_rows(rows[order], entries.indices[order], n_rows, entries.n_features)
    found = top_pairs(pattern, z, z.values[order], n_pairs, entries.values.dtype)
    mean, std = moments(total + found.total, squares + found.squares, n_pairs)
    low = low_support(entries, found.pair_ids)
    limit = "co-activation" if found.pair_ids.numel() < n_pairs else "fraction"
    return Selection(found.pair_ids, found.correlations, n_pairs, mean, std, int(alive.sum()), limit, low)


class Found(NamedTuple):
    """The top pairs of a pattern, and what all its pairs add to the sums over every pair."""

    pair_ids: Tensor
    correlations: Tensor
    total: float
    squares: float


def top_pairs(pattern: Pattern, z: Scaled, z_values: Tensor, wanted: int, dtype: torch.dtype) -> Found:
    """Go through all co-activations of `pattern`, whose entries are `z_values`, in at least float32."""
    values = z_values.to(torch.promote_types(dtype, torch.float32))
    top = TopPairs(wanted, pattern.n_features, values.dtype, values.device)
    total = squares = 0.0
    for chunk in co_activations(pattern, values):
        correlations, chunk_total, chunk_squares = correlations_of(chunk, z)
        total, squares = total + chunk_total, squares + chunk_squares
        top.add(correlations, chunk)
    return Found(*top.result(), total, squares)


def low_support(entries: Entries, pair_ids: Tensor) -> float:
    """Share of the pairs in which a feature fires at most 4 times."""
    if pair_ids.numel() == 0:
        return 0.0
    rare = entries.support <= 4
    return float((rare[pair_ids // entries.n_features] | rare[pair_ids % entries.n_features]).double().mean())


def correlations_of(chunk: CoActivations, z: Scaled) -> tuple[Tensor, float, float]:
    """Correlations of a chunk, and what they add to the sum and to the sum of squares over all pairs."""
    dots = chunk.dots
    if z.shift is None:
        norm = float(torch.linalg.vector_norm(dots, dtype=torch.float64))
        return dots, float(dots.sum(dtype=torch.float64)), norm**2
    first, second = chunk.features(torch.arange(dots.numel(), device=dots.device))
    apart = z.shift[first] * z.shift[second]
    together = dots.double() - apart
    squares = (together * together - apart * apart).sum()
    return together.to(dots.dtype), float(dots.sum(dtype=torch.float64)), float(squares)


def sums_without_meeting(z: Scaled, groups: Tensor | None = None, n_groups: int = 1) -> tuple[float, float]:
    """Sum and sum of squares of -shift_i shift_j over all pairs (of a group), as if none were ever co-active."""
    if z.shift is None:
        return 0.0, 0.0
    if groups is None:
        by_group = z.shift.unsqueeze(0)
    else:
        sizes = torch.bincount(groups, minlength=n_groups)
        order = torch.sort(groups, stable=True)[1]
        places = torch.arange(order.numel(), device=order.device) - (sizes.cumsum(0) - sizes)[groups[order]]
        by_group = z.shift.new_zeros(n_groups, int(sizes.max()))
        by_group[groups[order], places] = z.shift[order]
    return -sum_of_products(by_group), sum_of_products(by_group**2)


def sum_of_products(x_GN: Tensor) -> float:
    """Sum of x_i x_j over i < j of each row, all rows together; terms >= 0 are only ever added, so none cancel."""
    before_GN = torch.nn.functional.pad(x_GN.cumsum(1)[:, :-1], (1, 0))
    return float((x_GN * before_GN).sum())


def evaluate(entries: Entries, pair_ids: Tensor, nominal: int, tau: float, measure: Measure) -> Evaluation:
    """R(tau) = 1/|S| sum of relu(C - tau) over the given pairs on this batch, and its gradient at active entries.

    A feature that fires once keeps its correlation whatever it fires with, so its gradient is exactly zero.
    """
    z = scaled(entries, measure)
    first, second = pair_ids // entries.n_features, pair_ids % entries.n_features
    pairs, first_entries, second_entries = meetings(entries, first, second)
    dots = z.values.new_zeros(pair_ids.numel())
    dots = add_at(dots, pairs, z.values[first_entries] * z.values[second_entries])
    correlations = dots if z.shift is None else dots - z.shift[first] * z.shift[second]
    weights = hinge_weights(correlations, tau, nominal, entries.values.dtype)
    penalty = float(((correlations - tau) * weights).sum())

    met_weights = weights[pairs]
    pull = add_at(torch.zeros_like(z.values), first_entries, met_weights * z.values[second_entries])
    pull = add_at(pull, second_entries, met_weights * z.values[first_entries])
    own = add_at(torch.zeros_like(z.inverse_norm), first, weights * correlations)
    own = add_at(own, second, weights * correlations)
    if z.shift is None:
        gradient = pull - own[entries.indices] * z.values
    else:
        others = add_at(torch.zeros_like(own), first, weights * z.shift[second])
        others = add_at(others, second, weights * z.shift[first])
        root = max(entries.n_rows, 1) ** 0.5
        centred = z.values - (z.shift / root)[entries.indices]
        gradient = pull - (others / root)[entries.indices] - own[entries.indices] * centred
    movable = torch.where(entries.support > 1, z.inverse_norm, 0.0)
    return Evaluation(penalty, gradient * movable[entries.indices], correlations)


def hinge_weights(correlations: Tensor, tau: float, nominal: int, dtype: torch.dtype) -> Tensor:
    """[P] 1/|S| for pairs above tau by more than the rounding of `dtype`, else 0: dR/dC."""
    above = correlations - tau > 1 / steps_per_unit(dtype)
    return above.to(correlations.dtype) / max(nominal, 1)


def add_at(base: Tensor, places: Tensor, amounts: Tensor) -> Tensor:
    """`base` with `amounts` added at `places`, in the same order every time (index_add is not, on CUDA)."""
    if base.is_cuda:
        return base.index_put_((places,), amounts, accumulate=True)
    return base.index_add_(0, places, amounts)


def meetings(entries: Entries, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where the pairs meet: for each (pair, row where both fire) the pair's position and the two entries.

    Each pair walks the rows of its rarer feature and asks a bitmap (a bit per live feature and row) for the other.
    """
    device = entries.indices.device
    swap = entries.support[second] < entries.support[first]
    rare, other = torch.where(swap, second, first), torch.where(swap, first, second)
    by_feature = entries.pattern.by_feature
    lengths = entries.support[rare]
    pairs = torch.repeat_interleave(torch.arange(rare.numel(), device=device), lengths)
    slots = torch.arange(pairs.numel(), device=device) + (by_feature.offsets[rare] - lengths.cumsum(0) + lengths)[pairs]
    words, first_word = firing_bitmap(entries)
    rows = by_feature.rows[slots]
    met = ((words[first_word[other][pairs] + (rows >> 6)] >> (rows & 63)) & 1).nonzero().squeeze(1)
    pairs, rare_entries = pairs[met], by_feature.order[slots[met]]
    other_entries = torch.searchsorted(entries.keys, rows[met] * entries.n_features + other[pairs])
    swapped = swap[pairs]
    return (
        pairs,
        torch.where(swapped, other_entries, rare_entries),
        torch.where(swapped, rare_entries, other_entries),
    )


def firing_bitmap(entries: Entries) -> tuple[Tensor, Tensor]:
    """Bit `row & 63` of word `first_word[feature] + row // 64` says whether the feature fires on the row.

    Only live features have words of their own; the others share one run of zeros.
    """
    width = -(-entries.n_rows // 64)
    live = entries.support > 0
    first_word = torch.where(live, live.cumsum(0), 0) * width
    words = torch.zeros((int(live.sum()) + 1) * width, dtype=torch.int64, device=entries.indices.device)
    places = first_word[entries.indices] + (entries.rows >> 6)
    return words.index_add_(0, places, torch.ones_like(places) << (entries.rows & 63)), first_word
