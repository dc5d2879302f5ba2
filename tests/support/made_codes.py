"""Codes for the decorrelation tests: awkward small ones, and large sparse ones with known entangled pairs."""

import math
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor


@st.composite
def awkward_codes(draw, dtype: torch.dtype = torch.float64) -> Tensor:
    """[B, N] codes with few distinct values (ties), dead, single-firing and duplicated features, maybe no rows."""
    n_rows = draw(st.integers(0, 12))
    n_features = draw(st.integers(1, 14))
    seed = draw(st.integers(0, 2**20))
    density = draw(st.sampled_from([0.1, 0.3, 0.6, 1.0]))
    levels = draw(st.sampled_from([1, 3, 1000]))
    draws = torch.Generator().manual_seed(seed)
    active = torch.rand(n_rows, n_features, generator=draws) < density
    f_BN = (torch.randint(1, levels + 1, (n_rows, n_features), generator=draws) / 8).to(dtype) * active
    if n_rows and draw(st.booleans()):
        f_BN[1:, 0] = 0
    if n_features > 2 and draw(st.booleans()):
        f_BN[:, 1] = f_BN[:, 2]
    if draw(st.booleans()):
        f_BN[:, -1] = 0
    return f_BN


def sparse_codes(n_rows: int, n_features: int, k: int, seed: int) -> tuple[Tensor, Tensor]:
    """Indices and values [B, K] of k distinct features a row, exponential values, Zipf-like frequencies."""
    draws = torch.Generator().manual_seed(seed)
    weights = (torch.arange(n_features) + 10.0) ** -0.7
    weights = weights[torch.randperm(n_features, generator=draws)]
    indices_BK = torch.multinomial(weights.expand(n_rows, -1), k, generator=draws)
    return indices_BK, torch.empty(n_rows, k).exponential_(generator=draws) + 0.05


@dataclass
class SparseRows:
    """Somebody's sparse codes: nothing but the four attributes `codes=` asks for."""

    offsets: Tensor
    indices: Tensor
    values: Tensor
    n_features: int


def planted_codes(n_rows: int, n_features: int, n_pairs: int, seed: int) -> tuple[SparseRows, Tensor]:
    """A batch of rare features of which the pairs [P, 2] returned belong together; the rest is independent.

    Features fire 1 to 20 times in 2048 rows (log-uniform, the same in every batch). The members of a true pair share a
    rate and fire together 85 % of the time, with values that agree up to noise.
    """
    world = torch.Generator().manual_seed(12345)
    labels = torch.randperm(n_features, generator=world)
    n_events = n_features - n_pairs
    rates = torch.exp(torch.rand(n_events, generator=world) * math.log(20)) * n_rows / 2048
    draws = torch.Generator().manual_seed(seed)
    events = torch.repeat_interleave(torch.arange(n_events), torch.poisson(rates, generator=draws).long())
    rows = torch.randint(n_rows, events.shape, generator=draws)
    keys = torch.unique(rows * n_events + events)
    rows, events = keys // n_events, keys % n_events
    magnitudes = torch.rand(rows.shape, generator=draws) + 0.5
    paired, luck = events < n_pairs, torch.rand(rows.shape, generator=draws)
    first, second = ~paired | (luck < 0.925), paired & ((luck < 0.85) | (luck >= 0.925))
    noise = torch.rand(rows.shape, generator=draws) * 0.4 + 0.8
    members = torch.cat([torch.where(paired, 2 * events, events + n_pairs)[first], (2 * events + 1)[second]])
    rows = torch.cat([rows[first], rows[second]])
    values = torch.cat([magnitudes[first], (magnitudes * noise)[second]])
    keys, order = torch.sort(rows * n_features + labels[members])
    counts = torch.bincount(rows, minlength=n_rows)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    pairs = labels[: 2 * n_pairs].reshape(n_pairs, 2).sort(1)[0]
    return SparseRows(offsets, keys % n_features, values[order], n_features), pairs
