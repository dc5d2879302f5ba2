"""Which features are active on which rows, in the two orders sparse operations need.

Encoders produce entries row by row; weight gradients are built feature by feature. A `Pattern` holds the first order
and derives the second once, by one stable sort of small integers, for everybody who asks in the same step: the
decoder's and the encoder's gradient and the dot products of active entries all share it.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class ByFeature:
    """The entries of a pattern sorted by feature, rows ascending within a feature.

    Attributes:
        order: `[nnz]` positions in row order, so `values[order]` are the values in feature order.
        rows: `[nnz]` row of each entry.
        offsets: `[N + 1]` where each feature's entries start.
    """

    order: Int[Tensor, " nnz"]
    rows: Int[Tensor, " nnz"]
    offsets: Int[Tensor, " features_and_one"]


@dataclass(frozen=True, eq=False)
class Pattern:
    """Positions of the active entries of a [B, N] code, in CSR layout.

    Attributes:
        offsets: `[B + 1]` int64 row starts.
        indices: `[nnz]` int64 features, ascending and distinct within each row.
        n_features: N.
    """

    offsets: Int[Tensor, " rows_and_one"]
    indices: Int[Tensor, " nnz"]
    n_features: int

    @classmethod
    def from_rows(cls, rows: Int[Tensor, " nnz"], indices: Int[Tensor, " nnz"], n_rows: int, n_features: int):
        """From (row, feature) pairs sorted by row and by feature within a row."""
        pattern = cls(starts(rows, n_rows), indices, n_features)
        pattern.__dict__["rows"] = rows
        return pattern

    @property
    def n_rows(self) -> int:
        """B."""
        return self.offsets.numel() - 1

    @cached_property
    def rows(self) -> Int[Tensor, " nnz"]:
        """`[nnz]` row of each entry."""
        rows = torch.arange(self.n_rows, device=self.offsets.device)
        return rows.repeat_interleave(self.offsets.diff(), output_size=self.indices.numel())

    @cached_property
    def by_feature(self) -> ByFeature:
        """The same entries sorted by feature."""
        keys = self.indices.to(torch.int16 if self.n_features <= 2**15 else torch.int32)
        keys, order = keys.sort(stable=True)
        return ByFeature(order, self.rows[order], starts(keys.int(), self.n_features))

    def split(self, widths: list[int]) -> "Pattern":
        """Each row cut where the features reach `widths` (ascending, the last is N): row b becomes G rows b * G + g."""
        edges = torch.tensor(widths[:-1], device=self.indices.device)
        groups = torch.bucketize(self.indices, edges, right=True)
        pattern = Pattern.from_rows(
            self.rows * len(widths) + groups, self.indices, self.n_rows * len(widths), self.n_features
        )
        mine = self.by_feature
        pattern.__dict__["by_feature"] = ByFeature(mine.order, pattern.rows[mine.order], mine.offsets)
        return pattern


def starts(sorted_keys: Int[Tensor, " nnz"], n_keys: int) -> Int[Tensor, " keys_and_one"]:
    """Where each key's run starts in a sorted list: `[0, 0, 2]`, 3 keys -> `[0, 2, 2, 3]` (int64)."""
    edges = torch.arange(n_keys + 1, dtype=sorted_keys.dtype, device=sorted_keys.device)
    return torch.searchsorted(sorted_keys, edges)
