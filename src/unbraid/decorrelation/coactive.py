"""The exact path: selection and penalty from co-activations alone, O(W) forward and backward, whatever N is.

Two features that never fire together have C = 0, so the N x N matrix of Eq. 2 is known from the co-active pairs (the
rest enters mu and sigma in closed form). `select` goes through all of them once; `evaluate` looks only at the pairs
of S, walking for each pair the rows on which its features fire, so it costs O(active entries x partners); of a feature
with so many partners that this would cost more, it walks the co-activations instead.

Both measures are a dot product of scaled features minus a product of two per-feature numbers, C_ij = z_i . z_j -
shift_i shift_j with z_bi = f_bi / scale. Cosine divides by the norm and has no shift; Pearson divides by the centred
norm, and the shift sqrt(B) mean_i / centred norm stands for the centring of the inactive entries, which are never
written down. A feature active on every row has none: its entries are centred before anything is multiplied and its
shift is zero. Only such a feature can have a mean above sqrt(B) standard deviations, so no shift exceeds sqrt(B) and
the difference keeps its digits.
"""

import torch
from torch import Tensor

from unbraid.decorrelation.selection import (
    CONSTANT,
    Evaluation,
    Measure,
    Scaled,
    Selection,
    TopPairs,
    add_at,
    best_pairs,
    hinge_weights,
    live_pairs,
    low_support,
    moments,
    nominal_pairs,
    steps_per_unit,
)
from unbraid.distributed.shard import Shard
from unbraid.kernels.co_activation import PARTS, bar_for, bin_bits, co_activations, followers, work_edges
from unbraid.kernels.codes import Codes
from unbraid.kernels.on_cpu import in_parallel, loops_take

PUSH_PARTS = 4
"""Ranges of pairs whose pushes are added up apart, always as many, so that threads do not change the sums."""


def select(
    codes: Codes,
    fraction: float,
    measure: Measure,
    max_pairs_per_feature: int | None = None,
    shard: Shard | None = None,
) -> Selection:
    """S, mu and sigma (Eq. 3, 4) from every co-activation of `codes`.

    With a shard, each rank goes through the pairs whose first feature is its own and keeps those of S.
    """
    shard = shard or Shard(codes.n_features)
    n_live = int((codes.support > 0).sum())
    wanted, limit = nominal_pairs(n_live, fraction, max_pairs_per_feature)
    z = scaled(codes, measure)
    total, squares = sums_without_meeting(z)
    first, second, correlations, met, met_squares = best(codes.with_values(z.values), z, wanted, codes, shard)
    met, met_squares, chosen = shard.ranks.total(met, met_squares, first.numel())
    mean, std = moments(total + met, squares + met_squares, live_pairs(n_live))
    limit = "co-activation" if chosen < wanted else limit
    low = low_support(codes.support, first, second)
    return Selection(first, second, correlations, wanted, mean, std, n_live, limit, low)


