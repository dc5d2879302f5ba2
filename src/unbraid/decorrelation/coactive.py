"""The exact path: selection and penalty from co-activations alone, O(W) forward and backward, whatever N is.

Two features that never fire together have C = 0, so the N x N matrix of Eq. 2 is known from the co-active pairs (the
rest enters mu and sigma in closed form). `select` goes through all of them once; `evaluate` looks only at the pairs
of S, walking for each pair the rows on which its features fire, so it costs O(active entries x partners); of a feature
with so many partners that this would cost more, it walks the co-activations instead.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from unbraid.decorrelation.entries import Entries
from unbraid.decorrelation.hinge import Evaluation, add_at, hinge_weights
from unbraid.decorrelation.measure import Measure, Scaled, scaled
from unbraid.decorrelation.selection import (
    Selection,
    TopPairs,
    bar_for,
    best_pairs,
    bin_bits,
    live_pairs,
    low_support,
    moments,
    nominal_pairs,
    steps_per_unit,
)
from unbraid.distributed.shard import Shard
from unbraid.kernels.co_activation import CoActivations, RankedPairs, co_activations
from unbraid.kernels.on_cpu import in_parallel, loops_take
from unbraid.kernels.pattern import Pattern

PUSH_PARTS = 4
"""Ranges of pairs whose pushes are added up apart, always as many, so that threads do not change the sums."""


def select(
    entries: Entries,
    fraction: float,
    measure: Measure,
    max_pairs_per_feature: int | None = None,
    shard: Shard | None = None,
) -> Selection:
    """S, mu and sigma (Eq. 3, 4) from every co-activation of `entries`.

    With a shard, each rank goes through the pairs whose first feature is its own and keeps those of S.
    """
    shard = shard or Shard(entries.n_features)
    n_live = int((entries.support > 0).sum())
    wanted, limit = nominal_pairs(n_live, fraction, max_pairs_per_feature)
    z = scaled(entries, measure)
    total, squares = sums_without_meeting(z)
    found = top_pairs(entries.pattern, z, z.values, wanted, entries.values.dtype, shard)
    met, met_squares, chosen = shard.ranks.total(found.total, found.squares, found.first.numel())
    mean, std = moments(total + met, squares + met_squares, live_pairs(n_live))
    limit = "co-activation" if chosen < wanted else limit
    low = low_support(entries.support, found.first, found.second)
    return Selection(found.first, found.second, found.correlations, wanted, mean, std, n_live, limit, low)


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
    low = low_support(entries.support, found.first, found.second)
    limit = "co-activation" if found.first.numel() < n_pairs else "fraction"
    n_live = int(alive.sum())
    return Selection(found.first, found.second, found.correlations, n_pairs, mean, std, n_live, limit, low)


class Found(NamedTuple):
    """The top pairs of a pattern, and what all its pairs add to the sums over every pair."""

    first: Tensor
    second: Tensor
    correlations: Tensor
    total: float
    squares: float


def top_pairs(
    pattern: Pattern, z: Scaled, z_values: Tensor, wanted: int, dtype: torch.dtype, shard: Shard | None = None
) -> Found:
    """Go through all co-activations of `pattern`, whose entries are `z_values`, in at least float32."""
    dtype, shard = torch.promote_types(dtype, torch.float32), shard or Shard(pattern.n_features)
    if not loops_take(z_values):
        return listed_top_pairs(pattern, z, z_values, wanted, dtype, shard)
    steps = steps_per_unit(dtype)
    ranked = RankedPairs(pattern, z_values, z.shift, steps, bin_bits(steps), shard.start, shard.end)
    bar = bar_for(ranked.histogram, wanted, ranked.bits)
    first, second, found = best_pairs(*ranked.from_rank(bar), wanted, steps, pattern.n_features, shard.ranks)
    return Found(first, second, found.to(dtype), ranked.total, ranked.squares)


def listed_top_pairs(
    pattern: Pattern, z: Scaled, z_values: Tensor, wanted: int, dtype: torch.dtype, shard: Shard
) -> Found:
    """The same in tensor operations, from a list of all co-activations; in float64 where shifts are subtracted."""
    top = TopPairs(wanted, pattern.n_features, dtype, z_values.device)
    z_values = z_values if z.shift is not None else z_values.to(dtype)
    total = squares = 0.0
    for chunk in co_activations(pattern, z_values, shard.start, shard.end):
        correlations, chunk_total, chunk_squares = correlations_of(chunk, z)
        total, squares = total + chunk_total, squares + chunk_squares
        top.add(correlations.to(dtype), chunk)
    return Found(*top.result(shard.ranks), total, squares)


def correlations_of(chunk: CoActivations, z: Scaled) -> tuple[Tensor, float, float]:
    """Correlations of a chunk, and what they add to the sum and to the sum of squares over all pairs."""
    dots = chunk.dots
    if z.shift is None:
        precise = dots.double()
        return dots, float(precise.sum()), float(precise.dot(precise))
    apart = z.shift[chunk.first] * z.shift[chunk.second]
    together = dots.double() - apart
    squares = (together * together - apart * apart).sum()
    return together, float(dots.sum(dtype=torch.float64)), float(squares)


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


def evaluate(entries: Entries, first: Tensor, second: Tensor, nominal: int, tau: float, measure: Measure) -> Evaluation:
    """R(tau) = 1/|S| sum of relu(C - tau) over the given pairs on this batch, and its gradient at active entries.

    A feature that fires once keeps its correlation whatever it fires with, so its gradient is exactly zero.
    """
    z = scaled(entries, measure)
    push = push_by_loop if loops_take(z.values) else push_by_lists
    pushed = push(entries, first, second, nominal, tau, z)
    pull, centred = pushed.pull, z.values
    own = add_at(torch.zeros_like(z.inverse_norm), entries.indices, pull * z.values)
    if z.shift is not None:
        root = max(entries.n_rows, 1) ** 0.5
        own -= z.shift * pushed.others
        pull = pull - (pushed.others / root)[entries.indices]
        centred = z.values - (z.shift / root)[entries.indices]
    gradient = pull - own[entries.indices] * centred
    movable = torch.where(entries.support > 1, z.inverse_norm, 0.0)
    return Evaluation(pushed.penalty, gradient * movable[entries.indices], pushed.correlations)


class Pushed(NamedTuple):
    """Correlations of pairs, R, and the parts of its gradient, not yet divided by norms.

    What goes to a feature through its norm, the sum of dR/dC C over its pairs, is pull . z - shift * others.
    """

    correlations: Tensor
    """[P] float64."""
    pull: Tensor
    """[nnz] what goes to an entry itself."""
    others: Tensor
    """[N] what goes to a feature through its mean; none without shifts (cosine)."""
    penalty: float


def push_by_loop(entries: Entries, first: Tensor, second: Tensor, nominal: int, tau: float, z: Scaled) -> Pushed:
    """In a compiled loop that walks the rows of both features of a pair, or all co-activations of one: for CPUs."""
    by_feature, n_pairs = entries.pattern.by_feature, first.numel()
    edges = [n_pairs * part // PUSH_PARTS for part in range(PUSH_PARTS + 1)]
    row_ends = entries.offsets[1:][by_feature.rows]
    walk = [by_feature.offsets, by_feature.order, by_feature.rows, row_ends, entries.indices]
    shift = z.values.new_empty(0) if z.shift is None else z.shift
    weight = 1 / max(nominal, 1)
    numbers = [float(tau), 1 / steps_per_unit(entries.values.dtype), weight]
    correlations, pull = z.values.new_empty(n_pairs), z.values.new_zeros(PUSH_PARTS, z.values.numel())
    others, hinges = z.values.new_zeros(PUSH_PARTS, shift.numel()), z.values.new_zeros(PUSH_PARTS)
    written = correlations, pull, others, hinges
    in_parallel("push_apart", edges, first, second, *walk, z.values, shift, *numbers, *written)
    return Pushed(correlations, pull.sum(0), others.sum(0), float(hinges.sum()) * weight)


def push_by_lists(entries: Entries, first: Tensor, second: Tensor, nominal: int, tau: float, z: Scaled) -> Pushed:
    """In tensor operations, from a list of all rows on which a pair meets."""
    met = meetings(entries, first, second)
    z_first, z_second = z.values[met.first], z.values[met.second]
    correlations = add_at(z.values.new_zeros(first.numel()), met.pairs, z_first * z_second)
    if z.shift is not None:
        correlations = correlations - z.shift[first] * z.shift[second]
    weights = hinge_weights(correlations, tau, nominal, entries.values.dtype)
    met_weights = weights[met.pairs]
    pull = add_at(torch.zeros_like(z.values), met.first, met_weights * z_second)
    pull = add_at(pull, met.second, met_weights * z_first)
    others = z.values.new_zeros(0 if z.shift is None else entries.n_features)
    if z.shift is not None:
        others = add_at(add_at(others, first, weights * z.shift[second]), second, weights * z.shift[first])
    return Pushed(correlations, pull, others, float(((correlations - tau) * weights).sum()))


class Meetings(NamedTuple):
    """Every (pair, row on which both of its features fire)."""

    pairs: Tensor
    """Position of the pair."""
    first: Tensor
    """Entry of its first feature."""
    second: Tensor
    """Entry of its second feature."""


def meetings(entries: Entries, first: Tensor, second: Tensor) -> Meetings:
    """Where the pairs meet: each walks the rows of its rarer feature and asks a bitmap for the other."""
    device, by_feature, support = entries.indices.device, entries.pattern.by_feature, entries.support
    swap = support[second] < support[first]
    rare, other = torch.where(swap, second, first), torch.where(swap, first, second)
    lengths = support[rare]
    pairs = torch.repeat_interleave(torch.arange(rare.numel(), device=device), lengths)
    mine = torch.arange(pairs.numel(), device=device)
    mine += (by_feature.offsets[rare] - lengths.cumsum(0) + lengths)[pairs]
    rows = by_feature.rows[mine]
    bitmap = FiringBitmap(entries)
    places = bitmap.first_word[other][pairs] + (rows >> 6)
    met = ((bitmap.words[places] >> (rows & 63)) & 1).nonzero().squeeze(1)
    pairs, mine, places = pairs[met], mine[met], places[met]
    theirs = bitmap.rank(places, rows[met] & 63)
    swapped = swap[pairs]
    mine, theirs = by_feature.order[mine], by_feature.order[theirs]
    return Meetings(pairs, torch.where(swapped, theirs, mine), torch.where(swapped, mine, theirs))


class FiringBitmap:
    """A bit for every row and live feature, and for each word of 64 rows how many entries come before it.

    Features that never fire share one run of empty words, so the size follows what fires: B/8 bytes a live feature.
    """

    def __init__(self, entries: Entries):
        width = -(-entries.n_rows // 64)
        live = entries.support > 0
        self.first_word = torch.where(live, live.cumsum(0), 0) * width
        by_feature = entries.pattern.by_feature
        places = self.first_word[entries.indices[by_feature.order]] + (by_feature.rows >> 6)
        self.words = torch.zeros((int(live.sum()) + 1) * width, dtype=torch.int64, device=places.device)
        self.words.index_add_(0, places, torch.ones_like(places) << (by_feature.rows & 63))
        counts = torch.bincount(places, minlength=self.words.numel())
        self.before = counts.cumsum(0).sub_(counts).int()

    def rank(self, places: Tensor, bits: Tensor) -> Tensor:
        """Entry (counted feature by feature) at bit `bits` of the words at `places`; the bit must be set."""
        return self.before[places] + popcount(self.words[places] & ((torch.ones_like(bits) << bits) - 1))


def popcount(words: Tensor) -> Tensor:
    """Bits set in each int64, by adding up neighbouring fields of 1, 2 and 4 bits, then all bytes in one product."""
    words = words - ((words >> 1) & 0x5555555555555555)
    words = (words & 0x3333333333333333) + ((words >> 2) & 0x3333333333333333)
    return (((words + (words >> 4)) & 0x0F0F0F0F0F0F0F0F) * 0x0101010101010101) >> 56
