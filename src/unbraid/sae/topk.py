"""TopK (Gao et al. 2024, arXiv 2406.04093): the k largest pre-activations of each token."""

import torch
from torch import Tensor

from unbraid.sae.base import SAE, Forward


class TopKSAE(SAE):
    """f keeps the k largest entries of relu(pre) in each row."""

    architecture = "topk"

    def encode(self, x: Tensor) -> Tensor:
        """Codes, `[..., N]`."""
        pre = self.preactivations(x)
        values, indices = pre.topk(min(self.config.k, self.n_features), dim=-1, sorted=False)
        return torch.zeros_like(pre).scatter(-1, indices, values.relu())

    def training_forward(self, x_BD, dead_N=None, generator=None, path="auto") -> Forward:
        """One training pass; see `SAE.training_forward`."""
        f_BN = self.encode(x_BD)
        x_hat_BD = self.decode(f_BN)
        reconstruction = (x_BD - x_hat_BD).square().sum(1).mean()
        zero = torch.zeros_like(reconstruction)
        return Forward(x_hat_BD, f_BN, reconstruction, zero, zero, "dense")
