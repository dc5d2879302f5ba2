"""Sums that turn into R^2, taken batch by batch.

Everything is added up in float64 around a fixed reference row, because the variance of activations with a large mean
is a small difference of large numbers, and so that the result does not depend on how tokens are cut into batches.
"""

import torch
from jaxtyping import Float
from torch import Tensor


class ExplainedVariance:
    """True R^2 over all tokens: 1 - sum ||x - x_hat||^2 / sum ||x - mean||^2."""

    def __init__(self) -> None:
        self.n_tokens = 0
        self.residual = 0.0
        self._reference: Tensor | None = None
        self._sum: Tensor | float = 0.0
        self._squares = 0.0

    def add(self, x_BD: Float[Tensor, "B D"], x_hat_BD: Float[Tensor, "B D"]) -> None:
        """Count a batch."""
        x_BD = x_BD.double()
        if self._reference is None and len(x_BD):
            self._reference = x_BD[0]
        if self._reference is None:
            return
        shifted = x_BD - self._reference
        self._sum = self._sum + shifted.sum(0)
        self._squares += shifted.square().sum().item()
        self.residual += (x_BD - x_hat_BD.double()).square().sum().item()
        self.n_tokens += len(x_BD)

    @property
    def width(self) -> int | None:
        """D, None before the first row."""
        return None if self._reference is None else len(self._reference)

    @property
    def variance(self) -> float:
        """Sum over tokens of ||x - mean||^2."""
        if self.n_tokens == 0:
            return 0.0
        return self._squares - torch.as_tensor(self._sum).square().sum().item() / self.n_tokens

    @property
    def r2(self) -> float:
        """Share of the variance explained; 0 for activations that do not vary."""
        return 1 - self.residual / self.variance if self.variance > 0 else 0.0
