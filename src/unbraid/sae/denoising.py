"""Denoising autoencoder criterion (Vincent et al. 2008): reconstruct the clean input from a corrupted one.

A comparator: noise on the input decorrelates features without looking at them. It is the ReLU SAE with L1 whose encoder
sees x plus Gaussian noise of `corruption` times the batch's root mean square; inference sees x.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from unbraid.config import WeightedSAEConfig
from unbraid.sae.registry import register
from unbraid.sae.relu import ReLUSAE


class DenoisingConfig(WeightedSAEConfig):
    """ReLU with L1 on noisy inputs."""

    architecture: Literal["denoising"] = "denoising"
    corruption: float = Field(default=0.1, ge=0.0)
    """Standard deviation of the input noise relative to the input's root mean square."""


@register
class DenoisingSAE(ReLUSAE):
    """ReLU + L1 with Gaussian input noise in training."""

    settings = DenoisingConfig
    config: DenoisingConfig

    def corrupted(self, x_BD: Tensor, generator: torch.Generator | None) -> Tensor:
        """x plus noise from `generator`."""
        noise_BD = torch.randn(x_BD.shape, generator=generator, device=x_BD.device, dtype=x_BD.dtype)
        return x_BD + self.config.corruption * x_BD.square().mean().sqrt() * noise_BD
