"""Codes as the list of their active entries, whatever form they came in.

Dense codes, (indices, values) from a top-k, or a `Codes` object all become one `Entries`: rows of ascending feature
ids with positive values. Everything exact in this room is a function of these entries alone, so its cost follows what
fires, not how wide the dictionary is. `values` stays in the caller's graph; the rest carries no gradient.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unbraid.errors import CodesError


@runtime_checkable
class SparseCodes(Protocol):
    """What `codes=` must offer: rows in CSR form, feature ids ascending within a row, values above zero."""

    @property
    def offsets(self) -> Tensor: ...

    @property
    def indices(self) -> Tensor: ...

    @property
    def values(self) -> Tensor: ...

    @property
    def n_features(self) -> int: ...


@dataclass(frozen=True)
class Entries:
    """Active entries of a batch: row `b` holds `indices[offsets[b]:offsets[b + 1]]`, ascending, with `values` > 0."""

    offsets: Tensor
    indices: Tensor
    values: Tensor
    n_features: int

    @property
    def n_rows(self) -> int:
        """Rows B, those without an active feature included."""
        return self.offsets.numel() - 1

    @cached_property
    def row_lengths(self) -> Tensor:
        """[B] active features per row."""
        return self.offsets[1:] - self.offsets[:-1]

    @cached_property
    def rows(self) -> Tensor:
        """[nnz] row id of every entry."""
        row_ids = torch.arange(self.n_rows, device=self.offsets.device)
        return torch.repeat_interleave(row_ids, self.row_lengths, output_size=self.indices.numel())

    @cached_property
    def support(self) -> Tensor:
        """[N] rows on which each feature fires."""
        return torch.bincount(self.indices, minlength=self.n_features)

    @cached_property
    def by_feature(self) -> tuple[Tensor, Tensor]:
        """Entry ids sorted by feature, rows ascending within one, and where each feature starts ([nnz], [N + 1])."""
        order = torch.sort(self.indices, stable=True)[1]
        return order, offsets_of(self.support)

    @cached_property
    def co_activations(self) -> int:
        """W, the number of (row, pair of features active on it)."""
        lengths = self.row_lengths
        return int((lengths * (lengths - 1)).sum()) // 2

    def where(self, keep: Tensor) -> "Entries":
        """Only the entries where `keep` [nnz] is true; every row stays, maybe empty."""
        lengths = torch.bincount(self.rows[keep], minlength=self.n_rows)
        return Entries(offsets_of(lengths), self.indices[keep], self.values[keep], self.n_features)

    def detach(self) -> "Entries":
        """The same entries outside the caller's graph."""
        return Entries(self.offsets, self.indices, self.values.detach(), self.n_features)


def offsets_of(lengths: Tensor) -> Tensor:
    """[n + 1] start of each of n consecutive runs of the given lengths, and the total."""
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


def from_dense(f_BN: Float[Tensor, "B N"]) -> Entries:
    """Entries of dense codes; the gradient of an entry flows back to its place in `f_BN` and nowhere else."""
    require_codes(f_BN)
    rows, indices = (f_BN > 0).nonzero(as_tuple=True)
    n_rows, n_features = f_BN.shape
    offsets = offsets_of(torch.bincount(rows, minlength=n_rows))
    values = f_BN.reshape(-1).index_select(0, rows * n_features + indices)
    return Entries(offsets, indices, values, n_features)


def from_indices(indices_BK: Int[Tensor, "B K"], values_BK: Float[Tensor, "B K"], n_features: int) -> Entries:
    """Entries of (indices, values) rows; value 0 is padding, and a feature named twice in a row counts with its sum."""
    if indices_BK.shape != values_BK.shape:
        raise CodesError(
            f"indices {tuple(indices_BK.shape)} and values {tuple(values_BK.shape)} differ; expected the same [B, K]; "
            "pass both as your top-k returned them"
        )
    require_codes(values_BK)
    n_rows, width = indices_BK.shape
    active = values_BK.reshape(-1) > 0
    row_ids = torch.arange(n_rows, device=indices_BK.device).unsqueeze(1).expand(n_rows, width)
    rows = row_ids.reshape(-1)[active]
    chosen = indices_BK.reshape(-1)[active].long()
    require_feature_ids(chosen, n_features)
    keys, order = torch.sort(rows * n_features + chosen, stable=True)
    values = values_BK.reshape(-1)[active].index_select(0, order)
    unique_keys, place = torch.unique_consecutive(keys, return_inverse=True)
    if unique_keys.numel() < keys.numel():
        values = torch.zeros_like(values[: unique_keys.numel()]).index_add(0, place, values)
    offsets = offsets_of(torch.bincount(unique_keys // max(n_features, 1), minlength=n_rows))
    return Entries(offsets, unique_keys % max(n_features, 1), values, n_features)


def from_codes(codes: SparseCodes) -> Entries:
    """Entries of a `Codes` object, taken as they are."""
    require_codes(codes.values)
    indices = codes.indices.long()
    require_feature_ids(indices, codes.n_features)
    return Entries(codes.offsets.long(), indices, codes.values, codes.n_features)


def to_dense(entries: Entries) -> Float[Tensor, "B N"]:
    """Dense codes; for the oracle and for codes too dense for the exact path."""
    flat = entries.values.new_zeros(entries.n_rows * entries.n_features)
    places = entries.rows * entries.n_features + entries.indices
    return flat.index_add(0, places, entries.values).reshape(entries.n_rows, entries.n_features)


def require_codes(values: Tensor) -> None:
    """Codes are finite and non-negative; a sign error here would silently turn entangled pairs into opposed ones.

    Raises:
        CodesError: a value is negative, infinite or NaN, or the values are not floating point.
    """
    if not values.is_floating_point():
        raise CodesError(f"codes have dtype {values.dtype}; expected floating point; pass the encoder's output")
    if values.numel() == 0:
        return
    low, high = (float(bound) for bound in torch.aminmax(values.detach()))
    if not (low >= 0.0 and high < float("inf")):
        raise CodesError(
            f"codes range from {low} to {high}; expected finite numbers >= 0; apply the activation function first, or "
            "look for the step at which training diverged"
        )


def require_feature_ids(indices: Tensor, n_features: int) -> None:
    """Raises `CodesError` when a feature id lies outside 0..n_features - 1."""
    if indices.numel() == 0:
        return
    low, high = (int(bound) for bound in torch.aminmax(indices))
    if low < 0 or high >= n_features:
        raise CodesError(
            f"feature ids range from {low} to {high}; expected 0 to {n_features - 1}; pass n_features = the SAE's width"
        )
