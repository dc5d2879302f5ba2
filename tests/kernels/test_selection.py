"""Selection against sorting everything: the same entries, whatever the shape, the ties and the guess."""

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st

from unbraid.kernels import selection


@st.composite
def matrices(draw, levels: int = 0) -> torch.Tensor:
    """Random [B, N]; with `levels`, values repeat often."""
    rows = draw(st.integers(1, 40))
    features = draw(st.sampled_from([1, 3, 8, 24, 64, 128, 512]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    if levels:
        return torch.randint(-levels, levels + 1, (rows, features), generator=generator).float()
    return torch.randn(rows, features, generator=generator)


@given(matrices(), st.integers(1, 8))
def test_top_k_is_the_k_largest_of_each_row(pre_BN, k):
    k = min(k, pre_BN.shape[1])
    values, features = selection.top_k(pre_BN, k)
    expected_values, expected_features = reference.top_k(pre_BN, k)
    assert torch.equal(features, expected_features)
    assert torch.equal(values, expected_values)


@given(matrices(levels=3), st.integers(1, 8))
def test_top_k_gives_ties_to_the_first_features(pre_BN, k):
    k = min(k, pre_BN.shape[1])
    values, features = selection.top_k(pre_BN, k)
    expected_values, expected_features = reference.top_k(pre_BN, k)
    assert torch.equal(features, expected_features)
    assert torch.equal(values, expected_values)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_top_k_of_a_row_that_is_not_finite_is_nan(value):
    pre_BN = torch.randn(3, 64)
    pre_BN[1, 17] = value
    values, features = selection.top_k(pre_BN, 4)
    assert values.isnan().any(1).tolist() == [False, True, False]
    assert (features.diff(dim=1) > 0).all()


@given(matrices(), st.floats(-1, 3), st.booleans())
def test_entries_above_a_threshold_are_all_found_in_order(pre_BN, threshold, one_each):
    threshold_N = torch.full((pre_BN.shape[1],), threshold)
    if one_each:
        threshold_N += torch.linspace(0, 1, len(threshold_N))
    codes = selection.entries_above(pre_BN, threshold_N if one_each else threshold)
    rows, features = reference.entries_above(pre_BN, threshold_N)
    assert torch.equal(codes.rows(), rows) and torch.equal(codes.indices, features)
    assert torch.equal(codes.values, pre_BN[rows, features])
    assert codes.offsets.tolist() == [int((rows < b).sum()) for b in range(len(pre_BN) + 1)]


@given(matrices(), st.integers(1, 300), st.sampled_from([0.0, 0.01, 0.5, 1.0, 2.0, 99.0]))
def test_batch_top_k_does_not_depend_on_the_guess(pre_BN, count, guess):
    codes = selection.batch_top_k(pre_BN, count, guess)
    rows, features = reference.batch_top_k(pre_BN, count)
    assert torch.equal(codes.rows(), rows) and torch.equal(codes.indices, features)
    assert (codes.values > 0).all()


@given(matrices(levels=2), st.integers(1, 60), st.sampled_from([0.0, 0.5, 1.0]))
def test_batch_top_k_gives_ties_at_the_cut_to_the_earlier_entry(pre_BN, count, guess):
    codes = selection.batch_top_k(pre_BN, count, guess)
    rows, features = reference.batch_top_k(pre_BN, count)
    assert torch.equal(codes.rows(), rows) and torch.equal(codes.indices, features)


@given(matrices())
def test_density_is_the_share_of_every_16th_row(pre_BN):
    assert selection.density_above(pre_BN, 0.0) == (pre_BN[::16] > 0).double().mean().item()
