"""All pairs of features at once: sum C^2 through the Gram matrix of the tokens, linear in N.

With Z the scaled codes [B, N], sum over i, j of C_ij^2 is |Z Z^T|^2, a B x B matrix, and its gradient is 4 (Z Z^T) Z,
wanted at active entries only. Features that fire rarely are handled entry by entry (n^2 products for n firings), the
others as dense columns, whichever is less work.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from unbraid.decorrelation.blocks import entries_of_block
from unbraid.decorrelation.entries import Entries
from unbraid.decorrelation.hinge import Evaluation, add_at
from unbraid.decorrelation.measure import Measure, scaled
from unbraid.decorrelation.selection import live_pairs, moments

RARE = 64
"""Firings up to which listing n^2 products beats a dense column of a B x B product."""
COLUMNS = 512
"""Dense columns at a time."""
MEETINGS = 1_000_000
"""Listed products at a time."""


def mean_square(entries: Entries, measure: Measure) -> tuple[Evaluation, float, float, int]:
    """The mean of C^2 over live pairs, its gradient at active entries, mu, sigma, and the number of live features."""
    z = scaled(entries, measure)
    values = z.values  # Stays float64 for Pearson, where the Gram matrix is centred after the product.
    if z.shift is None:
        values = values.to(torch.promote_types(entries.values.dtype, torch.float32))
    n_live = int((entries.support > 0).sum())
    n_pairs = live_pairs(n_live)
    gram_BB = token_gram(entries, values)
    row_sums = add_at(z.values.new_zeros(entries.n_rows), entries.rows, z.values)
    norms = add_at(torch.zeros_like(z.inverse_norm), entries.indices, z.values**2)
    if z.shift is not None:
        gram_BB = gram_BB - gram_BB.mean(0) - gram_BB.mean(1, keepdim=True) + gram_BB.mean()
        row_sums = row_sums - z.shift.sum() / max(entries.n_rows, 1) ** 0.5
        norms = norms - z.shift**2
    squares = float(torch.linalg.vector_norm(gram_BB, dtype=torch.float64)) ** 2
    mean, std = moments(float((row_sums**2).sum() - norms.sum()) / 2, (squares - float((norms**2).sum())) / 2, n_pairs)
    slope = times_codes(gram_BB, entries, values).double() * (2 / max(n_pairs, 1))
    own = add_at(torch.zeros_like(z.inverse_norm), entries.indices, slope * z.values)[entries.indices]
    centred = z.values
    if z.shift is not None:
        centred = z.values - (z.shift / max(entries.n_rows, 1) ** 0.5)[entries.indices]
    movable = torch.where(entries.support > 1, z.inverse_norm, 0.0)[entries.indices]
    value = mean * mean + std * std
    return Evaluation(value, (slope - own * centred) * movable, torch.empty(0, dtype=torch.float64)), mean, std, n_live


def token_gram(entries: Entries, values: Tensor) -> Tensor:
    """Z Z^T [B, B]."""
    n_rows = entries.n_rows
    gram = values.new_zeros(n_rows * n_rows)
    for one, other in meetings_of_rare_features(entries):
        gram = add_at(gram, entries.rows[one] * n_rows + entries.rows[other], values[one] * values[other])
    gram_BB = gram.reshape(n_rows, n_rows)
    for ids, rows, columns, width in dense_features(entries):
        z_Bc = values.new_zeros(n_rows, width)
        z_Bc[rows, columns] = values[ids]
        gram_BB.addmm_(z_Bc, z_Bc.T)
    return gram_BB


def times_codes(gram_BB: Tensor, entries: Entries, values: Tensor) -> Tensor:
    """(Z Z^T) Z at the active entries."""
    out = torch.zeros_like(values)
    for one, other in meetings_of_rare_features(entries):
        out = add_at(out, one, gram_BB[entries.rows[one], entries.rows[other]] * values[other])
    for ids, rows, columns, width in dense_features(entries):
        z_Bc = values.new_zeros(entries.n_rows, width)
        z_Bc[rows, columns] = values[ids]
        out[ids] = (gram_BB @ z_Bc)[rows, columns]
    return out


def dense_features(entries: Entries) -> Iterator[tuple[Tensor, Tensor, Tensor, int]]:
    """Frequent features, a few at a time: their entries, rows and columns, and how many features."""
    for block in (entries.support > RARE).nonzero().squeeze(1).split(COLUMNS):
        yield *entries_of_block(entries, block), block.numel()


def meetings_of_rare_features(entries: Entries) -> Iterator[tuple[Tensor, Tensor]]:
    """All ordered pairs of entries (an entry with itself, too) of the same rare feature."""
    support = entries.support
    rare = ((support > 0) & (support <= RARE)).nonzero().squeeze(1)
    for block in rare.split(MEETINGS // RARE**2):
        ids, _, columns = entries_of_block(entries, block)
        lengths = support[block]
        repeats = lengths[columns]
        one = torch.repeat_interleave(torch.arange(ids.numel(), device=ids.device), repeats)
        run_starts = repeats.cumsum(0) - repeats
        feature_starts = lengths.cumsum(0) - lengths
        other = torch.arange(one.numel(), device=ids.device) - run_starts[one] + feature_starts[columns][one]
        yield ids[one], ids[other]
