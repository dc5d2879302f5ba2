"""The units SAEs train in: activations without their mean, scaled so that E||x - mean||^2 = 1.

Learning rates, lambda1 and first weights are for these units. A scale that counted the mean would leave next to nothing
of activations whose mean is large against their spread. Mean and scale are taken once, from the rows of the first fill,
and folded back into the SAE when it is exported.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from unbraid.errors import ActivationError

ROWS_AT_ONCE = 8192
RESOLUTION = 1e-7
"""Spread that is smaller than this share of the mean's norm is float32 rounding."""


@dataclass(frozen=True)
class Normalisation:
    """Raw activations -> training units: `(x - mean) * scale`.

    Attributes:
        mean_D: float32; subtracting it in float32 loses nothing where it dominates.
        scale: makes the mean squared norm 1.
    """

    mean_D: Tensor
    scale: float

    @classmethod
    @torch.no_grad()
    def of(cls, rows_RD: Tensor, where: str = "") -> "Normalisation":
        """From sample rows [R, D], with sums in float64.

        Raises:
            ActivationError: there are no rows, or they do not vary; `where` names them.
        """
        if len(rows_RD) == 0:
            raise ActivationError(
                f"no row of {where or 'the activations'} is left to learn from; expected some that pass the row "
                "filter; raise buffer.norm_limit, or check the text"
            )
        parts = rows_RD.split(ROWS_AT_ONCE)
        mean_D = torch.stack([part.double().sum(0) for part in parts]).sum(0).div(len(rows_RD)).float()
        square = sum(float((part.double() - mean_D).square().sum()) for part in parts) / len(rows_RD)
        if not square > (RESOLUTION * float(mean_D.double().norm())) ** 2:
            raise ActivationError(
                f"{where or 'the activations'}: all {len(rows_RD):,} rows looked at are the same (norm "
                f"{float(mean_D.norm()):g}); expected rows that differ, there is nothing to learn; choose another "
                "site, or check the model's weights"
            )
        return cls(mean_D, square**-0.5)

    @classmethod
    def none(cls, d_in: int) -> "Normalisation":
        """Of activations that have no mean and unit scale already."""
        return cls(torch.zeros(d_in), 1.0)

    def __call__(self, x_BD: Tensor) -> Tensor:
        """Rows in training units."""
        return (x_BD - self.mean_D) * self.scale

    def to(self, device: torch.device | str) -> "Normalisation":
        """The same on a device."""
        return Normalisation(self.mean_D.to(device), self.scale)
