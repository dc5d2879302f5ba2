"""Codes as the list of their active entries, whatever form they came in.

Dense or sparse tensors, (indices, values) from a top-k, or a `Codes` object all become one `Batch`. Everything exact
in this room is a function of its `Entries` alone (rows of ascending feature ids with positive values), so its cost
follows what fires, not how wide the dictionary is; only codes too dense for that keep their dense form, for blocks.
`values` stays in the caller's graph; the rest carries no gradient.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unbraid.errors import CodesError
from unbraid.kernels.pattern import Pattern


@runtime_checkable
class SparseCodes(Protocol):
    """What `codes=` must offer: rows in CSR form, feature ids ascending within a row, values above zero."""

    @property
    def offsets(self) -> Tensor:
        """[B + 1] row starts."""
        ...

    @property
    def indices(self) -> Tensor:
        """[nnz] feature ids."""
        ...

    @property
    def values(self) -> Tensor:
        """[nnz] codes."""
        ...

    @property
    def n_features(self) -> int:
        """N."""
        ...


@dataclass(frozen=True, eq=False)
class Entries:
    """Active entries of a batch: where they are, and their `values` [nnz] > 0."""

    pattern: Pattern
    values: Tensor

    @property
    def n_rows(self) -> int:
        """Rows B, those without an active feature included."""
        return self.pattern.n_rows

    @property
    def n_features(self) -> int:
        """N."""
        return self.pattern.n_features

    @property
    def offsets(self) -> Tensor:
        """[B + 1] row starts."""
        return self.pattern.offsets

    @property
    def indices(self) -> Tensor:
        """[nnz] feature of every entry."""
        return self.pattern.indices

    @property
    def rows(self) -> Tensor:
        """[nnz] row of every entry."""
        return self.pattern.rows

    @cached_property
    def support(self) -> Tensor:
        """[N] rows on which each feature fires."""
        return self.pattern.by_feature.offsets.diff()

    @cached_property
    def co_activations(self) -> int:
        """W, the number of (row, pair of features active on it)."""
        return _pairs_within(self.pattern.offsets.diff())

    @cached_property
    def keys(self) -> Tensor:
        """[nnz] row * N + feature, ascending."""
        return self.rows * self.n_features + self.indices

    def where(self, keep: Tensor) -> "Entries":
        """Only the entries where `keep` [nnz] is true; every row stays, maybe empty."""
        pattern = Pattern.from_rows(self.rows[keep], self.indices[keep], self.n_rows, self.n_features)
        return Entries(pattern, self.values[keep])

    def supported(self, min_support: int) -> "Entries":
        """Only the entries of features that fire on at least `min_support` rows."""
        return self if min_support <= 1 else self.where((self.support >= min_support)[self.indices])

    def detach(self) -> "Entries":
        """The same entries outside the caller's graph."""
        return Entries(self.pattern, self.values.detach())


class Batch:
    """The codes of one call, in the form they came, and their entries when somebody asks.

    Raises:
        CodesError: no or several forms of codes were passed, or they are not finite, not >= 0 or of the wrong shape.
    """

    def __init__(
        self,
        f: Tensor | None = None,
        indices: Tensor | None = None,
        values: Tensor | None = None,
        n_features: int | None = None,
        codes: SparseCodes | None = None,
    ):
        forms = sum((f is not None, indices is not None or values is not None, codes is not None))
        if forms != 1:
            raise CodesError(
                f"{forms} forms of codes were passed; expected exactly one: dense codes, indices= with values= and "
                "n_features=, or codes="
            )
        self.f_BN = f
        self._in_graph = torch.is_grad_enabled()
        if f is not None:
            _require_matrix(f, "codes", "[B, N]")
            if f.layout == torch.strided:
                _require_codes(f)
                self.n_rows, self.n_features = f.shape
                return
            self.f_BN = None
            entries = from_sparse_tensor(f)
        elif codes is not None:
            entries = from_codes(codes)
        elif indices is None or values is None or n_features is None:
            raise CodesError("indices, values and n_features belong together, and one is missing; pass all three")
        else:
            _require_matrix(values, "values", "[B, K]")
            if indices.shape != values.shape:
                raise CodesError(
                    f"indices {tuple(indices.shape)} and values {tuple(values.shape)} differ in shape; expected the "
                    "same [B, K]; pass both as your top-k returned them"
                )
            _require_codes(values)
            entries = from_indices(indices, values, n_features)
        self.__dict__["entries"] = entries
        self.n_rows, self.n_features = entries.n_rows, entries.n_features

    @cached_property
    def entries(self) -> Entries:
        """The active entries; of dense codes, gathered so that their gradient flows back to their places."""
        assert self.f_BN is not None
        with torch.set_grad_enabled(self._in_graph):
            return from_dense(self.f_BN)

    @cached_property
    def co_activations(self) -> int:
        """W, known without listing the entries."""
        if self.f_BN is None:
            return self.entries.co_activations
        return _pairs_within((self.f_BN > 0).sum(1))

    @property
    def support(self) -> Tensor:
        """[N] rows on which each feature fires, known without listing the entries of dense codes."""
        return self.entries.support if self.f_BN is None else (self.f_BN > 0).sum(0)

    @property
    def source(self) -> Tensor:
        """The tensor a penalty attaches to when its value does not depend on the entries."""
        return self.entries.values if self.f_BN is None else self.f_BN


