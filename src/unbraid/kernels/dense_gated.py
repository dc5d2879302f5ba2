"""The dense twin of the gated sparse path, with one [B, N] tensor kept: the codes.

Gate and magnitude share one product. Keeping it would double the memory of a step, so the backward pass makes it again,
slab by slab: one more product (eight instead of seven) in the short stretch of training where most gates are open.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from unbraid.kernels.dense import FeatureWeights, slabs, weighed


class _DenseGated(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        x_BD: Tensor,
        b_dec: Tensor,
        encoder_ND: Tensor,
        b_gate: Tensor,
        b_mag: Tensor,
        r_mag: Tensor,
        W_dec: Tensor,
        centred_BD: Tensor,
        u_BN: Tensor,
        weights: FeatureWeights | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.weights = weights
        gate_hat_BD = centred_BD.new_zeros(len(centred_BD), W_dec.shape[1])
        gate_l1 = centred_BD.new_zeros(())
        for _, part in slabs([len(W_dec)]):
            u = u_BN[:, part]
            gate = (u + b_gate[part]).relu_()
            gate_hat_BD.addmm_(gate, W_dec[part])
            gate_l1 += gate.sum()
            u.mul_(r_mag[part].exp()).add_(b_mag[part]).relu_().mul_(gate > 0)
        ctx.save_for_backward(encoder_ND, b_gate, r_mag, W_dec, centred_BD, u_BN)
        ctx.mark_dirty(u_BN)
        return u_BN, u_BN @ W_dec, gate_hat_BD, gate_l1

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, g_f_BN: Tensor | None, g_out: Tensor | None, g_gate_hat: Tensor | None, g_gate_l1: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        encoder_ND, b_gate, r_mag, W_dec, centred_BD, f_BN = ctx.saved_tensors
        g_encoder, g_W_dec = torch.zeros_like(encoder_ND), torch.zeros_like(W_dec)
        g_b_gate, g_b_mag, g_r_mag, sums_N = (torch.zeros_like(b_gate) for _ in range(4))
        g_x = torch.zeros_like(centred_BD) if ctx.needs_input_grad[0] else None
        for _, part in slabs([len(W_dec)]):
            u = centred_BD @ encoder_ND[part].T
            g_pi = torch.zeros_like(u) if g_gate_hat is None else g_gate_hat @ W_dec[part].T
            if g_gate_l1 is not None:
                g_pi += g_gate_l1
            g_pi *= (u + b_gate[part]) > 0
            g_mag = torch.zeros_like(u) if g_out is None else g_out @ W_dec[part].T
            if g_f_BN is not None:
                g_mag += g_f_BN[:, part]
            g_mag *= f_BN[:, part] > 0
            if g_out is not None:
                torch.mm(weighed(f_BN, part, ctx.weights).T, g_out, out=g_W_dec[part])
            scale = r_mag[part].exp()
            g_b_gate[part], g_b_mag[part] = g_pi.sum(0), g_mag.sum(0)
            g_r_mag[part] = (g_mag * u).sum(0) * scale
            g_u = g_pi.addcmul_(g_mag, scale)
            torch.mm(g_u.T, centred_BD, out=g_encoder[part])
            sums_N[part] = g_u.sum(0)
            if g_x is not None:
                g_x.addmm_(g_u, encoder_ND[part])
        g_b_dec = -(sums_N @ encoder_ND) if ctx.needs_input_grad[1] else None
        return g_x, g_b_dec, g_encoder, g_b_gate, g_b_mag, g_r_mag, g_W_dec, None, None, None


def dense_gated(
    x_BD: Float[Tensor, "B D"],
    b_dec: Float[Tensor, " D"],
    encoder_ND: Float[Tensor, "N D"],
    b_gate: Float[Tensor, " N"],
    b_mag: Float[Tensor, " N"],
    r_mag: Float[Tensor, " N"],
    W_dec: Float[Tensor, "N M"],
    centred_BD: Float[Tensor, "B D"],
    u_BN: Float[Tensor, "B N"],
    weights: FeatureWeights | None = None,
) -> tuple[Float[Tensor, "B N"], Float[Tensor, "B M"], Float[Tensor, "B M"], Float[Tensor, ""]]:
    """Gated codes from u = (x - b_dec) W_enc, made without a graph and taken over.

    For `weights` see `dense_autoencode`.

    Returns:
        The codes 1[u + b_gate > 0] * relu(exp(r_mag) u + b_mag), what they decode to, what the open gates
        relu(u + b_gate) decode to through a frozen W_dec, and the sum of the open gates.
    """
    return _DenseGated.apply(x_BD, b_dec, encoder_ND, b_gate, b_mag, r_mag, W_dec, centred_BD, u_BN, weights)  # pyright: ignore
