"""What a training pass over a batch gives, and the loss of a reconstruction."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor
from torch.nn import functional as F

from unbraid.kernels.codes import Codes

Path = Literal["dense", "sparse"]


@dataclass
class Forward:
    """What a training step needs from one pass over a batch.

    Attributes:
        x_hat_BD: reconstruction, or a transcoder's prediction [B, M].
        codes: `Codes` on the sparse path, a dense `[B, N]` tensor on the dense one; carries gradients.
        reconstruction: mean over tokens of ||x - x_hat||^2 (of ||y - y_hat||^2 for a transcoder).
        sparsity: to be weighted by lambda1; zero where sparsity is structural (top-k family).
        auxiliary: further losses, already weighted.
        path: which of the two equivalent computations ran.
        revived: dead features that the auxiliary loss looked at, on this rank.
    """

    x_hat_BD: Tensor
    codes: Codes | Tensor
    reconstruction: Tensor
    sparsity: Tensor
    auxiliary: Tensor
    path: Path
    revived: int = 0


class Encoded(NamedTuple):
    """What an architecture makes of a batch's pre-activations.

    Attributes:
        codes: sparse or dense, with a graph.
        parts_BGD: each feature group's share of the reconstruction, without b_dec.
        sparsity: to be weighted by lambda1.
        extra: a loss of the architecture's own, or zero.
    """

    codes: Codes | Tensor
    parts_BGD: Tensor
    sparsity: Tensor
    extra: Tensor


def squared_error(x_BD: Tensor, x_hat_BD: Tensor) -> Tensor:
    """Mean over tokens of ||x - x_hat||^2."""
    return F.mse_loss(x_hat_BD, x_BD, reduction="sum") / len(x_BD)
