"""The dense twin of the sparse path, made to fit in memory: four big products beside the encoder's, one [B, N] tensor.

Autograd on `relu(x W) W'` would keep the codes, build their gradient as a second [B, N] tensor and, for some
activations, more. Here the backward pass goes through the features in slabs: the gradient of a slab of codes is made,
masked, used for both weight gradients, and forgotten. Where a feature's code is zero its gradient is too, for every
architecture, so the codes themselves are the mask; a JumpReLU threshold gets its gradient from the same slabs.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

SLAB = 512

SlabGradient = Callable[[Tensor, slice], Tensor]
"""(a slab of codes [B, n], which features) -> a loss's gradient in them, a new tensor that broadcasts to the slab."""


FeatureWeights = Callable[[slice | Tensor], Tensor]
"""Features -> [B, n], a number for each token."""


def slabs(widths: list[int]) -> Iterator[tuple[int, slice]]:
    """(group, features) covering all features; no slab crosses from one group into the next."""
    start = 0
    for group, end in enumerate(widths):
        for first in range(start, end, SLAB):
            yield group, slice(first, min(first + SLAB, end))
        start = end


def where_positive_(g: Tensor, f: Tensor) -> None:
    """Put zeros into `g` wherever `f` is not positive: the gradient of a ReLU, in one pass."""
    torch.ops.aten.threshold_backward.grad_input(g, f, 0.0, grad_input=g)


def weighed(f_BN: Tensor, part: slice, weights: FeatureWeights | None) -> Tensor:
    """A slab of codes as the gradient of its decoder rows counts it."""
    return f_BN[:, part] if weights is None else f_BN[:, part] * weights(part)


class _DenseAutoencode(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        x_BD: Tensor,
        b_dec: Tensor,
        encoder_ND: Tensor,
        b_enc: Tensor,
        W_dec: Tensor,
        threshold_N: Tensor | None,
        centred_BD: Tensor,
        f_BN: Tensor,
        widths: list[int],
        window_BN: Tensor | None,
        bandwidth: float,
        penalty: Tensor | None,
        penalty_gradient: SlabGradient | None,
        weights: FeatureWeights | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.widths, ctx.bandwidth, ctx.penalty_gradient, ctx.weights = widths, bandwidth, penalty_gradient, weights
        starts = [0, *widths[:-1]]
        parts = [f_BN[:, a:b] @ W_dec[a:b] for a, b in zip(starts, widths, strict=True)]
        ctx.save_for_backward(encoder_ND, W_dec, threshold_N, centred_BD, f_BN, window_BN)
        ctx.mark_dirty(f_BN)
        parts_BGD = parts[0].unsqueeze(1) if len(parts) == 1 else torch.stack(parts, 1)
        return f_BN, parts_BGD, f_BN.new_zeros(()) if penalty is None else penalty.clone()

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, g_f_BN: Tensor | None, g_parts_BGD: Tensor | None, g_penalty: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        encoder_ND, W_dec, threshold_N, centred_BD, f_BN, window_BN = ctx.saved_tensors
        g_encoder, sums_N = torch.empty_like(encoder_ND), W_dec.new_empty(len(W_dec))
        g_W_dec = torch.zeros_like(W_dec) if g_parts_BGD is None else torch.empty_like(W_dec)
        g_threshold = torch.zeros_like(sums_N) if ctx.needs_input_grad[5] else None
        g_x = torch.zeros_like(centred_BD) if ctx.needs_input_grad[0] else None
        for group, part in slabs(ctx.widths):
            g_out = None if g_parts_BGD is None else g_parts_BGD[:, group]
            g = torch.zeros_like(f_BN[:, part]) if g_out is None else g_out @ W_dec[part].T
            if g_f_BN is not None:
                g += g_f_BN[:, part]
            if g_penalty is not None and ctx.penalty_gradient is not None:
                g += ctx.penalty_gradient(f_BN[:, part], part).mul_(g_penalty)
            if g_out is not None:
                torch.mm(weighed(f_BN, part, ctx.weights).T, g_out, out=g_W_dec[part])
            if g_threshold is not None:
                g_threshold[part] = (g * window_BN[:, part]).sum(0) * -(threshold_N[part] / ctx.bandwidth)
            where_positive_(g, f_BN[:, part])
            torch.mm(g.T, centred_BD, out=g_encoder[part])
            sums_N[part] = g.sum(0)
            if g_x is not None:
                g_x.addmm_(g, encoder_ND[part])
        g_b_dec = -(sums_N @ encoder_ND) if ctx.needs_input_grad[1] else None
        return g_x, g_b_dec, g_encoder, sums_N, g_W_dec, g_threshold, *[None] * 8


def dense_autoencode(
    x_BD: Float[Tensor, "B D"],
    b_dec: Float[Tensor, " D"],
    encoder_ND: Float[Tensor, "N D"],
    b_enc: Float[Tensor, " N"],
    W_dec: Float[Tensor, "N M"],
    centred_BD: Float[Tensor, "B D"],
    f_BN: Float[Tensor, "B N"],
    widths: list[int],
    order_N: Int[Tensor, " N"] | None = None,
    threshold_N: Float[Tensor, " N"] | None = None,
    window_BN: Bool[Tensor, "B N"] | None = None,
    bandwidth: float = 1.0,
    penalty: Float[Tensor, ""] | None = None,
    penalty_gradient: SlabGradient | None = None,
    weights: FeatureWeights | None = None,
) -> tuple[Float[Tensor, "B N"], Float[Tensor, "B groups M"], Float[Tensor, ""]]:
    """Codes and their partial reconstructions, differentiable in everything the codes were made of.

    Args:
        x_BD, b_dec, encoder_ND, b_enc, W_dec: what takes part; each may require a gradient. M, the width of the
            decoder, is D for an SAE, and for a transcoder `b_dec` is zero: its own is of what it predicts.
        centred_BD: x - b_dec.
        f_BN: codes made from them without a graph, with df/dpre = 1 where f > 0 and 0 elsewhere; taken over.
        widths: ends of the feature groups, the last N.
        order_N: the features in the order that `widths` counts in; as they are numbered without it. Rows are copied
            into that order and back; not with thresholds or a penalty, which no architecture combines with it.
        threshold_N: JumpReLU thresholds; `window_BN` marks |pre - threshold| < bandwidth / 2, where
            df/dthreshold = -threshold / bandwidth (Rajamanoharan et al. 2024, arXiv 2407.14435, eq. 11).
        penalty: a loss on the codes, made without a graph; `penalty_gradient` gives its gradient slab by slab.
        weights: called in the backward pass: how much each token counts in the gradient of these decoder rows.

    Returns:
        f_BN with a graph; for each group of features its share of the reconstruction (without b_dec); the penalty.
    """
    if order_N is not None:
        assert threshold_N is None and penalty_gradient is None
        rows = (encoder_ND[order_N], b_enc[order_N], W_dec[order_N])
        ordered = None if weights is None else (lambda part: weights(order_N[part]))
        f_BN, parts_BGD, nothing = dense_autoencode(
            x_BD, b_dec, *rows, centred_BD, f_BN[:, order_N], widths, weights=ordered
        )
        return f_BN[:, order_N.argsort()], parts_BGD, nothing
    return _DenseAutoencode.apply(  # pyright: ignore
        x_BD,
        b_dec,
        encoder_ND,
        b_enc,
        W_dec,
        threshold_N,
        centred_BD,
        f_BN,
        widths,
        window_BN,
        bandwidth,
        penalty,
        penalty_gradient,
        weights,
    )
