"""Codes and sparsity losses of the architectures from their papers' formulas, on whole matrices, for autograd alone."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from unbraid.sae import SAE


class Published(NamedTuple):
    """Codes [B, N], the loss that lambda1 weighs, and a gated SAE's open gates [B, N]."""

    f_BN: Tensor
    sparsity: Tensor
    gate_BN: Tensor | None = None


def published_codes(sae: SAE, u_BN: Tensor) -> Published:
    """What the architecture of `sae` makes of u, the encoder's product without a bias."""
    config, nothing = sae.config, u_BN.new_zeros(())
    if sae.architecture == "gated":
        gate_BN = (u_BN + sae.b_gate).relu()
        f_BN = (gate_BN > 0) * (u_BN * sae.r_mag.exp() + sae.b_mag).relu()
        return Published(f_BN, gate_BN.sum(1).mean(), gate_BN)
    pre_BN = u_BN + sae.b_enc
    if sae.architecture == "jumprelu":
        theta, eps = sae.threshold, config.bandwidth
        moved, window = theta - theta.detach(), ((pre_BN - theta).abs() < eps / 2).double().detach()
        # Values of the step function and of JumpReLU, with the pseudo-derivatives of eq. 11 and 12 in theta.
        step = (pre_BN > theta).double().detach() - window / eps * moved
        f_BN = pre_BN * step.detach() - theta.detach() / eps * window * moved
        tanh = torch.tanh(4 * math.sqrt(sae.d_out) * f_BN)
        return Published(f_BN, (step if config.jumprelu_sparsity == "l0" else tanh).sum(1).mean())
    f_BN = pre_BN.relu()
    if sae.architecture == "topk":
        return Published(f_BN * (f_BN >= f_BN.topk(config.k, dim=1).values[:, -1:]), nothing)
    if sae.architecture in ("batch_topk", "matryoshka"):
        return Published(f_BN * (f_BN >= f_BN.flatten().topk(len(f_BN) * config.k).values[-1]), nothing)
    if sae.architecture in ("relu", "denoising"):
        return Published(f_BN, f_BN.sum(1).mean())
    scaled = f_BN / f_BN.norm(dim=0).where((f_BN > 0).any(0), 1.0)
    return Published(f_BN, (scaled / scaled.norm(dim=1, keepdim=True)).sum(1).mean())
