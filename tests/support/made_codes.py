"""Codes for the decorrelation tests: awkward small ones, and large sparse ones with known entangled pairs."""

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


def planted_codes(n_rows: int, n_features: int, n_pairs: int, rate: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of rare independent features of which 2 * n_pairs fire in pairs: indices, values [B, K], pairs [P, 2].

    Every feature fires on a share `rate` of the rows. The features 2p and 2p + 1 of a relabelling fire together, with
    values that agree up to noise.
    """
    draws = torch.Generator().manual_seed(seed)
    labels = torch.randperm(n_features, generator=torch.Generator().manual_seed(1))
    n_groups = n_features - n_pairs
    fires = torch.rand(n_rows, n_groups, generator=draws) < rate
    rows, groups = fires.nonzero(as_tuple=True)
    magnitudes = torch.rand(rows.numel(), generator=draws) + 0.5
    paired = groups < n_pairs
    rows = torch.cat([rows, rows[paired]])
    members = torch.cat([torch.where(paired, 2 * groups, groups + n_pairs), 2 * groups[paired] + 1])
    noise = torch.rand(int(paired.sum()), generator=draws) * 0.4 + 0.8
    values = torch.cat([magnitudes, magnitudes[paired] * noise])
    counts = torch.bincount(rows, minlength=n_rows)
    order = torch.sort(rows, stable=True)[1]
    starts = counts.cumsum(0) - counts
    places = torch.arange(rows.numel()) - starts[rows[order]]
    indices_BK = torch.zeros(n_rows, int(counts.max()), dtype=torch.int64)
    values_BK = torch.zeros(n_rows, int(counts.max()))
    indices_BK[rows[order], places] = labels[members[order]]
    values_BK[rows[order], places] = values[order]
    pairs = labels[: 2 * n_pairs].reshape(n_pairs, 2).sort(1)[0]
    return indices_BK, values_BK, pairs
