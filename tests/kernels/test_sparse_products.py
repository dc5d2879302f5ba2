"""The sparse operations against plain loops: values and every gradient, on random patterns with every kind of gap."""

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st

from unbraid.kernels import products
from unbraid.kernels.autograd import active_entries, decode
from unbraid.kernels.codes import Codes


@st.composite
def problems(draw):
    """(entries with values, x_BD, W_ND): empty rows, dead features, features that fire everywhere, no entry at all."""
    rows, features, width = draw(st.integers(1, 7)), draw(st.integers(1, 9)), draw(st.integers(1, 20))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    active = torch.rand(rows, features, generator=generator) < draw(st.sampled_from([0.0, 0.15, 0.6, 1.0]))
    if draw(st.booleans()):
        active[draw(st.integers(0, rows - 1))] = False
        active[:, draw(st.integers(0, features - 1))] = False
    pairs = active.nonzero(as_tuple=True)
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    codes = Codes.from_rows(*pairs, make(len(pairs[0])), *active.shape)
    return codes, make(rows, width), make(features, width)


@given(problems())
def test_both_orders_list_the_same_entries(problem):
    codes, *_ = problem
    features = torch.arange(codes.n_features).repeat_interleave(codes.feature_offsets.diff())
    in_rows = list(zip(codes.rows().tolist(), codes.indices.tolist(), strict=True))
    assert in_rows == sorted(in_rows)
    by_feature = list(zip(features.tolist(), codes.rows_by_feature.tolist(), strict=True))
    assert by_feature == sorted((n, b) for b, n in in_rows)
    assert torch.equal(codes.indices[codes.order], features)
    assert torch.equal(codes.with_values(codes.values * 2).order, codes.order)


@given(problems())
def test_fast_products_equal_the_loops(problem):
    codes, x_BD, W_ND = problem
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)  # noqa: E731
    close(products.weighted_rows(codes, W_ND), reference.weighted_rows(codes, W_ND))
    close(products.weighted_columns(codes, x_BD), reference.weighted_columns(codes, x_BD))
    close(products.entry_dots(codes, x_BD, W_ND), reference.entry_dots(codes, x_BD, W_ND))
    close(products.sums_by_feature(codes), reference.sums_by_feature(codes))


@given(problems())
def test_decoding_has_the_dense_value_and_gradients(problem):
    codes, x_BD, W_ND = problem
    fast, slow = ([t.clone().requires_grad_() for t in (codes.values, W_ND)] for _ in range(2))
    dense = codes.with_values(slow[0]).to_dense() @ slow[1]
    sparse = decode(codes.with_values(fast[0]), fast[1])
    torch.testing.assert_close(sparse, dense, rtol=1e-12, atol=1e-12)
    (sparse * x_BD).sum().backward()
    (dense * x_BD).sum().backward()
    for mine, theirs in zip(fast, slow, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-12, atol=1e-12)


@given(problems(), st.booleans())
def test_active_entries_have_the_dense_gradients(problem, with_bias):
    codes, x_BD, W_ND = problem
    b_dec, b_enc = x_BD.mean(0) + 0.1, W_ND.mean(1)
    fast, slow = ([t.clone().requires_grad_() for t in (x_BD, b_dec, W_ND, b_enc)] for _ in range(2))
    pre_BN = (slow[0] - slow[1]) @ slow[2].T + (slow[3] if with_bias else 0)
    wanted = pre_BN[codes.rows(), codes.indices]
    made = codes.with_values(wanted.detach())
    made = active_entries(*fast[:3], fast[3] if with_bias else None, (x_BD - b_dec), made)
    assert torch.equal(made.values, wanted)
    (made.values * codes.values).sum().backward()
    (wanted * codes.values).sum().backward()
    for mine, theirs in zip(fast[: 3 + with_bias], slow, strict=False):
        expected = torch.zeros_like(theirs) if theirs.grad is None else theirs.grad
        torch.testing.assert_close(mine.grad, expected, rtol=1e-12, atol=1e-12)


@given(problems(), st.data())
def test_split_codes_decode_each_feature_group_apart(problem, data):
    codes, _, W_ND = problem
    cuts = data.draw(st.sets(st.integers(1, codes.n_features), max_size=3)) | {codes.n_features}
    widths = sorted(cuts)
    split, f_BN = codes.split(widths), codes.to_dense()
    parts = products.weighted_rows(split, W_ND).view(codes.n_rows, len(widths), -1)
    for group, (start, end) in enumerate(zip([0, *widths], widths, strict=False)):
        torch.testing.assert_close(parts[:, group], f_BN[:, start:end] @ W_ND[start:end], rtol=1e-12, atol=1e-12)
    assert torch.equal(split.rows_by_feature, split.rows()[split.order])


@given(problems(), st.data())
def test_codes_split_by_place_decode_groups_of_features_in_another_order(problem, data):
    codes, X_BD, W_ND = problem
    place_N = torch.tensor(data.draw(st.permutations(range(codes.n_features))))
    widths = sorted(data.draw(st.sets(st.integers(1, codes.n_features), max_size=3)) | {codes.n_features})
    split, f_BN = codes.split(widths, place_N), codes.to_dense()
    parts = products.weighted_rows(split, W_ND).view(codes.n_rows, len(widths), -1)
    for group, (start, end) in enumerate(zip([0, *widths], widths, strict=False)):
        members = ((place_N >= start) & (place_N < end)).nonzero().squeeze(1)
        torch.testing.assert_close(parts[:, group], f_BN[:, members] @ W_ND[members], rtol=1e-12, atol=1e-12)
    X_RD = X_BD.repeat_interleave(len(widths), 0)
    torch.testing.assert_close(products.weighted_columns(split, X_RD), f_BN.T @ X_BD, rtol=1e-12, atol=1e-12)
    dots = (X_BD @ W_ND.T)[split.rows() // len(widths), split.indices]
    torch.testing.assert_close(products.entry_dots(split, X_RD, W_ND), dots, rtol=1e-12, atol=1e-12)


def test_wide_codes_sort_by_feature_too():
    indices = torch.tensor([40_000, 3, 50_000])
    codes = Codes.from_rows(torch.tensor([0, 1, 1]), indices, torch.ones(3), 2, 60_000)
    assert codes.indices[codes.order].tolist() == [3, 40_000, 50_000]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_keep_the_dtype_and_repeat_bit_for_bit(dtype):
    generator = torch.Generator().manual_seed(0)
    active = torch.rand(64, 128, generator=generator) < 0.1
    pairs = active.nonzero(as_tuple=True)
    codes = Codes.from_rows(*pairs, torch.rand(len(pairs[0]), generator=generator, dtype=dtype), *active.shape)
    x_BD = torch.randn(64, 40, generator=generator, dtype=dtype)
    W_ND = torch.randn(128, 40, generator=generator, dtype=dtype)
    for product in (
        lambda: products.weighted_rows(codes, W_ND),
        lambda: products.weighted_columns(codes, x_BD),
        lambda: products.entry_dots(codes, x_BD, W_ND),
        lambda: products.sums_by_feature(codes),
    ):
        assert product().dtype == dtype
        assert torch.equal(product(), product())
