"""ReLU with an L1 penalty: the first sparse autoencoders (Bricken et al. 2023, Cunningham et al. 2023)."""

import torch
from torch import Tensor

from unbraid.sae.base import SAE, Forward


class ReLUSAE(SAE):
    """f = relu(pre); sparsity = mean over tokens of ||f||_1."""

    architecture = "relu"

    def encode(self, x: Tensor) -> Tensor:
        """Codes, `[..., N]`."""
        return self.preactivations(x).relu()

    def training_forward(self, x_BD, dead_N=None, generator=None, path="auto") -> Forward:
        """One training pass; see `SAE.training_forward`."""
        f_BN = self.preactivations(x_BD).relu()
        x_hat_BD = self.decode(f_BN)
        reconstruction = (x_BD - x_hat_BD).square().sum(1).mean()
        return Forward(x_hat_BD, f_BN, reconstruction, f_BN.sum(1).mean(), torch.zeros_like(reconstruction), "dense")
