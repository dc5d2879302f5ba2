"""ReLU with an L1 penalty: the first sparse autoencoders (Bricken et al. 2023, Cunningham et al. 2023)."""

from typing import Literal

import torch
from torch import Tensor

from unbraid.config import WeightedSAEConfig
from unbraid.kernels.codes import Codes
from unbraid.kernels.dense import SlabGradient
from unbraid.kernels.selection import density_above, entries_above
from unbraid.sae.base import SAE
from unbraid.sae.registry import register


class ReLUConfig(WeightedSAEConfig):
    """ReLU with L1."""

    architecture: Literal["relu"] = "relu"


@register
class ReLUSAE(SAE):
    """f = relu(pre); sparsity = mean over tokens of ||f||_1."""

    settings = ReLUConfig

    def density(self, pre_BN: Tensor) -> float:
        """Share of positive pre-activations."""
        return density_above(pre_BN, 0.0)

    def select(self, pre_BN: Tensor) -> Codes:
        """The positive pre-activations."""
        return entries_above(pre_BN, 0.0)

    def dense_codes(self, pre_BN: Tensor) -> Tensor:
        """relu(pre), in place."""
        return pre_BN.to(self.W_dec.dtype).relu_()

    def sparsity(self, codes: Codes) -> Tensor:
        """Mean over tokens of ||f||_1."""
        return codes.values.sum() / codes.n_rows

    @torch.no_grad()
    def dense_sparsity(self, f_BN: Tensor) -> tuple[Tensor, SlabGradient]:
        """The same for dense codes."""
        return f_BN.sum() / len(f_BN), lambda f, _: f.new_tensor(1 / len(f))
