"""The three sparse products a training step is made of, on torch's own operators, and on Triton for CUDA tensors.

`embedding_bag` is a CSR product that needs no transposed copy and is vectorised, threaded and prefetching on every CPU;
`sampled_addmm` computes dot products at given positions only, and runs a third faster when the positions come feature
by feature, because the larger matrix is then read once, in order. None of these build a graph: see `autograd.py`.
"""

import warnings

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from unbraid.kernels.codes import Codes

with warnings.catch_warnings():
    # torch announces once per process that CSR tensors are in beta; taken here, it never interrupts a training run.
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor([0, 1], [0], [0.0], (1, 1))


def segment_sums(
    offsets: Int[Tensor, " segments_and_one"],
    indices: Int[Tensor, " nnz"],
    weights: Float[Tensor, " nnz"],
    matrix: Float[Tensor, "rows D"],
) -> Float[Tensor, "segments D"]:
    """out[s] = sum of weights[e] * matrix[indices[e]] over e in offsets[s]..offsets[s + 1]."""
    if matrix.is_cuda:
        from unbraid.kernels import products_triton

        return products_triton.segment_sums(offsets, indices, weights, matrix)
    return F.embedding_bag(indices, matrix, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True)


def weighted_rows(codes: Codes, matrix_ND: Float[Tensor, "N D"]) -> Float[Tensor, "B D"]:
    """The code times a matrix: out[b] = sum of values * matrix[feature] over row b's entries (decoding)."""
    return segment_sums(codes.offsets, codes.indices, codes.values, matrix_ND)


def weighted_columns(codes: Codes, matrix_BD: Float[Tensor, "B D"]) -> Float[Tensor, "N D"]:
    """The code's transpose times a matrix: out[n] = sum of values * matrix[row] over feature n's entries."""
    return segment_sums(codes.feature_offsets, codes.rows_by_feature, codes.values[codes.order], matrix_BD)


def entry_dots(codes: Codes, matrix_BD: Float[Tensor, "B D"], matrix_ND: Float[Tensor, "N D"]) -> Float[Tensor, " nnz"]:
    """matrix_BD[row] . matrix_ND[feature] at each entry, in row order (the gradient of the codes)."""
    dots = dots_by_feature(codes.feature_offsets, codes.rows_by_feature, matrix_BD, matrix_ND)
    return torch.empty_like(dots).index_copy_(0, codes.order, dots)


def dots_by_feature(
    offsets: Int[Tensor, " features_and_one"],
    rows: Int[Tensor, " nnz"],
    matrix_BD: Float[Tensor, "B D"],
    matrix_ND: Float[Tensor, "N D"],
) -> Float[Tensor, " nnz"]:
    """matrix_BD[rows[e]] . matrix_ND[n] for e in offsets[n]..offsets[n + 1], in that order."""
    if matrix_BD.is_cuda:
        from unbraid.kernels import products_triton

        return products_triton.entry_dots(offsets, rows, matrix_BD, matrix_ND)
    zeros = matrix_BD.new_zeros(rows.numel())
    shape = (len(matrix_ND), len(matrix_BD))
    zeros = torch.sparse_csr_tensor(offsets, rows, zeros, shape, check_invariants=False)
    return torch.sparse.sampled_addmm(zeros, matrix_ND, matrix_BD.T, beta=0.0).values()


def sums_by_feature(codes: Codes) -> Float[Tensor, " N"]:
    """The sum of each feature's values, the same bits every time."""
    return torch.segment_reduce(codes.values[codes.order], "sum", offsets=codes.feature_offsets, initial=0)
