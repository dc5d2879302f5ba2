"""The Triton kernels against plain loops: interpreted on CPU tensors here, compiled where there is a GPU."""

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unbraid.kernels.codes import Codes

pytest.importorskip("triton")
from unbraid.kernels import products_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def problem(seed: int, rows: int, features: int, width: int, density: float, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    active = torch.rand(rows, features, generator=generator) < density
    pairs = active.nonzero(as_tuple=True)
    codes = Codes.from_rows(*pairs, torch.randn(len(pairs[0]), generator=generator, dtype=dtype), *active.shape)
    x_BD = torch.randn(rows, width, generator=generator, dtype=dtype)
    return codes, x_BD, torch.randn(features, width, generator=generator, dtype=dtype)


def compare(codes, x_BD, W_ND, **tolerance):
    offsets, order = codes.feature_offsets, codes.order
    there = lambda *tensors: [tensor.to(DEVICE) for tensor in tensors]  # noqa: E731
    rows = products_triton.segment_sums(*there(codes.offsets, codes.indices, codes.values, W_ND))
    columns = products_triton.segment_sums(*there(offsets, codes.rows_by_feature, codes.values[order], x_BD))
    dots = products_triton.entry_dots(*there(offsets, codes.rows_by_feature, x_BD, W_ND))
    torch.testing.assert_close(rows.cpu(), reference.weighted_rows(codes, W_ND), **tolerance)
    torch.testing.assert_close(columns.cpu(), reference.weighted_columns(codes, x_BD), **tolerance)
    torch.testing.assert_close(dots.cpu(), reference.entry_dots(codes, x_BD, W_ND)[order], **tolerance)


@settings(max_examples=12)
@given(
    st.integers(0, 1000),
    st.integers(1, 5),
    st.integers(1, 6),
    st.sampled_from([1, 7, 16, 33]),
    st.sampled_from([0.0, 0.3, 1.0]),
)
def test_triton_products_equal_the_loops(seed, rows, features, width, density):
    compare(*problem(seed, rows, features, width, density), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("width", [1024, 1300])
def test_rows_wider_than_a_block_are_summed_whole(width):
    compare(*problem(0, 3, 4, width, 0.5), rtol=1e-11, atol=1e-11)
    compare(*problem(1, 3, 4, width, 0.5, torch.float32), rtol=1e-4, atol=1e-4)
