"""Decoder rows whose norms at the sites they write into sum to 1: `sae.row_norm = "sum"`.

Crosscoders weigh a feature's activation by the sum over sites of its decoder rows' norms (Lindsey et al. 2024, Sparse
Crosscoders), in the L1 penalty and where a top-k ranks features. With rows whose sum is 1 the activation itself is that
product. Rows of unit norm over all sites together weigh a feature that writes everywhere alike less, by up to the root
of the number of sites.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from unbraid.sae.base import SAE


def summed_norms(W_dec: Float[Tensor, "N M"], widths: Sequence[int]) -> Float[Tensor, "N 1"]:
    """The norm of each row at each site, summed over the sites."""
    parts = (torch.linalg.vector_norm(part, dim=1, keepdim=True) for part in W_dec.split(list(widths), dim=1))
    return torch.stack(list(parts)).sum(0)


@torch.no_grad()
def scale_rows(sae: "SAE", widths: Sequence[int]) -> None:
    """Give rows a sum of 1; codes grow by as much as rows shrink, so that reconstructions stay as they are.

    Not so where a top-k chooses among them or one threshold is for all, since features then have other sizes.
    """
    norms_N1 = summed_norms(sae.W_dec, widths)
    sae.W_dec.div_(norms_N1)
    sae.encoder_ND.mul_(norms_N1)
    for name in sae.scaled_with_input:
        tensor = getattr(sae, name)
        tensor.mul_(norms_N1.squeeze(1) if tensor.ndim else norms_N1.mean())
