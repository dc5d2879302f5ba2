"""The algebra by which an SAE of training units becomes one of raw activations."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from unbraid.sae.base import SAE


def fold_into(
    sae: "SAE", mean_D: Tensor, scale: float | Tensor, mean_out_M: Tensor | None, scale_out: float | Tensor | None
) -> None:
    """`SAE.fold`, for every architecture."""
    device = sae.b_dec.device
    mean_D = mean_D.to(device, torch.float64)
    scale_out = scale if scale_out is None else scale_out
    mean_out_M = mean_D if mean_out_M is None else mean_out_M.to(device, torch.float64)
    b_dec = mean_out_M + sae.b_dec.double() / scale_out
    unit = float(scale_out.square().reciprocal().mean().rsqrt()) if isinstance(scale_out, Tensor) else scale_out
    for name in sae.scaled_with_input:
        getattr(sae, name).div_(unit)
    if isinstance(scale_out, Tensor):
        sae.W_dec.mul_(unit / scale_out)
    if sae.is_transcoder:
        sae.encoder_ND.mul_(scale / unit)
        sae.shift_input(mean_D @ sae.encoder_ND.double().T)
        if sae.W_skip is not None:
            sae.W_skip.mul_((scale[:, None] if isinstance(scale, Tensor) else scale) / scale_out)
            b_dec -= mean_D @ sae.W_skip.double()
    elif isinstance(scale, Tensor):
        sae.encoder_ND.mul_(scale / unit)
    sae.b_dec.copy_(b_dec)
