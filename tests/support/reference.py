"""The sparse operations as plain loops over active entries: slow, obvious, and what every fast version is tested by."""

import torch
from torch import Tensor

from unbraid.kernels.codes import Codes


def weighted_rows(codes: Codes, matrix_ND: Tensor) -> Tensor:
    """[B, D]: out[b] = sum over row b's entries e of codes.values[e] * matrix[indices[e]]."""
    out_BD = matrix_ND.new_zeros(codes.n_rows, matrix_ND.shape[1])
    for e, (row, feature) in enumerate(zip(codes.rows().tolist(), codes.indices.tolist(), strict=True)):
        out_BD[row] += codes.values[e] * matrix_ND[feature]
    return out_BD


def weighted_columns(codes: Codes, matrix_BD: Tensor) -> Tensor:
    """[N, D]: out[n] = sum over feature n's entries e of codes.values[e] * matrix[row of e]."""
    out_ND = matrix_BD.new_zeros(codes.n_features, matrix_BD.shape[1])
    for e, (row, feature) in enumerate(zip(codes.rows().tolist(), codes.indices.tolist(), strict=True)):
        out_ND[feature] += codes.values[e] * matrix_BD[row]
    return out_ND


def entry_dots(codes: Codes, matrix_BD: Tensor, matrix_ND: Tensor) -> Tensor:
    """[nnz]: out[e] = matrix_BD[row of e] . matrix_ND[feature of e]."""
    out = matrix_BD.new_zeros(codes.indices.numel())
    for e, (row, feature) in enumerate(zip(codes.rows().tolist(), codes.indices.tolist(), strict=True)):
        out[e] = matrix_BD[row] @ matrix_ND[feature]
    return out


def sums_by_feature(codes: Codes) -> Tensor:
    """[N]: the sum of each feature's values."""
    out_N = codes.values.new_zeros(codes.n_features)
    for e, feature in enumerate(codes.indices.tolist()):
        out_N[feature] += codes.values[e]
    return out_N


def top_k(pre_BN: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and features of the k largest entries of each row, features ascending; ties go to the lower feature."""
    order_BN = pre_BN.sort(dim=1, descending=True, stable=True).indices
    features_BK = order_BN[:, :k].sort(dim=1).values
    return pre_BN.gather(1, features_BK), features_BK


def entries_above(pre_BN: Tensor, threshold_N: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and features of the entries above each feature's threshold, row by row."""
    pairs = [(b, n) for b in range(len(pre_BN)) for n in range(pre_BN.shape[1]) if pre_BN[b, n] > threshold_N[n]]
    rows, features = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).unbind(1)
    return rows, features


def batch_top_k(pre_BN: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Rows and features of the `count` largest positive entries of the whole batch; ties go to the earlier one."""
    flat = pre_BN.flatten()
    chosen = flat.sort(descending=True, stable=True).indices[:count]
    chosen = chosen[flat[chosen] > 0].sort().values
    return chosen // pre_BN.shape[1], chosen % pre_BN.shape[1]