def from_dense(f_BN: Float[Tensor, "B N"]) -> Entries:
    """Entries of dense codes; the gradient of an entry flows back to its place in `f_BN` and nowhere else."""
    rows, indices = (f_BN > 0).nonzero(as_tuple=True)
    n_rows, n_features = f_BN.shape
    values = f_BN.reshape(-1).index_select(0, rows * n_features + indices)
    return Entries(Pattern.from_rows(rows, indices, n_rows, n_features), values)


def from_sparse_tensor(f_BN: Tensor) -> Entries:
    """Entries of codes held as a sparse torch tensor (COO or CSR)."""
    coordinates = f_BN.to_sparse_coo().coalesce()
    _require_codes(coordinates.values())
    kept = (coordinates.values() > 0).nonzero().squeeze(1)
    rows, indices = coordinates.indices()[:, kept]
    return Entries(Pattern.from_rows(rows, indices, *f_BN.shape), coordinates.values()[kept])


def from_indices(indices_BK: Int[Tensor, "B K"], values_BK: Float[Tensor, "B K"], n_features: int) -> Entries:
    """Entries of (indices, values) rows; value 0 is padding, and a feature named twice in a row counts with its sum."""
    rows, columns = (values_BK > 0).nonzero(as_tuple=True)
    indices = indices_BK[rows, columns].long()
    _require_feature_ids(indices, n_features)
    keys, order = torch.sort(rows * n_features + indices, stable=True)
    values = values_BK[rows, columns].index_select(0, order)
    unique_keys, place = torch.unique_consecutive(keys, return_inverse=True)
    if unique_keys.numel() < keys.numel():
        values = values.new_zeros(unique_keys.numel()).index_add(0, place, values)
    pattern = Pattern.from_rows(
        unique_keys // max(n_features, 1), unique_keys % max(n_features, 1), values_BK.shape[0], n_features
    )
    return Entries(pattern, values)


def from_codes(codes: SparseCodes) -> Entries:
    """Entries of a `Codes` object, taken as they are; a `Pattern` it already holds is shared."""
    _require_codes(codes.values)
    _require_feature_ids(codes.indices, codes.n_features)
    pattern = getattr(codes, "pattern", None)
    if not isinstance(pattern, Pattern):
        pattern = Pattern(codes.offsets.long(), codes.indices.long(), codes.n_features)
    return Entries(pattern, codes.values)


def to_dense(entries: Entries) -> Float[Tensor, "B N"]:
    """Dense codes, for the oracle."""
    flat = entries.values.new_zeros(entries.n_rows * entries.n_features)
    return flat.index_add(0, entries.keys, entries.values).reshape(entries.n_rows, entries.n_features)


def _pairs_within(lengths: Tensor) -> int:
    return int((lengths * (lengths - 1)).sum()) // 2


def _require_matrix(tensor: Tensor, name: str, shape: str) -> None:
    if tensor.ndim != 2:
        raise CodesError(
            f"{name} have shape {tuple(tensor.shape)}; expected {shape}; flatten leading dimensions, a row a token"
        )


def _require_codes(values: Tensor) -> None:
    """Codes are finite and non-negative; a sign error here would silently turn entangled pairs into opposed ones."""
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


def _require_feature_ids(indices: Tensor, n_features: int) -> None:
    if indices.numel() == 0:
        return
    low, high = (int(bound) for bound in torch.aminmax(indices))
    if low < 0 or high >= n_features:
        raise CodesError(
            f"feature ids range from {low} to {high}; expected 0 to {n_features - 1}; pass n_features = the SAE's width"
        )
