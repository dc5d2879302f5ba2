"""Loops that no chain of tensor operations does well, compiled by Numba, for tensors on a CPU.

What they share is a decision per number (is it among the largest of its row, has this pair met before), for which whole
tensors would have to be written and read again. A loop works on one range of rows, features or pairs; `on_cpu.py` runs
several at once. Ranges are cut by the data alone, so the same codes give the same bits on any number of threads. The
first call ever compiles a loop, a second or two; later processes load it from a cache. Every loop has a twin in tensor
operations, which runs on other devices and which the tests compare it with.
"""

from collections.abc import Callable
from typing import Any, no_type_check

import numba
import numpy as np

LANES = 16
SEARCHED = 16
"""A list of rows this many times longer than another is searched, not walked."""
WALKED = 2
"""Pairs are worked out together where their first feature leads fewer co-activations than this many a pair and row."""


def compiled(function: Callable[..., Any]) -> Any:
    """A function as machine code, kept on disk for later processes where there is a folder to write to."""
    try:
        return numba.njit(nogil=True, cache=True, error_model="numpy")(function)
    except RuntimeError:
        return numba.njit(nogil=True, error_model="numpy")(function)


@compiled
@no_type_check
def top_k(part, start, end, pre_BN, k, values_BK, features_BK):
    """The k largest entries of each row, by ascending feature; of equal ones the first. NaN for rows not finite.

    Where k group maxima reach a bar, k entries do, so the k largest are among the few entries that reach it. Groups
    are strided, so that maxima are taken along whole vectors.
    """
    n = pre_BN.shape[1]
    groups = n // LANES if n // LANES > 2 * k else n
    maxima, held, places = np.empty(groups, pre_BN.dtype), np.empty(n, pre_BN.dtype), np.empty(n, np.int64)
    for row in range(start, end):
        row_N = pre_BN[row]
        maxima[:] = row_N[:groups]
        for first in range(groups, n, groups):
            stride = row_N[first : first + groups]
            for group in range(stride.size):
                most, value = maxima[group], stride[group]
                maxima[group] = value if value > most else most
        count = entries_from(bar_reached(maxima, k, k // 4), row_N, held, places)
        if count < k:
            values_BK[row], features_BK[row] = np.nan, np.arange(k)
            continue
        cut = bar_reached(held[:count], k, 0)
        spare = count - k
        for j in range(count):
            spare -= held[j] < cut
        kept = 0
        for j in range(count - 1, -1, -1):
            if held[j] == cut and spare > 0:
                spare -= 1
            elif held[j] >= cut:
                kept += 1
                values_BK[row, k - kept], features_BK[row, k - kept] = held[j], places[j]


@compiled
@no_type_check
def bar_reached(values, k, slack):
    """The largest bar tried that k values reach, by halving: at most k + slack do, or the others tie at it.

    NaN, which nothing reaches, where a value is not finite.
    """
    half = values.dtype.type(0.5)
    low = high = values[0]
    finite = True
    for value in values:
        low = value if value < low else low
        high = value if value > high else high
        finite = finite and value - value == 0
    if not finite:
        return values.dtype.type(np.nan)
    reached = values.size
    while reached > k + slack:
        middle = low * half + high * half
        if not low < middle < high:
            return high if count_from(high, values) >= k else low
        at_middle = count_from(middle, values)
        if at_middle >= k:
            low, reached = middle, at_middle
        else:
            high = middle
    return low


@compiled
@no_type_check
def count_from(bar, values):
    """How many values reach the bar."""
    count = np.int32(0)
    for value in values:
        count += np.int32(value >= bar)
    return count


@compiled
@no_type_check
def entries_from(bar, row_N, held, places):
    """Write down the entries that reach the bar, in order; returns how many. Most blocks are passed over as a whole."""
    count = 0
    for block in range(0, row_N.size, LANES):
        last = min(block + LANES, row_N.size)
        if last - block == LANES:
            reached = np.int32(0)
            for j in range(LANES):
                reached += np.int32(row_N[block + j] >= bar)
            if reached == 0:
                continue
        for j in range(block, last):
            if row_N[j] >= bar:
                held[count], places[count] = row_N[j], j
                count += 1
    return count


@compiled
@no_type_check
def count_pairs(part, start, end, offsets, entries, row_ends, indices, z, shift, steps, bits, histogram, sums):
    """Ranks of the pairs led by features start..end, counted in bins; sums of their dots and of squares.

    Rounding can take a correlation beyond 1 and its rank beyond the last bin, which counts it.
    """
    last = histogram.shape[1] - 1
    sparse, met, dots = np.full(offsets.size, np.nan), np.empty(offsets.size, np.int32), np.empty(offsets.size)
    total, squares = 0.0, 0.0
    for first in range(start, end):
        n_met = meet_later(offsets[first], offsets[first + 1], entries, row_ends, indices, z, sparse, met, dots)
        for m in range(n_met):
            apart = shift[first] * shift[met[m]] if shift.size > 0 else 0.0
            correlation = dots[m] - apart
            total += dots[m]
            squares += correlation * correlation - apart * apart
            rank = np.int64(np.rint(correlation * steps))
            if rank > 0:
                histogram[part, min((rank - 1) >> bits, last)] += 1
    sums[part, 0], sums[part, 1] = total, squares


@compiled
@no_type_check
def place_pairs(part, start, end, offsets, entries, row_ends, indices, z, shift, steps, bar, places, pairs, found):
    """Write the pairs led by features start..end whose rank is at least `bar`, from `places[part]` on."""
    sparse, met, dots = np.full(offsets.size, np.nan), np.empty(offsets.size, np.int32), np.empty(offsets.size)
    place = places[part]
    for first in range(start, end):
        n_met = meet_later(offsets[first], offsets[first + 1], entries, row_ends, indices, z, sparse, met, dots)
        for m in range(n_met):
            correlation = dots[m]
            if shift.size > 0:
                correlation -= shift[first] * shift[met[m]]
            if np.int64(np.rint(correlation * steps)) >= bar:
                pairs[0, place], pairs[1, place], found[place] = first, met[m], correlation
                place += 1


@compiled
@no_type_check
def meet_later(start, end, entries, row_ends, indices, z, sparse, met, dots):
    """Dot products of one feature with those after it: returns how many it met; which, in `met`, and their `dots`.

    `sparse` [N] is NaN before and after, as centred values may have a dot product of any sign, or zero. A feature that
    fires once meets the rest of one row, each feature once.
    """
    n_met = 0
    if end - start == 1:
        entry = entries[start]
        for other in range(entry + 1, row_ends[start]):
            met[n_met], dots[n_met] = indices[other], z[entry] * z[other]
            n_met += 1
        return n_met
    for at in range(start, end):
        entry = entries[at]
        own = z[entry]
        for other in range(entry + 1, row_ends[at]):
            second, product = indices[other], own * z[other]
            before = sparse[second]
            new = before != before
            met[n_met] = second
            n_met += new
            sparse[second] = product if new else before + product
    for m in range(n_met):
        dots[m] = sparse[met[m]]
        sparse[met[m]] = np.nan
    return n_met


@compiled
@no_type_check
def push_apart(
    part, start, end, firsts, seconds, offsets, order, rows, row_ends, indices, z, shift, tau, step, weight, found,
    pull, others, hinges,
):  # fmt: skip
    """Correlations of pairs; for those above tau by more than a step, the sum over tau and parts of its gradient.

    A part has its own row of `pull` [parts, nnz], which goes to an entry itself, and of `others` [parts, N], which goes
    through the mean of a whole feature; without shifts (cosine) `shift` and `others` are empty. Neighbouring pairs with
    the same first feature that are many beside the co-activations it leads are worked out by walking these, others one
    by one; of a feature that fires once, by going through the rest of its row, in which S names its partners in order.
    """
    mine, theirs = np.empty(rows.size + 1, np.int64), np.empty(rows.size + 1, np.int64)
    dots, weights = np.zeros(offsets.size), np.zeros(offsets.size)
    pull, others = pull[part], others[part]
    pair, hinge = start, 0.0
    while pair < end:
        run, first = pair, firsts[pair]
        entry, last = offsets[first], offsets[first + 1]
        led = 0
        for at in range(entry, last):
            led += row_ends[at] - 1 - order[at]
        while pair < end and firsts[pair] == first:
            pair += 1
        lone = last - entry == 1
        walked = not lone and led <= WALKED * (pair - run) * (last - entry)
        if walked:
            for at in range(entry, last):
                one = order[at]
                for other in range(one + 1, row_ends[at]):
                    dots[indices[other]] += z[one] * z[other]
        for near in range(run, pair):
            second = seconds[near]
            if lone:
                if near == run or second < seconds[near - 1]:
                    one = other = order[entry]
                while other < row_ends[entry] and indices[other] < second:
                    other += 1
                mine[0], theirs[0] = one, other
                n_met = np.int64(other < row_ends[entry] and indices[other] == second)
            elif not walked:
                n_met = meet(entry, last, offsets[second], offsets[second + 1], rows, mine, theirs)
                for m in range(n_met):
                    mine[m], theirs[m] = order[mine[m]], order[theirs[m]]
            correlation = 0.0
            if walked:
                correlation = dots[second]
            else:
                for m in range(n_met):
                    correlation += z[mine[m]] * z[theirs[m]]
            if shift.size > 0:
                correlation -= shift[first] * shift[second]
            found[near] = correlation
            if correlation - tau > step:
                hinge += correlation - tau
                if shift.size > 0:
                    others[first] += weight * shift[second]
                    others[second] += weight * shift[first]
                if walked:
                    weights[second] = weight
                else:
                    for m in range(n_met):
                        pull[mine[m]] += weight * z[theirs[m]]
                        pull[theirs[m]] += weight * z[mine[m]]
        if walked:
            for at in range(entry, last):
                one, pulled = order[at], 0.0
                for other in range(one + 1, row_ends[at]):
                    second = indices[other]
                    pulled += weights[second] * z[other]
                    pull[other] += weights[second] * z[one]
                    dots[second] = 0.0
                pull[one] += pulled
            for near in range(run, pair):
                weights[seconds[near]] = 0.0
    hinges[part] = hinge


@compiled
@no_type_check
def meet(at, end, other, other_end, rows, mine, theirs):
    """Entries of two features on the same row: short lists are walked together, a much longer one is searched."""
    n_met = 0
    if other_end - other > SEARCHED * (end - at):
        for entry in range(at, end):
            other = first_from(rows[entry], rows, other, other_end)
            mine[n_met], theirs[n_met] = entry, other
            n_met += other < other_end and rows[other] == rows[entry]
    elif end - at > SEARCHED * (other_end - other):
        for entry in range(other, other_end):
            at = first_from(rows[entry], rows, at, end)
            mine[n_met], theirs[n_met] = at, entry
            n_met += at < end and rows[at] == rows[entry]
    else:
        while at < end and other < other_end:
            row, other_row = rows[at], rows[other]
            mine[n_met], theirs[n_met] = at, other
            n_met += row == other_row
            at += row <= other_row
            other += other_row <= row
    return n_met


@compiled
@no_type_check
def first_from(row, rows, low, high):
    """The first entry in low..high whose row is at least `row`, by halving."""
    while low < high:
        middle = (low + high) // 2
        if rows[middle] < row:
            low = middle + 1
        else:
            high = middle
    return low
