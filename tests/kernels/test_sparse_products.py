"""The sparse operations against plain loops: values and every gradient, on random patterns with every kind of gap."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unbraid.kernels import products, reference
from unbraid.kernels.autograd import active_entries, decode
from unbraid.kernels.pattern import Pattern


@st.composite
def problems(draw):
    """(pattern, values, x_BD, W_ND): empty rows, dead features, features that fire everywhere, no entry at all."""
    rows, features, width = draw(st.integers(1, 7)), draw(st.integers(1, 9)), draw(st.integers(1, 20))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    active = torch.rand(rows, features, generator=generator) < draw(st.sampled_from([0.0, 0.15, 0.6, 1.0]))
    if draw(st.booleans()):
        active[draw(st.integers(0, rows - 1))] = False
        active[:, draw(st.integers(0, features - 1))] = False
    pattern = Pattern.from_rows(*active.nonzero(as_tuple=True), *active.shape)
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return pattern, make(pattern.indices.numel()), make(rows, width), make(features, width)


@given(problems())
def test_both_orders_list_the_same_entries(problem):
    pattern, *_ = problem
    entries = pattern.by_feature
    features = torch.arange(pattern.n_features).repeat_interleave(entries.offsets.diff())
    in_rows = list(zip(pattern.rows.tolist(), pattern.indices.tolist(), strict=True))
    assert in_rows == sorted(in_rows)
    by_feature = list(zip(features.tolist(), entries.rows.tolist(), strict=True))
    assert by_feature == sorted((n, b) for b, n in in_rows)
    assert torch.equal(pattern.indices[entries.order], features)


@given(problems())
def test_fast_products_equal_the_loops(problem):
    pattern, values, x_BD, W_ND = problem
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)  # noqa: E731
    close(products.weighted_rows(pattern, values, W_ND), reference.weighted_rows(pattern, values, W_ND))
    close(products.weighted_columns(pattern, values, x_BD), reference.weighted_columns(pattern, values, x_BD))
    close(products.entry_dots(pattern, x_BD, W_ND), reference.entry_dots(pattern, x_BD, W_ND))
    close(products.sums_by_feature(pattern, values), reference.sums_by_feature(pattern, values))


@given(problems())
def test_decoding_has_the_dense_value_and_gradients(problem):
    pattern, values, x_BD, W_ND = problem
    fast, slow = ([t.clone().requires_grad_() for t in (values, W_ND)] for _ in range(2))
    f_BN = torch.zeros(pattern.n_rows, pattern.n_features, dtype=torch.float64)
    dense = f_BN.index_put((pattern.rows, pattern.indices), slow[0]) @ slow[1]
    sparse = decode(*fast, pattern)
    torch.testing.assert_close(sparse, dense, rtol=1e-12, atol=1e-12)
    (sparse * x_BD).sum().backward()
    (dense * x_BD).sum().backward()
    for mine, theirs in zip(fast, slow, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-12, atol=1e-12)


@given(problems(), st.booleans())
def test_active_entries_have_the_dense_gradients(problem, with_bias):
    pattern, weights, x_BD, W_ND = problem
    b_dec, b_enc = x_BD.mean(0) + 0.1, W_ND.mean(1)
    fast, slow = ([t.clone().requires_grad_() for t in (x_BD, b_dec, W_ND, b_enc)] for _ in range(2))
    pre_BN = (slow[0] - slow[1]) @ slow[2].T + (slow[3] if with_bias else 0)
    wanted = pre_BN[pattern.rows, pattern.indices]
    entries = active_entries(*fast[:3], fast[3] if with_bias else None, (x_BD - b_dec), wanted.detach(), pattern)
    assert torch.equal(entries, wanted)
    (entries * weights).sum().backward()
    (wanted * weights).sum().backward()
    for mine, theirs in zip(fast[: 3 + with_bias], slow, strict=False):
        expected = torch.zeros_like(theirs) if theirs.grad is None else theirs.grad
        torch.testing.assert_close(mine.grad, expected, rtol=1e-12, atol=1e-12)


@given(problems(), st.data())
def test_a_split_pattern_decodes_each_feature_group_apart(problem, data):
    pattern, values, _, W_ND = problem
    cuts = data.draw(st.sets(st.integers(1, pattern.n_features), max_size=3)) | {pattern.n_features}
    widths = sorted(cuts)
    parts = products.weighted_rows(pattern.split(widths), values, W_ND).view(pattern.n_rows, len(widths), -1)
    f_BN = torch.zeros(pattern.n_rows, pattern.n_features, dtype=torch.float64)
    f_BN[pattern.rows, pattern.indices] = values
    for group, (start, end) in enumerate(zip([0, *widths], widths, strict=False)):
        torch.testing.assert_close(parts[:, group], f_BN[:, start:end] @ W_ND[start:end], rtol=1e-12, atol=1e-12)
    split = pattern.split(widths)
    assert torch.equal(split.by_feature.rows, split.rows[split.by_feature.order])


def test_wide_patterns_sort_by_feature_too():
    indices = torch.tensor([40_000, 3, 50_000])
    pattern = Pattern.from_rows(torch.tensor([0, 1, 1]), indices, 2, 60_000)
    assert pattern.indices[pattern.by_feature.order].tolist() == [3, 40_000, 50_000]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_keep_the_dtype_and_repeat_bit_for_bit(dtype):
    generator = torch.Generator().manual_seed(0)
    active = torch.rand(64, 128, generator=generator) < 0.1
    pattern = Pattern.from_rows(*active.nonzero(as_tuple=True), *active.shape)
    values = torch.rand(pattern.indices.numel(), generator=generator, dtype=dtype)
    x_BD = torch.randn(64, 40, generator=generator, dtype=dtype)
    W_ND = torch.randn(128, 40, generator=generator, dtype=dtype)
    for product in (
        lambda: products.weighted_rows(pattern, values, W_ND),
        lambda: products.weighted_columns(pattern, values, x_BD),
        lambda: products.entry_dots(pattern, x_BD, W_ND),
        lambda: products.sums_by_feature(pattern, values),
    ):
        assert product().dtype == dtype
        assert torch.equal(product(), product())
