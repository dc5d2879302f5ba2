"""The units SAEs train in: activations without their mean, scaled so that E||x - mean||^2 = 1.

Learning rates, lambda1 and first weights are for these units. A scale that counted the mean would leave next to nothing
of activations whose mean is large against their spread. Mean and scale are taken once, from the rows of the first fill,
and folded back into the SAE when it is exported. Sites that stand side by side have a scale each, by which each gets
the same share of that mean square: none is learnt for its size alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

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
        scale: makes the mean squared norm 1; of several sites side by side `[D]` float64, one number a site.
        widths: of several sites side by side, how wide each is.
    """

    mean_D: Tensor
    scale: float | Tensor
    widths: tuple[int, ...] = ()

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

    @classmethod
    def side_by_side(cls, parts: Sequence["Normalisation"]) -> "Normalisation":
        """Of the activations of several sites put together, each with the same share of the mean squared norm."""
        if len(parts) == 1:
            return parts[0]
        scales = [torch.full_like(one.mean_D, 1.0, dtype=torch.float64) * one.scale for one in parts]
        widths = tuple(len(one.mean_D) for one in parts)
        return cls(torch.cat([one.mean_D for one in parts]), torch.cat(scales) / len(parts) ** 0.5, widths)

    def scales(self, widths: Sequence[int]) -> list[float]:
        """The scale of each site, of these widths, as plain numbers."""
        if not isinstance(self.scale, Tensor):
            return [self.scale]
        return [float(part[0]) for part in self.scale.split(list(widths))]

    def __call__(self, x_BD: Tensor) -> Tensor:
        """Rows in training units."""
        centred_BD = x_BD - self.mean_D
        return centred_BD * (self.scale.to(centred_BD) if isinstance(self.scale, Tensor) else self.scale)

    def to(self, device: torch.device | str) -> "Normalisation":
        """The same on a device."""
        scale = self.scale.to(device) if isinstance(self.scale, Tensor) else self.scale
        return replace(self, mean_D=self.mean_D.to(device), scale=scale)
