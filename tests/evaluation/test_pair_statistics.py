"""The tiled statistics equal the plain N x N matrix, whatever the tile, the path and the chunking."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unbraid.errors import CodesError, EvaluationError
from unbraid.evaluation import pairs
from unbraid.evaluation.correlation import correlation_summary


def random_codes(seed: int, n_tokens: int, n_features: int, density: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    active = torch.rand(n_tokens, n_features, generator=generator) < density
    return torch.rand(n_tokens, n_features, generator=generator, dtype=torch.float64) * active


def full_matrix(f: torch.Tensor, measure: str, min_support: int) -> np.ndarray:
    """Upper-triangle correlations of live pairs, the slow way."""
    live = (f > 0).sum(0) >= min_support
    f = f[:, live].numpy()
    if measure == "pearson":
        f = f - f.mean(0)
    norms = np.linalg.norm(f, axis=0)
    keep = norms > 1e-9
    f = np.where(keep, f / np.where(keep, norms, 1), 0)
    c = f.T @ f
    return c[np.triu_indices(len(c), k=1)]


@given(
    seed=st.integers(0, 1000),
    n_tokens=st.integers(1, 40),
    n_features=st.integers(1, 25),
    density=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    measure=st.sampled_from(["cosine", "pearson"]),
    min_support=st.integers(1, 3),
    tile=st.sampled_from([1, 30, 1 << 24]),
    dense=st.sampled_from([0, 10**9]),
)
def test_tiles_equal_the_full_matrix(seed, n_tokens, n_features, density, measure, min_support, tile, dense):
    f = random_codes(seed, n_tokens, n_features, density)
    expected = full_matrix(f, measure, min_support)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pairs, "TILE_ENTRIES", tile)
        patch.setattr(pairs, "DENSE_TILE_SPEEDUP", dense)
        summary = correlation_summary(f.split(7), n_features, fraction=0.1, measure=measure, min_support=min_support)
    assert summary.n_pairs == len(expected)
    if len(expected):
        assert summary.mean == pytest.approx(expected.mean(), abs=1e-10)
        assert summary.std == pytest.approx(expected.std(), abs=1e-7)
        top = np.sort(expected)[::-1][: summary.n_selected].clip(0)
        assert summary.top == pytest.approx(top.mean(), abs=1e-10)
        assert (summary.pairs[:, 0] < summary.pairs[:, 1]).all()
        shown = np.sort(summary.correlations.numpy())[::-1]
        np.testing.assert_allclose(shown, top[top > 0][: len(shown)], atol=1e-10)


def test_sparse_codes_and_dense_codes_give_the_same_summary():
    f = random_codes(3, 200, 40, 0.1)

    class Sparse:
        n_features = 40
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), (f > 0).sum(1).cumsum(0)])
        indices = f.nonzero()[:, 1]
        values = f[f > 0]

    a = correlation_summary([Sparse()], 40, fraction=0.05)
    b = correlation_summary([f[:150], f[150:]], 40, fraction=0.05)
    assert a.mean == b.mean and a.top == b.top and torch.equal(a.pairs, b.pairs)


def test_the_tail_stays_exact_when_it_is_pruned_on_the_way():
    f = random_codes(5, 300, 120, 0.2)
    expected = np.sort(full_matrix(f, "cosine", 1))[::-1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pairs, "TILE_ENTRIES", 200)
        patch.setattr(pairs._Tail, "SLACK", 0)
        (statistics,) = pairs.pair_statistics(pairs.stack_codes([f], 120), [pairs.View()], keep=0.01)
    np.testing.assert_allclose(statistics.values, expected[: len(statistics.values)], atol=1e-12)
    assert statistics.quantile(0.995) == pytest.approx(expected[len(expected) - int(np.ceil(0.995 * len(expected)))])


def test_ties_go_to_the_lowest_pair_id():
    f = torch.eye(6)[:4].double()
    f[0, 5] = f[1, 4] = f[2, 3] = 2.0
    f[3, 3] = 0.0
    summary = correlation_summary([f], 6, fraction=1 / 15)
    assert summary.n_selected == 1 and summary.pairs.tolist() == [[0, 5]]


def test_bad_codes_are_refused_with_a_reason():
    with pytest.raises(CodesError, match="negative"):
        correlation_summary([torch.tensor([[-1.0, 0.0]])], 2)
    with pytest.raises(CodesError, match=r"expected \[tokens, 3\]"):
        correlation_summary([torch.zeros(1, 2)], 3)
    with pytest.raises(EvaluationError, match="no codes"):
        correlation_summary([], 2)
