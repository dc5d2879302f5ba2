"""Codes: the non-negative, mostly zero numbers an encoder gives each token, held as the few entries that are not zero.

A training batch of 2048 tokens with 16k features is 128 MiB dense and under a MiB sparse. The layout is CSR (row
offsets, feature indices ascending within a row, values) because the row order is the order encoders produce, and the
one other order anything needs, by feature, is a single stable sort of the indices, shared by all who ask. `values` may
require a gradient: decoder, sparsity loss and decorrelation penalty all send theirs through this one tensor.
"""

from dataclasses import dataclass
from functools import cached_property

from jaxtyping import Float, Int
from torch import Tensor

from unbraid.errors import CodesError
from unbraid.kernels.pattern import Pattern


@dataclass(frozen=True, eq=False)
class Codes:
    """Sparse codes of B tokens over N features in CSR layout; every stored value is > 0.

    Attributes:
        offsets: `[B + 1]` int64, where each row's entries start; the last is their number.
        indices: `[nnz]` int64 feature numbers, ascending and distinct within each row.
        values: `[nnz]` floating, > 0; may require a gradient.
        n_features: N.
    """

    offsets: Int[Tensor, " rows_and_one"]
    indices: Int[Tensor, " nnz"]
    values: Float[Tensor, " nnz"]
    n_features: int

    @classmethod
    def at(cls, pattern: Pattern, values: Float[Tensor, " nnz"]) -> "Codes":
        """Codes with these values at the entries of a pattern, sharing its sort."""
        codes = cls(pattern.offsets, pattern.indices, values, pattern.n_features)
        codes.__dict__["pattern"] = pattern
        return codes

    @classmethod
    def from_dense(cls, f_BN: Tensor) -> "Codes":
        """The entries of a dense `[B, N]` code that are > 0; differentiable.

        Raises:
            CodesError: the tensor is not a matrix.
        """
        if f_BN.ndim != 2:
            raise CodesError(f"dense codes have shape {tuple(f_BN.shape)}; expected [B, N]; flatten leading dimensions")
        active_BN = f_BN > 0
        rows, indices = active_BN.nonzero(as_tuple=True)
        return cls.at(Pattern.from_rows(rows, indices, *f_BN.shape), f_BN[rows, indices])

    @classmethod
    def from_topk(cls, indices_BK: Int[Tensor, "B K"], values_BK: Float[Tensor, "B K"], n_features: int) -> "Codes":
        """Codes from K (feature, value) pairs a row, any order; values <= 0 are dropped. Differentiable."""
        indices_BK, order_BK = indices_BK.sort(dim=1)
        values_BK = values_BK.gather(1, order_BK)
        rows, kept = (values_BK > 0).nonzero(as_tuple=True)
        pattern = Pattern.from_rows(rows, indices_BK[rows, kept], len(indices_BK), n_features)
        return cls.at(pattern, values_BK[rows, kept])

    @property
    def n_rows(self) -> int:
        """B."""
        return self.offsets.numel() - 1

    @property
    def l0(self) -> Float[Tensor, ""]:
        """Mean number of active features per row (0 for an empty batch), as a float64 scalar tensor."""
        return self.offsets[-1].double() / max(1, self.n_rows)

    @cached_property
    def pattern(self) -> Pattern:
        """Where the entries are, in both orders."""
        return Pattern(self.offsets, self.indices, self.n_features)

    def rows(self) -> Int[Tensor, " nnz"]:
        """The row each entry belongs to."""
        return self.pattern.rows

    def detach(self) -> "Codes":
        """The same codes outside the autograd graph."""
        return Codes.at(self.pattern, self.values.detach())

    def to_dense(self) -> Float[Tensor, "B N"]:
        """The `[B, N]` matrix; differentiable."""
        dense_BN = self.values.new_zeros(self.n_rows, self.n_features)
        return dense_BN.index_put((self.rows(), self.indices), self.values)
