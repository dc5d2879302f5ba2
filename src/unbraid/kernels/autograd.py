"""Encoding and decoding as autograd functions that know which entries are active.

Pre-activations are one big product, 2 B D N multiplications, made without a graph; what a step needs of them is their
values at active entries. `active_entries` gives those values back their exact gradient, which touches active entries
only, and `decode` does the same for the decoder. The decoder bias, subtracted before the encoder, gets its gradient
from the [N] sums that b_enc's gradient is anyway: sum_b g_b W = (sum_b g_b) W, instead of another big product.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from unbraid.kernels.codes import Codes
from unbraid.kernels.products import entry_dots, sums_by_feature, weighted_columns, weighted_rows

EntryWeights = Callable[[Codes], Tensor]
"""Codes -> a number for each of their entries."""


class _ActiveEntries(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        x_BD: Tensor,
        b_dec: Tensor,
        encoder_ND: Tensor,
        b_enc: Tensor | None,
        centred_BD: Tensor,
        values: Tensor,
        codes: Codes,
    ) -> Tensor:
        ctx.save_for_backward(encoder_ND, centred_BD)
        ctx.codes = codes
        return values.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        encoder_ND, centred_BD = ctx.saved_tensors
        g_codes = ctx.codes.with_values(g)
        sums_N = sums_by_feature(g_codes)
        g_x = weighted_rows(g_codes, encoder_ND) if ctx.needs_input_grad[0] else None
        g_b_dec = -(sums_N @ encoder_ND) if ctx.needs_input_grad[1] else None
        g_encoder = weighted_columns(g_codes, centred_BD) if ctx.needs_input_grad[2] else None
        return g_x, g_b_dec, g_encoder, sums_N if ctx.needs_input_grad[3] else None, None, None, None


def active_entries(
    x_BD: Float[Tensor, "B D"],
    b_dec: Float[Tensor, " D"],
    encoder_ND: Float[Tensor, "N D"],
    b_enc: Float[Tensor, " N"] | None,
    centred_BD: Float[Tensor, "B D"],
    codes: Codes,
) -> Codes:
    """`codes`, their values with the gradient of ((x - b_dec) W_enc + b_enc) at their entries.

    Args:
        x_BD, b_dec, encoder_ND, b_enc: what the pre-activations are made of; each may require a gradient.
        centred_BD: x - b_dec, as used for the product.
        codes: the pre-activations at the entries, made without a graph.
    """
    values: Any = _ActiveEntries.apply(x_BD, b_dec, encoder_ND, b_enc, centred_BD, codes.values, codes)
    return codes.with_values(values)


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, values: Tensor, W_dec: Tensor, codes: Codes, weights: EntryWeights | None
    ) -> Tensor:
        ctx.save_for_backward(values, W_dec)
        ctx.codes, ctx.weights = codes, weights
        return weighted_rows(codes.with_values(values), W_dec)

    @staticmethod
    def backward(ctx: Any, g_BD: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        values, W_dec = ctx.saved_tensors
        g_BD = g_BD.contiguous()
        g_values = entry_dots(ctx.codes, g_BD, W_dec) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return g_values, None, None, None
        values = values if ctx.weights is None else values * ctx.weights(ctx.codes.with_values(values))
        return g_values, weighted_columns(ctx.codes.with_values(values), g_BD), None, None


def decode(codes: Codes, W_dec: Float[Tensor, "N D"], weights: EntryWeights | None = None) -> Float[Tensor, "rows D"]:
    """The sparse code times W_dec, differentiable in both.

    Args:
        codes: the sparse code.
        W_dec: the decoder.
        weights: called in the backward pass: how much each entry counts in the gradient of its decoder row.
    """
    return _Decode.apply(codes.values, W_dec, codes.detach(), weights)  # pyright: ignore
