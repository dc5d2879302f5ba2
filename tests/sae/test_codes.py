"""Codes: what goes in comes out, in order, and gradients pass through."""

import doctest

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unbraid.errors import CodesError
from unbraid.kernels import codes as codes_module
from unbraid.sae import Codes


@st.composite
def dense_codes(draw) -> torch.Tensor:
    rows, features = draw(st.integers(0, 6)), draw(st.integers(1, 9))
    density = draw(st.sampled_from([0.0, 0.2, 0.7, 1.0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    values = torch.rand(rows, features, generator=generator, dtype=torch.float64) + 0.1
    return values * (torch.rand(rows, features, generator=generator) < density)


@given(dense_codes())
def test_dense_codes_survive_the_round_trip(f_BN):
    codes = Codes.from_dense(f_BN)
    assert torch.equal(codes.to_dense(), f_BN)
    assert codes.n_rows == len(f_BN) and codes.n_features == f_BN.shape[1]
    assert float(codes.l0) == pytest.approx((f_BN > 0).sum().item() / max(1, len(f_BN)))


@given(dense_codes())
def test_entries_are_in_csr_order_and_positive(f_BN):
    codes = Codes.from_dense(f_BN)
    assert codes.offsets.dtype == codes.indices.dtype == torch.int64
    assert codes.offsets[0] == 0 and codes.offsets[-1] == codes.indices.numel() == codes.values.numel()
    assert (codes.values > 0).all()
    for row in range(codes.n_rows):
        mine = slice(int(codes.offsets[row]), int(codes.offsets[row + 1]))
        assert (codes.rows()[mine] == row).all()
        assert (codes.indices[mine].diff() > 0).all()


def test_topk_pairs_may_come_in_any_order_and_padded_with_zeros():
    indices = torch.tensor([[5, 1, 0], [2, 3, 4], [0, 1, 2]])
    values = torch.tensor([[0.5, 0.1, 0.0], [0.2, 0.3, 0.4], [0.0, 0.0, -1.0]])
    codes = Codes.from_topk(indices, values, 6)
    assert codes.offsets.tolist() == [0, 2, 5, 5]
    assert codes.indices.tolist() == [1, 5, 2, 3, 4]
    assert codes.to_dense()[0].tolist() == pytest.approx([0, 0.1, 0, 0, 0, 0.5])


def test_gradients_reach_what_the_codes_were_made_of():
    f_BN = torch.tensor([[0.0, 2.0], [3.0, 0.0]], requires_grad=True)
    (Codes.from_dense(f_BN).to_dense() * torch.tensor([[1.0, 2.0], [3.0, 4.0]])).sum().backward()
    assert f_BN.grad.tolist() == [[0.0, 2.0], [3.0, 0.0]]
    assert not Codes.from_dense(f_BN).detach().values.requires_grad


def test_codes_that_are_no_matrix_are_refused_by_shape():
    with pytest.raises(CodesError, match=r"\(2, 3, 4\).*\[B, N\]"):
        Codes.from_dense(torch.ones(2, 3, 4))


def test_the_docstring_example_runs():
    assert doctest.testmod(codes_module).attempted == 2


def test_numbers_that_are_not_finite_are_refused_and_never_dropped():
    for bad in (float("nan"), float("inf")):
        for attempt in (
            lambda bad=bad: Codes.from_dense(torch.tensor([[1.0, bad]])),
            lambda bad=bad: Codes.from_topk(torch.tensor([[0, 1]]), torch.tensor([[1.0, bad]]), 2),
        ):
            with pytest.raises(CodesError, match=f"to {bad}"):
                attempt()


def test_a_feature_named_twice_in_a_row_decodes_as_its_sum():
    codes = Codes.from_topk(torch.tensor([[1, 0, 1]]), torch.tensor([[1.0, 2.0, 3.0]]), 2)
    assert codes.to_dense().tolist() == [[2.0, 4.0]]


def test_codes_with_other_values_share_one_sort_whoever_asks_first():
    codes = Codes.from_dense(torch.rand(5, 7, generator=torch.Generator().manual_seed(0)).sub(0.5).relu())
    other = codes.with_values(codes.values * 2)
    assert other.order is codes.order and other.support is codes.support
    assert torch.equal(other.to_dense(), 2 * codes.to_dense())
