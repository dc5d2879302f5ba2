# pyright: basic
"""The sparse products as Triton kernels, for CUDA tensors.

One program sums one segment (a row when decoding, a feature when building weight gradients) for one slice of D, entry
by entry in order, so results repeat bit for bit, which atomic additions would not. Dot products go feature by feature:
the feature's row is loaded once and meets the batch rows it was active on. `TRITON_INTERPRET=1` runs the same kernels
on CPU tensors, which is how they are tested without a GPU.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor


@triton.jit
def _segment_sums(offsets, indices, weights, matrix, out, width, BLOCK: tl.constexpr):
    segment = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    total = tl.zeros((BLOCK,), dtype=out.dtype.element_ty)
    for entry in range(tl.load(offsets + segment), tl.load(offsets + segment + 1)):
        row = tl.load(indices + entry)
        total += tl.load(weights + entry) * tl.load(matrix + row * width + columns, mask=inside, other=0.0)
    tl.store(out + segment * width + columns, total, mask=inside)


@triton.jit
def _entry_dots(offsets, rows, matrix_b, matrix_n, out, width, BLOCK: tl.constexpr):
    feature = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    for entry in range(tl.load(offsets + feature), tl.load(offsets + feature + 1)):
        row = tl.load(rows + entry)
        total = tl.zeros((BLOCK,), dtype=out.dtype.element_ty)
        for start in range(0, width, BLOCK):
            inside = start + columns < width
            left = tl.load(matrix_b + row * width + start + columns, mask=inside, other=0.0)
            right = tl.load(matrix_n + feature * width + start + columns, mask=inside, other=0.0)
            total += left * right
        tl.store(out + entry, tl.sum(total))


def _block(width: int) -> int:
    return min(1024, triton.next_power_of_2(width))


def segment_sums(
    offsets: Int[Tensor, " segments_and_one"],
    indices: Int[Tensor, " nnz"],
    weights: Float[Tensor, " nnz"],
    matrix: Float[Tensor, "rows D"],
) -> Float[Tensor, "segments D"]:
    """out[s] = sum of weights[e] * matrix[indices[e]] over e in offsets[s]..offsets[s + 1]."""
    matrix = matrix.contiguous()
    n_segments, width = offsets.numel() - 1, matrix.shape[1]
    out = matrix.new_empty(n_segments, width)
    block: Any = _block(width)
    grid = (n_segments, triton.cdiv(width, block))
    _segment_sums[grid](offsets, indices, weights.contiguous(), matrix, out, width, BLOCK=block)
    return out


def entry_dots(
    offsets: Int[Tensor, " features_and_one"],
    rows: Int[Tensor, " nnz"],
    matrix_BD: Float[Tensor, "B D"],
    matrix_ND: Float[Tensor, "N D"],
) -> Float[Tensor, " nnz"]:
    """matrix_BD[rows[e]] . matrix_ND[n] for e in offsets[n]..offsets[n + 1], in that order."""
    matrix_BD, matrix_ND = matrix_BD.contiguous(), matrix_ND.contiguous()
    width = matrix_BD.shape[1]
    out = torch.empty(rows.shape, dtype=matrix_BD.dtype, device=matrix_BD.device)
    block: Any = _block(width)
    _entry_dots[(len(matrix_ND),)](offsets, rows, matrix_BD, matrix_ND, out, width, BLOCK=block)
    return out