def select_inside_groups(codes: Codes, groups: Tensor, n_groups: int, measure: Measure) -> Selection:
    """Every live pair inside a group (those with C > 0 are listed), mu and sigma over the same.

    Each row is cut into one row per group, so only pairs that share a group meet: W / groups.
    """
    alive = torch.bincount(groups[codes.support > 0], minlength=n_groups)
    n_pairs = int((alive * (alive - 1) // 2).sum())
    z = scaled(codes, measure)
    total, squares = sums_without_meeting(z, groups, n_groups)
    rows = codes.rows() * n_groups + groups[codes.indices]
    order = torch.sort(rows, stable=True)[1]
    n_rows = codes.n_rows * n_groups
    inside = Codes.from_rows(rows[order], codes.indices[order], z.values[order], n_rows, codes.n_features)
    first, second, correlations, met, met_squares = best(inside, z, n_pairs, codes, Shard(codes.n_features))
    mean, std = moments(total + met, squares + met_squares, n_pairs)
    low = low_support(codes.support, first, second)
    limit = "co-activation" if first.numel() < n_pairs else "fraction"
    return Selection(first, second, correlations, n_pairs, mean, std, int(alive.sum()), limit, low)


def best(
    entries: Codes, z: Scaled, wanted: int, codes: Codes, shard: Shard
) -> tuple[Tensor, Tensor, Tensor, float, float]:
    """The `wanted` best co-active pairs of `entries`, scaled `codes`, and what all its pairs add to the sums.

    Ranked on the grid of the codes' dtype, in at least float32.
    """
    dtype = torch.promote_types(codes.values.dtype, torch.float32)
    if not loops_take(entries.values):
        return best_listed(entries, z.shift, wanted, dtype, shard)
    from unbraid.kernels import loops

    steps = steps_per_unit(dtype)
    bits, shift = bin_bits(steps), entries.values.new_empty(0) if z.shift is None else z.shift
    edges = work_edges(entries, followers(entries), PARTS, shard.start, shard.end)
    row_ends = entries.offsets[1:][entries.rows_by_feature]
    walk = (entries.feature_offsets, entries.order, row_ends, entries.indices, entries.values, shift, steps)
    by_part = torch.zeros(len(edges) - 1, (steps >> bits) + 2, dtype=torch.int64)
    sums = entries.values.new_zeros(len(edges) - 1, 2)
    # Counted first, so that only pairs are written that reach the bin in which the wanted ones end.
    in_parallel(loops.count_pairs, edges, *walk, bits, by_part, sums)
    bar = bar_for(by_part.sum(0), wanted, bits)
    counts = by_part[:, (bar - 1) >> bits :].sum(1)
    pairs = torch.empty(2, int(counts.sum()), dtype=torch.int64)
    correlations = torch.empty(pairs.shape[1], dtype=torch.float64)
    in_parallel(loops.place_pairs, edges, *walk, bar, counts.cumsum(0) - counts, pairs, correlations)
    first, second, correlations = best_pairs(
        pairs[0], pairs[1], correlations, wanted, steps, codes.n_features, shard.ranks
    )
    total, squares = sums.sum(0).tolist()
    return first, second, correlations.to(dtype), total, squares


def best_listed(
    entries: Codes, shift: Tensor | None, wanted: int, dtype: torch.dtype, shard: Shard
) -> tuple[Tensor, Tensor, Tensor, float, float]:
    """The same in tensor operations, from a list of all co-activations; in float64 where shifts are subtracted."""
    top, total, squares = TopPairs(wanted, entries.n_features, dtype, entries.values.device), 0.0, 0.0
    entries = entries if shift is not None else entries.with_values(entries.values.to(dtype))
    for dots, first, second in co_activations(entries, shard.start, shard.end):
        precise = dots.double()
        total += float(precise.sum())
        if shift is None:
            squares += float(precise.dot(precise))
        else:
            apart = shift[first] * shift[second]
            precise = precise - apart
            squares += float((precise * precise - apart * apart).sum())
        top.add(precise.to(dtype), lambda at, first=first, second=second: (first[at], second[at]))
    return *top.result(shard.ranks), total, squares


def scaled(codes: Codes, measure: Measure) -> Scaled:
    """The features of a batch, at their active entries."""
    values = codes.values.detach().double()
    n_features, n_rows = codes.n_features, codes.n_rows
    squares = add_at(values.new_zeros(n_features), codes.indices, values * values)
    if measure == "cosine":
        inverse = torch.where(squares > 0, squares, torch.inf).rsqrt()
        return Scaled(values * inverse[codes.indices], inverse)
    means = add_at(values.new_zeros(n_features), codes.indices, values) / max(n_rows, 1)
    centred = values - means[codes.indices]
    rest = add_at(torch.zeros_like(means), codes.indices, centred)
    always = codes.support == n_rows
    # The mean of what is left corrects the rounding of the first mean, which may exceed the spread of the feature.
    centred = centred - torch.where(always, rest / max(n_rows, 1), 0.0)[codes.indices]
    norms = add_at(torch.zeros_like(means), codes.indices, centred * centred)
    norms += (n_rows - codes.support) * means * means
    inverse = torch.where(norms > CONSTANT * squares, norms, torch.inf).rsqrt()
    shift = torch.where(always, 0.0, means * inverse * max(n_rows, 1) ** 0.5)
    return Scaled(torch.where(always[codes.indices], centred, values) * inverse[codes.indices], inverse, shift)


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


def evaluate(codes: Codes, selection: Selection, measure: Measure) -> Evaluation:
    """R(tau) = 1/|S| sum of relu(C - tau) over the selected pairs on this batch, and its gradient at active entries.

    A feature that fires once keeps its correlation whatever it fires with, so its gradient is exactly zero.
    """
    z = scaled(codes, measure)
    push = push_by_loop if loops_take(z.values) else push_by_lists
    correlations, pull, others, penalty = push(codes, selection, z)
    centred = z.values
    # What goes to a feature through its norm, the sum of dR/dC C over its pairs, is pull . z - shift * others.
    own = add_at(torch.zeros_like(z.inverse_norm), codes.indices, pull * z.values)
    if z.shift is not None:
        root = max(codes.n_rows, 1) ** 0.5
        own -= z.shift * others
        pull = pull - (others / root)[codes.indices]
        centred = z.values - (z.shift / root)[codes.indices]
    gradient = pull - own[codes.indices] * centred
    movable = torch.where(codes.support > 1, z.inverse_norm, 0.0)
    return Evaluation(penalty, gradient * movable[codes.indices], correlations)


def push_by_loop(codes: Codes, selection: Selection, z: Scaled) -> tuple[Tensor, Tensor, Tensor, float]:
    """Correlations of the pairs, R, and the parts of its gradient, not yet divided by norms.

    In a compiled loop that walks the rows of both features of a pair, or all co-activations of one: for CPUs.

    Returns:
        Correlations [P] in float64; what goes to each entry itself, [nnz]; what goes to each feature through its mean,
        [N], nothing without shifts (cosine); R.
    """
    from unbraid.kernels import loops

    n_pairs = selection.first.numel()
    edges = [n_pairs * part // PUSH_PARTS for part in range(PUSH_PARTS + 1)]
    row_ends = codes.offsets[1:][codes.rows_by_feature]
    walk = [codes.feature_offsets, codes.order, codes.rows_by_feature, row_ends, codes.indices]
    shift = z.values.new_empty(0) if z.shift is None else z.shift
    weight = 1 / max(selection.nominal, 1)
    numbers = [float(selection.tau), 1 / steps_per_unit(codes.values.dtype), weight]
    correlations, pull = z.values.new_empty(n_pairs), z.values.new_zeros(PUSH_PARTS, z.values.numel())
    others, hinges = z.values.new_zeros(PUSH_PARTS, shift.numel()), z.values.new_zeros(PUSH_PARTS)
    written = correlations, pull, others, hinges
    in_parallel(loops.push_apart, edges, selection.first, selection.second, *walk, z.values, shift, *numbers, *written)
    return correlations, pull.sum(0), others.sum(0), float(hinges.sum()) * weight


def push_by_lists(codes: Codes, selection: Selection, z: Scaled) -> tuple[Tensor, Tensor, Tensor, float]:
    """The same in tensor operations, from a list of all rows on which a pair meets."""
    first, second = selection.first, selection.second
    pairs, of_first, of_second = meetings(codes, first, second)
    z_first, z_second = z.values[of_first], z.values[of_second]
    correlations = add_at(z.values.new_zeros(first.numel()), pairs, z_first * z_second)
    if z.shift is not None:
        correlations = correlations - z.shift[first] * z.shift[second]
    weights = hinge_weights(correlations, selection, codes.values.dtype)
    met_weights = weights[pairs]
    pull = add_at(torch.zeros_like(z.values), of_first, met_weights * z_second)
    pull = add_at(pull, of_second, met_weights * z_first)
    others = z.values.new_zeros(0 if z.shift is None else codes.n_features)
    if z.shift is not None:
        others = add_at(add_at(others, first, weights * z.shift[second]), second, weights * z.shift[first])
    return correlations, pull, others, float(((correlations - selection.tau) * weights).sum())


def meetings(codes: Codes, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Every (pair, row on which both fire): the pair's position, the entry of its first feature, and of its second.

    Each pair walks the rows of its rarer feature and asks a bitmap for the other.
    """
    device, support = codes.indices.device, codes.support
    swap = support[second] < support[first]
    rare, other = torch.where(swap, second, first), torch.where(swap, first, second)
    lengths = support[rare]
    pairs = torch.repeat_interleave(torch.arange(rare.numel(), device=device), lengths)
    mine = torch.arange(pairs.numel(), device=device)
    mine += (codes.feature_offsets[rare] - lengths.cumsum(0) + lengths)[pairs]
    rows = codes.rows_by_feature[mine]
    words, before, first_word = firing_bitmap(codes)
    places = first_word[other][pairs] + (rows >> 6)
    met = ((words[places] >> (rows & 63)) & 1).nonzero().squeeze(1)
    pairs, mine, places, bits = pairs[met], mine[met], places[met], rows[met] & 63
    theirs = before[places] + popcount(words[places] & ((torch.ones_like(bits) << bits) - 1))
    swapped = swap[pairs]
    mine, theirs = codes.order[mine], codes.order[theirs]
    return pairs, torch.where(swapped, theirs, mine), torch.where(swapped, mine, theirs)


def firing_bitmap(codes: Codes) -> tuple[Tensor, Tensor, Tensor]:
    """A bit for every row and live feature, in words of 64 rows.

    Features that never fire share one run of empty words, so the size follows what fires: B/8 bytes a live feature.

    Returns:
        The words; for each, how many entries (feature by feature) come before it; each feature's first word, [N].
    """
    width = -(-codes.n_rows // 64)
    live = codes.support > 0
    first_word = torch.where(live, live.cumsum(0), 0) * width
    rows = codes.rows_by_feature
    places = first_word[codes.indices[codes.order]] + (rows >> 6)
    words = torch.zeros((int(live.sum()) + 1) * width, dtype=torch.int64, device=places.device)
    words.index_add_(0, places, torch.ones_like(places) << (rows & 63))
    counts = torch.bincount(places, minlength=words.numel())
    return words, counts.cumsum(0).sub_(counts).int(), first_word


def popcount(words: Tensor) -> Tensor:
    """Bits set in each int64, by adding up neighbouring fields of 1, 2 and 4 bits, then all bytes in one product."""
    words = words - ((words >> 1) & 0x5555555555555555)
    words = (words & 0x3333333333333333) + ((words >> 2) & 0x3333333333333333)
    return (((words + (words >> 4)) & 0x0F0F0F0F0F0F0F0F) * 0x0101010101010101) >> 56
