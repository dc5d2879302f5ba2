"""How a penalty with a gradient worked out by hand enters autograd: as one node.

Nothing of a selection is recorded, the gradient exists once and reaches only what it belongs to.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _KnownGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, source: Tensor, value: float, gradient: Tensor | None) -> Tensor:
        ctx.gradient = gradient
        dtype = torch.promote_types(source.dtype, torch.float32)
        return torch.tensor(value, dtype=dtype, device=source.device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        gradient = ctx.gradient
        return None if gradient is None else gradient * grads[0].to(gradient.dtype), None, None


def attached(source: Tensor, value: float, gradient: Tensor | None) -> Tensor:
    """A scalar that is `value` and whose gradient with respect to `source` is `gradient` (none: zero).

    Differentiable once. At least float32, whatever the codes are.
    """
    gradient = None if gradient is None else gradient.to(source.dtype)
    return _KnownGradient.apply(source, float(value), gradient)  # pyright: ignore[reportReturnType]
