"""Codes: the non-negative, mostly zero numbers an encoder gives each token, held as the few entries that are not zero.

A training batch of 2048 tokens with 16k features is 128 MiB dense and under a MiB sparse. The layout is CSR (row
offsets, feature indices ascending within a row, values) because encoders produce entries row by row. The other order
that sparse operations need, feature by feature, is one stable sort of the indices; it is made when first asked for and
shared by all codes with the same entries. `values` may require a gradient: decoder, sparsity loss and decorrelation
penalty all send theirs through this one tensor.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unbraid.errors import CodesError


@dataclass(frozen=True, eq=False)
class Codes:
    """Sparse codes of B tokens over N features in CSR layout; every stored value is > 0.

    Attributes:
        offsets: `[B + 1]` int64, where each row's entries start; the last is their number.
        indices: `[nnz]` int64 feature numbers, ascending and distinct within each row.
        values: `[nnz]` floating, > 0; may require a gradient.
        n_features: N.

    Raises:
        CodesError: the parts do not fit together, or are not as described.

    Example:
        >>> codes = Codes(torch.tensor([0, 2, 3]), torch.tensor([1, 4, 0]), torch.tensor([0.5, 2.0, 1.0]), 5)
        >>> codes.to_dense().tolist()
        [[0.0, 0.5, 0.0, 0.0, 2.0], [1.0, 0.0, 0.0, 0.0, 0.0]]
    """

    offsets: Tensor
    indices: Tensor
    values: Tensor
    n_features: int

    def __post_init__(self) -> None:
        _require_layout(self.offsets, self.indices, self.values, self.n_features)
        self.__dict__.update(offsets=self.offsets.long(), indices=self.indices.long(), _shared={})
        require_codes(self.values)
        if self.values.numel():
            smallest = float(self.values.detach().amin())
            if smallest == 0:
                raise CodesError("codes store a value of 0; expected values above 0; leave inactive features out")
            if bool(((self.rows() * self.n_features + self.indices).diff() <= 0).any()):
                raise CodesError(
                    "feature ids of a row do not ascend, or one stands there twice; expected each active feature once, "
                    "in ascending order; sort each row, or pass indices=, values= and n_features="
                )

    @classmethod
    def unchecked(cls, offsets: Tensor, indices: Tensor, values: Tensor, n_features: int) -> "Codes":
        """Codes of parts known to be right, without a pass over them; inside an encoder values may be any number."""
        codes = object.__new__(cls)
        codes.__dict__.update(offsets=offsets, indices=indices, values=values, n_features=n_features, _shared={})
        return codes

    @classmethod
    def from_rows(cls, rows: Tensor, indices: Tensor, values: Tensor, n_rows: int, n_features: int) -> "Codes":
        """From entries sorted by row and by feature within a row, unchecked."""
        codes = cls.unchecked(starts(rows, n_rows), indices, values, n_features)
        codes._shared["rows"] = rows
        return codes

    @classmethod
    def from_dense(cls, f_BN: Tensor) -> "Codes":
        """The entries of a dense `[B, N]` code that are > 0; differentiable.

        Raises:
            CodesError: the tensor is not a matrix of finite numbers.
        """
        require_matrix(f_BN, "dense codes", "[B, N]")
        if f_BN.numel():
            require_codes(f_BN.detach().amax().relu())
        return positive_entries(f_BN)

    @classmethod
    def from_topk(cls, indices_BK: Tensor, values_BK: Tensor, n_features: int) -> "Codes":
        """Codes from K (feature, value) pairs a row, [B, K] each, any order; values <= 0 are dropped. Differentiable.

        A feature named twice in a row counts with its sum.

        Raises:
            CodesError: shapes differ, ids are not features, or values are not finite.
        """
        _require_pairs(indices_BK, values_BK, n_features)
        if values_BK.numel():
            require_codes(values_BK.detach().amax().relu())
        rows, columns = (values_BK > 0).nonzero(as_tuple=True)
        indices = indices_BK[rows, columns].long()
        _require_feature_ids(indices, n_features)
        keys, order = torch.sort(rows * n_features + indices, stable=True)
        values = values_BK[rows, columns].index_select(0, order)
        unique_keys, place = torch.unique_consecutive(keys, return_inverse=True)
        if unique_keys.numel() < keys.numel():
            values = values.new_zeros(unique_keys.numel()).index_add(0, place, values)
        return cls.from_rows(unique_keys // n_features, unique_keys % n_features, values, len(values_BK), n_features)

    @property
    def n_rows(self) -> int:
        """B."""
        return self.offsets.numel() - 1

    @property
    def l0(self) -> Float[Tensor, ""]:
        """Mean number of active features per row (0 for an empty batch), as a float64 scalar tensor."""
        return self.offsets[-1].double() / max(1, self.n_rows)

    def rows(self) -> Int[Tensor, " nnz"]:
        """The row each entry belongs to."""
        return self._once("rows", self._rows)

    @property
    def order(self) -> Int[Tensor, " nnz"]:
        """Entries feature by feature, rows ascending within a feature: `values[order]` are the values in that order."""
        return self._by_feature()[0]

    @property
    def rows_by_feature(self) -> Int[Tensor, " nnz"]:
        """The row of each entry, feature by feature."""
        return self._by_feature()[1]

    @property
    def feature_offsets(self) -> Int[Tensor, " features_and_one"]:
        """Where each feature's entries start in `order`."""
        return self._by_feature()[2]

    @property
    def support(self) -> Int[Tensor, " N"]:
        """Rows on which each feature fires."""
        return self._once("support", lambda: self.feature_offsets.diff())

    def co_activations(self) -> int:
        """W, the number of (row, pair of features active on it)."""
        return pairs_within(self.offsets.diff())

    def with_values(self, values: Float[Tensor, " nnz"]) -> "Codes":
        """Other numbers at the same entries, sharing their sort; unchecked."""
        codes = Codes.unchecked(self.offsets, self.indices, values, self.n_features)
        codes.__dict__["_shared"] = self._shared
        return codes

    @property
    def padded(self) -> bool:
        """Whether zeros may stand among the values.

        An encoder on an accelerator leaves them in, because the number of entries is then known without looking.
        """
        return self._shared.get("padded", False)

    def with_padding(self, values: Float[Tensor, " nnz"]) -> "Codes":
        """Other numbers at the same entries, of which some may be zero."""
        self._shared["padded"] = True
        return self.with_values(values)

    def without_padding(self) -> "Codes":
        """Only the entries that are > 0."""
        return self.where(self.values.detach() > 0) if self.padded else self

    def firing(self) -> Float[Tensor, " N"]:
        """Rows on which each feature's value is > 0, also of codes with padding."""
        if not self.padded:
            return self.support.float()
        fires = (self.values.detach() > 0).float()
        return torch.segment_reduce(fires[self.order], "sum", offsets=self.feature_offsets, initial=0)

    def where(self, keep: Tensor) -> "Codes":
        """Only the entries where `keep` [nnz] is true; every row stays, maybe empty. Differentiable."""
        kept = keep.nonzero().squeeze(1)
        values = self.values.index_select(0, kept)
        return Codes.from_rows(self.rows()[kept], self.indices[kept], values, self.n_rows, self.n_features)

    def split(self, widths: list[int], place_N: Int[Tensor, " N"] | None = None) -> "Codes":
        """Each row cut where the features reach `widths` (ascending, the last is N): row b becomes G rows b * G + g.

        With `place_N` features are counted in another order: it says where each stands. Differentiable.
        """
        places = self.indices if place_N is None else place_N
        groups = torch.zeros_like(places)
        for width in widths[:-1]:  # Numbers, not a tensor of them, which would have to be sent to the device.
            groups += places >= width
        groups = groups if place_N is None else groups[self.indices]
        rows, n_rows = self.rows() * len(widths) + groups, self.n_rows * len(widths)
        indices, values, by_feature = self.indices, self.values, self.order
        if place_N is not None:
            rows, order = rows.int().sort(stable=True)
            rows, indices, values = rows.long(), indices[order], values.index_select(0, order)
            moved_to = torch.empty_like(order)
            moved_to[order] = torch.arange(len(order), device=order.device)
            by_feature = moved_to[by_feature]
        codes = Codes.from_rows(rows, indices, values, n_rows, self.n_features)
        codes._shared["by feature"] = by_feature, rows[by_feature], self.feature_offsets
        codes._shared["padded"] = self.padded
        return codes

    def detach(self) -> "Codes":
        """The same codes outside the autograd graph."""
        return self.with_values(self.values.detach())

    def to_dense(self) -> Float[Tensor, "B N"]:
        """The `[B, N]` matrix; differentiable."""
        dense_BN = self.values.new_zeros(self.n_rows, self.n_features)
        return dense_BN.index_put((self.rows(), self.indices), self.values)

    def _rows(self) -> Tensor:
        rows = torch.arange(self.n_rows, device=self.offsets.device)
        return rows.repeat_interleave(self.offsets.diff(), output_size=self.indices.numel())

    def _by_feature(self) -> tuple[Tensor, Tensor, Tensor]:
        return self._once("by feature", self._sorted)

    def _sorted(self) -> tuple[Tensor, Tensor, Tensor]:
        keys = self.indices.to(torch.int16 if self.n_features <= 2**15 else torch.int32)
        keys, order = keys.sort(stable=True)
        return order, self.rows()[order], starts(keys.int(), self.n_features)

    @property
    def _shared(self) -> dict[str, Any]:
        return self.__dict__["_shared"]

    def _once(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self._shared:
            self._shared[name] = make()
        return self._shared[name]


def positive_entries(f_BN: Float[Tensor, "B N"]) -> Codes:
    """Entries of a matrix known to be codes; the gradient of an entry flows back to its place in it, nowhere else."""
    rows, indices = (f_BN > 0).nonzero(as_tuple=True)
    n_rows, n_features = f_BN.shape
    values = f_BN.reshape(-1).index_select(0, rows * n_features + indices)
    return Codes.from_rows(rows, indices, values, n_rows, n_features)


def starts(sorted_keys: Int[Tensor, " nnz"], n_keys: int) -> Int[Tensor, " keys_and_one"]:
    """Where each key's run starts in a sorted list: `[0, 0, 2]`, 3 keys -> `[0, 2, 2, 3]` (int64)."""
    edges = torch.arange(n_keys + 1, dtype=sorted_keys.dtype, device=sorted_keys.device)
    return torch.searchsorted(sorted_keys, edges)


def pairs_within(lengths: Tensor) -> int:
    """Pairs of entries in rows of these lengths."""
    return int((lengths * (lengths - 1)).sum()) // 2


def require_matrix(tensor: Any, name: str, shape: str) -> None:
    """Raises `CodesError` unless it is a matrix of real floating-point numbers with data."""
    if not isinstance(tensor, Tensor):
        raise CodesError(f"{name} are a {type(tensor).__name__}; expected a tensor {shape}; pass the encoder's output")
    if tensor.ndim != 2:
        raise CodesError(
            f"{name} have shape {tuple(tensor.shape)}; expected {shape}; flatten leading dimensions, one row per token"
        )
    require_numbers(tensor, name)


def require_numbers(tensor: Tensor, name: str) -> None:
    """Raises `CodesError` unless these are real floating-point numbers with data."""
    if not tensor.is_floating_point() or tensor.element_size() < 2:
        raise CodesError(
            f"{name} have dtype {tensor.dtype}; expected floating point of 16 bits or more; pass the encoder's output"
        )
    if tensor.device.type == "meta":
        raise CodesError(f"{name} are on the meta device, without data; expected numbers; move the model to a device")


def require_codes(values: Tensor) -> None:
    """Raises `CodesError` unless all are finite and >= 0: a sign error would turn entangled pairs into opposed ones."""
    if values.numel() == 0:
        return
    low, high = torch.stack(torch.aminmax(values.detach())).tolist()
    if not (low >= 0.0 and high < float("inf")):
        raise CodesError(
            f"codes range from {low} to {high}; expected finite numbers >= 0; apply the activation function first, or "
            "look for the step at which training diverged"
        )


def _require_pairs(indices: Any, values: Any, n_features: Any) -> None:
    require_matrix(values, "values", "[B, K]")
    _require_ids(indices, values)
    _require_count(n_features)
    if indices.shape != values.shape:
        raise CodesError(
            f"indices {tuple(indices.shape)} and values {tuple(values.shape)} differ in shape; expected the "
            "same [B, K]; pass both as your top-k returned them"
        )


def _require_layout(offsets: Any, indices: Any, values: Any, n_features: Any) -> None:
    if not isinstance(values, Tensor):
        raise CodesError(f"values are a {type(values).__name__}; expected a tensor [nnz]; pass the codes' values")
    require_numbers(values, "values")
    _require_ids(indices, values)
    _require_ids(offsets, values, "offsets")
    _require_count(n_features)
    if not (values.ndim == indices.ndim == offsets.ndim == 1 and len(values) == len(indices) and len(offsets) > 0):
        shapes = ", ".join(str(tuple(part.shape)) for part in (offsets, indices, values))
        raise CodesError(f"offsets, indices and values have shapes {shapes}; expected [B + 1], [nnz], [nnz]")
    if int(offsets[0]) != 0 or int(offsets[-1]) != len(values) or bool((offsets.diff() < 0).any()):
        raise CodesError(
            f"offsets run from {int(offsets[0])} to {int(offsets[-1])}; expected 0 to {len(values)}, the number of "
            "entries, never falling; pass where each row's entries start, and their number last"
        )
    _require_feature_ids(indices, n_features)


def _require_ids(ids: Any, values: Tensor, name: str = "indices") -> None:
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        kind = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise CodesError(f"{name} are {kind}; expected a tensor of integers; pass them as your top-k returned them")
    if ids.device != values.device:
        raise CodesError(
            f"{name} are on {ids.device}, values on {values.device}; expected one device; move one of them"
        )


def _require_count(n_features: Any) -> None:
    if not isinstance(n_features, int) or isinstance(n_features, bool) or n_features < 1:
        raise CodesError(f"n_features = {n_features!r}; expected a whole number >= 1; pass the SAE's width")


def _require_feature_ids(indices: Tensor, n_features: int) -> None:
    if indices.numel() == 0:
        return
    low, high = (int(bound) for bound in torch.aminmax(indices))
    if low < 0 or high >= n_features:
        raise CodesError(
            f"feature ids range from {low} to {high}; expected 0 to {n_features - 1}; pass n_features = the SAE's width"
        )
