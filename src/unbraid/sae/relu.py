"""ReLU with an L1 penalty: the first sparse autoencoders (Bricken et al. 2023, Cunningham et al. 2023)."""

from torch import Tensor

from unbraid.kernels.pattern import Pattern
from unbraid.kernels.selection import density_above, entries_above
from unbraid.sae.base import SAE, mean_l1
from unbraid.sae.codes import Codes


class ReLUSAE(SAE):
    """f = relu(pre); sparsity = mean over tokens of ||f||_1."""

    architecture = "relu"

    def density(self, pre_BN: Tensor) -> float:
        """Share of positive pre-activations."""
        return density_above(pre_BN, 0.0)

    def select(self, pre_BN: Tensor) -> tuple[Pattern, Tensor]:
        """The positive pre-activations."""
        return entries_above(pre_BN, 0.0)

    def dense_codes(self, pre_BN: Tensor) -> Tensor:
        """relu(pre), in place."""
        return pre_BN.float().relu_() if pre_BN.is_floating_point() and pre_BN.itemsize < 4 else pre_BN.relu_()

    def sparsity(self, codes: Codes | Tensor) -> Tensor:
        """Mean over tokens of ||f||_1."""
        return mean_l1(codes)
